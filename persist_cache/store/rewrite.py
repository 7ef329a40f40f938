"""Writing runs anew: what lives of one, or of several that follow each other, becomes one file.

The steps are those of any other put: the copy is durable before one short commit lets the edges
of the old files use it, and the old files go to the trash. Nothing is evicted for a copy. What is
worth it, `compact` decides.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from persist_cache import fs
from persist_cache.blobs.header import TOKENS, BlobHeader, EntryMark
from persist_cache.blobs.reader import BlobReader
from persist_cache.blobs.rows import ROW_AXIS, Cut, cut_runs
from persist_cache.blobs.writer import BlobWriter, Written
from persist_cache.codec import Tensor
from persist_cache.errors import CorruptBlobError
from persist_cache.index import tree
from persist_cache.index.records import (
    NO_ENTRY,
    BlobKind,
    BlobRecord,
    Edge,
    EntryRecord,
    edge_parent,
)
from persist_cache.index.transaction import Reader, Writer
from persist_cache.store import reservation
from persist_cache.store.budget import WRITTEN_BYTES, blob_estimate, written_today
from persist_cache.store.evict import Evictor
from persist_cache.store.recording import add_blob
from persist_cache.store.reservation import undone
from persist_cache.store.session import Disk
from persist_cache.tokens import TOKEN_BYTES

_PAGES_PER_RUN = 8
"""Pages of the index that a commit may copy for each run: its records lie in six tables."""


class LivingRun(Struct, frozen=True):
    """What lives of a run, as of one look at the index.

    Attributes:
        key: Of the edge with its first row: the same as long as anything uses the run.
        record: Of the run.
        packed: Tokens of its living rows.
        entries: Those that end in it, each with the position where it does.
    """

    key: bytes
    record: BlobRecord
    packed: bytes
    entries: tuple[tuple[int, EntryRecord], ...]

    @property
    def num_tokens(self) -> int:
        return len(self.packed) // TOKEN_BYTES

    @property
    def end(self) -> int:
        return self.record.start + self.num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of its living rows, about."""
        return self.record.nbytes * self.num_tokens // (self.record.num_tokens or 1)


class NotRewrittenError(Exception):
    """The runs stay as they are: the index changed, or their tensors do not go together."""


def living_run(txn: Reader, key: bytes) -> LivingRun:
    """The run whose first row's edge is filed under `key`."""
    edges = list(tree.edges_of_run(txn, key))
    record = None if not edges else txn.blob(edges[0][1].blob)
    if record is None:
        raise tree.damaged("an edge names a blob without record")
    position = record.start
    entries = []
    for _, edge in edges:
        position += edge.rows
        entry = txn.entry(edge.entry) if edge.entry != NO_ENTRY else None
        if entry is not None:
            entries.append((position, entry))
    packed = txn.tokens(edges[0][1].blob, 0, position - record.start)
    return LivingRun(key, record, packed, tuple(entries))


def rewrite(disk: Disk, evictor: Evictor, runs: Sequence[LivingRun]) -> None:
    """Put one file in the place of `runs`, which lie end to end on one path.

    Raises:
        CorruptBlobError: One of them is not what was written; its path says which.
        NotRewrittenError: Nothing was changed.
        StoreFullError: There is no room for the copy.
        StoreError: The disk failed; nothing was changed.
    """
    with (
        fs.errors_translated("while a blob was written anew"),
        contextlib.ExitStack() as stack,
        BlobWriter(disk.folder) as writer,
    ):
        readers = [stack.enter_context(_opened(disk, run)) for run in runs]
        header = _header(readers, runs)
        tensors = cut_runs(
            [
                Cut(reader, run.record.start, run.end, memoryview(run.packed))
                for reader, run in zip(readers, runs, strict=True)
            ]
        )
        _reserve(disk, evictor, writer, header, tensors, len(runs))
        with undone(disk, [writer]):
            written = writer.write(header, tensors)
            writer.publish()
            disk.index.update(lambda txn: _commit(disk, txn, runs, written))
        writer.keep()


def _opened(disk: Disk, run: LivingRun) -> BlobReader:
    record = run.record
    path = disk.folder.path(record.name.hex())
    try:
        return BlobReader(path, nbytes=record.nbytes, digest=record.digest)
    except FileNotFoundError:  # it was evicted, unless its record is still there
        raise CorruptBlobError(path, "its file is missing") from None


def _header(readers: Sequence[BlobReader], runs: Sequence[LivingRun]) -> BlobHeader:
    first, last = readers[0].header, readers[-1].header
    for reader in readers:
        header = reader.header
        if (header.fingerprint, header.layout) != (last.fingerprint, last.layout):
            raise CorruptBlobError(reader.path, "is of another model than its place in the index")
        same_kind = (header.complete, header.detail) == (last.complete, last.detail)
        if not same_kind or _geometry(header) != _geometry(last):
            raise NotRewrittenError("some runs have rows of layers that others lack")
    end = runs[-1].end
    marks = [
        EntryMark(position, entry.tier.label, entry.created_us / 1e6)
        for run in runs
        for position, entry in run.entries
    ]
    at_end = marks.pop() if marks and marks[-1].end == end else None
    return replace(
        last,
        start=first.start,
        end=end,
        prefix=first.prefix,
        parent=first.parent,
        tier=last.tier if at_end is None else at_end.tier,
        entry=at_end is not None,
        created=last.created if at_end is None else at_end.created,
        inner_entries=tuple(marks),
        replaces=tuple(
            name for reader in readers for name in (*reader.header.replaces, reader.name)
        ),
    )


def _geometry(header: BlobHeader) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Per tensor its type, and its shape without the number of rows."""
    return {
        name: (info.dtype, info.shape[:ROW_AXIS] + info.shape[ROW_AXIS + 1 :])
        for name, info in header.tensors.items()
        if name != TOKENS
    }


def _reserve(
    disk: Disk,
    evictor: Evictor,
    writer: BlobWriter,
    header: BlobHeader,
    tensors: Sequence[Tensor],
    num_runs: int,
) -> None:
    marks = msgspec.json.encode(header.inner_entries).decode()
    texts = (header.layout, header.identity, header.detail, marks, *header.replaces)
    nbytes = blob_estimate(
        sum(tensor.nbytes for tensor in tensors), len(tensors), sum(map(len, texts))
    )
    nbytes += num_runs * _PAGES_PER_RUN * mmap.PAGESIZE
    num_tokens = header.end - header.start
    reservation.reserve(
        disk,
        evictor,
        [bytes.fromhex(writer.name)],
        nbytes,
        num_tokens,
        protected=None,
        identity=header.identity,
    )


def _commit(disk: Disk, txn: Writer, runs: Sequence[LivingRun], written: Written) -> None:
    """Let the copy take the place of the runs, unless more of them lives by now."""
    edges: list[tuple[bytes, Edge]] = []
    for run in runs:
        found = list(tree.edges_of_run(txn, run.key))
        # A rebuild gives all nodes and blobs new numbers.
        number = txn.blob_number(run.record.name)
        if not found or (found[0][1].blob, found[0][1].first_row) != (number, 0):
            raise NotRewrittenError("a run went")
        if edges and edge_parent(run.key) != edges[-1][1].node:
            raise NotRewrittenError("a run hangs elsewhere")
        rows = sum(edge.rows for _, edge in found)
        if rows > run.num_tokens or (rows < run.num_tokens and run is not runs[-1]):
            raise NotRewrittenError("a run has other living rows")
        edges += found
    namespace = txn.space_of(edges[-1][1].blob)
    blob = add_blob(
        txn,
        written,
        namespace=namespace,
        kind=BlobKind.RUN,
        created=runs[-1].record.created,
        start=runs[0].record.start,
        packed=b"".join(run.packed for run in runs),
    )
    tree.repoint(txn, edges, blob, disk.clock())
    txn.count("merged" if len(runs) > 1 else "compacted", len(runs))
    txn.add(WRITTEN_BYTES, written.nbytes)
    txn.add(written_today(disk.clock()), written.nbytes)
