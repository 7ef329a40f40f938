"""When unlinking gives no room back: stop evicting, wait, and say so.

A snapshot (APFS, for Time Machine; also btrfs and ZFS) keeps the blocks of files that are
removed, so the free space of the disk does not rise however much is evicted, and the floor of
free space would have the store emptied for nothing. So what is evicted for the floor goes in
rounds, the first one small, and each must be seen to give back. After a few that did not, nothing
is evicted for the floor for a while. The pause is recorded in the index, for all processes.

What exceeds the budget is evicted all the same: that bounds what the store itself takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from persist_cache import fs
from persist_cache.errors import StoreError, StoreFullError
from persist_cache.index.environment import Index
from persist_cache.index.records import pack_counter, unpack_counter
from persist_cache.index.transaction import Reader, Writer
from persist_cache.store.budget import Budget

FIRST_ROUND_BYTES = 16 * 1024
_FIRST_LATE_ROUND_BYTES = 1 << 20
"""Where the file system tells late, and takes and gives by larger pieces."""
LONGEST_PAUSE_S = 3600.0
PATIENCE_S = 1.0
"""Some file systems free blocks in the background: how long to wait for them."""
_GROWTH = 4
_TRIALS = 2
"""Rounds that may give nothing back: other programs write, too."""
_FIRST_PAUSE_S = 60.0
_AT, _TIMES = "unreturned_at", "unreturned_times"
WHY = (
    "a snapshot of the disk (Time Machine makes them) still holds what was removed, or other "
    "programs took the room at once"
)


class Unreturned:
    """What a store knows of whether its disk gives unlinked blocks back.

    Thread safety: may be shared between threads; the state is in the index, or as one value here.
    """

    def __init__(self, index: Index, budget: Budget, clock: Callable[[], float]) -> None:
        self._index = index
        self._budget = budget
        self._clock = clock
        self._unrecorded: tuple[int, int] | None = None
        """The same as in the index, where it could not be recorded: when, and how often."""

    def paused_s(self, txn: Reader) -> float:
        """Seconds for which nothing is to be evicted for the floor; 0 when it may be."""
        at, times = self._unrecorded or (_number(txn, _AT), _number(txn, _TIMES))
        passed = self._clock() - at
        pause = min(_FIRST_PAUSE_S * 2.0 ** min(times - 1, 30), LONGEST_PAUSE_S)
        # A clock that was set back does not make it longer.
        return pause - passed if times > 0 and 0 <= passed < pause else 0.0

    def refuse_during_pause(self, txn: Reader) -> None:
        """Refuse to evict for the floor while that is known to be in vain.

        Raises:
            StoreFullError: It is.
        """
        left_s = self.paused_s(txn)
        if left_s > 0:
            raise self.refusal(left_s)

    def said(self, txn: Reader) -> str:
        """What people are told of a pause; "" when there is none."""
        left_s = self.paused_s(txn)
        if left_s <= 0:
            return ""
        return (
            f"evicting gave nothing back, because {WHY}; nothing is evicted for the free-space "
            f"floor for {_minutes(left_s)}"
        )

    def refusal(self, left_s: float) -> StoreFullError:
        """The sentence of a put that finds too little free space during a pause."""
        return StoreFullError(
            f"There is no room left: evicting gave nothing back, because {WHY}. Nothing more is "
            f"evicted for {_minutes(left_s)}; remove snapshots, free some disk space, or lower "
            f"the floor (now {self._budget.limits.min_free_bytes} bytes)."
        )

    def note(self, returned: bool) -> None:
        """Record how a trial ended."""
        with self._index.read() as txn:
            _, before = self._unrecorded or (0, _number(txn, _TIMES))
        if returned and before == 0:
            return
        at, times = int(self._clock()), 0 if returned else before + 1

        def change(txn: Writer) -> None:
            txn.set_meta(_TIMES, pack_counter(times))
            txn.set_meta(_AT, pack_counter(at))

        try:
            self._index.update(change)
            self._unrecorded = None
        except StoreError:
            self._unrecorded = at, times


class Rounds:
    """The rounds in which one put evicts for the floor of free space."""

    def __init__(self, unreturned: Unreturned, budget: Budget, index: Index) -> None:
        self._unreturned = unreturned
        self._budget = budget
        self._index = index
        self._step = _FIRST_LATE_ROUND_BYTES if budget.tells_late else FIRST_ROUND_BYTES
        self._futile = 0
        self._before = (0, 0)
        self.is_feasible = False
        """All that is wanted could be evicted, as was tried and taken back."""

    def begin(self, missing: int) -> int:
        """Bytes that the next round may evict, of those that are missing."""
        if self._budget.tells_late:
            fs.sync_file_system(self._index.root)
        self._before = self._now()
        return min(missing, self._step)

    def judge(self, unlinked: int) -> None:
        """See whether a round gave back what it unlinked; wait a moment if it did not.

        Raises:
            StoreFullError: It did not, and neither did those before it.
        """
        if unlinked <= 0:
            return
        if self._gave_back(unlinked):
            self._futile = 0
            self._step *= _GROWTH
            self._unreturned.note(returned=True)
            return
        self._futile += 1
        if self._futile < _TRIALS:
            return
        self._unreturned.note(returned=False)
        with self._index.read() as txn:
            left_s = self._unreturned.paused_s(txn)
        raise self._unreturned.refusal(left_s or _FIRST_PAUSE_S)

    def _gave_back(self, unlinked: int) -> bool:
        give_up = time.monotonic() + PATIENCE_S
        nap_s = 0.002
        while True:
            free, index_bytes = self._now()
            # The index may have grown by the commits of the eviction.
            risen = free - self._before[0] + max(0, index_bytes - self._before[1])
            if 2 * risen >= unlinked:
                return True
            left_s = give_up - time.monotonic()
            if left_s <= 0:
                return False
            fs.sync_file_system(self._index.root)
            time.sleep(min(nap_s, left_s))
            nap_s = min(2 * nap_s, 0.1)

    def _now(self) -> tuple[int, int]:
        return self._budget.free_bytes(), self._index.file_bytes()


def _number(txn: Reader, name: str) -> int:
    raw = txn.meta(name)
    return 0 if raw is None else unpack_counter(raw)


def _minutes(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return "a minute" if minutes == 1 else f"{minutes} minutes"
