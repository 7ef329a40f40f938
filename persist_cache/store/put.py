"""Putting an entry on disk: plan, reserve, write, publish, commit.

The files are durable and under their final names before one short commit makes them known. If the
index moved in between (another process stored some of it, or evicted the prefix), the files are
dropped and the work starts over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from persist_cache import fs
from persist_cache.blobs.header import TOKENS, BlobHeader, prefix_digest
from persist_cache.blobs.writer import BlobWriter, Written
from persist_cache.codec import Payload, Source, Tensor
from persist_cache.entry import PARTIAL_LABEL, Tier
from persist_cache.errors import StoreError, StoreFullError
from persist_cache.index import tree
from persist_cache.index.records import (
    NO_BLOB,
    NO_ENTRY,
    BlobKind,
    EntryRecord,
    NamespaceRecord,
    entry_id,
    namespace_key,
)
from persist_cache.index.transaction import Reader, Writer
from persist_cache.store import reservation
from persist_cache.store.budget import WRITTEN_BYTES, blob_estimate, written_today
from persist_cache.store.evict import Evictor
from persist_cache.store.recording import add_blob, place_entry
from persist_cache.store.reservation import undone
from persist_cache.store.session import Disk
from persist_cache.tokens import TOKEN_BYTES

if TYPE_CHECKING:
    from persist_cache.fingerprint.value import Fingerprint

_MAX_ATTEMPTS = 8
_MAX_RUNS = 100
"""Files of one put, all open until its commit; macOS allows a process 256."""


class PutResult(Struct, frozen=True):
    """What a put did.

    Attributes:
        entry: Id of the entry, or None for an empty prompt.
        new_tokens: Tokens that were not on disk before.
        nbytes: Bytes written.
    """

    entry: str | None
    new_tokens: int
    nbytes: int


class _Plan(Struct, frozen=True):
    """What has to be written, as of one look at the index.

    Attributes:
        stored: Leading tokens whose rows are on disk.
        parent: Name of the blob that holds the last of them, or "".
        needs_checkpoint: The end of the prompt can be resumed only with a state of its own.
    """

    stored: int
    parent: str
    needs_checkpoint: bool


class _Part(Struct, frozen=True):
    """One blob to be written: tokens `[start, end)`, or the state at `start == end`."""

    kind: BlobKind
    start: int
    end: int
    payload: Payload


class _MovedError(Exception):
    """The index changed between the plan and the commit."""


class Insertion:
    """One entry on its way to the disk."""

    def __init__(
        self,
        disk: Disk,
        evictor: Evictor,
        fingerprint: Fingerprint,
        packed: bytes,
        source: Source,
        wanted: EntryRecord,
        run_tokens: int,
        keep_s: Mapping[Tier, int],
        group: str,
    ) -> None:
        self._disk = disk
        self._evictor = evictor
        self._fingerprint = fingerprint
        self._identity = fingerprint.to_json().decode()
        self._key = namespace_key(fingerprint.digest, source.layout)
        self._packed = packed
        self._length = len(packed) // TOKEN_BYTES
        self._source = source
        self._wanted = wanted
        self._run_tokens = run_tokens
        self._keep_s = keep_s
        self._group = group
        self.partial: Sequence[int] = ()
        """Entries on the way that are there only until a longer one is: that one is stored now."""

    def run(self) -> PutResult:
        """Store it.

        Raises:
            StoreFullError: No room within the budget or on the disk; nothing was changed.
            StoreError: The disk failed, or others kept changing the same path.
        """
        has_room = False
        for _ in range(_MAX_ATTEMPTS):
            try:
                return self._attempt()
            except _MovedError:
                continue
            except StoreFullError:
                # A disk may also have no room for another file, however few bytes it has.
                if has_room or not self._lacks_files():
                    raise
            self._make_room_for_files()
            has_room = True
        raise StoreError("The store changed too often while an entry was written; try again.")

    def _attempt(self) -> PutResult:
        with self._disk.index.read() as txn:
            found = txn.namespaces(self._key)
            path = tree.walk(txn, found[0][1].root if found else tree.NO_ROOT, self._packed)
            plan = self._plan(txn, path)
            protected = _nodes_extended(txn, path)
        parts = list(self._parts(plan))
        if not parts:
            number = self._disk.index.update(lambda txn: self._commit(txn, plan, [], []))
            return PutResult(entry_id(number), 0, 0)
        with contextlib.ExitStack() as stack, fs.errors_translated("while an entry was written"):
            writers = [stack.enter_context(BlobWriter(self._disk.folder)) for _ in parts]
            with self._reserved(writers, parts, protected):
                written = self._write(writers, parts, plan)
                number = self._disk.index.update(
                    lambda txn: self._commit(txn, plan, parts, written)
                )
            for writer in writers:
                writer.keep()
        new_tokens = self._length - plan.stored
        return PutResult(entry_id(number), new_tokens, sum(one.nbytes for one in written))

    def _lacks_files(self) -> bool:
        free = self._disk.budget.free_files()
        return free is not None and free < self._wanted_files()

    def _wanted_files(self) -> int:
        """Most files that one attempt makes, each perhaps with a folder, and one for the index."""
        with self._disk.index.read() as txn:
            found = txn.namespaces(self._key)
            path = tree.walk(txn, found[0][1].root if found else tree.NO_ROOT, self._packed)
            plan = self._plan(txn, path)
        runs = -(-(self._length - plan.stored) // self._run_tokens)
        return 2 * (min(runs, _MAX_RUNS) + plan.needs_checkpoint) + 1

    def _make_room_for_files(self) -> None:
        with self._disk.index.read() as txn:
            found = txn.namespaces(self._key)
            path = tree.walk(txn, found[0][1].root if found else tree.NO_ROOT, self._packed)
            protected = _nodes_extended(txn, path)
        reservation.free_files(self._disk, self._evictor, self._wanted_files(), protected)

    def _plan(self, txn: Reader, path: tree.Walk) -> _Plan:
        parent = ""
        if path.steps:
            record = txn.blob(path.steps[-1].edge.blob)
            parent = record.name.hex() if record else ""
        revived = tree.dead_rows(txn, path, self._packed)
        return _Plan(
            stored=path.common + (revived.num_tokens if revived else 0),
            parent=parent,
            needs_checkpoint=self._needs_checkpoint(txn, path),
        )

    def _needs_checkpoint(self, txn: Reader, path: tree.Walk) -> bool:
        """Whether the end of the prompt can be resumed only with a state of its own."""
        if self._source.complete and path.complete_tokens == path.common:
            return False
        if path.common < self._length or path.node is None:
            return True
        entry = txn.entry(path.steps[-1].edge.entry)
        return entry is None or entry.checkpoint == NO_BLOB

    def _parts(self, plan: _Plan) -> Iterator[_Part]:
        """What to write: large runs, so that files are sequential, yet a tail can be freed."""
        new_tokens = self._length - plan.stored
        run_tokens = max(self._run_tokens, -(-new_tokens // _MAX_RUNS))
        for start in range(plan.stored, self._length, run_tokens):
            end = min(start + run_tokens, self._length)
            yield _Part(BlobKind.RUN, start, end, self._source.rows(start, end))
        if plan.needs_checkpoint:
            state = self._source.checkpoint()
            if state is None:
                raise StoreError("This cache has neither all of its rows nor a state to store.")
            yield _Part(BlobKind.CHECKPOINT, self._length, self._length, state)

    @contextlib.contextmanager
    def _reserved(
        self, writers: Sequence[BlobWriter], parts: Sequence[_Part], protected: frozenset[int]
    ) -> Iterator[None]:
        """Hold room within the budget; given back when the block fails."""
        names = [bytes.fromhex(writer.name) for writer in writers]
        texts = len(self._source.layout) + len(self._identity)
        nbytes = sum(
            blob_estimate(
                part.payload.nbytes + (part.end - part.start) * TOKEN_BYTES,
                len(part.payload.tensors) + 1,
                texts + len(part.payload.detail),
            )
            for part in parts
        )
        num_tokens = sum(part.end - part.start for part in parts)
        reservation.reserve(
            self._disk,
            self._evictor,
            names,
            nbytes,
            num_tokens,
            protected,
            identity=self._identity,
        )
        with undone(self._disk, writers):
            yield

    def _write(
        self, writers: Sequence[BlobWriter], parts: Sequence[_Part], plan: _Plan
    ) -> list[Written]:
        view = memoryview(self._packed)
        parent = plan.parent
        written = []
        for writer, part in zip(writers, parts, strict=True):
            tensors = list(part.payload.tensors)
            if part.kind == BlobKind.RUN:
                own = view[part.start * TOKEN_BYTES : part.end * TOKEN_BYTES]
                tensors.insert(0, Tensor(TOKENS, "I64", (part.end - part.start,), [own]))
            header = BlobHeader(
                kind=part.kind.name.lower(),
                complete=part.kind == BlobKind.RUN and self._source.complete,
                fingerprint=self._fingerprint.hex,
                identity=self._identity,
                layout=self._source.layout,
                detail=part.payload.detail,
                start=part.start,
                end=part.end,
                prefix=prefix_digest(view[: part.start * TOKEN_BYTES]),
                parent=parent,
                tier=self._wanted.tier.label,
                entry=part.end == self._length,
                created=self._wanted.created_us / 1e6,
            )
            written.append(writer.write(header, tensors))
            writer.publish()
            if part.kind == BlobKind.RUN:
                parent = writer.name
        return written

    def _commit(
        self, txn: Writer, plan: _Plan, parts: Sequence[_Part], written: Sequence[Written]
    ) -> int:
        """Make the files known, and the entry; returns its number."""
        namespace = self._namespace(txn)
        path = tree.walk(txn, namespace.root, self._packed)
        if self._plan(txn, path) != plan:
            raise _MovedError
        self.partial = self._partial(txn, path)
        revived = tree.dead_rows(txn, path, self._packed)
        pieces = [revived] if revived else []
        checkpoint = NO_BLOB
        for part, one in zip(parts, written, strict=True):
            blob = self._add_blob(txn, namespace, part, one)
            if part.kind == BlobKind.RUN:
                pieces.append(tree.Piece(blob, part.end - part.start, self._source.complete))
            else:
                checkpoint = blob
        self._keep_heads(txn, path)
        self._join_group(txn, path)
        node = tree.attach(txn, path, self._packed, pieces)
        total = sum(one.nbytes for one in written)
        if total:
            txn.count("puts")
            txn.add(WRITTEN_BYTES, total)
            txn.add(written_today(self._wanted.created_us / 1e6), total)
        return self._place(txn, namespace, node, checkpoint)

    def _partial(self, txn: Reader, path: tree.Walk) -> list[int]:
        numbers = [one.edge.entry for one in path.steps if one.is_whole and one.end < self._length]
        return [
            number
            for number in numbers
            if (entry := txn.entry(number)) is not None and entry.label == PARTIAL_LABEL
        ]

    def _namespace(self, txn: Writer) -> NamespaceRecord:
        found = txn.namespaces(self._key)
        if found:
            return found[0][1]
        record = NamespaceRecord(
            number=txn.add("next_namespace", 1),
            root=tree.new_node(txn),
            identity=self._identity,
            layout=self._source.layout,
            created=self._disk.clock(),
        )
        txn.put_namespace(self._key, record)
        return record

    def _add_blob(self, txn: Writer, namespace: NamespaceRecord, part: _Part, one: Written) -> int:
        return add_blob(
            txn,
            one,
            namespace=namespace.number,
            kind=part.kind,
            created=self._wanted.created_us / 1e6,
            start=part.start,
            packed=self._packed[part.start * TOKEN_BYTES : part.end * TOKEN_BYTES],
        )

    def _place(self, txn: Writer, namespace: NamespaceRecord, node: int, checkpoint: int) -> int:
        """Make the entry end at `node`, keeping what an older entry there had earned."""
        wanted = self._wanted._replace(namespace=namespace.number, node=node, checkpoint=checkpoint)
        before = txn.size_of(b"entries")
        number = place_entry(txn, self._key, self._packed, wanted)
        txn.join_group(number, self._group, is_new=txn.size_of(b"entries") > before)
        txn.keep_for(number, self._keep_s.get(wanted.tier, 0))
        return number

    def _join_group(self, txn: Writer, path: tree.Walk) -> None:
        """Note that the group uses what the prompt begins with, stored by whomever."""
        for step in path.steps:
            if step.is_whole and step.edge.entry != NO_ENTRY:
                txn.join_group(step.edge.entry, self._group)

    def _keep_heads(self, txn: Writer, path: tree.Walk) -> None:
        """Keep the system parts that the prompt begins with, stored by whomever."""
        seconds = self._keep_s.get(Tier.SYSTEM, 0)
        for step in path.steps if seconds else ():
            if step.is_whole and step.edge.entry != NO_ENTRY:
                record = txn.entry(step.edge.entry)
                if record is not None and record.tier == Tier.SYSTEM:
                    txn.keep_for(step.edge.entry, seconds)


def _nodes_extended(txn: Reader, path: tree.Walk) -> frozenset[int]:
    """Nodes whose entries keep `path` alive, so that making room does not tear it away."""
    nodes = {step.edge.node for step in path.steps}
    if path.steps:
        entry = txn.entry(tree.carrier(txn, path.steps[-1].edge))
        if entry is not None:
            nodes.add(entry.node)
    return frozenset(nodes)
