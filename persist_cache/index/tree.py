"""The trie of prompts inside the index: walk, split, attach, drop, merge.

Its edges are rows of blobs. All functions work within one transaction given by the caller and
keep these invariants, which `audit` checks:

- an edge never spans blobs, and begins at the position where its parent node lies;
- a blob's references equal the edges, or for a checkpoint the entries, that use it;
- the live part of a blob is a prefix of it: only tails die;
- a node without entry and with a single child that goes on in the same blob is merged away;
- every leaf carries an entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from msgspec import Struct

from persist_cache.entry import Tier
from persist_cache.errors import StoreError
from persist_cache.index.records import (
    NO_BLOB,
    NO_ENTRY,
    BlobRecord,
    Edge,
    EntryRecord,
    SizedRecord,
    edge_key,
    edge_parent,
    pack_number,
)
from persist_cache.index.transaction import Reader, Writer
from persist_cache.tokens import TOKEN_BYTES, common_prefix_tokens

BLOB_BYTES = "blob_bytes"
"""Counter: bytes on disk of all blobs that a record names."""
NEXT_NODE = "next_node"
NO_ROOT = 0
"""A node that never exists: a walk from it finds nothing."""
_MOST_EDGES = 64
"""Looked at to tell whose rows some are."""
MAX_ROWS = (1 << 32) - 1
MAX_DEPTH = 1 << 20
"""More edges than any path has; only in a damaged index does one lead round in a circle."""


def damaged(what: str) -> StoreError:
    """What to raise for an index that contradicts itself; LMDB has no checksums."""
    return StoreError(f"The index is damaged ({what}); run `persist-cache check --repair`.")


class Step(Struct, frozen=True):
    """One edge of a walk.

    Attributes:
        key: The edge's key.
        edge: The edge.
        start: Position of its first token.
        used: Leading tokens of it that the prompt shares; fewer than `edge.rows` only at the end.
    """

    key: bytes
    edge: Edge
    start: int
    used: int

    @property
    def end(self) -> int:
        return self.start + self.used

    @property
    def is_whole(self) -> bool:
        return self.used == self.edge.rows


class Walk(Struct, frozen=True):
    """How far a prompt follows the tree of one namespace."""

    root: int
    steps: tuple[Step, ...]
    common: int

    @property
    def complete_tokens(self) -> int:
        """Leading tokens whose rows exist for every layer: any position in them is resumable."""
        end = 0
        for step in self.steps:
            if not step.edge.complete:
                break
            end = step.end
        return end

    @property
    def node(self) -> int | None:
        """The node at the end of the walk, or None when it ended within an edge."""
        if not self.steps:
            return self.root
        return self.steps[-1].edge.node if self.steps[-1].is_whole else None


def walk(txn: Reader, root: int, packed: bytes) -> Walk:
    """Follow `packed` down from `root`; linear in the prompt, whatever else is stored."""
    steps: list[Step] = []
    node, position, length = root, 0, len(packed) // TOKEN_BYTES
    while position < length:
        offset = position * TOKEN_BYTES
        key = edge_key(node, packed[offset : offset + TOKEN_BYTES])
        edge = txn.edge(key)
        if edge is None:
            break
        run = txn.tokens(edge.blob, edge.first_row, edge.rows)
        if packed.startswith(run, offset) and run:
            used = edge.rows
        else:
            used = common_prefix_tokens(run, packed[offset : offset + len(run)])
        steps.append(Step(key, edge, position, used))
        position += used
        if used < edge.rows or not used:
            break
        node = edge.node
    return Walk(root, tuple(steps), position)


def resumable(txn: Reader, path: Walk, limit: int) -> tuple[int, int]:
    """The longest resumable position on `path`, at most `limit`.

    Returns:
        The position, and the checkpoint blob to use there or `NO_BLOB` when rows suffice.
    """
    by_rows = min(path.complete_tokens, limit)
    for step in reversed(path.steps):
        if step.end <= by_rows:
            break
        if step.is_whole and step.end <= limit and step.edge.entry != NO_ENTRY:
            entry = txn.entry(step.edge.entry)
            if entry is not None and entry.checkpoint != NO_BLOB:
                return step.end, entry.checkpoint
    return by_rows, NO_BLOB


def entries_used(txn: Reader, path: Walk, position: int) -> list[int]:
    """Entries that a hit at `position` makes use of: those on the way, else the nearest below."""
    found: list[int] = []
    for step in path.steps:
        if step.start >= position:
            break
        ends_here = step.is_whole and step.end <= position
        if ends_here and step.edge.entry != NO_ENTRY:
            found.append(step.edge.entry)
        elif step.end >= position:
            # Nothing ends at the position itself: an entry further down keeps its rows alive.
            found.append(carrier(txn, step.edge))
    return found


def prompt_rows(txn: Reader, path: Walk) -> int:
    """Leading tokens on `path` whose rows belong to an entry that is no reply.

    Below most nodes one is near. Where none is found among the nearest, there is taken to be one.
    """
    looked_at: set[int] = set()
    for step in reversed(path.steps):
        pending = [step.edge]
        while pending:
            edge = pending.pop()
            if edge.node in looked_at:
                continue
            looked_at.add(edge.node)
            record = None if edge.entry == NO_ENTRY else txn.entry(edge.entry)
            is_prompt = record is not None and record.tier != Tier.ASSISTANT
            if is_prompt or len(looked_at) > _MOST_EDGES:
                return step.end
            pending += [below for _, below in txn.children(edge.node, limit=_MOST_EDGES)]
    return 0


def carrier(txn: Reader, edge: Edge) -> int:
    """An entry at the lower end of `edge` or below: while it stays, so does the edge."""
    for _ in range(MAX_DEPTH):
        if edge.entry != NO_ENTRY:
            return edge.entry
        below = txn.children(edge.node, limit=1)
        if not below:
            return NO_ENTRY
        edge = below[0][1]
    raise damaged("the way down from a node has no end")


def path_of(txn: Reader, node: int) -> list[tuple[bytes, Edge]]:
    """Edges from the root down to `node`."""
    found: list[tuple[bytes, Edge]] = []
    key = txn.parent_key(node)
    while key is not None:
        edge = txn.edge(key)
        if edge is None:
            raise damaged("a node's way back names no edge")
        found.append((key, edge))
        if len(found) > MAX_DEPTH:
            raise damaged("the way back from a node has no end")
        key = txn.parent_key(edge_parent(key))
    return found[::-1]


def edges_below(txn: Reader, node: int) -> Iterator[Edge]:
    """Every edge below `node`, each behind the one above it."""
    pending, seen = [node], {node}
    while pending:
        for _, edge in txn.children(pending.pop()):
            if edge.node in seen:
                raise damaged("the way down from a node leads round in a circle")
            seen.add(edge.node)
            pending.append(edge.node)
            yield edge


def entries_behind(txn: Reader, node: int) -> Iterator[int]:
    """The entries that go on right after `node`: the nearest ones below it."""
    pending = [node]
    while pending:
        for _, edge in txn.children(pending.pop()):
            if edge.entry != NO_ENTRY:
                yield edge.entry
            else:
                pending.append(edge.node)


def tokens_of(txn: Reader, node: int) -> bytes:
    """Packed tokens from the root down to `node`."""
    return b"".join(
        txn.tokens(edge.blob, edge.first_row, edge.rows) for _, edge in path_of(txn, node)
    )


def new_node(txn: Writer) -> int:
    return txn.add(NEXT_NODE, 1)


class Piece(Struct, frozen=True):
    """An edge to hang below a walk: rows of a blob whose record exists already."""

    blob: int
    num_tokens: int
    complete: bool
    first_row: int = 0


def dead_rows(txn: Reader, path: Walk, packed: bytes) -> Piece | None:
    """Rows that lie unused behind the end of the walk, in the blob it ended in.

    They were an entry's that was dropped while their file had to stay. A prompt that goes on in
    the same tokens takes them back into service instead of writing them again.
    """
    if path.node is None or not path.steps:
        return None
    edge = path.steps[-1].edge
    first_row = edge.first_row + edge.rows
    rest = txn.tokens(edge.blob, first_row, MAX_ROWS)
    # Living rows there would have been walked: they begin with the same token.
    rows = common_prefix_tokens(rest, packed[path.common * TOKEN_BYTES :][: len(rest)])
    return Piece(edge.blob, rows, edge.complete, first_row) if rows else None


def attach(txn: Writer, path: Walk, packed: bytes, pieces: Sequence[Piece]) -> int:
    """Extend `path` by `pieces`, splitting the edge it ended in; returns the node at the end.

    A new blob must have been recorded with no references; its edge adds the first.
    """
    node = path.node
    if node is None:
        node = _split(txn, path.steps[-1])
    position = path.common
    for piece in pieces:
        below = new_node(txn)
        offset = position * TOKEN_BYTES
        key = edge_key(node, packed[offset : offset + TOKEN_BYTES])
        rows = piece.num_tokens
        txn.put_edge(key, Edge(piece.complete, piece.blob, below, NO_ENTRY, piece.first_row, rows))
        _refer(txn, piece.blob, 1)
        node, position = below, position + rows
    return node


def _split(txn: Writer, step: Step) -> int:
    """Put a node into the middle of an edge: index work only, both halves share the blob."""
    edge = step.edge
    middle = new_node(txn)
    below = txn.tokens(edge.blob, edge.first_row + step.used, 1)
    txn.put_edge(step.key, edge._replace(node=middle, entry=NO_ENTRY, rows=step.used))
    txn.put_edge(
        edge_key(middle, below),
        edge._replace(first_row=edge.first_row + step.used, rows=edge.rows - step.used),
    )
    _refer(txn, edge.blob, 1)
    return middle


def set_entry(txn: Writer, node: int, entry: int) -> None:
    """Make `entry` end at `node`, or none with `NO_ENTRY`."""
    key = txn.parent_key(node)
    edge = None if key is None else txn.edge(key)
    if key is None:
        raise damaged("entries end below the root")
    if edge is None:
        raise damaged("a node's way back names no edge")
    txn.put_edge(key, edge._replace(entry=entry))


def drop_entry(txn: Writer, number: int, reason: str, now: float) -> None:
    """Remove an entry, and every row and checkpoint that nothing needs without it.

    Blobs that lose their last reference go to the trash, whose files the caller unlinks after
    the commit. `reason` is remembered for `explain`.
    """
    record = txn.entry(number)
    if record is None:
        raise damaged("only stored entries are dropped")
    _forget_entry(txn, number, record, reason, now)
    set_entry(txn, record.node, NO_ENTRY)
    _prune(txn, record.node, now)


def drop_subtree(txn: Writer, key: bytes, reason: str, now: float) -> None:
    """Remove an edge and all that hangs below it, entries included."""
    edge = txn.edge(key)
    if edge is None:
        return
    pending = [(key, edge)]
    while pending:
        at, this = pending.pop()
        pending.extend(txn.children(this.node))
        if this.entry != NO_ENTRY:
            record = txn.entry(this.entry)
            if record is not None:
                _forget_entry(txn, this.entry, record, reason, now)
        txn.delete_edge(at, this.node)
        _unrefer(txn, this.blob, now)
    _prune(txn, edge_parent(key), now)


def _forget_entry(txn: Writer, number: int, record: EntryRecord, reason: str, now: float) -> None:
    txn.delete_entry(number)
    remember_departed(txn, number, reason, now)
    if record.checkpoint != NO_BLOB:
        _unrefer(txn, record.checkpoint, now)


def _prune(txn: Writer, node: int, now: float) -> None:
    """Remove what leads nowhere from `node` upwards, then merge what no longer branches."""
    while True:
        key = txn.parent_key(node)
        if key is None:
            return
        edge = txn.edge(key)
        if edge is None:
            raise damaged("a node's way back names no edge")
        below = txn.children(node, limit=2)
        if edge.entry != NO_ENTRY or len(below) > 1:
            return
        if len(below) == 1:
            _merge(txn, key, edge, *below[0])
            return
        txn.delete_edge(key, node)
        _unrefer(txn, edge.blob, now)
        node = edge_parent(key)


def _merge(txn: Writer, key: bytes, upper: Edge, lower_key: bytes, lower: Edge) -> None:
    if upper.blob != lower.blob or upper.first_row + upper.rows != lower.first_row:
        return
    txn.delete_edge(lower_key, None)
    txn.delete_edge(key, upper.node)
    txn.put_edge(key, lower._replace(first_row=upper.first_row, rows=upper.rows + lower.rows))
    _refer(txn, upper.blob, -1)


def _refer(txn: Writer, blob: int, change: int) -> BlobRecord:
    record = txn.blob(blob)
    if record is None:
        raise damaged("an edge names a blob without record")
    record = record._replace(references=record.references + change)
    txn.put_blob(blob, record)
    return record


def refer_checkpoint(txn: Writer, blob: int) -> None:
    """Count one more entry that resumes from the checkpoint `blob`."""
    _refer(txn, blob, 1)


def edges_of_run(txn: Reader, key: bytes) -> Iterator[tuple[bytes, Edge]]:
    """The edges that use the run whose first row's edge is filed under `key`, from there down."""
    edge = txn.edge(key)
    run = None if edge is None else edge.blob
    while edge is not None and edge.blob == run:
        yield key, edge
        behind = txn.tokens(edge.blob, edge.first_row + edge.rows, 1)
        key = edge_key(edge.node, behind)
        edge = txn.edge(key) if behind else None


def repoint(txn: Writer, edges: Sequence[tuple[bytes, Edge]], blob: int, now: float) -> None:
    """Let edges, which lie end to end, use the rows of `blob` from its first one on.

    They are the same rows. Of the blobs that had them none is left but those with other edges.
    """
    first_row = 0
    for key, edge in edges:
        txn.put_edge(key, edge._replace(blob=blob, first_row=first_row))
        _refer(txn, blob, 1)
        _unrefer(txn, edge.blob, now)
        first_row += edge.rows
    for (key, upper), (lower_key, _) in reversed(list(pairwise(edges))):
        if upper.entry == NO_ENTRY and len(txn.children(upper.node, limit=2)) == 1:
            _merge(txn, key, _known_edge(txn, key), lower_key, _known_edge(txn, lower_key))


def _known_edge(txn: Reader, key: bytes) -> Edge:
    edge = txn.edge(key)
    if edge is None:
        raise damaged("a node's way back names no edge")
    return edge


def _unrefer(txn: Writer, blob: int, now: float) -> None:
    record = _refer(txn, blob, -1)
    if record.references == 0:
        txn.delete_blob(blob, record.name)
        namespace = txn.disown(blob, record.disk_bytes)
        note = str(namespace) if namespace else ""
        txn.put_sized(b"trash", record.name, SizedRecord(record.disk_bytes, now, note))
        txn.add(BLOB_BYTES, -record.disk_bytes)


_MAX_DEPARTED = 4096


def remember_departed(txn: Writer, number: int, reason: str, now: float) -> None:
    """Note why an entry went, so that `explain` can tell; the notes are bounded."""
    if txn.size_of(b"departed") >= _MAX_DEPARTED:
        oldest = sorted(txn.sized(b"departed").items(), key=lambda item: item[1].since)
        for key, _ in oldest[: _MAX_DEPARTED // 4]:
            txn.delete_sized(b"departed", key)
    txn.put_sized(b"departed", pack_number(number), SizedRecord(0, now, reason))
