"""Comparing a store's index with its files, both ways, and mending what that finds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import compress, count, repeat
from operator import add, ne

from msgspec import Struct

from persist_cache import fs
from persist_cache.blobs.folder import SUFFIX, is_blob_file
from persist_cache.blobs.reader import BlobReader
from persist_cache.errors import CorruptBlobError, DamagedIndexError, StoreError
from persist_cache.index.audit import broken_invariants
from persist_cache.store import rebuild, testimony
from persist_cache.store.evict import Evictor
from persist_cache.store.opening import distrust
from persist_cache.store.quarantine import quarantine
from persist_cache.store.session import Disk
from persist_cache.store.sweep import is_expected, remove_orphans, sweep


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
            problems = [Problem("index", message) for message in broken_invariants(txn)]
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
        if not is_expected(disk, bytes.fromhex(name), path) and os.path.lexists(path):
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
