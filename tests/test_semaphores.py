"""Where LMDB writes the names of its semaphores, and what is read of them.

What is done with them is tested where LMDB has some: `scripts/test --darwin`.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest

from persist_cache.index import semaphores
from persist_cache.store.store import Store
from tests import forge


def head(readers: bytes = b"/MDBrAb3_+z", writer: bytes = b"/MDBwAb3_+z") -> bytes:
    """The head of a `lock.mdb` as LMDB lays it out with POSIX semaphores."""
    txn = struct.pack("=II32sQI12x", 0xBEEFC0DE, 0x10001, readers, 7, 1)
    return (txn + writer.ljust(64, b"\0")).ljust(256, b"\0")


def test_names_are_found_in_the_head_of_the_table() -> None:
    assert semaphores.names(head()) == (b"/MDBrAb3_+z", b"/MDBwAb3_+z")


@pytest.mark.parametrize(
    "bytes_", [b"", bytes(256), head(readers=b""), head(writer=b""), b"\0\0\0\0" + head()[4:]]
)
def test_table_of_another_kind_names_none(bytes_: bytes) -> None:
    assert semaphores.names(bytes_) is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere LMDB has semaphores")
def test_store_has_none_where_mutexes_are_robust(store: Store) -> None:
    assert forge.index(store).semaphores is None
    assert semaphores.names((store.root / "lock.mdb").read_bytes()) is None


def test_names_are_given_up_only_where_there_are_some(tmp_path: Path) -> None:
    semaphores.unlink(tmp_path)
    (tmp_path / "lock.mdb").write_bytes(bytes(256))
    semaphores.unlink(tmp_path)

    assert os.listdir(tmp_path) == ["lock.mdb"]
