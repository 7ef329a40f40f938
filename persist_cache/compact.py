"""Writing blobs anew that are mostly dead rows.

An eviction frees a file only when nothing uses it any more. What shares its first rows keeps all
of it on disk, the evicted prompt's rows too. Here the living rows get a file of their own, by the
steps of any other put, and the old file goes to the trash.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence

from msgspec import Struct
from msgspec.structs import replace

from persist_cache import fs, health, paths
from persist_cache.blobs import ALIGNMENT, BlobHeader, BlobReader, BlobWriter, Tensor, Written
from persist_cache.budget import blob_estimate, written_today
from persist_cache.cutting import cut_run
from persist_cache.disk import Disk
from persist_cache.entry import TOKEN_BYTES
from persist_cache.errors import CorruptBlobError, StoreFormatError, StoreFullError
from persist_cache.evict import Evictor
from persist_cache.index import Reader, Writer
from persist_cache.insert import add_blob, undone
from persist_cache.records import BlobKind, BlobRecord, EntryRecord

log = logging.getLogger(__name__)


class _Job(Struct, frozen=True):
    """One run to be cut, as of one look at the index.

    Attributes:
        key: Of the edge with its first row: the same as long as anything uses the run.
        record: Of the run.
        packed: Tokens of its living rows.
        entry: The one that ends with the last of them, or None.
    """

    key: bytes
    record: BlobRecord
    packed: bytes
    entry: EntryRecord | None

    @property
    def name(self) -> str:
        return self.record.name.hex()

    @property
    def num_tokens(self) -> int:
        return len(self.packed) // TOKEN_BYTES


class _MovedError(Exception):
    """The index changed while the copy was written."""


def compact(disk: Disk, evictor: Evictor) -> tuple[int, int]:
    """Write blobs anew of which more than half is dead, the shortest copies first.

    Nothing is evicted for that. A blob that turns out to be damaged goes to quarantine.

    Returns:
        How many were written anew, and how many stay because there is no room for a copy.

    Raises:
        StoreError: The disk failed.
    """
    with disk.index.read() as txn:
        jobs = sorted(_jobs(txn), key=lambda job: job.num_tokens)
    blobs = without_room = 0
    for job in jobs:
        try:
            _rewrite(disk, evictor, job)
            blobs += 1
        except _MovedError:
            log.debug("blob %s changed while it was written anew", job.name)
        except StoreFullError:
            without_room += 1
        except StoreFormatError as error:
            log.warning("blob %s is left as it is: %s", job.name, error)
        except CorruptBlobError as error:
            health.quarantine(disk, job.name, error.reason)
        evictor.empty_trash()
    return blobs, without_room


def is_mostly_dead(record: BlobRecord, living: int) -> bool:
    """Whether more than half of a run's file are rows behind its first `living` ones."""
    dead = record.num_tokens - living
    return 2 * dead * (record.nbytes - ALIGNMENT) > record.num_tokens * record.nbytes


def _jobs(txn: Reader) -> Iterator[_Job]:
    living: Counter[int] = Counter()
    first: dict[int, bytes] = {}
    for key, edge in txn.edges():
        living[edge.blob] += edge.rows
        if edge.first_row == 0:
            first[edge.blob] = key
    for number, record in txn.blobs():
        if record.kind == BlobKind.RUN and is_mostly_dead(record, living[number]):
            *_, (_, last) = paths.edges_of_run(txn, first[number])
            packed = txn.tokens(number, 0, living[number])
            yield _Job(first[number], record, packed, txn.entry(last.entry))


def _rewrite(disk: Disk, evictor: Evictor, job: _Job) -> None:
    """Cut one run.

    Raises:
        CorruptBlobError: It is not what was written.
        StoreFullError: There is no room for the copy.
        _MovedError: What lives of it is not what it was; nothing was changed.
    """
    with (
        fs.errors_translated("while a blob was written anew"),
        _opened(disk, job) as reader,
        BlobWriter(disk.folder) as writer,
    ):
        end = job.record.start + job.num_tokens
        tensors = cut_run(reader, job.record.start, end, memoryview(job.packed))
        header = _header(reader, job, end)
        _reserve(evictor, writer, header, tensors)
        with undone(disk, evictor, [writer]):
            written = writer.write(header, tensors)
            writer.publish()
            disk.index.update(lambda txn: _commit(disk, txn, job, written))
        writer.keep()


def _opened(disk: Disk, job: _Job) -> BlobReader:
    path = disk.folder.path(job.name)
    try:
        return BlobReader(path, nbytes=job.record.nbytes, digest=job.record.digest)
    except FileNotFoundError:  # it was evicted, unless its record is still there
        raise CorruptBlobError(path, "its file is missing") from None


def _header(reader: BlobReader, job: _Job, end: int) -> BlobHeader:
    old = reader.header
    entry = job.entry
    return replace(
        old,
        end=end,
        tier=old.tier if entry is None else entry.tier.label,
        entry=entry is not None,
        created=old.created if entry is None else entry.created_us / 1e6,
        replaces=(*old.replaces, reader.name),
    )


def _reserve(
    evictor: Evictor, writer: BlobWriter, header: BlobHeader, tensors: Sequence[Tensor]
) -> None:
    texts = (header.layout, header.identity, header.detail, *header.replaces)
    nbytes = blob_estimate(
        sum(tensor.nbytes for tensor in tensors), len(tensors), sum(map(len, texts))
    )
    num_tokens = header.end - header.start
    evictor.reserve([bytes.fromhex(writer.name)], nbytes, num_tokens, protected=None)


def _commit(disk: Disk, txn: Writer, job: _Job, written: Written) -> None:
    """Let the copy take the place of the run, unless more of that lives by now."""
    number = txn.blob_number(job.record.name)
    edges = list(paths.edges_of_run(txn, job.key))
    # A rebuild gives all nodes and blobs new numbers.
    if not edges or (edges[0][1].blob, edges[0][1].first_row) != (number, 0):
        raise _MovedError
    if sum(edge.rows for _, edge in edges) > job.num_tokens:
        raise _MovedError
    blob = add_blob(
        txn,
        written,
        kind=BlobKind.RUN,
        created=job.record.created,
        start=job.record.start,
        packed=job.packed,
    )
    paths.repoint(txn, edges, blob, disk.clock())
    txn.count("compacted")
    txn.add("written_bytes", written.nbytes)
    txn.add(written_today(disk.clock()), written.nbytes)
