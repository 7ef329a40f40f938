"""The index's file `data.mdb` as a file: what is seen of it before LMDB maps it, or beside that.

LMDB trusts the file that it maps. One that is too short would end the process with a signal, so
its length is checked here, and room in the address space is found before LMDB needs it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import struct
from pathlib import Path

from persist_cache import fs
from persist_cache.errors import DamagedIndexError, StoreAccessError, StoreFullError

FILE = "data.mdb"
_META_MAGIC = 0xBEEFC0DE
_META = struct.Struct("<16xI20xI")
"""The head of the file: after the page header LMDB's magic number, later its page size."""


def create_empty(path: Path) -> None:
    """Make the file that LMDB would make, unless it is there; LMDB fills one that is empty."""
    with contextlib.suppress(FileExistsError):
        fd = fs.create(path)
        try:
            fs.grow_exactly(fd)
        finally:
            os.close(fd)


def identity(path: Path) -> tuple[int, int]:
    """What tells the file from another one of the same name."""
    status = path.stat()
    return status.st_dev, status.st_ino


def check_length(path: Path, *, read_only: bool) -> None:
    """Refuse a file shorter than its two meta pages: it kills the process that maps it (SIGBUS).

    Args:
        path: The file.
        read_only: An empty one cannot be filled: another process is about to, or died before.

    Raises:
        DamagedIndexError: It is as short, or not LMDB's.
        StoreAccessError: It is no file at all.
    """
    try:
        # A pipe would have us wait for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise StoreAccessError(f"{path} is not a file; move it away.")
        head, size = os.read(fd, _META.size), status.st_size
    finally:
        os.close(fd)
    if size == 0 and read_only:
        raise DamagedIndexError(f"{path} is empty.")
    if size == 0:
        return
    magic, page_bytes = _META.unpack(head.ljust(_META.size, b"\0"))
    if magic != _META_MAGIC:
        raise DamagedIndexError(f"{path} is not an LMDB file.")
    if size < 2 * page_bytes:
        raise DamagedIndexError(f"{path} is truncated to {size} bytes.")


def larger_map(nbytes: int) -> int:
    """A size for a map that is to be larger than `nbytes`, as far as the process may have it.

    To be found out before: LMDB gives the old map up first, and cannot do without one.

    Raises:
        StoreFullError: The process may not have more address space.
    """
    for share in (1.0, 0.5, 0.125):
        size = int(nbytes * (1 + share)) // mmap.PAGESIZE * mmap.PAGESIZE + (1 << 20)
        try:
            mmap.mmap(-1, size, mmap.MAP_PRIVATE, mmap.PROT_READ).close()
        except (OSError, ValueError, OverflowError):
            continue
        return size
    raise StoreFullError(
        f"The index is full: its {nbytes} bytes cannot grow, because this process may not have "
        "more address space; raise that limit (ulimit -v). Nothing was changed."
    )
