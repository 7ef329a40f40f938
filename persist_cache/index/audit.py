"""Whether an index keeps the invariants of `tree`: each is checked for every record there is.

This is what tests and `persist-cache check` believe, so it has to be seen to be right: every
invariant is a plain loop over records, and reads like its sentence in `docs/format.md`. All of it
is linear in what is stored.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import xxhash

from persist_cache.index.records import (
    EDGE_KEY,
    END_OF_TIME_S,
    NO_BLOB,
    NO_ENTRY,
    BlobKind,
    BlobRecord,
    Edge,
    EntryRecord,
    NamespaceRecord,
    entry_id,
    namespace_key,
)
from persist_cache.index.transaction import Reader
from persist_cache.index.tree import BLOB_BYTES, NEXT_NODE

FINGERPRINT_BYTES = 32
END_OF_NUMBERS = (1 << 64) - 1


class Filed(NamedTuple):
    """An edge and what its key says of it.

    Attributes:
        key: All of the key.
        parent: The node at the upper end.
        token: The first token, packed.
        edge: The record.
    """

    key: bytes
    parent: int
    token: bytes
    edge: Edge


class Records(NamedTuple):
    """All records that make up the trees, each kind by its number where it has one."""

    edges: Sequence[Filed]
    blobs: dict[int, BlobRecord]
    entries: dict[int, EntryRecord]
    spaces: Sequence[tuple[bytes, NamespaceRecord]]

    @classmethod
    def of(cls, txn: Reader) -> Records:
        """Read all of them.

        Raises:
            StoreFormatError, struct.error, UnicodeDecodeError: One of them cannot be read.
        """
        return cls(
            edges=[_filed(key, edge) for key, edge in txn.edges()],
            blobs=dict(txn.blobs()),
            entries=dict(txn.entries()),
            spaces=txn.namespaces(),
        )


def _filed(key: bytes, edge: Edge) -> Filed:
    parent, token = EDGE_KEY.unpack(key)
    return Filed(key, parent, token, edge)


def broken_invariants(txn: Reader) -> list[str]:
    """A sentence for each invariant that does not hold; empty for a sound index.

    Raises:
        StoreError: A record cannot even be read.
    """
    found = Records.of(txn)
    depths = _depths(found)
    ways = _ways_from_roots(found)
    return [
        *_shape(txn, found),
        *_places(found, depths),
        *_rows(txn, found),
        *_leaves(found),
        *_entries(found, depths),
        *_resumable(found, ways),
        *_models(found, ways),
        *_orders(txn, found),
        *_blobs(txn, found),
        *_spaces(found),
        *(
            f"{counter} is smaller than a number that was given"
            for counter, _ in too_small(txn, found)
        ),
        *(
            f"entry {entry_id(number)} should have the number {entry_id(right)}"
            for number, right in misnumbered(txn, found)
        ),
    ]


def _begin(found: Records, edge: Edge) -> int:
    """Position of the first token of an edge: that of its rows."""
    blob = found.blobs.get(edge.blob)
    # An edge of an unknown blob is named as such; what else is said of it does not matter.
    return (-1 if blob is None else blob.start) + edge.first_row


def _depths(found: Records) -> dict[int, int]:
    """How many tokens lead to each node, by the rows of the edge above it."""
    depths = {one.edge.node: _begin(found, one.edge) + one.edge.rows for one in found.edges}
    for _, space in found.spaces:
        depths[space.root] = 0
    return depths


class _Way(NamedTuple):
    """The way to a node: the root it begins at, and whether all of it has rows of all layers."""

    root: int
    is_complete: bool


def _ways_from_roots(found: Records) -> dict[int, _Way]:
    """The ways to all nodes that can be reached."""
    below: dict[int, list[Edge]] = defaultdict(list)
    for one in found.edges:
        below[one.parent].append(one.edge)
    ways: dict[int, _Way] = {}
    for _, space in found.spaces:
        pending = [(space.root, _Way(space.root, True))]
        while pending:
            node, way = pending.pop()
            ways[node] = way
            # Taken out, so that a circle in a damaged index ends.
            for edge in below.pop(node, ()):
                pending.append((edge.node, _Way(way.root, way.is_complete and edge.complete)))
    return ways


def _shape(txn: Reader, found: Records) -> Iterator[str]:
    """Whether the edges are trees below the roots, and each node knows the edge above it.

    There is no circle if each edge has rows and begins where its parent lies, which is checked
    elsewhere: depth would have to grow all the way round.
    """
    roots = {space.root for _, space in found.spaces}
    times = Counter(one.edge.node for one in found.edges)
    times.update(roots)
    for node, reached in times.items():
        if reached > 1:
            yield f"node {node} is reached twice"
    above = {one.edge.node: one.key for one in found.edges}
    nodes, keys = txn.parents()
    way_back = dict(zip(nodes, map(bytes, keys), strict=True))
    for node, key in above.items():
        if way_back.get(node) != key:
            yield f"node {node} does not know its way back"
    if len(way_back) != len(above):
        yield f"{len(found.edges)} edges but {len(way_back)} ways back"
    lost = sum(one.parent not in above and one.parent not in roots for one in found.edges)
    if lost:
        yield f"{lost} edges cannot be reached from a root"


def _places(found: Records, depths: dict[int, int]) -> Iterator[str]:
    """Whether each edge begins where the node above it lies."""
    for one in found.edges:
        if depths.get(one.parent) != _begin(found, one.edge):
            yield f"node {one.edge.node} begins elsewhere than its rows"


def _rows(txn: Reader, found: Records) -> Iterator[str]:
    """Whether every edge uses rows that its blob has, under their first token, from row 0 on."""
    for one in found.edges:
        edge, blob = one.edge, found.blobs.get(one.edge.blob)
        if blob is None:
            yield f"node {edge.node} hangs on blob {edge.blob}, which is unknown"
        elif not edge.rows or edge.first_row + edge.rows > blob.num_tokens:
            yield f"node {edge.node} uses rows that blob {blob.name.hex()} lacks"
    first_tokens = txn.first_tokens()
    for one in found.edges:
        token = first_tokens.get(one.edge.blob)
        if one.edge.first_row:
            token = txn.tokens(one.edge.blob, one.edge.first_row, 1)
        if token != one.token:
            yield f"node {one.edge.node} is filed under another token"
    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for one in found.edges:
        spans[one.edge.blob].append((one.edge.first_row, one.edge.rows))
    for number in sorted(spans.keys() & found.blobs.keys()):
        covered, has_gap = 0, False
        for first_row, rows in sorted(spans[number]):
            has_gap |= first_row != covered
            covered += rows
        if has_gap:
            yield f"blob {found.blobs[number].name.hex()} has dead rows before living ones"


def _leaves(found: Records) -> Iterator[str]:
    """Whether every node without entry branches, or changes from one blob to another."""
    children = Counter(one.parent for one in found.edges)
    above = {one.edge.node: one.edge for one in found.edges}
    for one in found.edges:
        if one.edge.entry == NO_ENTRY and not children[one.edge.node]:
            yield f"node {one.edge.node} is a leaf without entry"
    for one in found.edges:
        before = above.get(one.parent)
        if before is None or before.entry != NO_ENTRY or children[one.parent] != 1:
            continue
        if (before.blob, before.first_row + before.rows) == (one.edge.blob, one.edge.first_row):
            yield f"node {one.parent} should be merged with its only child"


def _entries(found: Records, depths: dict[int, int]) -> Iterator[str]:
    """Whether each entry lies at its node and depth, with a checkpoint made for just there."""
    nodes = {one.edge.entry: one.edge.node for one in found.edges if one.edge.entry != NO_ENTRY}
    for number, entry in found.entries.items():
        if nodes.get(number) != entry.node:
            yield f"entry {entry_id(number)} is not where it says it is"
    for number, entry in found.entries.items():
        if depths.get(entry.node) != entry.num_tokens:
            yield f"entry {entry_id(number)} has another length than its path"
    for number in sorted(nodes.keys() - found.entries.keys()):
        yield f"node {nodes[number]} carries entry {entry_id(number)}, which has no record"
    times = Counter(one.edge.entry for one in found.edges)
    for number in nodes:
        if times[number] > 1:
            yield f"entry {entry_id(number)} ends at {times[number]} nodes"
    for number, entry in found.entries.items():
        if entry.checkpoint == NO_BLOB:
            continue
        blob = found.blobs.get(entry.checkpoint)
        if blob is None or (blob.kind, blob.start) != (BlobKind.CHECKPOINT, entry.num_tokens):
            yield f"entry {entry_id(number)} names a checkpoint that is not its own"


def _resumable(found: Records, ways: dict[int, _Way]) -> Iterator[str]:
    """Whether each entry without a checkpoint has the rows of all layers from the root on."""
    for number, entry in found.entries.items():
        if entry.checkpoint == NO_BLOB:
            way = ways.get(entry.node)
            if way is None or not way.is_complete:
                this = entry_id(number)
                yield f"entry {this} has neither a checkpoint nor the rows of all layers"


def _models(found: Records, ways: dict[int, _Way]) -> Iterator[str]:
    """Whether each entry names the namespace that it lies in."""
    roots = {space.number: space.root for _, space in found.spaces}
    for number, entry in found.entries.items():
        way = ways.get(entry.node)
        if way is None or roots.get(entry.namespace) != way.root:
            yield (
                f"entry {entry_id(number)} names namespace {entry.namespace}, below whose root it "
                "does not lie"
            )


def _orders(txn: Reader, found: Records) -> Iterator[str]:
    """Whether eviction and expiry go through exactly the entries there are."""
    listed = sorted(zip(*txn.recency_columns(), strict=True))
    due = sorted(
        (int(entry.tier), entry.last_use_us, number) for number, entry in found.entries.items()
    )
    if listed != due:
        yield "the order of eviction does not list exactly the entries"
    expiring = set()
    for number, entry in found.entries.items():
        if entry.expires:
            is_date = 0 < entry.expires < END_OF_TIME_S
            expiring.add((int(entry.expires * 1e6) if is_date else -1, number))
    if set(zip(*txn.expiry_columns(), strict=True)) != expiring:
        yield "the order of expiry does not list exactly the entries that expire"


def _blobs(txn: Reader, found: Records) -> Iterator[str]:
    """Whether each blob is found by name, and counts the edges or entries that use it."""
    used = Counter(one.edge.blob for one in found.edges)
    used.update(entry.checkpoint for entry in found.entries.values())
    for number, blob in found.blobs.items():
        if used[number] != blob.references:
            yield (
                f"blob {blob.name.hex()} counts {blob.references} references "
                f"instead of {used[number]}"
            )
    names = dict(zip(*txn.names(), strict=True))
    for number, blob in found.blobs.items():
        if names.get(blob.name) != number:
            yield f"blob {blob.name.hex()} cannot be found by its name"
    if len(names) != len(found.blobs):
        yield f"{len(found.blobs)} blobs but {len(names)} names"
    total, counted = sum(blob.disk_bytes for blob in found.blobs.values()), txn.counter(BLOB_BYTES)
    if total != counted:
        yield f"blobs sum up to {total} bytes, the counter says {counted}"


def _spaces(found: Records) -> Iterator[str]:
    """Whether each namespace is the one of its key."""
    for key, space in found.spaces:
        if namespace_key(key[:FINGERPRINT_BYTES], space.layout) != key:
            yield f"namespace {space.number} has another layout than its key says"


def too_small(txn: Reader, found: Records) -> Iterator[tuple[str, int]]:
    """The generators of numbers that would give one again, with the least that each may be."""
    nodes = [one.edge.node for one in found.edges]
    given = {
        NEXT_NODE: [*nodes, *(space.root for _, space in found.spaces)],
        "next_blob": list(found.blobs),
        "next_namespace": [space.number for _, space in found.spaces],
    }
    for counter, numbers in given.items():
        least = max(numbers, default=0)
        if txn.counter(counter) < least:
            yield counter, least


def stretches(
    txn: Reader, found: Records, begin: Callable[[bytes], Any]
) -> Iterator[tuple[Edge, bytes, Any, Any]]:
    """Go down all trees, and digest the tokens on the way.

    Args:
        txn: A view of the index.
        found: All its records.
        begin: Makes the digest of a namespace's root, given its key.

    Yields:
        An edge, key of its namespace, digests above and below it.
    """
    below: dict[int, list[Edge]] = defaultdict(list)
    for one in found.edges:
        below[one.parent].append(one.edge)
    for key, space in found.spaces:
        pending = [(space.root, begin(key))]
        while pending:
            node, above = pending.pop()
            # Taken out, so that a circle in a damaged index ends.
            for edge in below.pop(node, ()):
                mine = above.copy()
                mine.update(txn.tokens(edge.blob, edge.first_row, edge.rows))
                yield edge, key, above, mine
                pending.append((edge.node, mine))


def misnumbered(txn: Reader, found: Records) -> Iterator[tuple[int, int]]:
    """Entries whose number is not that of their tokens, and the number that is."""
    known = {one.edge.entry for one in found.edges}
    for edge, _, _, digest in stretches(txn, found, xxhash.xxh3_64):
        if edge.entry == NO_ENTRY:
            continue
        right = digest.intdigest() or 1
        if not was_given(edge.entry, right, known):
            yield edge.entry, right


def was_given(number: int, right: int, known: Collection[int]) -> bool:
    """Whether a prompt with the digest `right` has `number`: where it was taken, the next free."""
    while right != number and right in known:
        right = right + 1 & END_OF_NUMBERS or 1
    return right == number
