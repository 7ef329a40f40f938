"""A file that is there to be given up: on a full disk nothing could be evicted without it.

The index writes a few pages to record that something went, and a disk without a free block has
none for them. The ballast takes room while there is some, counts as what the store takes, and is
removed under `writer.lock` by the eviction that needs it. It is made again when there is room.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from persist_cache import fs

FILE = "ballast"
MAX_BYTES = 4 << 20
_SHARE = 64
_PAGE = 4096


class Ballast:
    """The ballast of one store. Thread safety: change it under `writer.lock` only."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        """Note where it is; `max_bytes` is the budget of the store."""
        self.path = root / FILE
        self.wanted_bytes = wanted_bytes(max_bytes)

    def disk_bytes(self) -> int:
        """What it takes at present."""
        return fs.disk_bytes(self.path)

    def missing_bytes(self) -> int:
        """What it is short of; below 0 when it is longer than it should be."""
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return self.wanted_bytes
        if not _is_own(status):
            return self.wanted_bytes or -1
        # Of a file as long as it should be, the last block may be larger than what is in it.
        return max(0, self.wanted_bytes - status.st_blocks * 512) or min(
            0, self.wanted_bytes - status.st_size
        )

    def release(self) -> int:
        """Give it up; returns the bytes that are free now."""
        try:
            status = os.lstat(self.path)
            nbytes = status.st_blocks * 512 if _is_own(status) else 0
            fs.unlink(self.path)
        except OSError:
            return 0
        return nbytes

    def regain(self) -> None:
        """Make it as large as it should be, or as it was.

        What has its name and is no file of its own, such as a hard link to another, only loses it.

        Raises:
            OSError: There is no room for it.
        """
        with contextlib.suppress(FileNotFoundError):
            if not _is_own(os.lstat(self.path)):
                fs.unlink(self.path)
        before = self.disk_bytes()
        if self.wanted_bytes == 0:
            with contextlib.suppress(FileNotFoundError):
                fs.unlink(self.path)
            return
        fd = fs.open_shared(self.path)
        try:
            if not _is_own(os.fstat(fd)):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.path))
            try:
                os.ftruncate(fd, self.wanted_bytes)
                fs.allocate(fd, self.wanted_bytes)
                if fs.disk_bytes(self.path) < self.wanted_bytes:
                    # No room can be taken in advance there, and zeros might be packed.
                    os.lseek(fd, 0, os.SEEK_SET)
                    fs.write_all(fd, [memoryview(os.urandom(self.wanted_bytes))])
                fs.sync(fd)
            except OSError:
                os.ftruncate(fd, before // _PAGE * _PAGE)
                raise
        finally:
            os.close(fd)


class Spare:
    """What a full disk can be relieved of before the index is open: here, the ballast alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ballast = Ballast(root, 0)

    def give_up(self) -> int:
        """Free some of the disk; returns how many bytes."""
        return self.ballast.release()

    def can_give_up(self) -> bool:
        """Whether `give_up` may free anything."""
        return self.ballast.disk_bytes() > 0


def _is_own(status: os.stat_result) -> bool:
    """Whether it may be resized: a file of ours that has no other name."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1


def wanted_bytes(max_bytes: int) -> int:
    """How large the ballast of a store with this budget is."""
    return min(MAX_BYTES, max_bytes // _SHARE) // _PAGE * _PAGE
