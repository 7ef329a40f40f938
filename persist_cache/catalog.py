"""What is in a store, for people: entries with their sizes, totals, and counters.

One pass over the index, however many entries there are; no file is opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from msgspec import Struct

from persist_cache import paths
from persist_cache.budget import Usage, written_today
from persist_cache.disk import Disk
from persist_cache.entry import Entry
from persist_cache.index import Reader
from persist_cache.records import (
    NO_BLOB,
    NO_ENTRY,
    BlobRecord,
    BlobSize,
    Edge,
    EntryRecord,
    NamespaceRecord,
    entry_id,
)


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
    counters: Mapping[str, int] = {}


class Catalog:
    """The whole index, loaded once for listing; linear in what is stored."""

    def __init__(self, txn: Reader) -> None:
        self.namespaces = {record.number: (key, record) for key, record in txn.namespaces()}
        self._fingerprints = {
            number: key[:32].hex() for number, (key, _) in self.namespaces.items()
        }
        self.blobs = dict(txn.blob_sizes())
        self.records = dict(txn.entries())
        self.edges = {edge.node: (parent, edge) for parent, edge in txn.links()}
        """Per node the node above it, and the edge between them."""
        self.shares: dict[int, int] = {}
        """Per node the part of a file that belongs to the edge above it, by rows."""
        depths: dict[int, int] = {}
        for node, (_, edge) in self.edges.items():
            blob = self.blobs[edge.blob]
            self.shares[node] = rows_bytes(blob, edge)
            depths[node] = blob.start + edge.first_row
        self.order = sorted(depths, key=depths.__getitem__)
        """Nodes with edges, each behind the one above it."""
        self.users = self.count_users()
        self._sums = self._add_up()

    def entries(self) -> list[Entry]:
        """All entries, in the order of their ids."""
        return [self.entry(number, record) for number, record in self.records.items()]

    def entry(self, number: int, record: EntryRecord) -> Entry:
        own, shared, parent, _ = self._sums[record.node]
        return make_entry(
            number,
            record,
            fingerprint=self.fingerprint(record),
            own_bytes=own + self.checkpoint_bytes(record),
            shared_bytes=shared,
            parent=parent,
        )

    def fingerprint(self, record: EntryRecord) -> str:
        return self._fingerprints.get(record.namespace, "")

    def checkpoint_bytes(self, record: EntryRecord) -> int:
        if record.checkpoint == NO_BLOB:
            return 0
        return self.blobs[record.checkpoint].disk_bytes

    def count_users(self, without: Collection[int] = ()) -> dict[int, int]:
        """Entries at or below each node, those `without` left out."""
        users = dict.fromkeys(self.edges, 0)
        users |= dict.fromkeys((record.root for _, record in self.namespaces.values()), 0)
        for node in reversed(self.order):
            parent, edge = self.edges[node]
            if edge.entry != NO_ENTRY and edge.entry not in without:
                users[node] += 1
            users[parent] += users[node]
        return users

    def _add_up(self) -> dict[int, tuple[int, int, int, int]]:
        """Per node: bytes above it that one entry needs, that several share; the last entries.

        The one above the node, and the one at it or above.
        """
        roots = (record.root for _, record in self.namespaces.values())
        sums = dict.fromkeys(roots, (0, 0, NO_ENTRY, NO_ENTRY))
        for node in self.order:
            parent, edge = self.edges[node]
            own, shared, _, above = sums[parent]
            if self.users[node] == 1:
                own += self.shares[node]
            else:
                shared += self.shares[node]
            sums[node] = own, shared, above, edge.entry or above
        return sums


def make_entry(
    number: int,
    record: EntryRecord,
    *,
    fingerprint: str,
    own_bytes: int,
    shared_bytes: int,
    parent: int,
) -> Entry:
    """An entry as people see it; `parent` is the number of the one that it continues."""
    return Entry(
        id=entry_id(number),
        fingerprint=fingerprint,
        tier=record.tier,
        num_tokens=record.num_tokens,
        own_bytes=own_bytes,
        shared_bytes=shared_bytes,
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


def load_entry(txn: Reader, number: int) -> Entry | None:
    """One entry; reads only what is on its path."""
    record = txn.entry(number)
    if record is None:
        return None
    own = shared = 0
    parent, is_own = NO_ENTRY, True
    for _, edge in reversed(paths.path_of(txn, record.node)):
        is_end = edge.node == record.node
        if not is_end and edge.entry != NO_ENTRY:
            parent = parent or edge.entry
            is_own = False
        # What else hangs below a node needs all that is above it.
        is_own = is_own and len(txn.children(edge.node, limit=2)) == (0 if is_end else 1)
        share = rows_bytes(known_blob(txn, edge.blob), edge)
        own, shared = (own + share, shared) if is_own else (own, shared + share)
    if record.checkpoint != NO_BLOB:
        own += known_blob(txn, record.checkpoint).disk_bytes
    return make_entry(
        number,
        record,
        fingerprint=namespace_of(txn, record)[0][:32].hex(),
        own_bytes=own,
        shared_bytes=shared,
        parent=parent,
    )


def namespace_of(txn: Reader, record: EntryRecord) -> tuple[bytes, NamespaceRecord]:
    """The namespace of an entry, with its key."""
    for key, namespace in txn.namespaces():
        if namespace.number == record.namespace:
            return key, namespace
    raise paths.damaged("an entry names a namespace without record")


def known_blob(txn: Reader, number: int) -> BlobRecord:
    record = txn.blob(number)
    if record is None:
        raise paths.damaged("it names a blob without record")
    return record


def rows_bytes(blob: BlobRecord | BlobSize, edge: Edge) -> int:
    """The part of a file that belongs to an edge, by rows."""
    return blob.disk_bytes * edge.rows // (blob.num_tokens or 1)


def store_stats(disk: Disk) -> StoreStats:
    """Totals, budget and counters of a store; takes no longer when there are more entries."""
    with disk.index.read() as txn:
        usage = disk.budget.usage(txn)
        counters = Counter(txn.counts())
        counters.update(disk.counts())
        written_bytes = txn.counter("written_bytes")
        number_of_entries = txn.size_of(b"entries")
        number_of_blobs = txn.size_of(b"blobs")
        today = txn.counter(written_today(disk.clock()))
    return StoreStats(
        path=str(disk.root),
        entries=number_of_entries,
        blobs=number_of_blobs,
        usage=usage,
        max_bytes=disk.limits.max_bytes,
        min_free_bytes=disk.limits.min_free_bytes,
        free_bytes=disk.budget.free_bytes(),
        daily_write_bytes=disk.limits.daily_write_bytes,
        written_today=today,
        written_bytes=written_bytes,
        counters=dict(sorted(counters.items())),
    )
