"""What is in a store, for people: entries with their sizes, totals, and counters.

One pass over the index, however many entries there are; no file is opened.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

from msgspec import Struct

from persist_cache.budget import Usage, written_today
from persist_cache.disk import Disk
from persist_cache.entry import Entry, Tier
from persist_cache.index import Reader
from persist_cache.records import (
    NO_BLOB,
    NO_ENTRY,
    Edge,
    EntryRecord,
    edge_parent,
    entry_id,
)


class TierStats(Struct, frozen=True):
    """Entries of one tier, and the bytes that only one of them needs."""

    entries: int = 0
    own_bytes: int = 0


class StoreStats(Struct, frozen=True):
    """Totals of a store.

    Attributes:
        path: Its folder.
        entries: Number of entries.
        blobs: Number of files.
        usage: Bytes on disk by what they are for.
        max_bytes: Budget.
        min_free_bytes: Free space that is left alone.
        free_bytes: Free on the file system now.
        daily_write_bytes: Write budget per UTC day, or None.
        written_today: Bytes written on this UTC day.
        written_bytes: Bytes written in the store's life.
        tiers: Per tier label.
        counters: Hits, misses by reason, evictions, quarantined, and so on, over its life.
    """

    path: str
    entries: int
    blobs: int
    usage: Usage
    max_bytes: int
    min_free_bytes: int
    free_bytes: int
    daily_write_bytes: int | None
    written_today: int
    written_bytes: int
    tiers: Mapping[str, TierStats] = {}
    counters: Mapping[str, int] = {}


class Catalog:
    """The whole index, loaded once for listing; linear in what is stored."""

    def __init__(self, txn: Reader) -> None:
        self.namespaces = {record.number: (key, record) for key, record in txn.namespaces()}
        self._fingerprints = {
            number: key[:32].hex() for number, (key, _) in self.namespaces.items()
        }
        self.blobs = dict(txn.blobs())
        self.records = dict(txn.entries())
        self.edges = {edge.node: (edge_parent(key), edge) for key, edge in txn.edges()}
        """Per node the node above it, and the edge between them."""
        self.order = sorted(self.edges, key=self._depth)
        """Nodes with edges, each behind the one above it."""
        self.users = self.count_users(lambda entry: True)
        self._sums = self._add_up()

    def entries(self) -> list[Entry]:
        """All entries, in the order of their ids."""
        return [self.entry(number, record) for number, record in self.records.items()]

    def entry(self, number: int, record: EntryRecord) -> Entry:
        own, shared, _ = self._sums[record.node]
        if record.checkpoint != NO_BLOB:
            own += self.blobs[record.checkpoint].disk_bytes
        parent = self._sums[self.edges[record.node][0]][2]
        return Entry(
            id=entry_id(number),
            fingerprint=self._fingerprints.get(record.namespace, ""),
            tier=record.tier,
            num_tokens=record.num_tokens,
            own_bytes=own,
            shared_bytes=shared,
            created=record.created_us / 1e6,
            last_use=record.last_use_us / 1e6,
            hits=record.hits,
            saved_s=record.saved_s,
            prefill_s=record.prefill_s,
            pinned=record.pinned,
            expires=record.expires or None,
            label=record.label,
            parent=None if parent == NO_ENTRY else entry_id(parent),
        )

    def count_users(self, counts: Callable[[int], bool]) -> Counter[int]:
        """Entries at or below each node for which `counts` is true of their number."""
        users: Counter[int] = Counter()
        for node in reversed(self.order):
            parent, edge = self.edges[node]
            if edge.entry != NO_ENTRY and counts(edge.entry):
                users[node] += 1
            if users[node]:
                users[parent] += users[node]
        return users

    def share(self, edge: Edge) -> int:
        """The part of a file that belongs to an edge, by rows."""
        blob = self.blobs[edge.blob]
        return blob.disk_bytes * edge.rows // (blob.num_tokens or 1)

    def _depth(self, node: int) -> int:
        edge = self.edges[node][1]
        return self.blobs[edge.blob].start + edge.first_row

    def _add_up(self) -> dict[int, tuple[int, int, int]]:
        """Per node: bytes above it that one entry needs, that several share; the last entry."""
        sums = {record.root: (0, 0, NO_ENTRY) for _, record in self.namespaces.values()}
        for node in self.order:
            parent, edge = self.edges[node]
            own, shared, above = sums[parent]
            if self.users[node] == 1:
                own += self.share(edge)
            else:
                shared += self.share(edge)
            sums[node] = own, shared, edge.entry or above
        return sums


def store_stats(disk: Disk, catalog: Catalog | None = None) -> StoreStats:
    """Totals, budget and counters of a store.

    Args:
        disk: The store.
        catalog: Its index, if that has just been loaded.
    """
    with disk.index.read() as txn:
        catalog = catalog or Catalog(txn)
        usage = disk.budget.usage(txn)
        counters = Counter(txn.counts())
        counters.update(disk.counts())
        written_bytes = txn.counter("written_bytes")
        number_of_blobs = txn.size_of(b"blobs")
        today = txn.counter(written_today(disk.clock()))
    entries = catalog.entries()
    sums: defaultdict[Tier, list[int]] = defaultdict(lambda: [0, 0])
    for entry in entries:
        sums[entry.tier][0] += 1
        sums[entry.tier][1] += entry.own_bytes
    return StoreStats(
        path=str(disk.root),
        entries=len(entries),
        blobs=number_of_blobs,
        usage=usage,
        max_bytes=disk.limits.max_bytes,
        min_free_bytes=disk.limits.min_free_bytes,
        free_bytes=disk.budget.free_bytes(),
        daily_write_bytes=disk.limits.daily_write_bytes,
        written_today=today,
        written_bytes=written_bytes,
        tiers={tier.label: TierStats(*sums[tier]) for tier in Tier},
        counters=dict(sorted(counters.items())),
    )
