"""macOS only: free LMDB's writer semaphore after its owner was killed.

There LMDB serialises writers with a named POSIX semaphore, which nobody releases for a dead
process: every other writer would wait for ever. `Index` knows from its own `writer.lock` that
nobody is inside a transaction, so what the semaphore still counts as taken is abandoned.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
from pathlib import Path

from persist_cache import fs
from persist_cache.errors import StoreError

_NAME = re.compile(rb"/MDBw[!-~]{1,26}")
"""LMDB's `/MDBw` and a hash; macOS allows 31 characters."""
_HEAD_BYTES = 4096
_open_files: dict[Path, int] = {}
_lock = threading.Lock()


def release_abandoned(lock_file: Path) -> bool:
    """Give the writer semaphore back that a dead process took.

    Call only while nobody can be inside a write transaction.

    Args:
        lock_file: The environment's `lock.mdb`.

    Returns:
        Whether it was taken; False when there was nothing to free.

    Raises:
        StoreError: The semaphore cannot be opened.
    """
    name = writer_semaphore(_head(lock_file))
    if name is None:
        return False
    return _free(name)


def writer_semaphore(head: bytes) -> bytes | None:
    """The name of the writer semaphore in the head of a `lock.mdb`, or None."""
    found = _NAME.search(head)
    return None if found is None else found.group()


def _head(lock_file: Path) -> bytes:
    """The first bytes of `lock.mdb`.

    Its descriptor is kept for the life of the process: closing any descriptor of the file drops
    the `fcntl` locks by which LMDB knows that this process has the environment open.
    """
    with _lock:
        path = lock_file.resolve()
        fd = _open_files.get(path)
        if fd is None or not os.path.samestat(os.fstat(fd), path.stat()):
            fd = _open_files[path] = fs.open_read(path)
        return os.pread(fd, _HEAD_BYTES, 0)


def _free(name: bytes) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sem_open.restype = ctypes.c_void_p
    libc.sem_open.argtypes = (ctypes.c_char_p, ctypes.c_int)
    for function in (libc.sem_trywait, libc.sem_post, libc.sem_close):
        function.argtypes = (ctypes.c_void_p,)
    semaphore = libc.sem_open(name, 0)
    if semaphore in (None, ctypes.c_void_p(-1).value):
        reason = os.strerror(ctypes.get_errno())
        raise StoreError(f"The index's lock cannot be repaired ({reason}).")
    try:
        # Taken: its count is 0. Free: trywait takes it, and post puts it back all the same.
        taken = bool(libc.sem_trywait(semaphore))
        if taken and ctypes.get_errno() != errno.EAGAIN:
            reason = os.strerror(ctypes.get_errno())
            raise StoreError(f"The index's lock cannot be repaired ({reason}).")
        libc.sem_post(semaphore)
    finally:
        libc.sem_close(semaphore)
    return taken
