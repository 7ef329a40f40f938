"""Upkeep: what is done for a store while nothing else is to be done.

Runs of conversations that grew are merged into larger files, and `gc` does everything at once.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from persist_cache.store import sweep
from persist_cache.store.compact import compact, merge_chains
from persist_cache.store.evict import Evictor
from persist_cache.store.lifetimes import TTL
from persist_cache.store.quotas import QUOTA
from persist_cache.store.session import Disk

_MAX_GROWN = 4096
_TIDY_S = 20.0
"""How much later than its time an entry may go, in a store that is used."""
_NAMESPACE_MEMORY_S = 30 * 86400.0


class Collected(Struct, frozen=True):
    """What `Store.gc` did.

    Attributes:
        freed_bytes: By which the store takes less of the disk.
        merged: Blobs that were merged with those before or behind them.
        compacted: Blobs of mostly dead rows that were written anew.
        without_room: Such blobs that stay, because a copy would exceed the budget.
    """

    freed_bytes: int
    merged: int
    compacted: int
    without_room: int


class Upkeep:
    """Keeps one store tidy. Thread safety: as `Disk`; `merge_runs` is for one thread at a time."""

    def __init__(self, disk: Disk, evictor: Evictor, run_tokens: int) -> None:
        self._disk = disk
        self._evictor = evictor
        self._run_tokens = run_tokens
        self._tidied = float("-inf")
        self._grown: dict[int, None] = {}
        """Entries stored since runs were merged last, in their order."""

    def note(self, entry: int) -> None:
        """Remember an entry that was stored, for `merge_runs`."""
        if len(self._grown) < _MAX_GROWN:
            self._grown[entry] = None

    def tidy(self, *, only_rules: bool = False) -> None:
        """Apply lifetimes and quotas, if it is some time since that was done; see `Store.tidy`.

        With `only_rules`, not where there are neither.
        """
        now = self._disk.clock()
        if 0 <= now - self._tidied < _TIDY_S:
            return
        if only_rules:
            with self._disk.index.read() as txn:
                if not txn.numbers(TTL) and not txn.numbers(QUOTA):
                    return
        self._tidied = now
        self._evictor.expire()
        self._evictor.apply_quotas()

    def merge_runs(self, keep_on: Callable[[], bool]) -> int:
        """Merge the runs of entries that were noted; see `Store.merge_runs`."""
        grown, self._grown = self._grown, {}
        if self._disk.limits.daily_write_bytes is not None:
            return 0
        merged = 0
        try:
            while grown and keep_on():
                number = next(iter(grown))
                del grown[number]
                merged += merge_chains(self._disk, self._evictor, number, self._run_tokens, keep_on)
                if not keep_on():
                    grown[number] = None
        finally:
            self._grown = grown | self._grown
        return merged

    def gc(self) -> Collected:
        """Do everything at once; see `Store.gc`."""
        disk = self._disk
        with disk.index.read() as txn:
            before = disk.budget.usage(txn).total
        sweep.sweep(disk, self._evictor)
        sweep.remove_orphans(disk)
        self._evictor.expire()
        self._evictor.apply_quotas()
        disk.index.update(lambda txn: txn.forget_added_of_nobody())
        sweep.forget_empty_namespaces(disk, _NAMESPACE_MEMORY_S)
        self._evictor.evict_to(disk.limits.max_bytes)
        with disk.index.read() as txn:
            entries = [number for number, _ in txn.entries()]
        merged = sum(
            merge_chains(disk, self._evictor, entry, self._run_tokens) for entry in entries
        )
        blobs, without_room = compact(disk, self._evictor)
        with disk.index.read() as txn:
            freed = before - disk.budget.usage(txn).total
        return Collected(max(0, freed), merged, blobs, without_room)
