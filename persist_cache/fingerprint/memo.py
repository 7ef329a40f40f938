"""The memo: identities that files had when they had a stamp, in one file for all processes."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypedDict

from persist_cache.fingerprint.reading import CannotIdentify, read_regular

MEMO_VERSION = 1
MEMO_RECORDS = 1024
"""Bounds the memo to about 150 KiB; the largest models have some 160 weights files."""
_IDENTITY = re.compile(r"sha256:[0-9a-f]{64}|xxh3-128:[0-9a-f]{32}")


class Stamp(NamedTuple):
    """What the file system changes whenever it changes a file.

    The device is that of `stat`, or in the memo the volume's lasting number.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )


class Record(NamedTuple):
    """The identity (`algorithm:hex`) that a file had when it had this stamp."""

    stamp: Stamp
    identity: str

    @property
    def slot(self) -> tuple[int, int, str]:
        return self.stamp.device, self.stamp.inode, self.identity.partition(":")[0]


class _MemoFile(TypedDict):
    version: int
    records: list[Record]


def default_memo_path() -> Path | None:
    """Return `weights.json` in `$PERSIST_CACHE_HOME`, or else in the user's cache folder.

    None for a user without a home folder.
    """
    import platformdirs

    try:
        if home := os.environ.get("PERSIST_CACHE_HOME"):
            return Path(home).expanduser() / "weights.json"
        return Path(platformdirs.user_cache_dir("persist-cache", appauthor=False)) / "weights.json"
    except RuntimeError:
        return None


class Memo:
    """Identities of files by stamp, in one JSON file.

    A hint that saves reading: when it is missing, damaged or read-only, files are read again.
    Processes share it without a lock: it is replaced whole, and what the last writer
    overwrites is only learnt again.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._records: dict[tuple[int, int, str], Record] | None = None

    def get(self, stamp: Stamp, algorithm: str) -> Record | None:
        """Return the record of the same inode; its stamp may be an older one."""
        if self._records is None:
            self._records = self._load()
        return self._records.get((stamp.device, stamp.inode, algorithm))

    def learn(self, records: Iterable[Record]) -> None:
        """Remember `records`, the newest `MEMO_RECORDS` of all; writes only what is new."""
        learnt = {record.slot: record for record in records}
        if not learnt or learnt.items() <= (self._records or {}).items():
            return
        older = {slot: record for slot, record in self._load().items() if slot not in learnt}
        newest = [*older.values(), *learnt.values()][-MEMO_RECORDS:]
        self._records = {record.slot: record for record in newest}
        self._store(newest)

    def _load(self) -> dict[tuple[int, int, str], Record]:
        import msgspec

        if self._path is None:
            return {}
        try:
            memo = msgspec.json.decode(read_regular(self._path), type=_MemoFile)
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError, CannotIdentify):
            return {}
        if memo["version"] != MEMO_VERSION:
            return {}
        return {
            record.slot: record
            for record in memo["records"]
            if _IDENTITY.fullmatch(record.identity)
        }

    def _store(self, records: list[Record]) -> None:
        import msgspec

        if self._path is None:
            return
        encoded = msgspec.json.encode(_MemoFile(version=MEMO_VERSION, records=records))
        temporary = self._path.with_name(f".{self._path.name}.{os.urandom(8).hex()}.tmp")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Not synced: a memo torn by a power cut is read as none.
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(encoded)
            temporary.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
