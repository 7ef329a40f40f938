"""What is given up so that a store on a full disk can be opened, and evicted from.

The ballast is for that. A store may have none: one of an earlier version, or one whose ballast
could not be made again. Then go, as long as the disk stays full: files that are on their way out
already, those of dead writers, damaged ones that were kept aside, and at last the files of what is
being evicted, before its records. If the process dies in between, a record names a file that is
gone; that is a miss, and `check --repair` removes it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from persist_cache import fs
from persist_cache.blobs.folder import BlobFolder, try_remove_orphan
from persist_cache.errors import StoreError
from persist_cache.index.ballast import Spare

if TYPE_CHECKING:
    from persist_cache.store.session import Disk

log = logging.getLogger(__name__)

_PORTION_BYTES = 4 << 20
"""How much of what is being evicted goes at once; a commit needs far less."""


class Relief:
    """Frees some of a full disk for one change; `give_up` is called until it gives nothing more.

    Thread safety: for one thread, which holds `writer.lock` while it calls `give_up`.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._steps = self._give_up()
        self.doomed: list[bytes] = []
        """Names of the blobs that go by the change."""
        self.lost = 0
        """How many of their files are gone before their records."""

    def give_up(self) -> int:
        """Free some of the disk; returns how many bytes, 0 when there is nothing left to give."""
        freed = next(self._steps, 0)
        if freed:
            with contextlib.suppress(OSError):
                fs.sync_folder(self._disk.root)  # some file systems give the room back only then
        return freed

    def _give_up(self) -> Iterator[int]:
        ballast = self._disk.ballast.release()
        if ballast:
            # Nothing else: whatever takes that much would take the rest as well.
            yield ballast
            return
        for step in (self._trash, self._dead, self._quarantine):
            if freed := step():
                yield freed
        while self.doomed:
            freed = 0
            while self.doomed and freed < _PORTION_BYTES:
                freed += self._lose(self.doomed.pop())
            if freed:
                yield freed

    def _trash(self) -> int:
        """Files that are listed to be removed, and are to be struck off later."""
        try:
            with self._disk.index.read() as txn:
                names = list(txn.sized(b"trash"))
            if names:
                self._disk.index.sync()
        except StoreError:
            return 0
        return sum(_unlinked(self._places(names)))

    def _dead(self) -> int:
        """Files of dead writers, on their way or where nobody knows them."""
        try:
            with self._disk.index.read() as txn:
                pending = list(txn.sized(b"pending"))
        except StoreError:
            return 0
        folder = self._disk.folder
        names = {name.hex() for name in pending} | {name for name, _ in folder.temporaries()}
        freed = 0
        for name in sorted(names):
            for path in (folder.temporary_path(name), folder.path(name)):
                nbytes = fs.disk_bytes(path)
                is_known = partial(self._disk.is_recorded, bytes.fromhex(name))
                if nbytes and try_remove_orphan(path, is_known):
                    freed += nbytes
        return freed

    def _quarantine(self) -> int:
        return sum(_unlinked(path for _, path in list(self._disk.folder.in_quarantine())))

    def _lose(self, name: bytes) -> int:
        freed = sum(_unlinked(self._places([name])))
        self.lost += freed > 0
        return freed

    def _places(self, names: Iterable[bytes]) -> Iterator[Path]:
        folder = self._disk.folder
        for name in names:
            yield folder.path(name.hex())
            yield folder.quarantine_path(name.hex())


class UnseenSpare(Spare):
    """What can be given up without the index: what needs no record to be told from what is wanted.

    The ballast, else damaged files and those of dead writers.
    """

    def give_up(self) -> int:
        freed = super().give_up()
        if freed:
            return freed
        folder = BlobFolder(self.root)
        for _, path in list(folder.temporaries()):
            nbytes = fs.disk_bytes(path)
            # Nothing is recorded while it is here, and a living writer has it locked.
            freed += nbytes if try_remove_orphan(path, lambda: False) else 0
        return freed + sum(_unlinked(path for _, path in list(folder.in_quarantine())))

    def can_give_up(self) -> bool:
        folder = BlobFolder(self.root)
        found = (*folder.temporaries(), *folder.in_quarantine())
        return super().can_give_up() or any(fs.disk_bytes(path) for _, path in found)


def _unlinked(paths: Iterable[Path]) -> Iterator[int]:
    """Unlink files; yields the bytes of each that went."""
    for path in paths:
        try:
            nbytes = os.lstat(path).st_blocks * 512
            fs.unlink(path)
        except OSError:
            continue
        yield nbytes
