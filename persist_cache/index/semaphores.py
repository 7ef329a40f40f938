"""LMDB's two named semaphores, where it has those instead of robust mutexes (macOS).

One serialises writers, the other the claiming of slots in the table of readers. The system takes
neither back from a process that dies, so everyone else would wait for ever. Two locks of ours,
which end with their process, prove that nobody is inside: `writer.lock`, held around every write
transaction, and a `flock` on `data.mdb`, held while a reader's slot may be claimed. Under its lock
each semaphore must be free; one that is not was abandoned, and is mended as LMDB mends a robust
mutex: the number of the last commit in `lock.mdb` is set to that of the newest meta page, since
the dead writer may have written one without the other, and the semaphore is given back.

Thread safety: `Semaphores` may be shared between threads, except that the caller of `mend_writer`
holds `writer.lock`.

`ctypes` is imported where it is called: where LMDB locks otherwise, no command waits for it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from persist_cache import fs
from persist_cache.errors import StoreBusyError, StoreError
from persist_cache.index import holders

PATIENCE_S = 10.0
"""How long to wait for processes that claim a reader's slot, which takes microseconds."""
_CLOSING_PATIENCE_S = 1.0
_GRACE_S = 0.1
"""A semaphore that stays taken for so long was abandoned.

Not at once, since earlier versions of this package take it without our locks for a moment.
"""
_DOING = "while the readers of the index were looked at"
_TABLE = "lock.mdb"
_DATA = "data.mdb"
_HEAD_BYTES = 256
_HEAD = struct.Struct("=II32sQ")
"""The head of `lock.mdb`: magic, format, the readers' semaphore, the number of the last commit."""
_MAGIC = 0xBEEFC0DE
_COMMIT_OFFSET = 40
_READERS = re.compile(rb"/MDBr[!-~]{1,26}")
_WRITER = re.compile(rb"/MDBw[!-~]{1,26}")
"""`/MDBw` and a hash; macOS allows 31 characters."""
_PAGE_BYTES = struct.Struct("=40xI")
_META_COMMIT = struct.Struct("=144xQ")
"""In a meta page: the page size, and the number of the commit."""


class Names(NamedTuple):
    """What the two semaphores of an environment are called."""

    readers: bytes
    writer: bytes


def names(head: bytes) -> Names | None:
    """The names in the head of a `lock.mdb`; None if LMDB uses no semaphores there."""
    if len(head) < _HEAD.size or _HEAD.unpack_from(head)[0] != _MAGIC:
        return None
    readers = _READERS.match(head, 8)
    writer = _WRITER.search(head, _HEAD.size)
    return Names(readers.group(), writer.group()) if readers and writer else None


def unlink(root: Path) -> None:
    """Give up the names of the semaphores of the environment in `root`, before it is removed.

    LMDB does so when the last process closes it, but not for one that was killed. A semaphore that
    some process still has open stays what it is.
    """
    if sys.platform == "linux":
        return
    with contextlib.suppress(OSError):
        fd = fs.open_read(root / _TABLE)
        try:
            found = names(os.pread(fd, _HEAD_BYTES, 0))
        finally:
            os.close(fd)
        for name in found or ():
            _libc().sem_unlink(name)


def are_exhausted() -> bool:
    """Whether the system has no room for another named semaphore."""
    import ctypes

    libc = _libc()
    name = f"/persist-cache-{os.getpid()}".encode()
    handle = libc.sem_open(
        name, os.O_CREAT | os.O_EXCL, ctypes.c_uint(fs.FILE_MODE), ctypes.c_uint(1)
    )
    if not _is_valid(handle):
        return ctypes.get_errno() == errno.ENOSPC
    libc.sem_close(handle)
    libc.sem_unlink(name)
    return False


class Semaphores:
    """The semaphores of one environment, from before LMDB opens it until after it is closed."""

    def __init__(self, root: Path) -> None:
        """Prepare for the environment in the folder `root`, which need not be there yet.

        This process must not have it open: the descriptor of `lock.mdb` that is kept here may be
        closed only when it is not, since that drops the `fcntl` locks by which LMDB knows that
        the process has it open.
        """
        self._root = root
        self._mutex = threading.Lock()
        self._data_fd = -1
        self._table_fd = -1
        self._readers: _Semaphore | None = None
        self._writer: _Semaphore | None = None
        self.names: Names | None = None

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Hold while LMDB opens the environment, which claims a slot for a moment.

        If that fails, or this does afterwards, close the environment first and then `close` this.

        Raises:
            StoreBusyError: A process that claims one does not go on.
            StoreError: A semaphore cannot be opened.
        """
        self._open_files()
        with self.claiming():
            yield
        self._open_files()
        if self.names is None:  # robust mutexes after all
            self._close_data()

    @contextlib.contextmanager
    def claiming(self) -> Iterator[None]:
        """Hold while a slot in the table of readers may be claimed or freed.

        Raises:
            StoreBusyError: A process that does so does not go on.
        """
        if self._data_fd < 0:  # there is nothing to hold yet, or no need to
            yield
            return
        if not self._mutex.acquire(timeout=PATIENCE_S):
            raise self._busy()
        try:
            with fs.errors_translated(_DOING):
                # It may have been closed while this thread waited.
                if self._data_fd >= 0 and not fs.lock(self._data_fd, PATIENCE_S):
                    raise self._busy()
            try:
                self._mend_readers()
                yield
            finally:
                with fs.errors_translated(_DOING):
                    if self._data_fd >= 0:
                        fs.unlock(self._data_fd)
        finally:
            self._mutex.release()

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Hold while LMDB closes the environment; it may give up the names while others open it.

        Not at any price: a process that is stopped does not keep this one from ending.
        """
        is_alone = self._mutex.acquire(timeout=_CLOSING_PATIENCE_S)
        try:
            with contextlib.suppress(OSError, StoreError):
                if self._data_fd >= 0 and fs.lock(self._data_fd, _CLOSING_PATIENCE_S):
                    self._mend_readers()
            yield
            self.close()  # the lock goes with its descriptor
        finally:
            if is_alone:
                self._mutex.release()

    def mend_writer(self) -> bool:
        """Give the writers' semaphore back if a dead process had it; returns whether one had.

        The caller holds `writer.lock`, without a transaction.
        """
        return self._writer is not None and self._writer.mend(self._restore_commit)

    def take_readers(self) -> bool:
        """Take the readers' semaphore and keep it, as a process does that dies in the midst of it.

        For tests of what is done about it.
        """
        return self._readers is not None and self._readers.take()

    def take_writer(self) -> bool:
        """Take the writers' semaphore likewise."""
        return self._writer is not None and self._writer.take()

    def commits(self) -> tuple[int, int]:
        """The number of the last commit in `lock.mdb`, and in the newest meta page."""
        return _HEAD.unpack(os.pread(self._table_fd, _HEAD.size, 0))[3], self._newest_commit()

    def let_go(self) -> None:
        """In a forked child: drop the lock that is the parent's."""
        self._close_data()

    def close(self) -> None:
        """Close everything; the environment is not open in this process."""
        for semaphore in (self._readers, self._writer):
            if semaphore is not None:
                semaphore.close()
        self._readers = self._writer = self.names = None
        self._close_data()
        if self._table_fd >= 0:
            os.close(self._table_fd)
            self._table_fd = -1

    def _mend_readers(self) -> None:
        if self._readers is not None:
            self._readers.mend()

    def _busy(self) -> StoreBusyError:
        path = self._root / _DATA
        return StoreBusyError(holders.sentence(path, holders.holders(path), PATIENCE_S))

    def _open_files(self) -> None:
        """Open what is there: the two files, and the semaphores that are named in one."""
        if self._data_fd < 0:
            with contextlib.suppress(FileNotFoundError):
                self._data_fd = fs.open_read(self._root / _DATA)
        if self._table_fd < 0:
            with contextlib.suppress(FileNotFoundError):
                self._table_fd = os.open(
                    self._root / _TABLE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
                )
        for semaphore in (self._readers, self._writer):
            if semaphore is not None:
                semaphore.close()
        self._readers = self._writer = None
        if self._table_fd >= 0:
            self.names = names(os.pread(self._table_fd, _HEAD_BYTES, 0))
        if self.names is not None:
            self._readers = _Semaphore.opened(self.names.readers)
            self._writer = _Semaphore.opened(self.names.writer)

    def _close_data(self) -> None:
        if self._data_fd >= 0:
            os.close(self._data_fd)
            self._data_fd = -1

    def _newest_commit(self) -> int:
        page_bytes = self._unpacked(_PAGE_BYTES, 0)
        return max(self._unpacked(_META_COMMIT, offset) for offset in (0, page_bytes))

    def _unpacked(self, number: struct.Struct, offset: int) -> int:
        return int(number.unpack(os.pread(self._data_fd, number.size, offset))[0])

    def _restore_commit(self) -> None:
        """Without it the next writer would overwrite pages of a commit that is in force."""
        os.pwrite(self._table_fd, struct.pack("=Q", self._newest_commit()), _COMMIT_OFFSET)


class _Semaphore:
    """One open semaphore."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    @classmethod
    def opened(cls, name: bytes) -> _Semaphore | None:
        """Open the semaphore `name`; None if there is none."""
        import ctypes

        handle = _libc().sem_open(name, 0)
        if _is_valid(handle):
            return cls(handle)
        if ctypes.get_errno() == errno.ENOENT:
            return None
        reason = os.strerror(ctypes.get_errno())
        raise StoreError(f"A lock of the index cannot be opened ({reason}).")

    def take(self) -> bool:
        """Take it if it is free."""
        import ctypes

        while _libc().sem_trywait(self._handle):
            code = ctypes.get_errno()
            if code == errno.EAGAIN:
                return False
            if code != errno.EINTR:
                raise StoreError(f"A lock of the index cannot be used ({os.strerror(code)}).")
        return True

    def mend(self, prepare: Callable[[], None] = lambda: None) -> bool:
        """Have it free, once; the caller knows that no process has it and lives.

        Args:
            prepare: Called before it is given back if it was abandoned.

        Returns:
            Whether it was.
        """
        give_up = time.monotonic() + _GRACE_S
        times = 0
        while True:
            # One that was given back twice would let two processes in.
            while self.take():
                times += 1
            if times or time.monotonic() > give_up:
                break
            time.sleep(0.001)
        if not times:
            prepare()
        # Dying before this leaves it abandoned, for the next one to find.
        _libc().sem_post(self._handle)
        return not times

    def close(self) -> None:
        _libc().sem_close(self._handle)


@functools.cache
def _libc() -> Any:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.sem_open.restype = ctypes.c_void_p
    # Its further arguments are variadic, and passed as such because they are not named here.
    libc.sem_open.argtypes = (ctypes.c_char_p, ctypes.c_int)
    libc.sem_unlink.argtypes = (ctypes.c_char_p,)
    for function in (libc.sem_trywait, libc.sem_post, libc.sem_close):
        function.argtypes = (ctypes.c_void_p,)
    return libc


def _is_valid(handle: int | None) -> bool:
    import ctypes

    return handle not in (None, ctypes.c_void_p(-1).value)
