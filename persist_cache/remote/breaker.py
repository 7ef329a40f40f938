"""The circuit breaker: a remote that fails is left alone, and tried again by one probe at a time.

No request waits for a remote that is known to be down: while the breaker is not closed it asks
nothing, and what finds out whether the remote is back runs by itself.

Thread safety: `Breaker` may be shared between threads; `_lock` guards everything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

FAILURES = 3
"""So many in a row open it."""
FIRST_RETRY_S = 30.0
LAST_RETRY_S = 600.0


class Breaker:
    """Says whether the remote may be asked."""

    def __init__(
        self, probe: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin closed.

        Args:
            probe: Starts finding out, by itself, whether the remote is back; it ends with
                `succeeded` or `failed`.
            clock: Seconds.
        """
        self._probe = probe
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._wait_s = 0.0
        self._opened_at = 0.0
        self._is_open = False
        self._is_probing = False
        self._last_error = ""

    @property
    def last_error(self) -> str:
        """The last failure, as a clause; "" for none yet."""
        with self._lock:
            return self._last_error

    @property
    def state(self) -> str:
        """`closed`, `open` or `half-open`."""
        with self._lock:
            if not self._is_open:
                return "closed"
            return "half-open" if self._is_probing else "open"

    @property
    def retry_in_s(self) -> float:
        """Seconds until the remote is tried again; 0 while it is in use."""
        with self._lock:
            if not self._is_open or self._is_probing:
                return 0.0
            return max(0.0, self._opened_at + self._wait_s - self._clock())

    def allows(self) -> bool:
        """Whether to ask the remote now. Where it is time to try again, that is begun."""
        with self._lock:
            if not self._is_open:
                return True
            is_due = self._clock() >= self._opened_at + self._wait_s
            if self._is_probing or not is_due:
                return False
            self._is_probing = True
        self._probe()
        return False

    def note(self, reason: str) -> None:
        """Remember an error that says nothing of whether the remote can be asked."""
        with self._lock:
            self._last_error = reason

    def succeeded(self) -> None:
        """Note that the remote answered."""
        with self._lock:
            self._failures = 0
            self._wait_s = 0.0
            self._is_open = self._is_probing = False

    def failed(self, reason: str, *, at_once: bool = False) -> bool:
        """Note that it did not.

        Args:
            reason: A clause for people.
            at_once: Somebody waited for it: once is enough.

        Returns:
            Whether this opened the breaker.
        """
        with self._lock:
            self._last_error = reason
            self._failures += 1
            was_open, was_probing = self._is_open, self._is_probing
            if not (at_once or was_open or self._failures >= FAILURES):
                return False
            if was_open and not was_probing:
                return False  # of a request that began before it opened
            self._is_open, self._is_probing = True, False
            self._opened_at = self._clock()
            self._wait_s = min(max(FIRST_RETRY_S, 2 * self._wait_s), LAST_RETRY_S)
            return not was_open
