"""The name of LMDB's writer semaphore is found, and the file it is read from stays open."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from persist_cache.index import semaphores

NAME = b"/MDBwAb3_+z"


def lock_file(path: Path, name: bytes) -> Path:
    """The head of a `lock.mdb` as LMDB lays it out with POSIX semaphores."""
    head = b"\xde\xc0\xef\xbe" + bytes(60) + b"/MDBrAb3_+z" + bytes(53) + name + bytes(53)
    path.write_bytes(head.ljust(8192, b"\0"))
    return path


def test_writer_semaphore_is_told_from_the_readers(tmp_path: Path) -> None:
    head = lock_file(tmp_path / "lock.mdb", NAME).read_bytes()

    assert semaphores.writer_semaphore(head) == NAME
    assert semaphores.writer_semaphore(bytes(4096)) is None


def test_file_without_a_name_frees_nothing(tmp_path: Path) -> None:
    assert not semaphores.release_abandoned(lock_file(tmp_path / "lock.mdb", b""))


def test_lock_file_is_opened_once_and_kept_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[bytes] = []

    def free(name: bytes) -> bool:
        freed.append(name)
        return True

    monkeypatch.setattr(semaphores, "_free", free)
    path = lock_file(tmp_path / "lock.mdb", NAME)

    assert semaphores.release_abandoned(path)
    fd = semaphores._open_files[path.resolve()]
    assert semaphores.release_abandoned(path)

    assert freed == [NAME] * 2
    assert semaphores._open_files[path.resolve()] == fd
    assert os.fstat(fd).st_size == 8192


@pytest.mark.skipif(sys.platform != "linux", reason="ctypes cannot call the variadic sem_open")
def test_taken_semaphore_is_freed_and_a_free_one_left() -> None:
    import ctypes

    libc = ctypes.CDLL(None)
    libc.sem_open.restype = ctypes.c_void_p
    libc.sem_open.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_uint)
    libc.sem_trywait.argtypes = libc.sem_close.argtypes = (ctypes.c_void_p,)
    name = f"/MDBwtest{os.getpid()}".encode()
    semaphore = libc.sem_open(name, os.O_CREAT | os.O_EXCL, 0o600, 1)
    try:
        assert not semaphores._free(name)
        assert libc.sem_trywait(semaphore) == 0
        assert semaphores._free(name)
        assert not semaphores._free(name)
    finally:
        libc.sem_close(semaphore)
        libc.sem_unlink(name)
