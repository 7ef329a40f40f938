"""The lock of writers: one thread of one process changes the index at a time.

Threads of a process take turns by a lock in memory, processes by a `flock` on `writer.lock`, which
ends with its process. `flock` has no time limit, so waiting means trying again, and a wait that
ends in vain names the process that holds the lock. What the lock guards is up to the caller.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from persist_cache import fs
from persist_cache.errors import StoreBusyError
from persist_cache.index import holders

LOCK_FILE = "writer.lock"
PATIENCE_S = 10.0
"""How long a change waits for other processes; a commit takes milliseconds."""
_SOON_S = 2.0
"""After so long it is said that something waits."""
_MARKS = struct.Struct("<B7xQ")
"""The head of `writer.lock`: whether a writer is inside, and the process that was last."""


class WriterLock:
    """The lock of writers of one store, as one process sees it.

    Thread safety: it may be shared between threads; `_guard` guards the list of those that wait.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / LOCK_FILE
        self._fd = -1
        self._pid = os.getpid()
        self._threads = threading.Lock()
        self._owner: int | None = None
        self._guard = threading.Lock()
        self._waits: dict[int, float] = {}

    def open(self) -> None:
        """Open the file, creating it; without it, only threads of this process are kept out."""
        self._fd = fs.open_shared(self._path)

    def close(self) -> None:
        """Close the file, which gives the lock up; in a forked child it leaves the parent's."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread holds it."""
        return self._owner == threading.get_ident()

    @property
    def syncs_fully(self) -> bool:
        """Whether the file's volume can make a commit durable; see `fs.syncs_fully`."""
        return fs.syncs_fully(self._fd)

    @contextlib.contextmanager
    def held(
        self, patience_s: float | None, check: Callable[[], None], prepare: Callable[[], None]
    ) -> Iterator[None]:
        """Hold it for the block; byte 0 of the file is 1 meanwhile.

        Args:
            patience_s: How long to wait for other threads and processes; `PATIENCE_S` when None.
            check: Called before and after waiting; raises if the index may not be used.
            prepare: Called as soon as it is held.

        Raises:
            StoreBusyError: It was not free in that time.
        """
        patience_s = PATIENCE_S if patience_s is None else max(0.0, patience_s)
        me = threading.get_ident()
        started = time.monotonic()
        give_up = started + patience_s
        with self._guard:
            self._waits[me] = started
        try:
            if not self._threads.acquire(timeout=patience_s):
                check()
                raise StoreBusyError(self._busy(patience_s))
        except BaseException:
            self._waits_no_more(me)
            raise
        try:
            try:
                check()
                if not fs.lock(self._fd, max(0.0, give_up - time.monotonic())):
                    raise StoreBusyError(self._busy(patience_s))
            finally:
                self._waits_no_more(me)
            try:
                prepare()
                self._mark(_MARKS.pack(1, self._pid))
                self._owner = me
                yield
            finally:
                self._owner = None
                self._mark(b"\x00")
                fs.unlock(self._fd)
        finally:
            self._threads.release()

    @contextlib.contextmanager
    def threads_kept_out(self, timeout_s: float | None) -> Iterator[bool]:
        """Keep other threads of this process out; the block is told whether that succeeded.

        Args:
            timeout_s: How long to wait for them; None for as long as it takes.
        """
        if not self._threads.acquire(timeout=-1 if timeout_s is None else timeout_s):
            yield False
            return
        try:
            yield True
        finally:
            self._threads.release()

    def waits_for(self) -> str:
        """What keeps changes waiting at this moment, in a sentence; "" if nothing does."""
        with self._guard:
            since = min(self._waits.values(), default=None)
        if since is None or time.monotonic() - since < _SOON_S:
            return ""
        return self._busy(time.monotonic() - since)

    def _waits_no_more(self, thread: int) -> None:
        with self._guard:
            self._waits.pop(thread, None)

    def _busy(self, waited_s: float) -> str:
        last = 0
        with contextlib.suppress(OSError, struct.error):
            last = _MARKS.unpack(os.pread(self._fd, _MARKS.size, 0))[1]
        return holders.sentence(self._path, holders.holders(self._path, last), waited_s)

    def _mark(self, marks: bytes) -> None:
        # On a full disk the file's first byte may be refused; evicting has to work even then.
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, marks, 0)
