"""Putting an entry on disk: plan, reserve, write, publish, commit.

The files are durable and under their final names before one short commit makes them known. If the
index moved in between (another process stored some of it, or evicted the prefix), the files are
dropped and the work starts over.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from persist_cache import paths
from persist_cache.blobs import (
    TOKENS,
    BlobHeader,
    BlobWriter,
    Payload,
    Tensor,
    Written,
    prefix_digest,
)
from persist_cache.budget import blob_estimate, written_today
from persist_cache.disk import Disk
from persist_cache.entry import TOKEN_BYTES
from persist_cache.errors import StoreError, StoreFullError
from persist_cache.evict import Evictor
from persist_cache.fingerprint import Fingerprint
from persist_cache.index import Reader, Writer
from persist_cache.records import (
    NO_BLOB,
    NO_ENTRY,
    BlobKind,
    BlobRecord,
    EntryRecord,
    NamespaceRecord,
    entry_id,
    entry_number,
    namespace_key,
)

log = logging.getLogger(__name__)
_MAX_ATTEMPTS = 8


class Source(Protocol):
    """What a put saves: a KV cache, seen as rows and state.

    Its byte views must stay unchanged until the put returns.
    """

    @property
    def layout(self) -> str:
        """JSON of classes and geometry; only equal layouts share runs."""

    @property
    def complete(self) -> bool:
        """Rows of every layer exist, so that any position can be resumed."""

    def rows(self, start: int, end: int) -> Payload:
        """The rows of tokens `[start, end)`."""

    def checkpoint(self) -> Payload | None:
        """State at the end of those layers whose rows may drop, or None if there are none."""


@dataclass(frozen=True, slots=True)
class PutResult:
    """What a put did.

    Attributes:
        entry: Id of the entry, or None for an empty prompt.
        new_tokens: Tokens that were not on disk before.
        nbytes: Bytes written.
    """

    entry: str | None
    new_tokens: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """What has to be written, as of one look at the index."""

    common: int
    parent: str
    needs_checkpoint: bool
    protected: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Part:
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

    def run(self) -> PutResult:
        """Store it.

        Raises:
            StoreFullError: No room within the budget or on the disk; nothing was changed.
            StoreError: The disk failed, or others kept changing the same path.
        """
        for _ in range(_MAX_ATTEMPTS):
            with contextlib.suppress(_MovedError):
                return self._attempt()
        raise StoreError("The store changed too often while an entry was written; try again.")

    def _attempt(self) -> PutResult:
        with self._disk.index.read() as txn:
            plan = self._plan(txn)
        parts = list(self._parts(plan))
        if not parts:
            number = self._disk.index.update(lambda txn: self._commit(txn, plan, [], []))
            return PutResult(entry_id(number), 0, 0)
        with contextlib.ExitStack() as stack, _disk_errors():
            writers = [stack.enter_context(BlobWriter(self._disk.folder)) for _ in parts]
            with self._reserved(writers, parts, plan):
                written = self._write(writers, parts, plan)
                number = self._disk.index.update(
                    lambda txn: self._commit(txn, plan, parts, written)
                )
            for writer in writers:
                writer.keep()
        new_tokens = self._length - plan.common
        return PutResult(entry_id(number), new_tokens, sum(one.nbytes for one in written))

    def _plan(self, txn: Reader) -> _Plan:
        found = txn.namespaces(self._key)
        if not found:
            return _Plan(0, "", not self._source.complete, frozenset())
        path = paths.walk(txn, found[0][1].root, self._packed)
        parent = ""
        if path.steps:
            record = txn.blob(path.steps[-1].edge.blob)
            parent = record.name.hex() if record else ""
        return _Plan(
            common=path.common,
            parent=parent,
            needs_checkpoint=self._needs_checkpoint(txn, path),
            protected=frozenset(step.edge.node for step in path.steps),
        )

    def _needs_checkpoint(self, txn: Reader, path: paths.Walk) -> bool:
        """Whether the end of the prompt can be resumed only with a state of its own."""
        if self._source.complete and path.complete_tokens == path.common:
            return False
        if path.common < self._length or path.node is None:
            return True
        entry = txn.entry(path.steps[-1].edge.entry)
        return entry is None or entry.checkpoint == NO_BLOB

    def _parts(self, plan: _Plan) -> Iterator[_Part]:
        """What to write: large runs, so that files are sequential, yet a tail can be freed."""
        for start in range(plan.common, self._length, self._run_tokens):
            end = min(start + self._run_tokens, self._length)
            yield _Part(BlobKind.RUN, start, end, self._source.rows(start, end))
        if plan.needs_checkpoint:
            state = self._source.checkpoint()
            if state is None:
                raise StoreError("This cache has neither all of its rows nor a state to store.")
            yield _Part(BlobKind.CHECKPOINT, self._length, self._length, state)

    @contextlib.contextmanager
    def _reserved(
        self, writers: Sequence[BlobWriter], parts: Sequence[_Part], plan: _Plan
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
        self._evictor.reserve(names, nbytes, self._length - plan.common, plan.protected)
        try:
            yield
        except BaseException:
            # Files first: one without a reservation would be found by a full scan only.
            for writer in writers:
                writer.discard()
            # If even this fails, the next sweep finds the reservation's writer dead.
            with contextlib.suppress(StoreError):
                self._evictor.release(names)
            raise

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
        path = paths.walk(txn, namespace.root, self._packed)
        if (path.common, self._needs_checkpoint(txn, path)) != (
            plan.common,
            plan.needs_checkpoint,
        ):
            raise _MovedError
        pieces: list[paths.Piece] = []
        checkpoint = NO_BLOB
        for part, one in zip(parts, written, strict=True):
            blob = self._add_blob(txn, part, one)
            if part.kind == BlobKind.RUN:
                pieces.append(paths.Piece(blob, part.end - part.start, self._source.complete))
            else:
                checkpoint = blob
        node = paths.attach(txn, path, self._packed, pieces)
        total = sum(one.nbytes for one in written)
        if total:
            txn.add("puts", 1)
            txn.add("written_bytes", total)
            txn.add(written_today(self._wanted.created_us / 1e6), total)
        return self._place(txn, namespace, node, checkpoint)

    def _namespace(self, txn: Writer) -> NamespaceRecord:
        found = txn.namespaces(self._key)
        if found:
            return found[0][1]
        record = NamespaceRecord(
            number=txn.add("next_namespace", 1),
            root=paths.new_node(txn),
            identity=self._identity,
            layout=self._source.layout,
            created=self._disk.clock(),
        )
        txn.put_namespace(self._key, record)
        return record

    def _add_blob(self, txn: Writer, part: _Part, one: Written) -> int:
        return add_blob(
            txn,
            one,
            kind=part.kind,
            created=self._wanted.created_us / 1e6,
            start=part.start,
            packed=self._packed[part.start * TOKEN_BYTES : part.end * TOKEN_BYTES],
        )

    def _place(self, txn: Writer, namespace: NamespaceRecord, node: int, checkpoint: int) -> int:
        """Make the entry end at `node`, keeping what an older entry there had earned."""
        wanted = self._wanted._replace(namespace=namespace.number, node=node, checkpoint=checkpoint)
        return place_entry(txn, self._key, self._packed, wanted)


def add_blob(
    txn: Writer, one: Written, *, kind: BlobKind, created: float, start: int, packed: bytes
) -> int:
    """Record a published file, with its tokens and as yet without references."""
    number = txn.add("next_blob", 1)
    record = BlobRecord(
        kind=kind,
        references=0,
        num_tokens=len(packed) // TOKEN_BYTES,
        start=start,
        nbytes=one.nbytes,
        disk_bytes=one.disk_bytes,
        created=created,
        name=bytes.fromhex(one.name),
        digest=one.digest,
    )
    txn.put_blob(number, record)
    if kind == BlobKind.RUN:
        txn.put_tokens(number, packed)
    txn.add(paths.BLOB_BYTES, one.disk_bytes)
    txn.delete_sized(b"pending", record.name)
    return number


def place_entry(txn: Writer, key: bytes, packed: bytes, wanted: EntryRecord) -> int:
    """Make an entry end at `wanted.node`, or merge `wanted` into the one that is there.

    The higher tier, the pin, the uses and the label of an older entry stay. `wanted.checkpoint`
    must have been added by `add_blob`; it gets its reference here.

    Returns:
        The entry's number.
    """
    edge_at = txn.parent_key(wanted.node)
    edge = None if edge_at is None else txn.edge(edge_at)
    assert edge is not None, "entries end below the root"
    if wanted.checkpoint != NO_BLOB:
        paths.refer_checkpoint(txn, wanted.checkpoint)
    old = txn.entry(edge.entry) if edge.entry != NO_ENTRY else None
    if old is not None:
        paths.put_entry(
            txn,
            edge.entry,
            old._replace(
                tier=max(old.tier, wanted.tier),
                pinned=old.pinned or wanted.pinned,
                checkpoint=old.checkpoint or wanted.checkpoint,
                last_use_us=max(old.last_use_us, wanted.last_use_us),
                prefill_s=wanted.prefill_s or old.prefill_s,
                expires=wanted.expires or old.expires,
                label=wanted.label or old.label,
            ),
        )
        return edge.entry
    number = entry_number(key, packed)
    while txn.entry(number) is not None:  # another path has the same 64-bit digest
        number = number + 1 & (1 << 64) - 1 or 1
    paths.put_entry(txn, number, wanted)
    paths.set_entry(txn, wanted.node, number)
    return number


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Translate what the file system says while blobs are written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFullError("The disk is full; nothing was stored.") from error
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StoreError(f"The disk failed while an entry was written ({reason}).") from error
