"""What is in a store, for people: entries with their sizes, totals, and counters.

One pass over the index, however many entries there are; no file is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from itertools import count, islice, repeat
from math import isfinite
from operator import add, ge, truediv
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct

from persist_cache.entry import Entry
from persist_cache.index import tree
from persist_cache.index.columns import BlobColumns, EdgeColumns
from persist_cache.index.records import (
    NO_BLOB,
    NO_ENTRY,
    BlobRecord,
    EntryRecord,
    NamespaceRecord,
    entry_id,
    entry_ids,
    tiers_of,
)
from persist_cache.index.transaction import Reader
from persist_cache.store import lifetimes
from persist_cache.store.budget import WRITTEN_BYTES, Usage, written_today
from persist_cache.store.quotas import Used
from persist_cache.store.session import Disk

if TYPE_CHECKING:
    from persist_cache.fingerprint.value import Fingerprint

T = TypeVar("T")


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
        eviction_paused: Why nothing is evicted for the free-space floor at present, or "".
        quotas: How much of each quota is used, the fullest first.
        ttl: Default lifetimes in seconds.
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
    eviction_paused: str = ""
    quotas: tuple[Used, ...] = ()
    ttl: Mapping[str, int] = {}


class Catalog:
    """The whole index, loaded once for listing; linear in what is stored.

    It consists of columns: to add up along the tree takes a third to a half of the time that it
    takes with an object for each record. A node has a *place* in those of the tree, behind that
    of the node above it. An entry has a *row* in its own columns.

    Attributes:
        namespaces: Records with their keys, by number.
        fingerprints: In hex, by the namespace's number.
        places: Per node its place; the roots come first.
        first: Place of the first node that is no root.
        above: Per place that of the node above; a root's is its own.
        ends: Per place the entry that ends there, or `NO_ENTRY`.
        blobs: Per place the blob that the edge above it is of.
        shares: Per place the bytes of that blob that belong to the edge, by rows.
        users: Per place the number of entries there or below.
        kept_s: Per entry the seconds that it is kept behind each use, where that was asked for.
        groups: Per entry the groups that it belongs to, where it does.
        expires: Per row when the entry expires, in UTC seconds, 0 for never.
        disk_bytes: Per blob what it takes on disk.
        table: The entries.
        rows: Per entry its row.
    """

    def __init__(self, txn: Reader) -> None:
        self.namespaces = {record.number: (key, record) for key, record in txn.namespaces()}
        self.fingerprints = {number: key[:32].hex() for number, (key, _) in self.namespaces.items()}
        self.table = txn.entry_columns()
        self.rows = {number: row for row, number in enumerate(self.table.numbers)}
        self.kept_s = txn.all_kept_s()
        self.groups = txn.all_groups()
        self.expires = lifetimes.ends(self.table, lifetimes.of_store(txn))
        blobs = txn.blob_columns()
        self.disk_bytes = dict(zip(blobs.numbers, blobs.disk_bytes, strict=True))
        try:
            self._load_tree(txn.edge_columns(), blobs)
        except KeyError as error:
            raise tree.damaged(f"an edge names blob or node {error}, which has no record") from None
        self._refuse_contradictions()
        self.users = self.count_users()

    def _refuse_contradictions(self) -> None:
        """See now that no sum along the tree can fail: an eviction may have begun by then."""
        if not self.fingerprints.keys() >= set(self.table.namespaces):
            raise tree.damaged("an entry names a namespace without record")
        if not self.rows.keys() >= set(self.ends) - {NO_ENTRY}:
            raise tree.damaged("an edge names an entry without record")
        if not self.places.keys() >= set(self.table.nodes):
            raise tree.damaged("an entry names a node without record")
        if not self.disk_bytes.keys() >= set(self.table.checkpoints) - {NO_BLOB}:
            raise tree.damaged("an entry names a checkpoint without record")
        if any(map(ge, islice(self.above, self.first, None), count(self.first))):
            raise tree.damaged("an edge begins before the one above it")
        if not all(map(isfinite, self.table.expires)):
            raise tree.damaged("an entry expires at no time")

    def _load_tree(self, edges: EdgeColumns, blobs: BlobColumns) -> None:
        starts = dict(zip(blobs.numbers, blobs.starts, strict=True))
        depths = list(map(add, map(starts.__getitem__, edges.blobs), edges.first_rows))
        order = sorted(range(len(depths)), key=depths.__getitem__)
        roots = [record.root for _, record in self.namespaces.values()]
        self.first = first = len(roots)
        self.places = dict(zip(roots, range(first), strict=True))
        self.places |= zip(map(edges.nodes.__getitem__, order), count(first))
        parents = map(edges.parents.__getitem__, order)
        self.above = [*range(first), *map(self.places.__getitem__, parents)]
        self.ends = [*repeat(NO_ENTRY, first), *map(edges.entries.__getitem__, order)]
        self.blobs = [*repeat(NO_BLOB, first), *map(edges.blobs.__getitem__, order)]
        num_tokens = dict(zip(blobs.numbers, blobs.num_tokens, strict=True))
        shares = [
            rows_bytes(self.disk_bytes[blob], num_tokens[blob], rows)
            for blob, rows in zip(edges.blobs, edges.rows, strict=True)
        ]
        self.shares = [*repeat(0, first), *map(shares.__getitem__, order)]

    def columns(
        self, rows: Sequence[int], fields: Sequence[str] = Entry.__struct_fields__
    ) -> dict[str, Sequence[Any]]:
        """The `fields` of the entries in these `rows`, by name."""
        table = self.table
        is_all = rows == range(len(self.rows))

        def of(column: Sequence[T]) -> Sequence[T]:
            # Records in the order of memory are read in a third of the time.
            return column if is_all else list(map(column.__getitem__, rows))

        places = list(map(self.places.__getitem__, of(table.nodes)))
        own, shared, above = self._sums

        def own_bytes() -> list[int]:
            checkpoints = self.checkpoint_bytes(of(table.checkpoints))
            return list(map(add, map(own.__getitem__, places), checkpoints))

        def parents() -> list[str | None]:
            numbers = list(map(above.__getitem__, places))
            names = zip(numbers, entry_ids(numbers), strict=True)
            return [None if number == NO_ENTRY else name for number, name in names]

        makers: dict[str, Callable[[], Sequence[Any]]] = {
            "id": lambda: of(self.ids),
            "fingerprint": lambda: list(map(self.fingerprints.__getitem__, of(table.namespaces))),
            "tier": lambda: tiers_of(of(table.tiers)),
            "num_tokens": lambda: of(table.num_tokens),
            "own_bytes": own_bytes,
            "shared_bytes": lambda: list(map(shared.__getitem__, places)),
            "created": lambda: list(map(truediv, of(table.created_us), repeat(1e6))),
            "last_use": lambda: list(map(truediv, of(table.last_uses_us), repeat(1e6))),
            "hits": lambda: of(table.hits),
            "saved_s": lambda: of(table.saved_s),
            "prefill_s": lambda: of(table.prefills_s),
            "pinned": lambda: list(map(bool, of(table.pinned))),
            "expires": lambda: [when or None for when in of(self.expires)],
            "label": lambda: of(table.labels),
            "parent": parents,
            "keep_s": lambda: [self.kept_s.get(number, 0) for number in of(table.numbers)],
            "groups": lambda: [self.groups.get(number, ()) for number in of(table.numbers)],
        }
        return {field: makers[field]() for field in fields}

    def entries(self, rows: Sequence[int] | None = None) -> list[Entry]:
        """The entries in these `rows`; all, in the order of their ids, when None."""
        chosen = range(len(self.rows)) if rows is None else rows
        return list(map(Entry, *self.columns(chosen).values()))

    def checkpoint_bytes(self, checkpoints: Sequence[int]) -> list[int]:
        """Bytes on disk of each of these checkpoints, 0 where there is none."""
        return [0 if one == NO_BLOB else self.disk_bytes[one] for one in checkpoints]

    def count_users(self, without: Collection[int] = ()) -> list[int]:
        """Per place the entries there or below, those `without` left out."""
        users = [entry != NO_ENTRY and entry not in without for entry in self.ends]
        return self.sum_upwards(list(map(int, users)))

    def sum_upwards(self, amounts: list[int]) -> list[int]:
        """Add to each place what is at all places below it; changes `amounts` and returns it."""
        above = self.above
        for place in range(len(amounts) - 1, self.first - 1, -1):
            amounts[above[place]] += amounts[place]
        return amounts

    @cached_property
    def ids(self) -> list[str]:
        """Per row the entry's id; they are sorted."""
        return entry_ids(self.table.numbers)

    @cached_property
    def _sums(self) -> tuple[list[int], list[int], list[int]]:
        """Per place: bytes down to it that one entry needs, that several share; the entry above."""
        own, shared, before = [0] * self.first, [0] * self.first, [NO_ENTRY] * self.first
        ends = self.ends
        users, shares = self.users, self.shares
        for place in range(self.first, len(ends)):
            parent = self.above[place]
            mine = users[place] == 1
            own.append(own[parent] + shares[place] if mine else own[parent])
            shared.append(shared[parent] if mine else shared[parent] + shares[place])
            before.append(ends[parent] or before[parent])
        return own, shared, before


def load_entry(txn: Reader, number: int) -> Entry | None:
    """One entry; reads only what is on its path."""
    record = txn.entry(number)
    if record is None:
        return None
    own = shared = 0
    parent, is_own = NO_ENTRY, True
    for _, edge in reversed(tree.path_of(txn, record.node)):
        is_end = edge.node == record.node
        if not is_end and edge.entry != NO_ENTRY:
            parent = parent or edge.entry
            is_own = False
        # What else hangs below a node needs all that is above it.
        is_own = is_own and len(txn.children(edge.node, limit=2)) == (0 if is_end else 1)
        blob = known_blob(txn, edge.blob)
        share = rows_bytes(blob.disk_bytes, blob.num_tokens, edge.rows)
        own, shared = (own + share, shared) if is_own else (own, shared + share)
    if record.checkpoint != NO_BLOB:
        own += known_blob(txn, record.checkpoint).disk_bytes
    return Entry(
        id=entry_id(number),
        fingerprint=namespace_of(txn, record)[0][:32].hex(),
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
        expires=_expires(txn, record),
        label=record.label,
        parent=None if parent == NO_ENTRY else entry_id(parent),
        keep_s=txn.kept_s(number),
        groups=txn.groups(number),
    )


def _expires(txn: Reader, record: EntryRecord) -> float | None:
    """When an entry expires: by a date of its own, or else by default."""
    lives = None if record.expires else lifetimes.of_store(txn)
    seconds = None if lives is None else lives(record.tier, record.namespace)
    if seconds is None:
        return record.expires or None
    return record.created_us / 1e6 + seconds


def namespace_of(txn: Reader, record: EntryRecord) -> tuple[bytes, NamespaceRecord]:
    """The namespace of an entry, with its key."""
    for key, namespace in txn.namespaces():
        if namespace.number == record.namespace:
            return key, namespace
    raise tree.damaged("an entry names a namespace without record")


def identity_of(record: NamespaceRecord) -> Fingerprint:
    """The model whose entries a namespace has."""
    from persist_cache.fingerprint.value import Fingerprint

    try:
        return Fingerprint.from_json(record.identity.encode())
    except ValueError as error:
        raise tree.damaged(f"the identity of a model is {error}") from None


def known_blob(txn: Reader, number: int) -> BlobRecord:
    record = txn.blob(number)
    if record is None:
        raise tree.damaged("it names a blob without record")
    return record


def rows_bytes(disk_bytes: int, num_tokens: int, rows: int) -> int:
    """The part that `rows` are of a file of `num_tokens` rows."""
    return disk_bytes * rows // (num_tokens or 1)


def store_stats(disk: Disk) -> StoreStats:
    """Totals, budget and counters of a store; takes no longer when there are more entries."""

    def written() -> Mapping[str, int]:
        with disk.index.read() as txn:
            return txn.counts()

    counters = disk.counted(written)
    with disk.index.read() as txn:
        usage = disk.budget.usage(txn)
        written_bytes = txn.counter(WRITTEN_BYTES)
        number_of_entries = txn.size_of(b"entries")
        number_of_blobs = txn.size_of(b"blobs")
        today = txn.counter(written_today(disk.clock()))
        paused = disk.unreturned.said(txn)
        quotas, ttl = tuple(disk.quotas.used(txn)), txn.numbers(lifetimes.TTL)
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
        eviction_paused=paused,
        quotas=quotas,
        ttl=ttl,
    )
