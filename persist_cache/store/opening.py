"""Opening a store: its folder, its index, rebuilt where need be, and its limits.

While a store is open its process holds `store.lock` shared. Only who gets that lock exclusively
may put a damaged index aside and make a new one: nobody else has it mapped then.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

from persist_cache import fs
from persist_cache.blobs.folder import BlobFolder
from persist_cache.errors import (
    DamagedIndexError,
    StoreAccessError,
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreInUseError,
)
from persist_cache.filenames import PRESENCE_FILE, SUSPECT_FILE, TAG_FILE
from persist_cache.index import ballast, holders, lock_table, semaphores
from persist_cache.index.environment import Index
from persist_cache.index.records import pack_counter, unpack_counter
from persist_cache.index.transaction import Writer
from persist_cache.index.writer_lock import PATIENCE_S
from persist_cache.store import exclusion, rebuild, sweep
from persist_cache.store.budget import DEFAULT_MAX_BYTES, DEFAULT_MIN_FREE_BYTES, Limits
from persist_cache.store.evict import Evictor
from persist_cache.store.relief import UnseenSpare
from persist_cache.store.session import Disk
from persist_cache.system import streams

log = logging.getLogger(__name__)
_PATIENCE_S = 5.0
"""How long to wait for processes that open the store at the same time."""
_READER_PATIENCE_S = 0.5
INDEX_FILES = ("data.mdb", "lock.mdb", "writer.lock", PRESENCE_FILE)
_UNLIMITED = (1 << 63) - 1
_IMPOSSIBLE = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
)
AskedLimits = tuple[int | None, int | None, int | None]
"""Budget and bytes to leave free, None for what was last set; bytes a day, None for any."""
_said_open: set[Path] = set()
"""Stores of this process that no permissions protect, and of which that was said."""
_CACHEDIR_TAG = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# This folder is a cache of persist-cache; backups may leave it out.\n"
)


def prepare_folder(root: Path, folder: BlobFolder, read_only: bool) -> None:
    """Make sure that the folder exists, is ours, and that nobody else can read it.

    KV tensors reveal their prompt, so modes are repaired, and a foreign owner is refused.
    """
    try:
        if not read_only:
            _make_folders(root.parent)
            fs.make_folder(root)
        status = root.stat()
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(root))
        _refuse_owner(root, status)
        _refuse_foreign(root)
        if read_only:
            return
        if status.st_mode & 0o077:
            _close_to_others(root)
        folder.create()
        with contextlib.suppress(FileExistsError):
            fd = fs.create(root / TAG_FILE)
            try:
                fs.write_all(fd, [memoryview(_CACHEDIR_TAG)])
            finally:
                os.close(fd)
        exclusion.exclude(root)
    except FileNotFoundError as error:
        if read_only:
            raise StoreAccessError(f"There is no store at {root}.") from error
        place = error.filename or root
        raise StoreAccessError(
            f"{root} cannot be made: its file system takes no new folder {place}."
        ) from error
    except (NotADirectoryError, FileExistsError) as error:
        raise StoreAccessError(f"{_no_folder(root)} is not a folder.") from error
    except OSError as error:
        raise StoreAccessError(f"{root} cannot be used ({error.strerror}).") from error


def _close_to_others(root: Path) -> None:
    """Take the rights of other users away, or say once that the file system knows none."""
    if fs.restrict(root, fs.FOLDER_MODE):
        log.warning("%s was open to other users; it is yours alone now", root)
    elif root not in _said_open:
        _said_open.add(root)
        log.warning(
            "%s is on a file system that keeps no permissions: whoever can read this disk can "
            "read the prompts in it",
            root,
        )


def is_impossible(error: StoreError) -> bool:
    """Whether what `prepare_folder` raised is about the path itself, whatever the disk may do."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _IMPOSSIBLE


def _make_folders(path: Path) -> None:
    """Make `path` and what is missing above it, however deep; `Path.mkdir` recurses."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        if path == path.parent:
            break
        path = path.parent
    for one in reversed(missing):
        one.mkdir(exist_ok=True)


def _no_folder(path: Path) -> Path:
    """The first part of a path that is there and is no folder; else the path."""
    for one in (*reversed(path.parents), path):
        with contextlib.suppress(OSError):
            if not stat.S_ISDIR(one.stat().st_mode):
                return one
    return path


def _refuse_foreign(root: Path) -> None:
    """Refuse parts of a store that are not its owner's alone, or lead elsewhere.

    Whoever may write to the folder for a moment could leave them there, and read what is written.

    Raises:
        StoreAccessError: There is such a part.
    """
    places = [(root / name, True) for name in ("blobs", "tmp", "quarantine")]
    for place, must_be_folder in places:
        try:
            status = place.lstat()
        except FileNotFoundError:
            continue
        _refuse_owner(place, status)
        is_folder = stat.S_ISDIR(status.st_mode)
        if stat.S_ISLNK(status.st_mode) or (must_be_folder and not is_folder):
            raise StoreAccessError(
                f"{place} is not a folder of its own, as the store needs it; move it away."
            )
        if place == places[0][0]:
            places += [(Path(one.path), False) for one in os.scandir(place) if len(one.name) == 2]
    for name in (*INDEX_FILES, ballast.FILE):
        for follow in (False, True):
            with contextlib.suppress(FileNotFoundError):
                _refuse_owner(root / name, (root / name).stat(follow_symlinks=follow))


def _refuse_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise StoreAccessError(
            f"{path} belongs to another user; use a folder of your own (--store PATH)."
        )


def open_index(root: Path, folder: BlobFolder, read_only: bool) -> Index:
    """Open the index in `root`; one that is missing or damaged is made anew from the blobs.

    Raises:
        StoreAccessError: There is none, and none may be made, since `read_only`.
        StoreInUseError: It has to be made anew while another process uses it.
        StoreError: It is damaged and may not be mended, since `read_only`; or the disk failed.
    """
    try:
        return _open_index(root, folder, read_only)
    except OSError as error:
        raise fs.translated(error, f"while {root} was opened") from error


def _open_index(root: Path, folder: BlobFolder, read_only: bool) -> Index:
    if read_only:
        if not (root / "data.mdb").exists():
            raise StoreAccessError(f"There is no store at {root}.")
        return _open_to_read(root)
    presence = fs.open_shared(root / PRESENCE_FILE)
    try:
        return _open_present(root, folder, presence)
    except BaseException:
        os.close(presence)
        raise


def _open_to_read(root: Path) -> Index:
    """Open an index that another process may be making at this moment."""
    give_up = time.monotonic() + _READER_PATIENCE_S
    if lock_table.is_copied_on_write(root) and os.access(root / lock_table.FILE, os.W_OK):
        presence = fs.open_shared(root / PRESENCE_FILE)
        try:
            _write_table_in_place(root, presence, read_only=True)
        finally:
            os.close(presence)
    while True:
        try:
            return Index(root, read_only=True, spare=UnseenSpare(root))
        except DamagedIndexError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def _open_present(root: Path, folder: BlobFolder, presence: int) -> Index:
    give_up = time.monotonic() + _PATIENCE_S
    if lock_table.is_copied_on_write(root):
        _write_table_in_place(root, presence, read_only=False)
    while True:
        _share(root, presence)
        damage: StoreError | None = None
        try:
            if (root / SUSPECT_FILE).exists():
                raise DamagedIndexError(f"The index at {root} is damaged.")
            index = Index(root, read_only=False, presence=presence, spare=UnseenSpare(root))
        except DamagedIndexError as error:
            damage = error
        else:
            is_due = True
            try:
                is_due = rebuild.is_due(index)
            finally:
                if is_due:
                    index.detach_presence()
                    index.close()
            if not is_due:
                return index
        fs.unlock(presence)
        if fs.try_lock(presence):
            return _make_anew(root, folder, presence, damage)
        # Others open the same store, and may be about to mend it, or they use what is damaged.
        if time.monotonic() > give_up:
            raise StoreInUseError(
                f"The index at {root} has to be rebuilt, but another process has the store open; "
                "end that process first."
            ) from damage
        time.sleep(0.02)


def _write_table_in_place(root: Path, presence: int, read_only: bool) -> None:
    """Make a table anew that is copied when it is written to, if nobody else has the store open.

    Raises:
        StoreFullError: There is no room for it, and so none to write to the one there is.
    """
    if fs.try_lock(presence):
        lock_table.make_anew(root, read_only, UnseenSpare(root))
    else:
        lock_table.require_room(root, read_only, UnseenSpare(root))


def _make_anew(root: Path, folder: BlobFolder, presence: int, damage: StoreError | None) -> Index:
    """Fill a new index; the caller holds `store.lock` exclusively, and shared afterwards."""
    if damage is not None:
        log.warning("%s It is rebuilt from the blobs.", damage)
        # Nothing in it can be trusted, and it holds prompts: what is evicted must be gone.
        semaphores.unlink(root)
        for name in ("data.mdb", "lock.mdb"):
            with contextlib.suppress(FileNotFoundError):
                fs.unlink(root / name)
    index = Index(root, read_only=False, presence=presence, spare=UnseenSpare(root))
    try:
        placed = rebuild.rebuild(index, folder)
        with contextlib.suppress(FileNotFoundError):
            fs.unlink(root / SUSPECT_FILE)
        _share(root, presence)
    except BaseException:
        index.detach_presence()
        index.close()
        raise
    if placed:
        log.warning("the index of %s was rebuilt from %d blobs", root, placed)
    return index


def _share(root: Path, presence: int) -> None:
    """Say that the store is in use; others may be making its index anew."""
    if not fs.lock_shared(presence, PATIENCE_S):
        path = root / PRESENCE_FILE
        raise StoreBusyError(holders.sentence(path, holders.holders(path), PATIENCE_S))


def settle_limits(
    index: Index,
    max_bytes: int | None,
    min_free_bytes: int | None,
    daily_write_bytes: int | None,
    *,
    before: Limits | None = None,
) -> Limits:
    """Limits given win and are remembered, so that the command line knows the server's.

    Args:
        index: The store's.
        max_bytes: As `Store.open`, as are the next two.
        min_free_bytes: Likewise.
        daily_write_bytes: Likewise.
        before: Those of the store that was in its place, which are given where it has none.
    """
    given = {
        name: None if value is None else min(value, _UNLIMITED)
        for name, value in (("max_bytes", max_bytes), ("min_free_bytes", min_free_bytes))
    }
    with index.read() as txn:
        stored = {name: txn.meta(name) for name in given}
    if before is not None:
        for name, value in given.items():
            if value is None and stored[name] is None:
                given[name] = getattr(before, name)
    news = {
        name: value
        for name, value in given.items()
        if value is not None and stored[name] != pack_counter(value)
    }
    if news and not index.read_only:

        def remember(txn: Writer) -> None:
            for name, value in news.items():
                txn.set_meta(name, pack_counter(value))

        with contextlib.suppress(StoreFullError):
            index.update(remember)

    def settle(name: str, default: int) -> int:
        value = given[name]
        if value is not None:
            return value
        raw = stored[name]
        return default if raw is None else unpack_counter(raw)

    return Limits(
        settle("max_bytes", DEFAULT_MAX_BYTES),
        settle("min_free_bytes", DEFAULT_MIN_FREE_BYTES),
        daily_write_bytes,
    )


def distrust(root: Path) -> None:
    """Have the index made anew by whoever opens the store next."""
    with contextlib.suppress(FileExistsError):
        os.close(fs.create(root / SUSPECT_FILE))


def open_disk(
    root: Path,
    limits: AskedLimits,
    *,
    read_only: bool,
    clock: Callable[[], float],
    before: Limits | None = None,
) -> Disk:
    """Open a store's parts, finish what dead processes left, and rebuild a damaged index.

    Args:
        root: Its folder.
        limits: What was asked for.
        read_only: Change nothing.
        clock: UTC seconds.
        before: Limits of the store that was in its place, for one that has none of its own.
    """
    streams.occupy()
    folder = BlobFolder(root)
    prepare_folder(root, folder, read_only)
    may_rebuild = not read_only
    while True:
        index = open_index(root, folder, read_only)
        try:
            settled = settle_limits(index, *limits, before=before)
            disk = Disk(root, index, folder, settled, clock)
            if not read_only:
                # A full disk must not keep anybody from reading, or from evicting.
                with contextlib.suppress(StoreFullError):
                    sweep.sweep(disk, Evictor(disk))
                disk.regain_ballast()
            return disk
        except DamagedIndexError:
            index.close()
            if not may_rebuild:
                raise
            # LMDB notices some damage only when it comes to the page.
            may_rebuild = False
            distrust(root)
        except BaseException:
            index.close()
            raise
