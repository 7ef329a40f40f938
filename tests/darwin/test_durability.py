"""`F_FULLFSYNC`: what it says is heard, and a volume that has none is named."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from persist_cache import Store, fs
from persist_cache.errors import StoreAccessError, StoreError
from tests.fakes import put

F_FULLFSYNC = 51


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the system answers to `F_FULLFSYNC`: the error's number in `code`; 0 for none."""
    answer = {"code": 0, "asked": 0, "fsync": 0}
    real, fsync = fcntl.fcntl, os.fsync

    def call(fd: Any, command: int, argument: Any = 0) -> Any:
        if command == F_FULLFSYNC:
            answer["asked"] += 1
            if answer["code"]:
                raise OSError(answer["code"], os.strerror(answer["code"]))
        return real(fd, command, argument)

    def plain(fd: int) -> None:
        answer["fsync"] += 1
        fsync(fd)

    monkeypatch.setattr(fcntl, "fcntl", call)
    monkeypatch.setattr(os, "fsync", plain)
    return answer


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOTTY, errno.EINVAL])
def test_file_system_without_it_gets_a_plain_fsync(
    tmp_path: Path, says: dict[str, int], code: int
) -> None:
    says["code"] = code

    fs.sync_folder(tmp_path)

    assert (says["asked"], says["fsync"]) == (1, 1)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EBADF, errno.EINTR])
def test_any_other_error_is_one(tmp_path: Path, says: dict[str, int], code: int) -> None:
    says["code"] = code

    with pytest.raises(OSError) as caught:
        fs.sync_folder(tmp_path)

    assert caught.value.errno == code


def test_disk_that_fails_to_sync_stores_nothing(tmp_path: Path, says: dict[str, int]) -> None:
    with Store.open(tmp_path / "store", max_bytes=1 << 30, min_free_bytes=0) as store:
        says["code"] = errno.EIO
        with pytest.raises(StoreError, match=os.strerror(errno.EIO)):
            put(store, [1, 2, 3])
        says["code"] = 0
        assert store.entries() == []
        put(store, [1, 2, 3])
        assert store.check(read_data=True) == []


def test_volume_without_it_is_named_when_the_store_is_opened(
    tmp_path: Path, says: dict[str, int]
) -> None:
    """LMDB asks for it at each commit, and has no other way."""
    says["code"] = errno.ENOTSUP

    with pytest.raises(StoreAccessError, match="exFAT") as caught:
        Store.open(tmp_path / "store", max_bytes=1 << 30, min_free_bytes=0)

    assert "a volume that" in str(caught.value)
    assert f"is on {fs.volume(tmp_path)}," in str(caught.value)
    assert os.path.ismount(fs.volume(tmp_path))
    assert not (tmp_path / "store" / "data.mdb").exists()


def test_store_is_still_read_on_such_a_volume(tmp_path: Path, says: dict[str, int]) -> None:
    with Store.open(tmp_path / "store", max_bytes=1 << 30, min_free_bytes=0) as store:
        put(store, [1, 2, 3])
    says["code"] = errno.ENOTSUP

    with Store.open(tmp_path / "store", read_only=True) as store:
        assert len(store.entries()) == 1
