"""What a store holds in all, by tier and by model, and what an eviction would free of it.

Reads the index only: no file is opened and no model is needed, so it works beside a running
server, and on a store that may not be changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import cached_property
from itertools import compress
from typing import Any, TypeVar

from msgspec import Struct

from persist_cache.entry import Entry, Tier
from persist_cache.index.records import (
    NO_BLOB,
    NO_ENTRY,
)
from persist_cache.queries.models import Model, as_model
from persist_cache.queries.stale import outdated_reason
from persist_cache.store.store import Store

K = TypeVar("K", bound=Hashable)


class Removal(Struct, frozen=True):
    """What an eviction would do.

    Attributes:
        freed_bytes: Bytes of files that would go.
        kept_bytes: Bytes of the evicted entries' rows that others need too.
        kept_for: Number of those others.
        dead_bytes: Bytes of rows that nothing would need any more, in files that stay for others.
    """

    freed_bytes: int
    kept_bytes: int
    kept_for: int
    dead_bytes: int


def left_in_trash(store: Store, missing_bytes: int) -> int:
    """How much of what an eviction did not free is still there, because unlinking it failed.

    Args:
        store: After the eviction.
        missing_bytes: What was to be freed and was not; other processes may have freed it.
    """
    with store.read() as txn:
        trash = sum(record.nbytes for record in txn.sized(b"trash").values())
    return max(0, min(missing_bytes, trash))


class Amount(Struct, frozen=True):
    """How much there is of something.

    Attributes:
        entries: Number of entries.
        nbytes: Bytes of the files behind them; none is counted twice.
        hits: Requests that they served, from disk or out of memory.
        saved_s: Seconds of prefill that saved, less what reading took.
    """

    entries: int = 0
    nbytes: int = 0
    hits: int = 0
    saved_s: float = 0.0


class Quarantined(Struct, frozen=True):
    """A damaged blob that was taken out of service; `since` in UTC seconds."""

    blob: str
    nbytes: int
    since: float
    reason: str


class LeftBehind(Struct, frozen=True):
    """Entries that no model can find any more, because of the versions installed here.

    Attributes:
        reason: Why.
        entries: Number of entries.
        nbytes: Bytes of the files behind them.
        pinned: Of the entries, those that only go when they are named.
    """

    reason: str
    entries: int
    nbytes: int
    pinned: int


class Survey:
    """A view of all entries of a store as of one moment.

    Attributes:
        entries: All entries, in the order of their ids.
        ids: Theirs, sorted.
        models: By fingerprint; also those that have no entries left.
        fingerprints: By the number of a namespace, of which a model has one for each layout.
    """

    def __init__(self, store: Store) -> None:
        """Load the index of `store`.

        Raises:
            StoreError: The index contradicts itself.
        """
        self._store = store
        self.catalog = store.catalog()
        self.models = {
            key[:32].hex(): as_model(key, record)
            for key, record in self.catalog.namespaces.values()
        }

    @cached_property
    def entries(self) -> list[Entry]:
        return self.catalog.entries()

    @property
    def ids(self) -> list[str]:
        return self.catalog.ids

    @property
    def fingerprints(self) -> dict[int, str]:
        return self.catalog.fingerprints

    @property
    def num_entries(self) -> int:
        return len(self.catalog.rows)

    def entries_at(self, rows: Sequence[int]) -> list[Entry]:
        """The entries at these places of `entries`, in the order of `rows`."""
        return self.catalog.entries(rows)

    def columns(self, rows: Sequence[int], fields: Sequence[str]) -> dict[str, Sequence[Any]]:
        """Like `entries_at`, but each field of all: for thousands, in a fraction of the time."""
        return self.catalog.columns(rows, fields)

    def model_of(self, entry: Entry) -> Model:
        return self.models.get(entry.fingerprint) or Model(entry.fingerprint)

    def added_bytes(self, entry: Entry) -> int:
        """Bytes that `entry` has beyond the one it continues, whoever else needs them."""
        catalog = self.catalog
        row = catalog.rows[int(entry.id, 16)]
        checkpoint = catalog.table.checkpoints[row]
        total = 0 if checkpoint == NO_BLOB else catalog.disk_bytes[checkpoint]
        place = catalog.places[catalog.table.nodes[row]]
        while True:
            total += catalog.shares[place]
            place = catalog.above[place]
            if place < catalog.first or catalog.ends[place] != NO_ENTRY:
                return total

    def removal(self, ids: Collection[str]) -> Removal:
        """What evicting the entries `ids` would free, and what stays because others need it."""
        catalog = self.catalog
        doomed = {int(one, 16) for one in ids}
        left = catalog.count_users(doomed)
        living: set[int] = set()
        dying = {catalog.table.checkpoints[catalog.rows[one]] for one in doomed}
        kept_bytes = kept_for = 0
        dying_rows: list[tuple[int, int]] = []
        for place in range(catalog.first, len(left)):
            stay = left[place]
            (living if stay else dying).add(catalog.blobs[place])
            if not stay:
                dying_rows.append((catalog.blobs[place], catalog.shares[place]))
            if stay and stay < catalog.users[place]:
                kept_bytes += catalog.shares[place]
                if catalog.above[place] < catalog.first:
                    kept_for += stay
        return Removal(
            freed_bytes=sum(catalog.disk_bytes[blob] for blob in dying - living - {NO_BLOB}),
            kept_bytes=kept_bytes,
            kept_for=kept_for,
            dead_bytes=sum(nbytes for blob, nbytes in dying_rows if blob in living),
        )

    @cached_property
    def by_tier(self) -> dict[Tier, Amount]:
        """Per tier; rows that several share count for the highest tier among them."""
        catalog = self.catalog
        tier_of = dict(zip(catalog.table.numbers, catalog.table.tiers, strict=True))
        tier_of[NO_ENTRY] = min(Tier)
        highest = list(map(tier_of.__getitem__, catalog.ends))
        nbytes = dict.fromkeys(map(int, Tier), 0)
        above = catalog.above
        for place in range(len(highest) - 1, catalog.first - 1, -1):
            tier = highest[place]
            nbytes[tier] += catalog.shares[place]
            if highest[above[place]] < tier:
                highest[above[place]] = tier
        amounts = self._amounts(nbytes, catalog.table.tiers)
        return {tier: amounts[tier] for tier in Tier}

    @cached_property
    def by_model(self) -> dict[str, Amount]:
        """Per fingerprint, those without entries left out."""
        catalog = self.catalog
        key_of = catalog.fingerprints
        # The roots come first, in the order of the namespaces.
        models = list(key_of.values())
        nbytes: Counter[str] = Counter()
        for place in range(catalog.first, len(catalog.above)):
            model = models[catalog.above[place]]
            models.append(model)
            nbytes[model] += catalog.shares[place]
        return self._amounts(nbytes, [key_of[one] for one in catalog.table.namespaces])

    @cached_property
    def left_behind(self) -> list[LeftBehind]:
        """What an upgrade left behind, by reason, the most bytes first; no model is looked at."""
        reasons = {key: outdated_reason(self.models[key]) for key in self.by_model}
        table = self.catalog.table
        pinned = Counter(
            self.fingerprints[namespace] for namespace in compress(table.namespaces, table.pinned)
        )
        found: dict[str, LeftBehind] = {}
        for key, reason in reasons.items():
            if reason:
                before = found.get(reason, LeftBehind(reason, 0, 0, 0))
                amount = self.by_model[key]
                found[reason] = LeftBehind(
                    reason,
                    before.entries + amount.entries,
                    before.nbytes + amount.nbytes,
                    before.pinned + pinned[key],
                )
        return sorted(found.values(), key=lambda one: -one.nbytes)

    @cached_property
    def saved_s(self) -> float:
        """Seconds of prefill that the hits of all entries saved."""
        return sum(self.catalog.table.saved_s)

    def _amounts(self, nbytes: Mapping[K, int], keys: Sequence[K]) -> dict[K, Amount]:
        """Totals of the entries with the same key; `nbytes` are those of their rows."""
        table = self.catalog.table
        numbers = {key: [0, amount, 0] for key, amount in nbytes.items()}
        seconds = dict.fromkeys(nbytes, 0.0)
        for key, checkpoint, hits, saved_s in zip(
            keys,
            self.catalog.checkpoint_bytes(table.checkpoints),
            table.hits,
            table.saved_s,
            strict=True,
        ):
            sums = numbers[key]
            sums[0] += 1
            sums[1] += checkpoint
            sums[2] += hits
            seconds[key] += saved_s
        return {
            key: Amount(entries, amount, hits, seconds[key])
            for key, (entries, amount, hits) in numbers.items()
        }


def quarantined(store: Store) -> list[Quarantined]:
    """Damaged blobs that are kept aside."""
    with store.read() as txn:
        return [
            Quarantined(name.hex(), record.nbytes, record.since, record.note)
            for name, record in txn.sized(b"quarantine").items()
        ]
