"""Keeping a store sound: sweep after dead writers, quarantine what is damaged, check everything.

`check` compares the index with the files both ways; `repair` mends what it found without ever
removing a file whose writer lives.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from itertools import compress, count, repeat
from operator import add, ne
from pathlib import Path

from msgspec import Struct

from persist_cache import fs
from persist_cache.blobs.folder import SUFFIX, is_blob_file, try_remove_orphan
from persist_cache.blobs.reader import BlobReader
from persist_cache.errors import CorruptBlobError, DamagedIndexError, StoreBusyError, StoreError
from persist_cache.filenames import SUSPECT_FILE
from persist_cache.index import tree
from persist_cache.index.audit import broken_invariants
from persist_cache.index.records import BlobKind, SizedRecord
from persist_cache.index.transaction import Writer
from persist_cache.store import rebuild, testimony
from persist_cache.store.evict import Evictor
from persist_cache.store.session import Disk

log = logging.getLogger(__name__)


class Problem(Struct, frozen=True):
    """Something `check` found.

    Attributes:
        kind: `index`, `missing`, `damaged`, `orphan` or `trash`.
        message: One sentence.
        blob: Name of the blob concerned, or "".
    """

    kind: str
    message: str
    blob: str = ""


def sweep(disk: Disk, evictor: Evictor) -> None:
    """Finish what dead processes left behind: reservations, temporary files, trash.

    Cheap enough for every start: it looks at what the index lists and at the folders for
    temporary and damaged files, never at all blobs.
    """
    evictor.release_abandoned()
    disk.folder.remove_strays()
    evictor.redate()
    with disk.index.read() as txn:
        quarantined = txn.sized(b"quarantine")
    for name_hex, path in list(disk.folder.temporaries()):
        try_remove_orphan(path, partial(_is_pending, disk, bytes.fromhex(name_hex)))
    for name, record in quarantined.items():
        # Whoever put it there may have died before the file was moved.
        if not disk.folder.quarantine_path(name.hex()).exists():
            _move_to_quarantine(disk, name, record)
    for name_hex, path in list(disk.folder.in_quarantine()):
        if bytes.fromhex(name_hex) not in quarantined:
            try_remove_orphan(path, partial(_is_quarantined, disk, bytes.fromhex(name_hex)))
    _measure_quarantine(disk)
    evictor.empty_trash()
    disk.index.reader_check()


def _measure_quarantine(disk: Disk) -> None:
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


def remove_orphans(disk: Disk) -> int:
    """Remove published files that no record names and whose writer is dead; scans all folders."""
    removed = 0
    for name_hex, path in list(disk.folder.names()):
        is_known = partial(_is_expected, disk, bytes.fromhex(name_hex), path)
        if not is_known():
            removed += try_remove_orphan(path, is_known)
    disk.folder.remove_empty()
    return removed


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
    _move_to_quarantine(disk, name, waste)
    return True


def _move_to_quarantine(disk: Disk, name: bytes, record: SizedRecord) -> None:
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


def check(
    disk: Disk,
    *,
    read_data: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Problem]:
    """Compare index and files both ways; changes nothing.

    Args:
        disk: The store.
        read_data: Also read every byte and verify its checksum.
        progress: Called with bytes done and bytes in total while data is read.

    Returns:
        What is wrong; empty for a sound store.
    """
    try:
        with disk.index.read(copies=True) as txn:
            blobs = txn.blob_columns()
            problems = [Problem("index", message) for message in broken_invariants(txn, blobs)]
            pending = set(txn.sized(b"pending"))
            trash = set(txn.sized(b"trash"))
            for database in (b"quarantine", b"departed"):
                txn.sized(database)
            txn.counts()
    except StoreError as error:
        # Records that cannot even be read: nothing can be said of files before it is made anew.
        return [Problem("index", str(error))]
    lengths, misplaced = _look_at_files(disk)
    names = list(map(bytes.hex, blobs.names))
    files = list(map(add, names, repeat(SUFFIX)))
    total, done = sum(blobs.nbytes), 0
    said: dict[str, testimony.Testimony] = {}
    suspects: Iterable[int] = range(len(names))
    if not read_data:
        suspects = compress(count(), map(ne, map(lengths.get, files), blobs.nbytes))
    for at in suspects:
        digest = blobs.digests[at] if read_data else None
        problem = _check_blob(disk, names[at], blobs.nbytes[at], digest, said)
        # A blob evicted while it was looked at is no problem.
        if problem is not None and disk.is_recorded(blobs.names[at]):
            problems.append(problem)
        done += blobs.nbytes[at]
        if progress is not None and read_data:
            progress(done, total)
    problems += _contradictions(disk, said)
    awaited = {name.hex() + SUFFIX for name in pending | trash}
    unknown = lengths.keys() - files - awaited
    for fan, file in sorted([*misplaced, *((file[:2], file) for file in unknown)]):
        if not is_blob_file(file):
            continue
        name, path = file.removesuffix(SUFFIX), disk.folder.blobs / fan / file
        if not _is_expected(disk, bytes.fromhex(name), path) and os.path.lexists(path):
            problems.append(Problem("orphan", "no record names this file", name))
    problems += [
        Problem("trash", "this file was evicted but is still there", name)
        for name in sorted(key.hex() for key in trash)
        if disk.folder.path(name).exists()
    ]
    return problems


def _look_at_files(disk: Disk) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The length of every file where a blob of its name belongs; folder and name of all others."""
    lengths: dict[str, int] = {}
    misplaced: list[tuple[str, str]] = []
    for fan, found in disk.folder.lengths():
        for file in [file for file in found if not file.startswith(fan)]:
            misplaced.append((fan, file))
            del found[file]
        lengths |= found
    return lengths, misplaced


def repair(disk: Disk, evictor: Evictor, problems: list[Problem]) -> None:
    """Mend what `check` found; a contradictory index is made anew from the blobs."""
    doubtful = [problem.blob for problem in problems if problem.kind == "index"]
    if doubtful and not testimony.mend(disk, filter(None, doubtful)):
        try:
            rebuild.rebuild(disk.index, disk.folder)
        except DamagedIndexError as error:
            distrust(disk.root)
            raise DamagedIndexError(
                "The index is damaged beyond its records; it is made anew when the store is opened "
                "next and no other process uses it."
            ) from error
    for problem in problems:
        if problem.kind in ("missing", "damaged"):
            quarantine(disk, problem.blob, problem.message)
    sweep(disk, evictor)
    remove_orphans(disk)


def distrust(root: Path) -> None:
    """Have the index made anew by whoever opens the store next."""
    with contextlib.suppress(FileExistsError):
        os.close(fs.create(root / SUSPECT_FILE))


def _contradictions(disk: Disk, said: dict[str, testimony.Testimony]) -> list[Problem]:
    if not said:
        return []
    with disk.index.read(copies=True) as txn:
        found = dict.fromkeys(testimony.contradictions(txn, said))
    return [Problem("index", message, name) for message, name in found]


def _check_blob(
    disk: Disk,
    name: str,
    nbytes: int,
    digest: bytes | None,
    said: dict[str, testimony.Testimony],
) -> Problem | None:
    """What is wrong with a blob: with its length, or when its `digest` is given, any byte.

    `said` gets what a sound one says of itself.
    """
    path = disk.folder.path(name)
    try:
        if digest is None:
            size = path.stat().st_size
            if size != nbytes:
                return Problem("damaged", f"{size} bytes long instead of {nbytes}", name)
            return None
        with BlobReader(path, nbytes=nbytes, digest=digest) as reader:
            reader.verify()
            said[name] = testimony.Testimony.of(reader)
    except FileNotFoundError:
        return Problem("missing", "its file is missing", name)
    except CorruptBlobError as error:
        if not error.is_unreadable and testimony.is_whole(disk, name):
            return Problem("index", "the index has other bytes of this blob than it has", name)
        return Problem("damaged", error.reason, name)
    except ValueError as error:
        return Problem("damaged", str(error), name)
    except StoreError as error:
        return Problem("damaged", str(error), name)
    except OSError as error:
        if fs.is_passing(error):
            raise fs.translated(error, "while a blob was checked") from error
        return Problem("damaged", f"it cannot be read ({error.strerror})", name)
    return None


def _is_expected(disk: Disk, name: bytes, path: Path) -> bool:
    """Whether somebody answers for the file `path`: a record, a writer, the trash."""
    if path != disk.folder.path(name.hex()):
        return False
    with disk.index.read() as txn:
        return txn.blob_number(name) is not None or any(
            txn.in_database(database, name) for database in (b"pending", b"trash", b"quarantine")
        )


def _is_quarantined(disk: Disk, name: bytes) -> bool:
    with disk.index.read() as txn:
        return txn.in_database(b"quarantine", name)


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
