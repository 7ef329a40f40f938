"""LMDB's table of readers, `lock.mdb`: there in full before it is mapped.

LMDB makes it sparse and writes to it through a mapping, so on a full disk the first use of a page
of it would end the process (SIGBUS). Closing any descriptor of the file drops the `fcntl` locks by
which LMDB knows that this process has the environment open, and the next process to open it would
reset the table. So what is done here is done before LMDB opens the file, and never while any
environment of this process has it open.

Thread safety: `opening` serialises all threads of the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from persist_cache import fs
from persist_cache.errors import StoreFullError, StoreInUseError

FILE = "lock.mdb"
MAX_READERS = 512
_SLOT_BYTES = 64
NBYTES = (-(-MAX_READERS * _SLOT_BYTES // 4096) + 1) * 4096
"""The readers, a cache line each, and the head of the table, whose length the platform decides."""

_lock = threading.Lock()
_open: set[tuple[int, int, int]] = set()
"""Process, device and inode of every table that is mapped."""


@contextlib.contextmanager
def opening(root: Path, read_only: bool) -> Iterator[None]:
    """Hold while LMDB opens the environment in the folder `root`; `closed` undoes it.

    Raises:
        StoreInUseError: This process has it open.
        StoreFullError: The disk has no room for the table.
    """
    with _lock:
        if _key(root) in _open:
            raise StoreInUseError(
                f"The store at {root} is open in this process already; share that object."
            )
        _prepare(root / FILE, read_only)
        yield
        key = _key(root)
        if key is not None:
            _open.add(key)


def is_open(root: Path) -> bool:
    """Whether this process has the environment in the folder `root` open."""
    with _lock:
        return _key(root) in _open


def closed(key: tuple[int, int, int] | None) -> None:
    """Note that the environment with this `key` was closed."""
    with _lock:
        _open.discard(key or (0, 0, 0))


def key(root: Path) -> tuple[int, int, int] | None:
    """What stands for the environment in the folder `root`, for `closed`."""
    return _key(root)


def _key(root: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(root / FILE)
    except OSError:
        return None
    # A forked child has none of its parent's locks, so it can lose none either.
    return os.getpid(), status.st_dev, status.st_ino


def _prepare(path: Path, read_only: bool) -> None:
    try:
        status = os.stat(path)
        nbytes = status.st_size or NBYTES
        if status.st_size and status.st_blocks * 512 >= status.st_size:
            return
    except FileNotFoundError:
        if read_only:
            return  # LMDB makes none either
        nbytes = NBYTES
    try:
        _allocate(path, nbytes)
    except OSError as error:
        if error.errno in fs.FULL:
            raise StoreFullError(
                f"The disk is full: the index needs {nbytes} bytes for {path}; free some space."
            ) from error
        if not read_only:
            raise


def _allocate(path: Path, nbytes: int) -> None:
    fd = fs.open_shared(path)
    try:
        if os.fstat(fd).st_size == 0:
            fs.write_in_place(fd)
        fs.allocate(fd, nbytes)
    finally:
        os.close(fd)


def is_copied_on_write(root: Path) -> bool:
    """Whether a page of the table may take new room when it is written to, though it has some.

    So it is on btrfs if the table was made without `write_in_place`. Changes nothing.
    """
    from persist_cache.environment import file_system

    path = root / FILE
    with _lock, contextlib.suppress(OSError):
        # File systems of that kind have no device of their own.
        if os.major(os.stat(path).st_dev) or _key(root) in _open or file_system(root) != "btrfs":
            return False
        fd = fs.open_read(path)
        try:
            return not fs.is_written_in_place(fd)
        finally:
            os.close(fd)
    return False


def make_anew(root: Path) -> bool:
    """Begin the table anew, to be written in place; returns whether that was done.

    The caller holds `store.lock` exclusively, so that no writer is about to open it. Readers take
    no lock of ours, but LMDB's tells whether there are any; one that is about to open it finds an
    empty table at worst, and tries again.
    """
    with _lock:
        if _key(root) in _open:
            return False
        fd = fs.open_shared(root / FILE)
        try:
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
            except OSError:
                return False
            os.ftruncate(fd, 0)
            fs.write_in_place(fd)
            with contextlib.suppress(OSError):  # on a full disk opening it will say so
                fs.allocate(fd, NBYTES)
            return True
        finally:
            os.close(fd)
