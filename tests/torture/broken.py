"""Deliberate defects: a torture that does not find these finds nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from persist_cache import fs
from persist_cache.blobs.reader import BlobReader
from persist_cache.blobs.writer import BlobWriter
from persist_cache.index.records import SizedRecord
from persist_cache.store import reservation
from persist_cache.store.evict import Evictor
from persist_cache.store.put import Insertion, PutResult
from persist_cache.store.session import Disk


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

    def reserve(
        disk: Disk,
        evictor: Evictor,
        names: Sequence[bytes],
        nbytes: int,
        num_tokens: int,
        protected: frozenset[int] | None,
        *,
        identity: str = "",
    ) -> None:
        share = SizedRecord(nbytes // len(names) + 1, disk.clock())

        def note(txn: Any) -> None:
            for name in names:
                txn.put_sized(b"pending", name, share)

        disk.index.update(note)

    def run_then_evict(self: Insertion) -> PutResult:
        done = run(self)
        self._evictor.evict_to(self._disk.limits.max_bytes)
        return done

    reservation.reserve = reserve
    Insertion.run = run_then_evict  # type: ignore[method-assign]


def _memory_by_name() -> None:
    """Caches in memory are found by the model's name, whichever weights computed them."""
    from persist_cache.cache.owners import Owner, Owners

    of = Owners.of

    def by_name(self: Owners, model: Hashable, *, may_read: bool, salt: str = "") -> Owner:
        owner = of(self, model, may_read=may_read, salt=salt)
        return dataclasses.replace(owner, identity="", load=None)

    Owners.of = by_name  # type: ignore[method-assign]


def _identified_late() -> None:
    """A model is identified by its files as they are once it was loaded."""
    from persist_cache.fingerprint import loads

    def around_load(files: loads.Files, load: Callable[[], Any]) -> Any:
        return load(), files.describe()

    loads.around_load = around_load


def _two_looks() -> None:
    """A fetch tells the length of one cache, and gives away what a second look finds."""
    from persist_cache.cache.lookup import Lookup, Taken
    from persist_cache.cache.owners import Owner

    take = Lookup.take

    def look_and_take(self: Lookup, owner: Owner, packed: bytes, limit: int, **how: Any) -> Taken:
        first = self.outlook(owner, packed, limit)[1]
        given = take(self, owner, packed, limit, **how)
        return given if first == 0 else given._replace(num_tokens=first)

    Lookup.take = look_and_take  # type: ignore[method-assign]


def _only_lengths() -> None:
    """Of a cache that its former owner changed, only the length is compared."""
    from persist_cache.cache.live_caches import Held, Resident

    is_unchanged = Resident.is_unchanged

    def has_its_length(self: Resident, held: Held) -> bool:
        held.witness = None
        return is_unchanged(self, held)

    Resident.is_unchanged = has_its_length  # type: ignore[method-assign]


FOUND_BY = {
    "checksum": "kills",
    "order": "kills",
    "budget": "kills",
    "memory-by-name": "replaced",
    "identified-late": "replaced",
    "two-looks": "threads",
    "only-lengths": "threads",
}
"""The storm that has to find each."""

BREAKS: dict[str, Callable[[], None]] = {
    "checksum": _no_checksum,
    "order": _commit_first,
    "budget": _budget_afterwards,
    "memory-by-name": _memory_by_name,
    "identified-late": _identified_late,
    "two-looks": _two_looks,
    "only-lengths": _only_lengths,
}
