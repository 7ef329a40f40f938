"""How much disk the store may take, and how much it takes.

Everything that `du` would count is counted: blobs, the index, files on their way, files in the
trash or in quarantine, and the folders. Limits are enforced before a byte is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec import Struct

from persist_cache import fs
from persist_cache.blobs.folder import BlobFolder
from persist_cache.blobs.header import ALIGNMENT
from persist_cache.errors import StoreFullError
from persist_cache.index.ballast import Ballast
from persist_cache.index.environment import Index
from persist_cache.index.transaction import Reader
from persist_cache.index.tree import BLOB_BYTES
from persist_cache.store.free_space import FreeSpace

DEFAULT_MAX_BYTES = 32 << 30
DEFAULT_MIN_FREE_BYTES = 2 << 30
WRITTEN_BYTES = "written_bytes"
"""Name of the counter of all bytes ever written to blobs."""
_INDEX_SLACK_PAGES = 32
"""Pages that recording a prompt may add to the index besides those of the tokens themselves."""
_INDEX_TOKEN_BYTES = 16
"""A token has 8 bytes, and a run has pages of its own, of which the last may be half empty."""
_FILE_SLACK = 8 * 1024
"""A new blob may need a new folder, and its last block is filled up."""
_METADATA_SLACK = 256 * 1024
"""What a file system may need for its own records of a new file, which `du` does not count …"""
_METADATA_SHARE = 256
"""… and of its content: btrfs keeps checksums, and copies what it changes."""


class Limits(Struct, frozen=True):
    """What the user allows.

    Attributes:
        max_bytes: All that the store takes on disk.
        min_free_bytes: Left free on its file system.
        daily_write_bytes: Written per UTC day, or None.
    """

    max_bytes: int
    min_free_bytes: int
    daily_write_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_bytes", "min_free_bytes", "daily_write_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")


class Usage(Struct, frozen=True):
    """Bytes on disk by what they are for, as `du` counts them."""

    blobs: int
    index: int
    pending: int
    trash: int
    quarantine: int
    folders: int
    ballast: int = 0

    @property
    def total(self) -> int:
        waste = self.pending + self.trash + self.quarantine
        return self.blobs + self.index + waste + self.folders + self.ballast

    @property
    def without_entries(self) -> int:
        """What would be left if everything went that may."""
        return self.index + self.folders + self.ballast


class Budget:
    """Compares usage with limits; it decides how much must go, never what."""

    def __init__(
        self, limits: Limits, index: Index, folder: BlobFolder, clock: Callable[[], float]
    ) -> None:
        self.limits = limits
        self.ballast = Ballast(index.root, limits.max_bytes)
        self._clock = clock
        self._index = index
        self._folder = folder
        self._free = FreeSpace(index.root)

    def usage(self, txn: Reader) -> Usage:
        return Usage(
            blobs=txn.counter(BLOB_BYTES),
            index=self._index.file_bytes(),
            pending=sum(record.nbytes for record in txn.sized(b"pending").values()),
            trash=sum(record.nbytes for record in txn.sized(b"trash").values()),
            quarantine=sum(record.nbytes for record in txn.sized(b"quarantine").values()),
            folders=self._folder.overhead_bytes(),
            ballast=self.ballast.disk_bytes(),
        )

    def refuse_impossible(self, txn: Reader, nbytes: int, num_tokens: int) -> None:
        """Refuse what could not be written even into an empty store.

        Raises:
            StoreFullError: Larger than the budget, or today's write budget is spent.
        """
        fixed = self._index.file_bytes() + self._folder.overhead_bytes()
        fixed += self.ballast.disk_bytes() + self._index_growth(num_tokens)
        if nbytes + fixed > self.limits.max_bytes:
            raise StoreFullError(
                f"An entry of {nbytes} bytes is larger than the budget: of "
                f"{self.limits.max_bytes} bytes index, folders and ballast take {fixed}; "
                "raise it or keep shorter prompts."
            )
        daily = self.limits.daily_write_bytes
        if daily is not None and txn.counter(written_today(self._clock())) + nbytes > daily:
            raise StoreFullError(
                f"Today's write budget of {daily} bytes is spent; writing goes on tomorrow (UTC)."
            )

    @property
    def tells_late(self) -> bool:
        """Whether the file system tells only later what is free; see `FreeSpace`."""
        return self._free.is_late

    def excess(self, txn: Reader, nbytes: int, num_tokens: int) -> int:
        """Bytes that must go before `nbytes` more may be written; 0 or less when they fit."""
        return max(self.lacks(txn, nbytes, num_tokens))

    def lacks(self, txn: Reader, nbytes: int, num_tokens: int) -> tuple[int, int]:
        """What `nbytes` more lack of the budget, and of the disk above its floor; 0 or less: none.

        The first goes by what the store takes, the second by what the disk says is free.
        """
        growth = nbytes + self._index_growth(num_tokens)
        over = self.usage(txn).total + growth - self.limits.max_bytes
        if self.limits.min_free_bytes == 0:
            return over, over
        return over, self._wanted_free(txn, growth) - self.free_bytes()

    def settle(self, nbytes: int, num_tokens: int, *, after_removals: bool = False) -> None:
        """See that what the file system says is free is right, if `excess` depends on it."""
        if self.limits.min_free_bytes == 0:
            return
        with self._index.read() as txn:
            wanted = self._wanted_free(txn, nbytes + self._index_growth(num_tokens))
            written, commits = txn.counter(WRITTEN_BYTES), txn.commit_id
        if after_removals:
            self._free.settle_removals(wanted)
        else:
            # The ballast may have been made anew since, which is no counter's business.
            self._free.settle(wanted + self.ballast.wanted_bytes, written, commits)

    def _wanted_free(self, txn: Reader, growth: int) -> int:
        """What must be free before the store grows by that much."""
        growth += self._to_come(txn)
        growth += growth // _METADATA_SHARE + _METADATA_SLACK
        return self.limits.min_free_bytes + growth

    def _to_come(self, txn: Reader) -> int:
        """Bytes reserved for files that are being written, as far as they are not there yet."""
        pending = txn.sized(b"pending")
        reserved = sum(record.nbytes for record in pending.values())
        if reserved and not self._free.is_late:
            for name in map(bytes.hex, pending):
                # Renamed from the first place to the second.
                nbytes = fs.disk_bytes(self._folder.temporary_path(name))
                reserved -= nbytes or fs.disk_bytes(self._folder.path(name))
        return max(0, reserved)

    def _index_growth(self, num_tokens: int) -> int:
        return index_growth(num_tokens, self._index.page_bytes)

    def may_regain(self, txn: Reader, max_bytes: int) -> bool:
        """Whether the ballast may be made as large as it should be, within `max_bytes`.

        A disk that is nearly full is left alone: others need the rest of it more.
        """
        missing = self.ballast.missing_bytes()
        if missing <= 0:
            return missing < 0
        room = self.free_bytes() - self.limits.min_free_bytes
        return room >= 2 * missing and self.usage(txn).total + missing <= max_bytes

    def free_bytes(self) -> int:
        """Bytes free on the store's file system.

        Raises:
            StoreError: The file system does not say.
        """
        return self._free.now()

    def free_files(self) -> int | None:
        """Files that the store's file system may still get; None where there is no limit.

        Raises:
            StoreError: The file system does not say.
        """
        try:
            return fs.free_files(self._index.root)
        except OSError as error:
            raise fs.translated(error, "while its free space was asked for") from error


def written_today(now: float) -> str:
    """Name of the counter of bytes written on the UTC day of `now`."""
    return time.strftime("written:%Y-%m-%d", time.gmtime(now))


def index_growth(num_tokens: int, page_bytes: int) -> int:
    """Upper estimate of what recording that many new tokens adds to the index.

    Args:
        num_tokens: How many.
        page_bytes: Of a page of the index: that of the machine that made it.
    """
    return num_tokens * _INDEX_TOKEN_BYTES + _INDEX_SLACK_PAGES * page_bytes


def blob_estimate(tensor_bytes: int, num_tensors: int, text_bytes: int) -> int:
    """Upper estimate of a blob's size on disk, before it is written.

    Args:
        tensor_bytes: Bytes of all tensors.
        num_tensors: How many; each is named, placed and checksummed in the header.
        text_bytes: Length of the free texts in the header, which JSON may escape.
    """
    header = 2048 + 320 * num_tensors + 2 * text_bytes
    return header + ALIGNMENT + tensor_bytes + _FILE_SLACK
