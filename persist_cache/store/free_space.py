"""What is free on the store's file system, also where that is told late.

btrfs counts what was written and what was removed when it commits, every half minute. Near the
floor of free space it has to do that before it is asked.
"""

from __future__ import annotations

from pathlib import Path

from persist_cache import fs
from persist_cache.system.mounts import Mounts

_LATE = frozenset({"btrfs"})
_COMMIT_BYTES = 128 * 1024
"""What a commit of the index may write besides tokens."""


class FreeSpace:
    """The free bytes of one file system. Thread safety: may be used from any thread."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._late: bool | None = None
        self._settled: tuple[int, int] | None = None

    @property
    def is_late(self) -> bool:
        """Whether the file system tells late what changed."""
        if self._late is None:
            self._late = Mounts().kind(self._root) in _LATE
        return self._late

    def now(self) -> int:
        """What the file system says.

        Raises:
            StoreError: It does not say.
        """
        try:
            return fs.free_bytes(self._root)
        except OSError as error:
            raise fs.translated(error, "while its free space was asked for") from error

    def settle(self, wanted: int, written: int, commits: int) -> None:
        """See that `now` is right where it is not much more than what is wanted.

        Args:
            wanted: Bytes that must be free.
            written: Bytes that were ever written to blobs.
            commits: Number of commits of the index.
        """
        if not self.is_late:
            return
        if self._settled is not None:
            more_written, more_commits = written - self._settled[0], commits - self._settled[1]
            untold = more_written + more_commits * _COMMIT_BYTES
            if self.now() - untold >= wanted:
                return
        fs.sync_file_system(self._root)
        self._settled = written, commits

    def settle_removals(self, wanted: int) -> None:
        """See that `now` is right after files were removed, if it is less than what is wanted."""
        if self.is_late and self.now() < wanted:
            fs.sync_file_system(self._root)
