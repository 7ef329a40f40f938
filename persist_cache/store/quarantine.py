"""Quarantine: a damaged blob is taken out of service, and kept for a look at it.

One commit removes the records of the blob and of everything below it in the trie, and lists the
file; then the file moves to the folder `quarantine/`. It counts against the budget there, and is
the first to go when room is needed.
"""

from __future__ import annotations

import contextlib
import logging

from persist_cache import fs
from persist_cache.index import tree
from persist_cache.index.records import BlobKind, SizedRecord
from persist_cache.index.transaction import Writer
from persist_cache.store.session import Disk

log = logging.getLogger(__name__)


def correct_sizes(disk: Disk) -> None:
    """Correct the sizes of damaged files that could not be told when they were put aside."""
    with disk.index.read() as txn:
        recorded = txn.sized(b"quarantine")
    found: dict[bytes, int] = {}
    for name, record in recorded.items():
        with contextlib.suppress(OSError):
            nbytes = fs.disk_bytes(disk.folder.quarantine_path(name.hex()))
            if nbytes != record.nbytes:
                found[name] = nbytes

    def correct(txn: Writer) -> None:
        for name, record in txn.sized(b"quarantine").items():
            if name in found:
                txn.put_sized(b"quarantine", name, record._replace(nbytes=found[name]))

    if found:
        disk.index.update(correct)


def quarantine(disk: Disk, name_hex: str, reason: str, *, is_unreadable: bool = False) -> bool:
    """Take a bad blob out of service: its records and all that hangs on them go, the file moves.

    Unless it is sound and the index is wrong about it: then that is set right.

    Args:
        disk: The store.
        name_hex: The blob.
        reason: What is wrong, for people.
        is_unreadable: The disk gave an error, so it is not to be read again.

    Returns:
        Whether it went; False when somebody else was first, or the index was at fault.
    """
    from persist_cache.store import testimony  # of use when something is damaged, and only then

    if not is_unreadable and testimony.set_right(disk, name_hex):
        return False  # the index was at fault
    name = bytes.fromhex(name_hex)
    nbytes: int | None = None
    with contextlib.suppress(OSError):  # damage may have changed its size as well
        nbytes = fs.disk_bytes(disk.folder.path(name_hex))

    def expel(txn: Writer) -> SizedRecord | None:
        # Not before: while this waits for its turn, others may still be told that they are stored.
        now = disk.clock()
        number = txn.blob_number(name)
        record = None if number is None else txn.blob(number)
        if number is None or record is None:
            return None
        why = f"quarantined: {reason}"
        if record.kind == BlobKind.RUN:
            # All other edges of a blob hang on the one with its first row.
            for key in [
                key for key, edge in txn.edges() if edge.blob == number and edge.first_row == 0
            ]:
                tree.drop_subtree(txn, key, why, now)
        else:
            for entry, resumed in list(txn.entries()):
                if resumed.checkpoint == number:
                    tree.drop_entry(txn, entry, why, now)
        txn.delete_sized(b"trash", name)
        waste = SizedRecord(record.disk_bytes if nbytes is None else nbytes, now, reason)
        txn.put_sized(b"quarantine", name, waste)
        txn.count("quarantined")
        return waste

    waste = disk.index.update(expel)
    if waste is None:
        return False
    log.warning("blob %s was put into quarantine: %s", name_hex, reason)
    move_aside(disk, name, waste)
    return True


def move_aside(disk: Disk, name: bytes, record: SizedRecord) -> None:
    """Move a damaged file aside; where it will not move, leave it to the trash."""
    disk.index.sync()  # else a power cut could take back the records' removal, but not the move
    try:
        if disk.folder.quarantine(name.hex()):
            return
    except OSError as error:
        log.warning("blob %s cannot be moved: %s", name.hex(), error)

    def discard(txn: Writer) -> None:
        if txn.delete_sized(b"quarantine", name):
            txn.put_sized(b"trash", name, record)

    disk.index.update(discard)


def is_quarantined(disk: Disk, name: bytes) -> bool:
    with disk.index.read() as txn:
        return txn.in_database(b"quarantine", name)
