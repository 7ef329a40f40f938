"""The lane is what it says: semaphores, pages of 16 KiB, and a view of a Mac."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from persist_cache import fs
from persist_cache.store.store import Store
from tests import forge


def test_lmdb_has_semaphores_and_large_pages(store: Store) -> None:
    locks = forge.index(store).semaphores

    assert locks is not None
    assert locks.names is not None
    assert forge.index(store).page_bytes == mmap.PAGESIZE == 16384


def test_modules_of_this_repository_see_a_mac_and_others_do_not() -> None:
    assert sys.platform == "darwin"
    assert vars(fs)["sys"].platform == "darwin"
    assert not hasattr(os, "posix_fadvise")
    assert fcntl.F_FULLFSYNC == 51  # type: ignore[attr-defined]
    assert subprocess.sys.platform == "linux"  # type: ignore[attr-defined]


def test_more_buffers_than_a_call_takes_are_written_and_read(tmp_path: Path) -> None:
    parts = [memoryview(bytes([number % 251])) for number in range(3000)]
    with pytest.raises(OSError), (tmp_path / "one").open("wb") as file:
        os.writev(file.fileno(), parts)

    fd = fs.create(tmp_path / "file")
    try:
        assert fs.write_all(fd, parts) == 3000
        fs.sync(fd)
        found = [memoryview(bytearray(1)) for _ in parts]
        assert fs.read_into(fd, 0, found) == 3000
    finally:
        os.close(fd)
    assert found == parts


def test_reading_ahead_is_advice_of_its_own_kind(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(300_000))

    assert fs.read_ahead(tmp_path / "file") == 300_000
