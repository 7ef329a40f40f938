"""Clearing up after dead processes, which may have died between any two steps.

No file is removed whose writer lives: each is looked up in the index again once its lock is held.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from persist_cache.blobs.folder import try_remove_orphan
from persist_cache.errors import StoreBusyError, StoreError
from persist_cache.index.transaction import BLANK, Writer
from persist_cache.store.evict import Evictor
from persist_cache.store.quarantine import correct_sizes, is_quarantined, move_aside
from persist_cache.store.quotas import QUOTA, is_counted, recount
from persist_cache.store.reservation import release_abandoned
from persist_cache.store.session import Disk


def sweep(disk: Disk, evictor: Evictor) -> None:
    """Finish what dead processes left behind: reservations, temporary files, trash.

    Cheap enough for every start: it looks at what the index lists and at the folders for
    temporary and damaged files, never at all blobs.
    """
    release_abandoned(disk)
    with disk.index.read() as txn:
        is_filed, is_blank = txn.knows_all_families(), not txn.size_of(BLANK)
    if not is_filed:
        disk.index.update(Writer.file_families)
    with disk.index.read() as txn:
        is_due = bool(txn.numbers(QUOTA)) and not is_counted(txn)
    if is_due:
        disk.index.update(recount)
    if not is_blank:
        disk.index.update(Writer.unfill)  # of whoever died while it overwrote free pages
    disk.folder.remove_strays()
    evictor.redate()
    with disk.index.read() as txn:
        quarantined = txn.sized(b"quarantine")
    for name_hex, path in list(disk.folder.temporaries()):
        _try_remove(disk, path, partial(_is_pending, disk, bytes.fromhex(name_hex)))
    for name, record in quarantined.items():
        # Whoever put it there may have died before the file was moved.
        if not disk.folder.quarantine_path(name.hex()).exists():
            move_aside(disk, name, record)
    for name_hex, path in list(disk.folder.in_quarantine()):
        if bytes.fromhex(name_hex) not in quarantined:
            _try_remove(disk, path, partial(is_quarantined, disk, bytes.fromhex(name_hex)))
    correct_sizes(disk)
    evictor.empty_trash()
    disk.index.reader_check()


def remove_orphans(disk: Disk) -> int:
    """Remove published files that no record names and whose writer is dead; scans all folders."""
    removed = 0
    for name_hex, path in list(disk.folder.names()):
        is_known = partial(is_expected, disk, bytes.fromhex(name_hex), path)
        if not is_known():
            removed += _try_remove(disk, path, is_known)
    disk.folder.remove_empty()
    return removed


def _try_remove(disk: Disk, path: Path, is_known: Callable[[], bool]) -> bool:
    return try_remove_orphan(path, is_known, overwrites=disk.overwrites)


def is_expected(disk: Disk, name: bytes, path: Path) -> bool:
    """Whether somebody answers for the file `path`: a record, a writer, the trash."""
    if path != disk.folder.path(name.hex()):
        return False
    with disk.index.read() as txn:
        return txn.blob_number(name) is not None or any(
            txn.in_database(database, name) for database in (b"pending", b"trash", b"quarantine")
        )


def _is_pending(disk: Disk, name: bytes) -> bool:
    with disk.index.read() as txn:
        return txn.in_database(b"pending", name)


def forget_empty_namespaces(disk: Disk, older_than_s: float) -> int:
    """Drop models of which nothing is left; returns how many.

    Raises:
        StoreBusyError: Another process does not end its transaction; what follows waits as long.
    """
    limit = disk.clock() - older_than_s

    def forget(txn: Writer) -> int:
        gone = [
            key
            for key, record in txn.namespaces()
            if record.created < limit and not txn.children(record.root, limit=1)
        ]
        for key in gone:
            txn.delete_namespace(key)
        return len(gone)

    try:
        return disk.index.update(forget)
    except StoreBusyError:
        raise
    except StoreError:
        return 0
