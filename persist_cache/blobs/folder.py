"""Where blobs lie: the folders of the living, of those on their way, and of the damaged.

While a blob's writer lives it holds the file's `flock`, so a file that no record names is garbage
exactly when its lock is free.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from persist_cache import fs
from persist_cache.filenames import STRAY_PROBE, is_small, is_stray

log = logging.getLogger(__name__)
SUFFIX = ".safetensors"
_BLOB_FILE = re.compile("[0-9a-f]{32}" + re.escape(SUFFIX))
_MEMO_MADE_S = 60.0
"""A memo is written in much less."""


class BlobFolder:
    """The folders that hold blobs: `blobs/<2 hex>/` for the living, `tmp/`, `quarantine/`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs"
        self.temporary = root / "tmp"
        self.quarantined = root / "quarantine"

    def create(self) -> None:
        for folder in (self.blobs, self.temporary, self.quarantined):
            fs.make_folder(folder)

    def path(self, name: str) -> Path:
        return self.blobs / name[:2] / (name + SUFFIX)

    def temporary_path(self, name: str) -> Path:
        return self.temporary / (name + SUFFIX)

    def quarantine_path(self, name: str) -> Path:
        return self.quarantined / (name + SUFFIX)

    def ensure_parent(self, path: Path) -> None:
        if not path.parent.is_dir():
            fs.make_folder(path.parent)
            fs.sync_folder(self.blobs)

    def names(self) -> Iterator[tuple[str, Path]]:
        """Every file that looks like a published blob, also one in a folder not its own."""
        for folder in sorted(self.blobs.iterdir()):
            if len(folder.name) == 2 and folder.is_dir():
                yield from _blob_files(folder)

    def lengths(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Per folder of the fan-out what is in it, blob or not, with its length.

        The length is -1 where there is none to tell. Paths as objects would take most of the time
        of looking at a large store.
        """
        for fan in sorted(os.listdir(self.blobs)):
            if len(fan) != 2:
                continue
            path = f"{self.blobs}/{fan}"
            try:
                names = os.listdir(path)
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                lengths = _lengths(names, folder)
            finally:
                os.close(folder)
            yield fan, dict(zip(names, lengths, strict=True))

    def remove_empty(self) -> None:
        """Remove folders of the fan-out in which nothing is left."""
        for folder in sorted(self.blobs.iterdir()):
            if len(folder.name) == 2:
                # One that is not empty, or no folder, says so itself: looking first would race.
                with contextlib.suppress(OSError):
                    fs.remove_folder(folder)

    def temporaries(self) -> Iterator[tuple[str, Path]]:
        """Every file that looks like a blob on its way."""
        yield from _blob_files(self.temporary)

    def in_quarantine(self) -> Iterator[tuple[str, Path]]:
        """Every damaged blob that was put aside."""
        yield from _blob_files(self.quarantined)

    def overhead_bytes(self) -> int:
        """What the folders themselves take on disk, and the small files of the store."""
        places = (self.root, self.blobs, self.temporary, self.quarantined)
        total = sum(fs.disk_bytes(place) for place in places)
        with os.scandir(self.root) as found:
            names = [one.name for one in found]
        # Paths as objects would take most of the time: a put asks several times.
        total += sum(fs.disk_bytes(f"{self.root}/{name}") for name in names if is_small(name))
        with os.scandir(self.blobs) as fans:
            # One that is empty may be removed at this moment by another process.
            total += sum(fs.disk_bytes(fan.path) for fan in fans)
        return total

    def remove_strays(self) -> None:
        """Remove files beside the blobs whose writers were killed."""
        with os.scandir(self.root) as found:
            strays = [Path(one.path) for one in found if is_stray(one.name)]
        for path in strays:
            with contextlib.suppress(OSError):
                age_s = time.time() - path.lstat().st_mtime
                if STRAY_PROBE.fullmatch(path.name) or not 0 <= age_s < _MEMO_MADE_S:
                    fs.unlink(path)

    def remove(self, name: str, *, overwrites: bool = False) -> None:
        """Unlink a blob, published or in quarantine; one that is gone already is fine.

        Args:
            name: Of the blob.
            overwrites: Put zeros in the place of its bytes before.

        Raises:
            OSError: The folder does not let go of it; the caller tries again later.
        """
        for path in (self.path(name), self.quarantine_path(name)):
            with contextlib.suppress(FileNotFoundError):
                if overwrites:
                    _overwrite(path)
                _unlink_or_rmdir(path)

    def quarantine(self, name: str) -> bool:
        """Move a damaged blob aside, for whoever wants to see it; returns whether it was there."""
        try:
            fs.rename(self.path(name), self.quarantine_path(name))
        except FileNotFoundError:
            return False
        return True


def is_blob_file(name: str) -> bool:
    """Whether `name` is 32 lower-case hex digits and the suffix: no other file is ever touched."""
    return _BLOB_FILE.fullmatch(name) is not None


def new_name() -> str:
    return os.urandom(16).hex()


def _lengths(names: Sequence[str], folder: int) -> list[int]:
    """The length of each of these files of an open folder, -1 where there is none to tell."""
    try:
        return [os.stat(name, dir_fd=folder).st_size for name in names]
    except OSError:  # one is gone meanwhile, or a link to nowhere
        if len(names) == 1:
            return [-1]
        return [length for name in names for length in _lengths([name], folder)]


def _blob_files(folder: Path) -> Iterator[tuple[str, Path]]:
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:  # empty, and removed by another process
        return
    for path in paths:
        if is_blob_file(path.name):
            yield path.name.removesuffix(SUFFIX), path


def _overwrite(path: Path) -> None:
    """Put zeros in the place of a file's bytes, as far as that goes: it is unlinked at least."""
    if path.is_file() and not path.is_symlink():
        with contextlib.suppress(OSError):
            fs.overwrite(path)


def _unlink_or_rmdir(path: Path) -> None:
    """Remove a name that is ours, also where an empty folder took the place of the file."""
    try:
        fs.unlink(path)
    except (IsADirectoryError, PermissionError):  # macOS says "operation not permitted"
        if path.is_symlink() or not path.is_dir():
            raise
        fs.remove_folder(path)


def is_same_file(path: Path, fd: int) -> bool:
    """Whether `path` still names the open file `fd`."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(fd))


def try_remove_orphan(
    path: Path, is_known: Callable[[], bool], *, overwrites: bool = False
) -> bool:
    """Remove the file `path` if its writer is dead and no record names it.

    Args:
        path: A temporary or published blob that looked unknown.
        is_known: Called without arguments while the lock is held: looks again, in a fresh
            transaction, whether a record names the file by now.
        overwrites: Put zeros in the place of its bytes before.

    Returns:
        Whether the file was removed; one that cannot be is left for another time.
    """
    try:
        fd = fs.open_read(path)
    except OSError as error:
        if error.errno != errno.ELOOP or is_known():
            return False
        # A symbolic link has no writer, and whatever it leads to is not ours.
        with contextlib.suppress(OSError):
            fs.unlink(path)
            return True
        return False
    try:
        # Whoever renamed it to its final place meanwhile may have committed it: look twice.
        if not fs.try_lock(fd) or is_known() or not is_same_file(path, fd):
            return False
        if overwrites:
            _overwrite(path)
        _unlink_or_rmdir(path)
    except OSError as error:
        log.warning("%s is an orphan and cannot be removed: %s", path, error)
        return False
    finally:
        os.close(fd)
    return True
