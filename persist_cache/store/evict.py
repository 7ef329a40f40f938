"""Eviction: what goes, in which order, and the trash through which it goes.

One commit removes the records and lists the files in `trash`; only then are they unlinked; the
next commit strikes them from the list. A file that cannot be unlinked stays listed, and counted.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeVar

from persist_cache.entry import PARTIAL_LABEL, Tier
from persist_cache.errors import StoreError, StoreFullError
from persist_cache.index import order, tree
from persist_cache.index.records import SizedRecord, entry_id, recency_key, unpack_number
from persist_cache.index.transaction import Reader, Writer
from persist_cache.store import lifetimes
from persist_cache.store.relief import Relief
from persist_cache.store.session import Disk

log = logging.getLogger(__name__)
T = TypeVar("T")

REQUESTED = "evicted by request"
"""Why an entry went, as `explain` and `show` say it."""
REPLACED = "replaced by a longer one"
UNDONE = "removed again because its import failed"

_COMMIT_BYTES = 64 * 1024
"""What the commit of an eviction may add to the index, however little is evicted …"""
_ENTRY_BYTES = 512
"""… and for each entry that goes: it is remembered for a while, and pages are copied."""
_AHEAD_US = 60 * 1_000_000
"""Clocks are set back by a little now and then."""


class Evictor:
    """Frees bytes of one store. Thread safety: as `Disk`."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def evict(
        self,
        numbers: Sequence[int],
        reason: str,
        *,
        to_bytes: int | None = None,
        missing_ok: bool = False,
        mark: str = "",
    ) -> int:
        """Remove entries, and every file that nothing else needs; see `Store.evict`.

        With a `mark`, that counter says from this commit on that more is to be done.

        The ballast is made anew afterwards if it was given up, as far as the budget, or
        `to_bytes`, has room for it.

        Returns:
            Bytes of the files that are gone; one that cannot be unlinked stays in the trash.

        Raises:
            KeyError: One of them is not stored; nothing was removed.
        """

        def drop(txn: Writer) -> None:
            if not missing_ok:
                for number in numbers:
                    if txn.entry(number) is None:
                        raise KeyError(f"no entry has the id {entry_id(number)}")
            self._drop(txn, numbers, "evicted", reason)
            if mark:
                txn.add(mark, 1 - txn.counter(mark))

        freed = self._freed_by(drop)
        if to_bytes is not None:
            self.shed_ballast(to_bytes)
        self._disk.regain_ballast(to_bytes)
        return freed

    def retire(self, numbers: Collection[int]) -> None:
        """Remove entries that a longer one has taken the place of.

        Those that somebody set apart meanwhile stay, and those that are being read. What cannot be
        done stays undone, until the next entry on their way, or until their room is needed.
        """

        def drop(txn: Writer) -> None:
            served = self._disk.nodes_served(txn)
            going = [
                number
                for number in numbers
                if (entry := txn.entry(number)) is not None
                and entry.label == PARTIAL_LABEL
                and not (entry.pinned or entry.expires or entry.node in served)
            ]
            self._drop(txn, going, "replaced", REPLACED)

        if not numbers:
            return
        try:
            self.update(drop)
            self.empty_trash()
        except StoreError as error:
            log.debug("entries that were replaced are still there: %s", error)

    def _freed_by(self, change: Callable[[Writer], object]) -> int:
        """Bytes of the files that are gone after a commit that moves some into the trash."""

        def commit(txn: Writer) -> dict[bytes, SizedRecord]:
            before = txn.keys(b"trash")
            change(txn)
            trash = txn.sized(b"trash")
            return {name: trash[name] for name in trash.keys() - before}

        doomed = self.update(commit)
        self.empty_trash()
        with self._disk.index.read() as txn:
            left = txn.keys(b"trash")
        return sum(record.nbytes for name, record in doomed.items() if name not in left)

    def evict_to(self, max_bytes: int) -> int:
        """Evict in order until the store takes at most `max_bytes`, or the rest is pinned.

        Returns:
            Bytes on disk afterwards.
        """
        with contextlib.suppress(StoreFullError):  # that is what this is to mend
            self._disk.flush()
        self.empty_trash()
        ballast = self.shed_ballast(max_bytes)
        budget = self._disk.budget

        def shrink(txn: Writer) -> int:
            usage = budget.usage(txn)
            # If it was given up so that this can be committed, it is to come back.
            excess = usage.total - usage.ballast + ballast - max_bytes
            return self.free(txn, excess, frozenset()) if excess > 0 else 0

        # The index may grow a little while it notes what went, so look again.
        while self.update(shrink) and self.empty_trash():
            pass
        self._disk.regain_ballast(min(max_bytes, self._disk.limits.max_bytes))
        with self._disk.index.read() as txn:
            return budget.usage(txn).total

    def victims_until(self, max_bytes: int, candidates: Collection[int]) -> list[str]:
        """Ids that eviction would take, in order, if only `candidates` could go."""
        disk = self._disk

        def attempt(txn: Writer) -> list[str]:
            chosen: list[str] = []
            protected = {
                record.node for number, record in txn.entries() if number not in candidates
            }
            start = txn.counter(tree.BLOB_BYTES)
            usage = disk.budget.usage(txn)
            excess = usage.total - max_bytes
            if usage.without_entries > max_bytes:
                excess -= usage.ballast  # it goes as well
            if excess > 0:
                for number in order.victims(txn, protected, disk.clock()):
                    tree.drop_entry(txn, number, "", disk.clock())
                    chosen.append(entry_id(number))
                    if start - txn.counter(tree.BLOB_BYTES) >= excess:
                        break
            return chosen

        return disk.index.dry_run(attempt)

    def refuse_without_room(
        self, nbytes: int, num_tokens: int, protected: frozenset[int], what: str
    ) -> None:
        """Refuse what no eviction could make room for; nothing is evicted."""
        budget = self._disk.budget

        def attempt(txn: Writer) -> None:
            budget.refuse_impossible(txn, nbytes, num_tokens)
            excess = budget.excess(txn, nbytes, num_tokens)
            if excess > 0 and self.free(txn, excess, protected) < excess:
                raise StoreFullError(
                    f"There is no room for {what}: what remains is pinned or in use. Unpin or "
                    "evict something, free some disk space, or raise the budget (now "
                    f"{self._disk.limits.max_bytes} bytes)."
                )

        self._disk.index.dry_run(attempt)

    def shed_ballast(self, max_bytes: int) -> int:
        """Give the ballast up if, with it, no eviction could bring the store to `max_bytes`.

        Returns:
            Its bytes that are left.
        """
        with self._disk.index.read() as txn:
            usage = self._disk.budget.usage(txn)
        if not usage.ballast or usage.without_entries <= max_bytes:
            return usage.ballast
        self._disk.index.alone(self._disk.ballast.release)
        return 0

    def update(self, change: Callable[[Writer], T]) -> T:
        """Commit what is to free some of the disk, also when the disk is full.

        Raises:
            StoreFullError: What could be given up for it was not enough.
        """
        relief = Relief(self._disk)

        def noted(txn: Writer) -> T:
            before = txn.keys(b"trash")
            value = change(txn)
            relief.doomed = sorted(txn.keys(b"trash") - before)
            return value

        with self._disk.index.terms(relieve=relief.give_up):
            try:
                return self._disk.index.update(noted)
            except StoreFullError as error:
                if not relief.lost:
                    raise
                raise StoreFullError(
                    "The disk is full: to make room for this, the files of what was to go were "
                    "removed, and something else took that room at once. Their entries are "
                    "listed still, and are found no more; free some space and try again, or run "
                    "`persist-cache check --repair` then."
                ) from error

    def expire(self) -> int:
        """Remove entries past their expiry, or past their default lifetime; returns how many."""
        now = self._disk.clock()
        with self._disk.index.read(copies=True) as txn:
            if not txn.expired(now) and not lifetimes.due(txn, now):
                return 0

        def drop(txn: Writer) -> int:
            served = self._disk.nodes_served(txn)
            due = [
                number
                for number in lifetimes.due(txn, now)
                if (entry := txn.entry(number)) is not None and entry.node not in served
            ]
            return self._drop_expired(txn, served) + self._drop(txn, due, "expired", "expired")

        dropped = self.update(drop)
        self.empty_trash()
        return dropped

    def apply_quotas(self) -> int:
        """Evict what exceeds the quota of a model or a salt; returns the bytes."""
        quotas = self._disk.quotas
        with self._disk.index.read() as txn:
            if not quotas.is_exceeded(txn):
                return 0
        freed = self.update(lambda txn: quotas.apply(txn, self))
        self.empty_trash()
        return freed

    def free_among(self, txn: Writer, excess: int, protected: frozenset[int]) -> int:
        """As `free`, but what is in quarantine or has expired elsewhere is left alone."""
        start = txn.counter(tree.BLOB_BYTES)
        shielded = protected | self._disk.nodes_served(txn)

        def victims() -> Iterator[int]:
            for number in order.victims(txn, shielded, self._disk.clock()):
                if start - txn.counter(tree.BLOB_BYTES) >= excess:
                    return
                yield number

        self._drop(txn, victims(), "evicted", "evicted to keep a quota")
        return start - txn.counter(tree.BLOB_BYTES)

    def purge_quarantine(self) -> int:
        """Remove the damaged files that were put aside; returns their bytes.

        They hold prompts: whoever evicts everything wants them gone as well.
        """
        freed = self._freed_by(self._drop_quarantine)
        self._disk.regain_ballast()
        return freed

    def empty_trash(self) -> bool:
        """Unlink what the trash lists and strike it off.

        A file that cannot be removed stays listed, and counted against the budget.

        Returns:
            Whether that helped: False when there are such files and none other went.
        """
        with self._disk.index.read() as txn:
            doomed = list(txn.sized(b"trash"))
        if doomed:
            # Else a power cut could take back the records' removal, but not that of the files.
            self._disk.index.sync()
        gone = []
        for name in doomed:
            try:
                self._disk.folder.remove(name.hex(), overwrites=self._disk.overwrites)
                gone.append(name)
            except OSError as error:
                log.warning("blob %s cannot be removed: %s", name.hex(), error)
        if gone:

            def strike(txn: Writer) -> None:
                for name in gone:
                    txn.delete_sized(b"trash", name)

            self.update(strike)
        return bool(gone) or not doomed

    def make_room(self, txn: Writer, excess: int, protected: frozenset[int]) -> int:
        """Drop entries for `excess` bytes and for what the commit of that takes itself.

        Else a put could be refused in the end for whose sake something was evicted.

        Returns:
            Bytes freed beyond those; fewer than 0 if nothing more may go.
        """
        return self.drop_until(
            txn,
            lambda freed, dropped: freed - excess - _COMMIT_BYTES - dropped * _ENTRY_BYTES,
            protected,
        )

    def free(self, txn: Writer, excess: int, protected: frozenset[int]) -> int:
        """Drop entries until `excess` bytes are freed or nothing may go; returns bytes freed."""
        surplus = self.drop_until(txn, lambda freed, _: freed - excess, protected)
        return surplus + excess

    def drop_until(
        self, txn: Writer, surplus: Callable[[int, int], int], protected: frozenset[int]
    ) -> int:
        """Drop what is worth least until the surplus is 0 or nothing may go; returns the surplus.

        Args:
            txn: Where.
            surplus: What is more than enough, given the bytes freed and the entries dropped.
            protected: Nodes whose entries stay.
        """
        start = txn.counter(tree.BLOB_BYTES)
        self._redate(txn)
        waste = self._drop_quarantine(txn)
        shielded = protected | self._disk.nodes_served(txn)
        dropped = self._drop_expired(txn, shielded)

        def left() -> int:
            return surplus(waste + start - txn.counter(tree.BLOB_BYTES), dropped)

        def victims() -> Iterator[int]:
            nonlocal dropped
            for number in order.victims(txn, shielded, self._disk.clock()):
                if left() >= 0:
                    return
                dropped += 1
                yield number

        self._drop(txn, victims(), "evicted", "evicted to make room")
        return left()

    def redate(self) -> None:
        """Have what was used in the future, by a clock that was wrong, be used now.

        It would outlive everything else.
        """
        with self._disk.index.read() as txn:
            any_ahead = bool(self._ahead(txn))
        if any_ahead:
            self._disk.index.update(self._redate)

    def _ahead(self, txn: Reader) -> list[int]:
        """Entries whose last use lies ahead of the clock."""
        limit = int(self._disk.clock() * 1e6) + _AHEAD_US
        found = []
        for tier in Tier:
            for key in txn.recency_keys(recency_key(tier, limit, 0)):
                if key[0] != tier:
                    break
                found.append(unpack_number(key[9:]))
        return found

    def _redate(self, txn: Writer) -> None:
        now_us = int(self._disk.clock() * 1e6)
        for number in self._ahead(txn):
            record = txn.entry(number)
            if record is not None:
                created_us = min(record.created_us, now_us)
                txn.put_entry(number, record._replace(last_use_us=now_us, created_us=created_us))

    def _drop_expired(self, txn: Writer, shielded: set[int] | frozenset[int]) -> int:
        past = []
        for number in txn.expired(self._disk.clock()):
            record = txn.entry(number)
            if record is not None and not record.pinned and record.node not in shielded:
                past.append(number)
        return self._drop(txn, past, "expired", "expired")

    def _drop(self, txn: Writer, numbers: Iterable[int], cause: str, reason: str) -> int:
        """Drop entries and count them, in all and by tier; returns how many there were."""
        dropped: Counter[str] = Counter()
        for number in numbers:
            record = txn.entry(number)
            if record is not None:
                tree.drop_entry(txn, number, reason, self._disk.clock())
                dropped[record.tier.label] += 1
        for tier, count in dropped.items():
            txn.count(f"{cause}:{tier}", count)
        if dropped:
            txn.count(cause, dropped.total())
        return dropped.total()

    def _drop_quarantine(self, txn: Writer) -> int:
        """Damaged files are kept out of courtesy only: they go before anything useful does."""
        freed = 0
        for name, record in txn.sized(b"quarantine").items():
            txn.delete_sized(b"quarantine", name)
            txn.put_sized(b"trash", name, record)
            freed += record.nbytes
        return freed
