"""What the store took on disk over the last day: a sample a minute, in memory alone."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from msgspec import Struct

EVERY_S = 60.0
DAY_S = 86_400.0
_SAMPLES = 24 * 60 + 1


class DiskSample(Struct, frozen=True):
    """What a store took at one time.

    Attributes:
        at: When, in UTC seconds.
        total: Bytes on disk; None while it was off.
        tiers: Of these, those of each tier, by its label; empty where they were not added up.
    """

    at: float
    total: int | None
    tiers: tuple[tuple[str, int], ...] = ()


class DiskHistory:
    """Samples a store.

    Thread safety: may be shared between threads; `_lock` guards the samples.
    """

    def __init__(
        self, sample: Callable[[float], DiskSample], clock: Callable[[], float] = time.time
    ) -> None:
        """Remember nothing yet.

        Args:
            sample: Takes a sample at a time.
            clock: UTC seconds.
        """
        self._sample = sample
        self._clock = clock
        self._lock = threading.Lock()
        self._samples: deque[DiskSample] = deque(maxlen=_SAMPLES)

    def start(self) -> None:
        """Take a sample now and each minute, on a thread that ends with the process."""
        threading.Thread(target=self._run, name="persist-cache-disk-history", daemon=True).start()

    def take(self) -> None:
        """Take a sample now."""
        sample = self._sample(self._clock())
        with self._lock:
            # A clock that was set back must not put them out of order.
            while self._samples and self._samples[-1].at >= sample.at:
                self._samples.pop()
            self._samples.append(sample)

    def samples(self, most: int) -> Sequence[DiskSample]:
        """At most so many samples, evenly spread, oldest first; the last one is of now."""
        now = self._sample(self._clock())
        with self._lock:
            known = [one for one in self._samples if now.at - DAY_S <= one.at < now.at]
        known.append(now)
        step = -(-len(known) // most)
        return known[::-step][::-1]

    def _run(self) -> None:
        pause = threading.Event()
        while True:
            self.take()
            pause.wait(EVERY_S)
