"""LMDB's table of readers, `lock.mdb`: there in full before it is mapped.

LMDB makes it sparse and writes to it through a mapping, so on a full disk the first use of a page
of it would end the process (SIGBUS). Closing any descriptor of the file drops the `fcntl` locks by
which LMDB knows that this process has the environment open, and the next process to open it would
reset the table. So what is done here is done before LMDB opens the file, and never while any
environment of this process has it open.

Thread safety: `opening` serialises all threads of the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from persist_cache import fs
from persist_cache.errors import StoreFullError, StoreInUseError
from persist_cache.index.ballast import Spare
from persist_cache.system.mounts import Mounts

FILE = "lock.mdb"
MAX_READERS = 512
_SLOT_BYTES = 64
_MAGIC = (0xBEEFC0DE).to_bytes(4, sys.byteorder)
NBYTES = (-(-MAX_READERS * _SLOT_BYTES // 4096) + 1) * 4096
"""The readers, a cache line each, and the head of the table, whose length the platform decides."""
_LEAST_BYTES = 4096
"""What there must be of it: the head, and the slots of some sixty readers."""

_lock = threading.Lock()
_open: set[tuple[int, int, int]] = set()
"""Process, device and inode of every table that is mapped."""


@contextlib.contextmanager
def opening(root: Path, read_only: bool, spare: Spare) -> Iterator[int]:
    """Hold while LMDB opens the environment in the folder `root`; `closed` undoes it.

    Yields the number of readers to ask LMDB for. It lengthens a table that is shorter than they
    need, and otherwise takes as many as the table has slots for.

    Raises:
        StoreInUseError: This process has it open.
        StoreFullError: The disk has no room for the table.
    """
    with _lock:
        if _key(root) in _open:
            raise StoreInUseError(
                f"The store at {root} is open in this process already; share that object."
            )
        yield _prepare(root, read_only, spare)
        key = _key(root)
        if key is not None:
            _open.add(key)


def is_open(root: Path) -> bool:
    """Whether this process has the environment in the folder `root` open."""
    with _lock:
        return _key(root) in _open


def is_begun(root: Path) -> bool:
    """Whether the table has no head yet: the process that makes it is at it, or died.

    For when opening the environment in the folder `root` failed.
    """
    with _lock, contextlib.suppress(OSError):
        if _key(root) in _open:
            return False
        fd = fs.open_read(root / FILE)
        try:
            return os.pread(fd, 4, 0) != _MAGIC
        finally:
            os.close(fd)
    return False


def closed(key: tuple[int, int, int] | None) -> None:
    """Note that the environment with this `key` was closed."""
    with _lock:
        _open.discard(key or (0, 0, 0))


def key(root: Path) -> tuple[int, int, int] | None:
    """What stands for the environment in the folder `root`, for `closed`."""
    return _key(root)


def _key(root: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(root / FILE)
    except OSError:
        return None
    # A forked child has none of its parent's locks, so it can lose none either.
    return os.getpid(), status.st_dev, status.st_ino


def _prepare(root: Path, read_only: bool, spare: Spare) -> int:
    """Have all of the table there, or make it as short as what is there; see `opening`."""
    path = root / FILE
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if not read_only:  # LMDB makes none for a reader either
            with _said_if_full(path, spare):
                _with_spare(spare, lambda: _create(path))
        return MAX_READERS
    is_short = status.st_size < MAX_READERS * _SLOT_BYTES
    if not is_short and status.st_blocks * 512 >= status.st_size:
        return MAX_READERS
    try:
        return _complete(root, is_short, read_only, spare)
    except _SharedTableError as error:
        with _said_if_full(path, spare, is_shared=True):
            raise error.cause from error
    except OSError as error:
        if error.errno not in fs.FULL and read_only:
            return MAX_READERS  # LMDB does not lock what it may not write to
        with _said_if_full(path, spare):
            raise


class _SharedTableError(Exception):
    """There is no room for the rest of a table that others have mapped."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause)
        self.cause = cause


def _complete(root: Path, is_short: bool, read_only: bool, spare: Spare) -> int:
    """Allocate what is missing of a table, or cut it to what there is of it."""
    fd = fs.open_shared(root / FILE)
    try:
        # What others have mapped keeps its length: they would look for readers beyond it.
        is_alone = _is_alone(fd)
        size = os.fstat(fd).st_size
        if size == 0:
            fs.write_in_place(fd)
        nbytes = NBYTES if is_short and (is_alone or size == 0) else size

        def allocate() -> None:
            fs.allocate(fd, nbytes)

        try:
            if read_only:
                allocate()
            else:
                _with_spare(spare, allocate)
        except OSError as error:
            if error.errno not in fs.FULL:
                raise
            if not is_alone:
                raise _SharedTableError(error) from error
            if _head_bytes(fd) < _LEAST_BYTES:
                fs.allocate(fd, _LEAST_BYTES)
            nbytes = max(_LEAST_BYTES, min(size, _head_bytes(fd) // _LEAST_BYTES * _LEAST_BYTES))
            os.ftruncate(fd, nbytes)
        return MAX_READERS if nbytes >= MAX_READERS * _SLOT_BYTES else 1
    finally:
        os.close(fd)


def _is_alone(fd: int) -> bool:
    """Take LMDB's own lock, until `fd` is closed; False if any process has the table mapped."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
    except OSError:
        return False
    return True


def _head_bytes(fd: int) -> int:
    """How many bytes from its beginning on a file has room for."""
    if os.fstat(fd).st_blocks == 0:
        return 0
    return os.lseek(fd, 0, os.SEEK_HOLE)


def _create(path: Path) -> None:
    """Make a table that is there in full from the beginning, or none."""
    try:
        fd = fs.create_nameless(path.parent)
        is_named = False
    except OSError as error:
        if error.errno in fs.FULL:
            raise
        fd = fs.open_shared(path)
        is_named = True
    try:
        fs.write_in_place(fd)
        fs.allocate(fd, NBYTES)
        if not is_named:
            with contextlib.suppress(FileExistsError):  # another process was faster
                fs.give_name(fd, path)
    finally:
        os.close(fd)


def _with_spare(spare: Spare, act: Callable[[], None]) -> None:
    """Do something that takes room; where there is none, once more without the ballast.

    Or, if there is none, without damaged files and those of dead writers.

    Not under `writer.lock`, which may need room itself: who is making the ballast anew at this
    moment fills a file without a name, and the next eviction makes another.
    """
    try:
        act()
    except OSError as error:
        if error.errno not in fs.FULL or not spare.give_up():
            raise
        with contextlib.suppress(OSError):
            fs.sync_folder(spare.root)  # some file systems give the room back only then
        act()


@contextlib.contextmanager
def _said_if_full(path: Path, spare: Spare, *, is_shared: bool = False) -> Iterator[None]:
    """Say what helps where the disk has no room for the table.

    Args:
        path: The table.
        spare: What may be given up.
        is_shared: Others have it mapped; once they have not, it can do with less.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in fs.FULL:
            raise
        said = f"The disk is full: the index needs {NBYTES} bytes for {path}; free some space"
        if spare.can_give_up():
            said += ", or have `persist-cache evict` do so"
        elif is_shared:
            said += " on it, or end the other processes that use the store"
        else:
            said += " on it; the store itself has nothing to give up without its index"
        raise StoreFullError(said + ".") from error


def is_copied_on_write(root: Path) -> bool:
    """Whether a page of the table may take new room when it is written to, though it has some.

    So it is on btrfs if the table was made without `write_in_place`. Changes nothing.
    """
    path = root / FILE
    with _lock, contextlib.suppress(OSError):
        # File systems of that kind have no device of their own.
        if os.major(os.stat(path).st_dev) or _key(root) in _open or Mounts().kind(root) != "btrfs":
            return False
        fd = fs.open_read(path)
        try:
            return not fs.is_written_in_place(fd)
        finally:
            os.close(fd)
    return False


def make_anew(root: Path, read_only: bool, spare: Spare) -> bool:
    """Begin the table anew, to be written in place; returns whether that was done.

    The caller holds `store.lock` exclusively, so that no writer is about to open it. Readers take
    no lock of ours, but LMDB's tells whether there are any; one that is about to open it finds an
    empty table at worst, and tries again. It cannot be replaced, since it may be open by then; so
    room for it is looked for before the one there is is given up.

    Raises:
        StoreFullError: The disk has no room for it; nothing was changed but the ballast.
    """
    with _lock:
        if _key(root) in _open:
            return False
        _require_room(root, read_only, spare)
        fd = fs.open_shared(root / FILE)
        try:
            if not _is_alone(fd):
                return False
            os.ftruncate(fd, 0)
            fs.write_in_place(fd)
            with contextlib.suppress(OSError):  # on a full disk opening it will say so
                fs.allocate(fd, NBYTES)
            return True
        finally:
            os.close(fd)


def require_room(root: Path, read_only: bool, spare: Spare) -> None:
    """See that a table that is copied when it is written to can be written to at present.

    Raises:
        StoreFullError: The disk has no room; nothing was changed but, unless `read_only`, the
            ballast.
    """
    with _lock:
        _require_room(root, read_only, spare)


def _require_room(root: Path, read_only: bool, spare: Spare) -> None:
    with _said_if_full(root / FILE, spare):
        if read_only:
            _find_room(root)
        else:
            _with_spare(spare, lambda: _find_room(root))


def _find_room(root: Path) -> None:
    """Raise what the file system says if there is no room for another table."""
    try:
        fd = fs.create_nameless(root)
    except OSError as error:
        if error.errno in fs.FULL:
            raise
        return
    try:
        fs.write_in_place(fd)
        fs.allocate(fd, NBYTES)
    finally:
        os.close(fd)
