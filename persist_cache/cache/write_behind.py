"""Write-behind: one long-lived thread that saves jobs by tier, highest first.

The queue is bounded in bytes of cache memory that it keeps alive. A job that does not fit is
refused, so that its owner keeps it and tries again; nothing that was accepted is dropped.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

_IDLE_AGAIN = 5
"""Idle work is also how a disk that failed is tried again, so it comes back, but rarely."""


@dataclass(order=True, slots=True)
class _Job:
    rank: int
    order: int
    nbytes: int = field(compare=False)
    save: Callable[[], None] = field(compare=False)


class WriteBehind:
    """A queue with its thread.

    Thread safety: every method may be called from any thread; `_changed` guards the state. Jobs
    run on the thread of the queue, one at a time, without any lock held.
    """

    def __init__(self, *, max_bytes: int, idle_s: float, on_idle: Callable[[], None]) -> None:
        """Start the thread.

        Args:
            max_bytes: Cache memory that waiting jobs may keep alive. A single larger job is
                accepted while nothing else waits.
            idle_s: Seconds without jobs or `poke` after which `on_idle` is called; while nothing
                else happens, it is called again after five times as long.
            on_idle: Called on the thread; it may submit jobs.
        """
        self._max_bytes = max_bytes
        self._idle_s = max(idle_s, 0.01)
        self._on_idle = on_idle
        self._changed = threading.Condition()
        self._jobs: list[_Job] = []
        self._order = itertools.count()
        self._nbytes = 0
        self._running = False
        self._closing = False
        self._poked = False
        self._idle_at = time.monotonic() + idle_s
        self._thread = threading.Thread(target=self._run, name="persist-cache-writer", daemon=True)
        self._thread.start()

    def submit(self, save: Callable[[], None], *, rank: int, nbytes: int) -> bool:
        """Queue a job.

        Args:
            save: What to do; must not raise.
            rank: Higher runs first.
            nbytes: Memory that the job keeps alive until it is done.

        Returns:
            Whether it was accepted; False when the queue is full or closed.
        """
        with self._changed:
            full = self._nbytes and self._nbytes + nbytes > self._max_bytes
            if full or self._closing:
                return False
            heapq.heappush(self._jobs, _Job(-rank, next(self._order), nbytes, save))
            self._nbytes += nbytes
            self._changed.notify_all()
            return True

    def on_thread(self) -> bool:
        """Whether the caller runs on the thread of the queue."""
        return threading.current_thread() is self._thread

    def poke(self) -> None:
        """Say that the process is busy: idle work waits another `idle_s`."""
        self._idle_at = time.monotonic() + self._idle_s
        self._poked = True

    def is_idle(self) -> bool:
        """Whether idle work that is under way may go on: nothing else came up meanwhile."""
        with self._changed:
            return not (self._poked or self._jobs or self._closing)

    def waiting(self) -> tuple[int, int]:
        """Jobs not finished yet, and the bytes they keep alive."""
        with self._changed:
            return len(self._jobs) + self._running, self._nbytes

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until every accepted job is done; returns whether that came true in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._running, timeout_s)

    def close(self, timeout_s: float | None = None) -> bool:
        """Finish accepted jobs and end the thread; returns whether it ended in time."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                job = self._next()
                if job is not None:
                    self._running = True
                elif self._closing:
                    return
            try:
                if job is None:
                    self._on_idle()
                else:
                    job.save()
            except Exception:
                log.exception("background work failed")
            with self._changed:
                if job is not None:
                    self._nbytes -= job.nbytes
                    self._running = False
                    # Let go of the cache memory before waiting for the next job.
                    job = None
                self._changed.notify_all()

    def _next(self) -> _Job | None:
        """The next job; None when it is time for idle work, or to end."""
        while True:
            if self._jobs:
                return heapq.heappop(self._jobs)
            if self._closing:
                return None
            self._poked = False  # before looking at the clock: what comes after it is seen
            wait = self._idle_at - time.monotonic()
            if wait <= 0:
                self._idle_at = time.monotonic() + _IDLE_AGAIN * self._idle_s
                return None
            # poke() cannot wake us, so look again now and then.
            self._changed.wait(min(wait, self._idle_s))
