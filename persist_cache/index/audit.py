"""Whether an index keeps the invariants of `paths`: every one is checked, for all records at once.

Linear in what is stored. Whole columns are compared, and single records looked at only where two
differ: a loop over ten thousand of them that asks ten questions of each would take most of the
time of `persist-cache check`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import compress, count, repeat
from operator import add, eq, gt, ne, or_
from typing import Any, TypeVar

import xxhash

from persist_cache.index.columns import BlobColumns, EdgeColumns, EntryColumns
from persist_cache.index.records import (
    END_OF_TIME_S,
    NO_BLOB,
    NO_ENTRY,
    BlobKind,
    NamespaceRecord,
    entry_id,
    namespace_key,
)
from persist_cache.index.transaction import Reader
from persist_cache.index.tree import BLOB_BYTES, NEXT_NODE

V = TypeVar("V")
FINGERPRINT_BYTES = 32
END_OF_NUMBERS = (1 << 64) - 1
Spaces = Sequence[tuple[bytes, NamespaceRecord]]


def broken_invariants(txn: Reader, blobs: BlobColumns) -> list[str]:
    """A sentence for each invariant that does not hold; empty for a sound index.

    Args:
        txn: A view of the index.
        blobs: All its blobs, as the caller has read them already.

    Raises:
        StoreError: A record cannot even be read.
    """
    edges = txn.edge_columns()
    entries = txn.entry_columns()
    spaces = txn.namespaces()
    namespaces = {record.number: record.root for _, record in spaces}
    roots = set(namespaces.values())
    starts = dict(zip(blobs.numbers, blobs.starts, strict=True))
    # An edge of an unknown blob is named as such; what else is said of it does not matter.
    begins = [*map(add, map(starts.get, edges.blobs, [-1] * len(edges.blobs)), edges.first_rows)]
    depths = dict(zip(edges.nodes, map(add, begins, edges.rows), strict=True))
    depths |= dict.fromkeys(roots, 0)
    problems = [*_shape(txn, edges, roots)]
    problems += [
        f"node {edges.nodes[at]} begins elsewhere than its rows"
        for at in _unequal(map(depths.get, edges.parents), begins)
    ]
    problems += _rows(txn, edges, blobs)
    problems += _leaves(edges)
    problems += _entries(edges, entries, depths, blobs)
    problems += _stranded(edges, entries, roots)
    problems += _models(edges, entries, namespaces)
    problems += _orders(txn, entries)
    problems += _blobs(txn, edges, entries, blobs)
    problems += _spaces(spaces)
    problems += [
        f"{counter} is smaller than a number that was given"
        for counter, _ in too_small(txn, edges, blobs, spaces)
    ]
    problems += [
        f"entry {entry_id(number)} should have the number {entry_id(right)}"
        for number, right in misnumbered(txn, edges, spaces)
    ]
    return problems


def _unequal(found: Iterable[V | None], expected: Iterable[V]) -> list[int]:
    """Places at which two columns differ."""
    left, right = list(found), list(expected)
    if left == right:
        return []
    return [at for at, (one, other) in enumerate(zip(left, right, strict=True)) if one != other]


def _shape(txn: Reader, edges: EdgeColumns, roots: set[int]) -> Iterator[str]:
    """Whether the edges are trees below the roots, and each node knows the edge above it.

    There is no circle if each edge has rows and begins where its parent lies, which is checked
    elsewhere: depth would have to grow all the way round.
    """
    ways = dict(zip(edges.nodes, edges.keys, strict=True))
    if len(ways) < len(edges.nodes) or not roots.isdisjoint(ways):
        times = Counter(edges.nodes)
        times.update(roots)
        yield from (f"node {node} is reached twice" for node in times if times[node] > 1)
    nodes, keys = txn.parents()
    if len(nodes) != len(ways) or _unequal(map(ways.get, nodes), keys):
        parents = dict(zip(nodes, keys, strict=True))
        for node, key in ways.items():
            if parents.get(node) != key:
                yield f"node {node} does not know its way back"
        if len(parents) != len(edges.nodes):
            yield f"{len(edges.nodes)} edges but {len(parents)} ways back"
    unknown = set(edges.parents) - ways.keys() - roots
    if unknown:
        lost = sum(map(unknown.__contains__, edges.parents))
        yield f"{lost} edges cannot be reached from a root"


def _rows(txn: Reader, edges: EdgeColumns, blobs: BlobColumns) -> Iterator[str]:
    """Whether every edge uses rows that its blob has, under their first token, from row 0 on."""
    names = dict(zip(blobs.numbers, blobs.names, strict=True))
    lengths = dict(zip(blobs.numbers, blobs.num_tokens, strict=True))
    ends = list(map(add, edges.first_rows, edges.rows))
    available = list(map(lengths.get, edges.blobs, [-1] * len(ends)))
    if any(map(gt, ends, available)) or not all(edges.rows):
        for node, blob, rows, end, length in zip(
            edges.nodes, edges.blobs, edges.rows, ends, available, strict=True
        ):
            if blob not in names:
                yield f"node {node} hangs on blob {blob}, which is unknown"
            elif not rows or end > length:
                yield f"node {node} uses rows that blob {names[blob].hex()} lacks"
    tokens = list(map(txn.first_tokens().get, edges.blobs))
    for at in compress(count(), edges.first_rows):
        tokens[at] = txn.tokens(edges.blobs[at], edges.first_rows[at], 1)
    for at in _unequal(tokens, edges.tokens):
        yield f"node {edges.nodes[at]} is filed under another token"
    # A blob with one edge is told by its first row alone.
    shared = {blob for blob, users in Counter(edges.blobs).items() if users > 1}
    places = compress(count(), map(or_, map(shared.__contains__, edges.blobs), edges.first_rows))
    spans = [(edges.blobs[at], edges.first_rows[at], edges.rows[at]) for at in places]
    bad = set()
    last, covered = NO_BLOB, 0
    for blob, first, rows in sorted(spans):
        if blob != last:
            last, covered = blob, 0
        if first != covered:
            bad.add(blob)
        covered += rows
    for blob in sorted(bad & names.keys()):
        yield f"blob {names[blob].hex()} has dead rows before living ones"


def _leaves(edges: EdgeColumns) -> Iterator[str]:
    """Whether every node without entry branches, or changes from one blob to another."""
    if NO_ENTRY not in edges.entries:
        return
    children = Counter(edges.parents)
    bare = {}
    for at in compress(count(), map(eq, edges.entries, repeat(NO_ENTRY))):
        node = edges.nodes[at]
        if not children[node]:
            yield f"node {node} is a leaf without entry"
        elif children[node] == 1:
            bare[node] = edges.blobs[at], edges.first_rows[at] + edges.rows[at]
    for at in compress(count(), map(bare.__contains__, edges.parents)):
        node = edges.parents[at]
        if bare[node] == (edges.blobs[at], edges.first_rows[at]):
            yield f"node {node} should be merged with its only child"


def _entries(
    edges: EdgeColumns, entries: EntryColumns, depths: dict[int, int], blobs: BlobColumns
) -> Iterator[str]:
    """Whether each entry lies at its node and depth, with a checkpoint made for just there."""
    nodes = dict(zip(edges.entries, edges.nodes, strict=True))
    nodes.pop(NO_ENTRY, None)
    lost = _unequal(map(nodes.get, entries.numbers), entries.nodes)
    for at in lost:
        yield f"entry {entry_id(entries.numbers[at])} is not where it says it is"
    for at in _unequal(map(depths.get, entries.nodes), entries.num_tokens):
        yield f"entry {entry_id(entries.numbers[at])} has another length than its path"
    if lost or len(nodes) != len(entries.numbers):
        for number in sorted(nodes.keys() - set(entries.numbers)):
            yield f"node {nodes[number]} carries entry {entry_id(number)}, which has no record"
    if len(nodes) < len(edges.entries) - edges.entries.count(NO_ENTRY):
        times = Counter(edges.entries)
        for number in nodes:
            if times[number] > 1:
                yield f"entry {entry_id(number)} ends at {times[number]} nodes"
    are_checkpoints = map(eq, blobs.kinds, repeat(BlobKind.CHECKPOINT))
    made_for = dict(compress(zip(blobs.numbers, blobs.starts, strict=True), are_checkpoints))
    for at in compress(count(), map(ne, entries.checkpoints, repeat(NO_BLOB))):
        if made_for.get(entries.checkpoints[at]) != entries.num_tokens[at]:
            this = entry_id(entries.numbers[at])
            yield f"entry {this} names a checkpoint that is not its own"


def _stranded(edges: EdgeColumns, entries: EntryColumns, roots: set[int]) -> Iterator[str]:
    """Whether each entry without a checkpoint has the rows of all layers from the root on."""
    if NO_BLOB not in entries.checkpoints or all(flags & 1 for flags in edges.flags):
        return
    above = dict(zip(edges.nodes, zip(edges.parents, edges.flags, strict=True), strict=True))
    complete = dict.fromkeys(roots, True)
    for at in compress(count(), map(eq, entries.checkpoints, repeat(NO_BLOB))):
        node, way = entries.nodes[at], []
        while node not in complete and node in above:
            complete[node] = False  # where a way ends in a circle, or nowhere
            way.append(node)
            node = above[node][0]
        is_whole = complete.get(node, False)
        for below in reversed(way):
            is_whole = complete[below] = is_whole and bool(above[below][1] & 1)
        if not complete.get(entries.nodes[at], False):
            this = entry_id(entries.numbers[at])
            yield f"entry {this} has neither a checkpoint nor the rows of all layers"


def _models(edges: EdgeColumns, entries: EntryColumns, roots: Mapping[int, int]) -> Iterator[str]:
    """Whether each entry names the namespace that it lies in; `roots` has all of them."""
    if len(roots) == 1 and set(entries.namespaces) <= roots.keys():
        return
    above = dict(zip(edges.nodes, edges.parents, strict=True))
    found = {root: root for root in roots.values()}
    for at, node in enumerate(entries.nodes):
        way = []
        while node not in found:
            found[node] = node  # where a way ends in a circle, or nowhere
            way.append(node)
            node = above.get(node, node)
        found |= dict.fromkeys(way, found[node])
        number = entries.namespaces[at]
        if roots.get(number) != found[node]:
            this = entry_id(entries.numbers[at])
            yield f"entry {this} names namespace {number}, below whose root it does not lie"


def _spaces(spaces: Spaces) -> Iterator[str]:
    """Whether each namespace is the one of its key."""
    for key, record in spaces:
        if namespace_key(key[:FINGERPRINT_BYTES], record.layout) != key:
            yield f"namespace {record.number} has another layout than its key says"


def too_small(
    txn: Reader, edges: EdgeColumns, blobs: BlobColumns, spaces: Spaces
) -> Iterator[tuple[str, int]]:
    """The generators of numbers that would give one again, with the least that each may be."""
    given = {
        NEXT_NODE: [*edges.nodes, *(record.root for _, record in spaces)],
        "next_blob": blobs.numbers,
        "next_namespace": [record.number for _, record in spaces],
    }
    for counter, numbers in given.items():
        least = max(numbers, default=0)
        if txn.counter(counter) < least:
            yield counter, least


def stretches(
    txn: Reader, edges: EdgeColumns, spaces: Spaces, begin: Callable[[bytes], Any]
) -> Iterator[tuple[int, bytes, Any, Any]]:
    """Go down all trees, and digest the tokens on the way.

    Args:
        txn: A view of the index.
        edges: All its edges.
        spaces: All its namespaces.
        begin: Makes the digest of a namespace's root, given its key.

    Yields:
        Place of an edge in the columns, key of its namespace, digests above and below it.
    """
    below: dict[int, list[int]] = {}
    for at, parent in enumerate(edges.parents):
        below.setdefault(parent, []).append(at)
    for key, record in spaces:
        pending = [(record.root, begin(key))]
        while pending:
            node, above = pending.pop()
            # Taken out, so that a circle in a damaged index ends.
            for at in below.pop(node, ()):
                mine = above.copy()
                mine.update(txn.tokens(edges.blobs[at], edges.first_rows[at], edges.rows[at]))
                yield at, key, above, mine
                pending.append((edges.nodes[at], mine))


def misnumbered(txn: Reader, edges: EdgeColumns, spaces: Spaces) -> Iterator[tuple[int, int]]:
    """Entries whose number is not that of their tokens, and the number that is."""
    known = set(edges.entries)
    for at, _, _, digest in stretches(txn, edges, spaces, xxhash.xxh3_64):
        number = edges.entries[at]
        if number == NO_ENTRY:
            continue
        right = digest.intdigest() or 1
        if not was_given(number, right, known):
            yield number, right


def was_given(number: int, right: int, known: Collection[int]) -> bool:
    """Whether a prompt with the digest `right` has `number`: where it was taken, the next free."""
    while right != number and right in known:
        right = right + 1 & END_OF_NUMBERS or 1
    return right == number


def _orders(txn: Reader, entries: EntryColumns) -> Iterator[str]:
    """Whether eviction and expiry go through exactly the entries there are."""
    tiers, last_uses, numbers = txn.recency_columns()
    is_listed = (
        len(numbers) == len(entries.numbers)
        and not _unequal(_by(numbers, tiers, entries.numbers), entries.tiers)
        and not _unequal(_by(numbers, last_uses, entries.numbers), entries.last_uses_us)
    )
    if not is_listed:
        yield "the order of eviction does not list exactly the entries"
    dated = compress(zip(entries.expires, entries.numbers, strict=True), entries.expires)
    expiring = {
        (int(when * 1e6) if 0 < when < END_OF_TIME_S else -1, number) for when, number in dated
    }
    if set(zip(*txn.expiry_columns(), strict=True)) != expiring:
        yield "the order of expiry does not list exactly the entries that expire"


def _by(keys: Iterable[int], values: Iterable[V], wanted: Iterable[int]) -> Iterator[V | None]:
    """The values of the `wanted` keys, None for those that are not there."""
    get: Callable[[int], V | None] = dict(zip(keys, values, strict=True)).get
    return map(get, wanted)


def _blobs(
    txn: Reader, edges: EdgeColumns, entries: EntryColumns, blobs: BlobColumns
) -> Iterator[str]:
    """Whether each blob is found by name, and counts the edges or entries that use it."""
    used = Counter(edges.blobs)
    used.update(entries.checkpoints)
    for at in _unequal(map(used.__getitem__, blobs.numbers), blobs.references):
        yield (
            f"blob {blobs.names[at].hex()} counts {blobs.references[at]} references "
            f"instead of {used[blobs.numbers[at]]}"
        )
    names = dict(zip(*txn.names(), strict=True))
    for at in _unequal(map(names.get, blobs.names), blobs.numbers):
        yield f"blob {blobs.names[at].hex()} cannot be found by its name"
    if len(names) != len(blobs.names):
        yield f"{len(blobs.names)} blobs but {len(names)} names"
    total, counted = sum(blobs.disk_bytes), txn.counter(BLOB_BYTES)
    if total != counted:
        yield f"blobs sum up to {total} bytes, the counter says {counted}"
