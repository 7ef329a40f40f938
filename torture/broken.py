"""Deliberate defects: a torture that does not find these finds nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from persist_cache import fs
from persist_cache.blobs import BlobReader, BlobWriter
from persist_cache.disk import Disk
from persist_cache.evict import Evictor
from persist_cache.insert import Insertion, PutResult
from persist_cache.records import SizedRecord


def install(name: str) -> None:
    """Break the store in this process; "" leaves it whole."""
    if name:
        BREAKS[name]()


def _no_checksum() -> None:
    """Tensors are served as they are read."""

    def read(self: BlobReader, name: str, buffers: Sequence[memoryview]) -> None:
        with self._descriptor() as fd:
            fs.read_into(fd, self.header.tensors[name].offset, buffers)

    BlobReader.read = read  # type: ignore[method-assign]


def _commit_first() -> None:
    """The record is committed before its blob has its final name."""
    publish, keep = BlobWriter.publish, BlobWriter.keep

    def later(self: BlobWriter) -> None:
        pass

    def keep_after_publishing(self: BlobWriter) -> None:
        publish(self)
        keep(self)

    BlobWriter.publish = later  # type: ignore[method-assign]
    BlobWriter.keep = keep_after_publishing  # type: ignore[method-assign]


def _budget_afterwards() -> None:
    """Room is made once the blob is there, not before."""
    run = Insertion.run

    def reserve(self: Evictor, names: Sequence[bytes], nbytes: int, *_: Any, **__: Any) -> None:
        disk: Disk = self._disk
        share = SizedRecord(nbytes // len(names) + 1, disk.clock())

        def note(txn: Any) -> None:
            for name in names:
                txn.put_sized(b"pending", name, share)

        disk.index.update(note)

    def run_then_evict(self: Insertion) -> PutResult:
        done = run(self)
        self._evictor.evict_to(self._disk.limits.max_bytes)
        return done

    Evictor.reserve = reserve  # type: ignore[method-assign]
    Insertion.run = run_then_evict  # type: ignore[method-assign]


FOUND_BY = {"checksum": "kills", "order": "kills", "budget": "kills"}
"""The storm that has to find each."""

BREAKS: dict[str, Callable[[], None]] = {
    "checksum": _no_checksum,
    "order": _commit_first,
    "budget": _budget_afterwards,
}
