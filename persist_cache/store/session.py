"""The open parts of a store that its modules share: index, blob folder, limits, clock, uses.

Thread safety: `Disk` may be shared between threads; `_lock` guards buffered uses and counts and
the set of entries that are being read.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from msgspec import Struct, field

from persist_cache.blobs.folder import BlobFolder
from persist_cache.errors import StoreError
from persist_cache.index.environment import Index
from persist_cache.index.records import LAST_DATE_S, MAX_HITS, UNREADABLE
from persist_cache.index.transaction import Reader, Writer, counter_name
from persist_cache.store.budget import Budget, Limits
from persist_cache.store.quotas import Quotas
from persist_cache.store.unreturned import Unreturned

log = logging.getLogger(__name__)

_SETTLE_S = 1.0
"""How long whoever wants exact counters waits for a flush that is under way."""


class _Use(Struct):
    last_use: float
    hits: int = 0
    saved_s: float = 0.0
    groups: dict[str, int] = field(default_factory=dict)
    """Of the requests, each with the tokens of a prompt of its that were found."""


def _sane(clock: Callable[[], float]) -> Callable[[], float]:
    """The same clock, as long as it shows dates that can be recorded: 1970 to `LAST_DATE_S`."""

    def now() -> float:
        shown = clock()
        return min(max(0.0, shown), LAST_DATE_S) if shown == shown else 0.0

    return now


class Disk:
    """What every module of the store works on."""

    def __init__(
        self,
        root: Path,
        index: Index,
        folder: BlobFolder,
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        self.root = root
        self.index = index
        self.folder = folder
        self.limits = limits
        self.clock = _sane(clock)
        self.budget = Budget(limits, index, folder, self.clock)
        self.ballast = self.budget.ballast
        self.quotas = Quotas()
        self.unreturned = Unreturned(index, self.budget, self.clock)
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._uses: dict[int, _Use] = {}
        self._counts: Counter[str] = Counter()
        self._flushing: list[Counter[str]] = []
        self._flushes = 0
        self._serving: Counter[int] = Counter()
        self.overwrites = False
        """Whether files that go are overwritten before."""

    @contextlib.contextmanager
    def serving(self, entries: Iterable[int]) -> Iterator[None]:
        """Keep eviction in this process away from entries that are being read."""
        numbers = list(entries)
        with self._lock:
            self._serving.update(numbers)
        try:
            yield
        finally:
            with self._lock:
                self._serving.subtract(numbers)
                self._serving = +self._serving

    def nodes_served(self, txn: Reader) -> set[int]:
        """Nodes of the entries that are being read."""
        with self._lock:
            serving = list(self._serving)
        return {record.node for number in serving if (record := txn.entry(number)) is not None}

    def is_recorded(self, name: bytes) -> bool:
        """Whether a record names the blob `name` (16 bytes), as of now."""
        with self.index.read() as txn:
            return txn.blob_number(name) is not None

    def touch(self, entries: list[int], saved_s: float, group: str, num_tokens: int) -> None:
        """Note a use of `entries`; the last one is credited with the hit. Writes nothing yet.

        Args:
            entries: Numbers; the last one may be of a prompt that parts from the one it served.
            saved_s: What the hit saved.
            group: Of the request.
            num_tokens: Tokens of its prompt that were used.
        """
        now = self.clock()
        with self._lock:
            for number in entries:
                use = self._uses.setdefault(number, _Use(now))
                use.last_use = now
                use.groups[group] = max(num_tokens, use.groups.get(group, 0))
            if entries:
                self._uses[entries[-1]].hits += 1
                self._uses[entries[-1]].saved_s += saved_s

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter of the store. Writes nothing yet."""
        with self._lock:
            self._counts[counter_name(name)] += amount

    def counted(self, written: Callable[[], Mapping[str, int]]) -> Counter[str]:
        """The counters of a store: what `written` reads from the index, and what is buffered.

        A flush moves counts from here to there: the two are read while none is under way, or,
        where one takes longer than a second, as if it had not been committed yet.
        """
        give_up = time.monotonic() + _SETTLE_S
        while True:
            with self._lock:
                self._settled.wait_for(
                    lambda: not self._flushing, max(0.0, give_up - time.monotonic())
                )
                flushes = self._flushes
            counters = Counter(written())
            with self._lock:
                if self._flushes == flushes or time.monotonic() > give_up:
                    for counts in [self._counts, *self._flushing]:
                        counters.update(counts)
                    return counters

    def regain_ballast(self, max_bytes: int | None = None) -> None:
        """Make the ballast anew where it was given up, if there is room; never fails.

        Args:
            max_bytes: What the store may take with it; the budget when None.
        """
        limit = self.limits.max_bytes if max_bytes is None else max_bytes
        missing = self.ballast.missing_bytes()
        if self.index.read_only or missing == 0:
            return

        def regain() -> None:
            with self.index.read() as txn:
                may = self.budget.may_regain(txn, limit)
            if may:
                self.ballast.regain()

        try:
            with self.index.read() as txn:
                may = self.budget.may_regain(txn, limit)
            if may:
                self.index.alone(regain)
        except (OSError, StoreError) as error:
            log.debug("the ballast stays as it is: %s", error)

    def flush(self, patience_s: float | None = None) -> bool:
        """Commit buffered uses and counts together; they stay buffered if that fails.

        Args:
            patience_s: How long to wait for other processes; as every change when None.

        Returns:
            Whether there was anything to commit.

        Raises:
            StoreError: The index cannot be written.
        """
        with self._lock:
            uses, self._uses = self._uses, {}
            counts, self._counts = self._counts, Counter()
            if not uses and not counts:
                return False
            self._flushing.append(counts)
            self._flushes += 1

        def apply(txn: Writer) -> None:
            for number, use in uses.items():
                try:
                    record = txn.entry(number)
                except (StoreError, *UNREADABLE):
                    continue  # it is damaged, which `check` finds; the others are not
                if record is not None:
                    # A date that lies ahead is of a clock that was wrong.
                    last_us, created_us = int(use.last_use * 1e6), record.created_us
                    if record.last_use_us <= self.clock() * 1e6:
                        last_us = max(record.last_use_us, last_us)
                    else:  # nor is it kept until its lifetime after that is over
                        created_us = min(created_us, last_us)
                    txn.put_entry(
                        number,
                        record._replace(
                            created_us=created_us,
                            last_use_us=last_us,
                            hits=min(record.hits + use.hits, MAX_HITS),
                            saved_s=record.saved_s + use.saved_s,
                        ),
                    )
                    for group, num_tokens in use.groups.items():
                        if record.num_tokens <= num_tokens:
                            txn.join_group(number, group)
            for name, amount in counts.items():
                txn.count(name, amount)

        try:
            with self.index.terms(patience_s=patience_s):
                self.index.update(apply)
        except BaseException:
            with self._lock:
                self._flushing.remove(counts)
                self._give_back(uses, counts)
            raise
        with self._lock:
            self._flushing.remove(counts)
            self._settled.notify_all()
        return True

    def _give_back(self, uses: dict[int, _Use], counts: Counter[str]) -> None:
        """Buffer again what could not be committed; under `_lock`."""
        self._settled.notify_all()
        for number, use in uses.items():
            newer = self._uses.setdefault(number, use)
            if newer is not use:
                newer.hits += use.hits
                newer.saved_s += use.saved_s
                for group, num_tokens in use.groups.items():
                    newer.groups[group] = max(num_tokens, newer.groups.get(group, 0))
        self._counts.update(counts)
