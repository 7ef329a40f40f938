"""Sums of requests over the last hour, the last day, and since the server was started.

A sum for each minute of a day, in memory alone: after a restart they begin again, and say since
when they hold.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

from msgspec import Struct, field

_MINUTE_S = 60
_DAY_MINUTES = 24 * 60
HOUR_S = 3600.0
DAY_S = 86_400.0


class Sums(Struct):
    """What requests of some time came to.

    Attributes:
        since: Since when, in UTC seconds.
        requests: That are over.
        failed: Of these, that failed.
        left: Of these, whose clients left.
        asked_tokens: Of all prompts.
        reused_tokens: Of these, that were not computed, by where they came from.
        saved_s: Seconds of prefill that this saved, less what reading took.
        unmeasured: Requests that reused tokens of which nobody knows what they would have cost.
    """

    since: float
    requests: int = 0
    failed: int = 0
    left: int = 0
    asked_tokens: int = 0
    reused_tokens: Counter[str] = field(default_factory=Counter)
    saved_s: float = 0.0
    unmeasured: int = 0

    def add(self, other: Sums) -> None:
        """Add what another time came to."""
        self.requests += other.requests
        self.failed += other.failed
        self.left += other.left
        self.asked_tokens += other.asked_tokens
        self.reused_tokens.update(other.reused_tokens)
        self.saved_s += other.saved_s
        self.unmeasured += other.unmeasured


class RequestHistory:
    """Adds requests up.

    Thread safety: may be shared between threads; `_lock` guards everything.

    Attributes:
        started: When it began, in UTC seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.started = clock()
        self._lock = threading.Lock()
        self._all = Sums(self.started)
        self._minutes: deque[Sums] = deque(maxlen=_DAY_MINUTES + 1)

    def __len__(self) -> int:
        """Minutes of which there are sums."""
        with self._lock:
            return len(self._minutes)

    def add(
        self,
        state: str,
        asked_tokens: int,
        reused_tokens: Mapping[str, int],
        saved_s: float | None,
    ) -> None:
        """Add a request that is over.

        Args:
            state: `done`, `failed` or `left`.
            asked_tokens: Of its prompt.
            reused_tokens: Of these, that were not computed, by where they came from.
            saved_s: Seconds that this saved; None where nobody measured.
        """
        reused = Counter({source: count for source, count in reused_tokens.items() if count})
        one = Sums(
            0.0,
            requests=1,
            failed=int(state == "failed"),
            left=int(state == "left"),
            asked_tokens=asked_tokens,
            reused_tokens=reused,
            saved_s=saved_s or 0.0,
            unmeasured=int(saved_s is None and bool(reused)),
        )
        with self._lock:
            minute = self._now() // _MINUTE_S * _MINUTE_S
            if not self._minutes or self._minutes[-1].since < minute:
                self._minutes.append(Sums(minute))
            self._minutes[-1].add(one)
            self._all.add(one)

    def over(self, seconds: float | None = None) -> Sums:
        """What the requests of the last seconds came to, to the minute; None for all of them."""
        with self._lock:
            first = 0.0
            if seconds is not None:
                first = (self._now() - seconds) // _MINUTE_S * _MINUTE_S
            sums = Sums(max(self.started, first))
            if seconds is None:
                sums.add(self._all)
                return sums
            for minute in reversed(self._minutes):
                if minute.since < first:
                    break
                sums.add(minute)
            return sums

    def _now(self) -> float:
        """What the clock says.

        If it was set back, what was counted in minutes to come counts as of now: it would be in the
        last hour until the clock is there again.
        """
        now = self._clock()
        minute = now // _MINUTE_S * _MINUTE_S
        self.started = min(self.started, now)
        if self._minutes and self._minutes[-1].since > minute:
            sums = Sums(minute)
            while self._minutes and self._minutes[-1].since >= minute:
                sums.add(self._minutes.pop())
            self._minutes.append(sums)
        return now
