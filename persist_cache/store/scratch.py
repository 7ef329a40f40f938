"""Room for bytes that are not part of the store yet: counted like any other, and never left behind.

It is a file like that of a blob on its way, with a reservation of its own. A killed process leaves
both to the next sweep, as a killed put does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from persist_cache import fs
from persist_cache.blobs.writer import BlobWriter
from persist_cache.errors import StoreError
from persist_cache.index.transaction import Writer
from persist_cache.store import reservation
from persist_cache.store.budget import WRITTEN_BYTES, blob_estimate, written_today
from persist_cache.store.evict import Evictor
from persist_cache.store.session import Disk


class Scratch(Struct, frozen=True):
    """A file for a while.

    Attributes:
        path: To be named in errors.
        fd: Open for reading and writing.
        nbytes: Its length, with room for all of it.
    """

    path: Path
    fd: int
    nbytes: int


@contextlib.contextmanager
def scratch(
    disk: Disk, evictor: Evictor, nbytes: int, protected: frozenset[int]
) -> Iterator[Scratch]:
    """See `Store.scratch`."""
    with (
        fs.errors_translated("while room for a while was made"),
        BlobWriter(disk.folder) as writer,
    ):
        name = bytes.fromhex(writer.name)
        reservation.reserve(disk, evictor, [name], blob_estimate(nbytes, 0, 0), 0, protected)
        try:
            fs.allocate(writer.fileno(), nbytes)
            yield Scratch(writer.path, writer.fileno(), nbytes)
        finally:
            # If this fails, the next sweep finds file and reservation without a living writer.
            writer.discard()
            if writer.is_gone:
                with contextlib.suppress(StoreError):
                    disk.index.update(lambda txn: _give_back(disk, txn, name, nbytes))


def _give_back(disk: Disk, txn: Writer, name: bytes, nbytes: int) -> None:
    """End the reservation; what was written counts for the day."""
    txn.delete_sized(b"pending", name)
    txn.add(WRITTEN_BYTES, nbytes)
    txn.add(written_today(disk.clock()), nbytes)
