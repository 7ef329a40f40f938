"""What is in a store, for people: entries with their sizes, totals, and counters.

One pass over the index, however many entries there are; no file is opened.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from persist_cache.budget import Usage, written_today
from persist_cache.disk import Disk
from persist_cache.entry import Entry, Tier
from persist_cache.index import Reader
from persist_cache.records import (
    NO_BLOB,
    NO_ENTRY,
    BlobRecord,
    Edge,
    EntryRecord,
    edge_parent,
    entry_id,
)


@dataclass(frozen=True, slots=True)
class TierStats:
    """Entries of one tier, and the tokens on their paths that no lower tier shares."""

    entries: int = 0
    own_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StoreStats:
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
    tiers: Mapping[str, TierStats] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)


class Catalog:
    """The whole index, loaded once for listing."""

    def __init__(self, txn: Reader) -> None:
        self._edges = dict(txn.edges())
        self._blobs = dict(txn.blobs())
        self._records = dict(txn.entries())
        self._fingerprints = {record.number: key[:32].hex() for key, record in txn.namespaces()}
        self._by_node = {edge.node: (key, edge) for key, edge in self._edges.items()}
        self._users = self._count_users()

    def entries(self) -> list[Entry]:
        """All entries, in the order of their ids."""
        return [self.entry(number, record) for number, record in self._records.items()]

    def entry(self, number: int, record: EntryRecord) -> Entry:
        own, shared = self._sizes(record)
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
            parent=self._parent_entry(record),
        )

    def _count_users(self) -> Counter[int]:
        """Entries at or below each node: deepest nodes first, each adds to its parent."""
        users: Counter[int] = Counter()
        position = {
            node: self._blobs[edge.blob].start + edge.first_row + edge.rows
            for node, (_, edge) in self._by_node.items()
        }
        for node in sorted(position, key=position.__getitem__, reverse=True):
            key, edge = self._by_node[node]
            if edge.entry != NO_ENTRY:
                users[node] += 1
            users[edge_parent(key)] += users[node]
        return users

    def _sizes(self, record: EntryRecord) -> tuple[int, int]:
        """Bytes that only this entry needs, and bytes that it shares."""
        own = 0 if record.checkpoint == NO_BLOB else self._blobs[record.checkpoint].disk_bytes
        shared = 0
        found = self._by_node.get(record.node)
        while found is not None:
            key, edge = found
            nbytes = _share(edge, self._blobs[edge.blob])
            if self._users[edge.node] == 1:
                own += nbytes
            else:
                shared += nbytes
            found = self._by_node.get(edge_parent(key))
        return own, shared

    def _parent_entry(self, record: EntryRecord) -> str | None:
        """The nearest entry above, for drawing the tree."""
        key, _ = self._by_node[record.node]
        found = self._by_node.get(edge_parent(key))
        while found is not None:
            key, edge = found
            if edge.entry != NO_ENTRY:
                return entry_id(edge.entry)
            found = self._by_node.get(edge_parent(key))
        return None


def _share(edge: Edge, blob: BlobRecord) -> int:
    """The part of a file that belongs to an edge, by rows."""
    return blob.disk_bytes * edge.rows // max(1, blob.num_tokens)


def store_stats(disk: Disk) -> StoreStats:
    """Totals, budget and counters of a store."""
    with disk.index.read() as txn:
        catalog = Catalog(txn)
        usage = disk.budget.usage(txn)
        counters = Counter(txn.counters()) + disk.counts()
        number_of_blobs = txn.size_of(b"blobs")
        today = txn.counter(written_today(disk.clock()))
    entries = catalog.entries()
    sums: defaultdict[Tier, list[int]] = defaultdict(lambda: [0, 0])
    for entry in entries:
        sums[entry.tier][0] += 1
        sums[entry.tier][1] += entry.own_bytes
    internal = ("schema", "created", "next_", "written:", "max_bytes", "min_free", "daily_")
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
        written_bytes=counters["written_bytes"],
        tiers={tier.label: TierStats(*sums[tier]) for tier in Tier},
        counters={
            name: value for name, value in sorted(counters.items()) if not name.startswith(internal)
        },
    )
