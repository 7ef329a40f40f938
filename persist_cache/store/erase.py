"""Erasing: nothing of what was evicted is left in the folder.

Eviction leaves rows of a file that others need, damaged files, and tokens in pages of the index
that are free. Each step here is an eviction's, a rewrite's or an ordinary commit, so the process
may die between any two; a mark in the index says that it is not done yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from msgspec import Struct

from persist_cache.errors import StoreFullError
from persist_cache.index.scrub import growth_pages, scrub
from persist_cache.index.transaction import UNFINISHED, Writer
from persist_cache.store import sweep
from persist_cache.store.compact import compact
from persist_cache.store.evict import Evictor
from persist_cache.store.session import Disk

CANNOT = (
    "snapshots of the file system, backups, what a disk keeps of blocks that were written over "
    "(SSD cells, copy-on-write file systems), swap, and the memory of running processes"
)
"""What no program can erase, in words."""


class Erased(Struct, frozen=True):
    """What `Store.erase` did.

    Attributes:
        compacted: Files that were written anew without rows of what was evicted.
        without_room: Files that keep such rows, because there is no room for a copy.
        in_trash: Files that could not be removed.
        overwritten_pages: Free pages of the index that are zeros now.
        is_read: Some pages stay, because a process reads what they held.
    """

    compacted: int
    without_room: int
    in_trash: int
    overwritten_pages: int
    is_read: bool

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left that could be erased."""
        return not (self.without_room or self.in_trash or self.is_read)


def erase(disk: Disk, evictor: Evictor) -> Erased:
    """Erase what evictions left; see `Store.erase`."""
    disk.flush()
    disk.index.update(_begin)
    with overwriting(disk):
        sweep.sweep(disk, evictor)
        sweep.remove_orphans(disk)
        evictor.purge_quarantine()
        compacted, without_room = compact(disk, evictor, any_dead=True)
        evictor.purge_quarantine()  # what turned out to be damaged
        evictor.empty_trash()
    disk.index.update(_forget)
    _require_room(disk)
    done = scrub(disk.index)
    with disk.index.read() as txn:
        in_trash = len(txn.keys(b"trash"))
    found = Erased(compacted, without_room, in_trash, done.pages, done.is_read)
    if found.is_complete:
        disk.index.update(lambda txn: txn.add(UNFINISHED, -txn.counter(UNFINISHED)))
    return found


def _require_room(disk: Disk) -> None:
    """See that the index may be written anew within the budget.

    Raises:
        StoreFullError: It may not.
    """
    nbytes = growth_pages(disk.index) * disk.index.page_bytes
    with disk.index.read() as txn:
        lacks = disk.budget.excess(txn, nbytes, 0)
    if lacks > 0:
        raise StoreFullError(
            f"Not everything was erased: to write the index anew {lacks} bytes more are needed, "
            "within the budget and on the disk. Evict something or raise the budget, and run "
            "`persist-cache gc --erase`."
        )


@contextlib.contextmanager
def overwriting(disk: Disk) -> Iterator[None]:
    """Have files that go in the block be overwritten before."""
    before, disk.overwrites = disk.overwrites, True
    try:
        yield
    finally:
        disk.overwrites = before


def _begin(txn: Writer) -> None:
    txn.add(UNFINISHED, 1 - txn.counter(UNFINISHED))


def _forget(txn: Writer) -> None:
    txn.forget_departed()
    txn.forget_added_of_nobody()
