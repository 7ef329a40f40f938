"""What files hold, as identities: from names, from remembered stamps, or by reading them.

`Contents` also notes each file that it was asked about, with its stamp and the way to it. Two
such notes, taken before and after, tell whether a model was changed while it was loaded.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

from persist_cache.system.mounts import Mounts
from persist_cache.system.volumes import lasting_device

MEMO_VERSION = 1
MEMO_RECORDS = 1024
"""Bounds the memo to about 150 KiB; the largest models have some 160 weights files."""

SETTLED_NS = 2_000_000_000
"""A file changed again within the tick of its file system's clock keeps its stamp.

Only a stamp older than this is remembered, or stands for the content: git's "racy" rule.
"""

_HASH_THREADS = 4
_MOST_LINKS = 40
_IDENTITY = re.compile(r"sha256:[0-9a-f]{64}|xxh3-128:[0-9a-f]{32}")

_SHA256 = "sha256"
_XXH3 = "xxh3-128"


class CannotIdentify(Exception):
    """Carries a reason from where it is found to `Identifier`, which makes a value of it."""


class ChangedMeanwhile(CannotIdentify):
    """A file was changed while it was looked at; it may be all right the next time."""


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


class _Record(NamedTuple):
    """The identity (`algorithm:hex`) that a file had when it had this stamp."""

    stamp: Stamp
    identity: str

    @property
    def slot(self) -> tuple[int, int, str]:
        return self.stamp.device, self.stamp.inode, self.identity.partition(":")[0]


class _MemoFile(TypedDict):
    version: int
    records: list[_Record]


class Look(NamedTuple):
    """How a file was found: by its stamp, and by its content if that is known."""

    stamp: Stamp
    identity: str


class Contents:
    """Content identities of files, and notes of what was looked at.

    Args:
        memo_path: Memo of file stamps, or None for none.
        paranoid: Believe neither the memo nor blob names.
        only_look: Take notes for a later comparison; do not read a file whose stamp stands for
            its content, and give such a file no identity.

    Attributes:
        code: Digests of the importable files that were read, by their path in the model's folder.
    """

    def __init__(
        self, memo_path: Path | None, paranoid: bool = False, *, only_look: bool = False
    ) -> None:
        self.only_look = only_look
        self.code: dict[str, str] = {}
        self._memo = _Memo(memo_path)
        self._paranoid = paranoid
        self._mounts = Mounts()
        self.looks: dict[str, Look] = {}
        self.ways: dict[str, os.stat_result] = {}

    def changed_since(self, before: Contents) -> str:
        """Name a file that is not what it was when `before` looked at it; "" if all are."""
        for path in sorted(self.looks.keys() | before.looks.keys()):
            now, then = self.looks.get(path), before.looks.get(path)
            if now is None or then is None or now.stamp != then.stamp:
                return path
            # Where a stamp stands for the content, the first look has no identity.
            if then.identity and now.identity != then.identity:
                return path
        for path in sorted(self.ways.keys() | before.ways.keys()):
            if _way_moved(before.ways.get(path), self.ways.get(path)):
                return path
        return ""

    def read(self, path: Path) -> bytes:
        """Return the bytes of a small file.

        Raises:
            OSError: It is missing or unreadable.
            CannotIdentify: It is no regular file, or changes while it is read.
        """
        self._note_way(path)
        with _open_regular(path) as file:
            stamp = Stamp.of(os.fstat(file.fileno()))
            content = file.readall() or b""
            if Stamp.of(os.fstat(file.fileno())) != stamp:
                raise ChangedMeanwhile(f"{printable(path)} was changed while it was read")
        self.looks[os.fspath(path)] = Look(stamp, blake2b(content))
        return content

    def read_code(self, path: Path, name: str) -> str:
        """Return the digest of a file that Python may keep once it is imported.

        Args:
            path: The file.
            name: Its path in the model's folder.

        Raises:
            OSError, CannotIdentify: As `read` does.
        """
        self.code[name] = digest = blake2b(self.read(path))
        return digest

    def identify(self, paths: Sequence[Path], *, note: bool = True) -> str:
        """Return one identity for a set of files, whatever their names and order.

        Args:
            paths: The files.
            note: Whether a change of them matters to `changed_since`.

        Raises:
            OSError: a file is missing or unreadable.
            CannotIdentify: a path is no regular file, or the file changes while it is read.
        """
        return one_identity(self.identify_each(paths, note=note).values())

    def identify_each(self, paths: Sequence[Path], *, note: bool = True) -> dict[Path, str]:
        """Return the identity of each file; raises as `identify` does."""
        asked_ns = time.time_ns()
        known: dict[Path, _Record] = {}
        unread: list[tuple[Path, str]] = []
        unproven: set[Path] = set()
        for path in paths:
            if note:
                self._note_way(path)
            record, proves = self._recall(path, asked_ns)
            if not proves:
                unproven.add(path)
            if isinstance(record, _Record):
                known[path] = record
            else:
                unread.append((path, record))
        known |= self._read_all(unread)
        self._memo.learn(
            record._replace(stamp=_lasting(path, record.stamp))
            for path, record in known.items()
            if record.identity and path not in unproven and _settled(record.stamp, asked_ns)
        )
        if note:
            for path, record in known.items():
                self.looks[os.fspath(path)] = Look(record.stamp, record.identity)
        return {path: known[path].identity for path in paths}

    def _recall(self, path: Path, asked_ns: int) -> tuple[_Record | str, bool]:
        """Return what is known of the file, or the algorithm to read it with.

        The second value tells whether the file's stamp can stand for its content.
        """
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CannotIdentify(f"{printable(path)} is not a file")
        stamp = Stamp.of(status)
        proves = self._mounts.ctime_proves(path, status)
        if self.only_look and proves and _settled(stamp, asked_ns):
            return _Record(stamp, ""), proves
        blob_name = _hub_blob_name(path)
        # The algorithm follows from the file alone, never from what the memo happens to hold.
        algorithm = _SHA256 if blob_name or self._paranoid else _XXH3
        if self._paranoid or not proves:
            # A blob's name is believed once, and without a stamp this may be the second time.
            return algorithm, proves
        lasting = _lasting(path, stamp)
        # Builds before this one noted the device that `stat` gives.
        record = self._memo.get(lasting, algorithm) or self._memo.get(stamp, algorithm)
        if record is not None and record.stamp in (lasting, stamp):
            return record._replace(stamp=stamp), proves
        if record is None and blob_name:
            return _Record(stamp, f"{_SHA256}:{blob_name}"), proves
        # A blob is written once and renamed; if its stamp moved, its name proves nothing.
        return algorithm, proves

    def _read_all(self, files: Sequence[tuple[Path, str]]) -> dict[Path, _Record]:
        if len(files) < 2:
            return {path: _read_identity(path, algorithm) for path, algorithm in files}
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(_HASH_THREADS, "persist-cache-fingerprint") as pool:
            records = pool.map(lambda file: _read_identity(*file), files)
            return {path: record for (path, _), record in zip(files, records, strict=True)}

    def _note_way(self, path: Path) -> None:
        for step, status in _way_to(path):
            self.ways[step] = status


def one_identity(identities: Iterable[str]) -> str:
    """Return one identity for several, whatever their order."""
    ordered = sorted(identities)
    return ordered[0] if len(ordered) == 1 else "blake2b:" + blake2b(pack(ordered))


def pack(texts: Iterable[str]) -> bytes:
    """Join texts so that no other list of texts gives the same bytes."""
    encoded = [text.encode() for text in texts]
    return b"".join(len(text).to_bytes(8, "little") + text for text in encoded)


def blake2b(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def printable(text: str | os.PathLike[str]) -> str:
    """Make a text storable: paths and JSON may hold what is not valid Unicode."""
    return os.fspath(text).encode("utf-8", "backslashreplace").decode()


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


def _open_regular(path: Path) -> io.FileIO:
    # Opening a FIFO would block the caller for ever.
    if not stat.S_ISREG(path.stat().st_mode):
        raise CannotIdentify(f"{printable(path)} is not a file")
    return io.FileIO(path)


def read_regular(path: Path) -> bytes:
    """Return the bytes of a small file; raises as `Contents.read` does, and notes nothing."""
    with _open_regular(path) as file:
        return file.readall() or b""


def _settled(stamp: Stamp, asked_ns: int) -> bool:
    return asked_ns - max(stamp.mtime_ns, stamp.ctime_ns) >= SETTLED_NS


def _lasting(path: Path, stamp: Stamp) -> Stamp:
    """The same stamp, by a device number that a restart of the machine does not change."""
    return stamp._replace(device=lasting_device(path, stamp.device))


def _read_identity(path: Path, algorithm: str) -> _Record:
    import xxhash

    with path.open("rb", buffering=0) as file:
        stamp = Stamp.of(os.fstat(file.fileno()))
        digest = hashlib.file_digest(
            file, hashlib.sha256 if algorithm == _SHA256 else xxhash.xxh3_128
        )
        if Stamp.of(os.fstat(file.fileno())) != stamp:
            raise ChangedMeanwhile(f"{printable(path)} was changed while it was read")
    return _Record(stamp, f"{algorithm}:{digest.hexdigest()}")


# The way to a file -------------------------------------------------------------------------


def _way_to(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Walk to a file: each folder and link on the way, and the file, with its own status.

    The walk ends where something is missing.
    """
    ahead = list(reversed(path.absolute().parts))
    here, links = "", 0
    while ahead:
        part = ahead.pop()
        if part == "..":
            here = os.path.dirname(here)
            continue
        step = os.path.join(here, part)
        try:
            status = os.lstat(step)
        except FileNotFoundError:
            return
        yield step, status
        if not stat.S_ISLNK(status.st_mode):
            here = step
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
        # A target that begins with "/" leads away from `here` by itself.
        ahead.extend(reversed(Path(os.readlink(step)).parts))


def _way_moved(before: os.stat_result | None, after: os.stat_result | None) -> bool:
    """Return whether a folder or link on the way was replaced or renamed in between.

    A folder in which a file was made is the same folder: that moves both of its dates, while
    renaming it moves only ctime.
    """
    if before is None or after is None:
        return True
    then, now = Stamp.of(before), Stamp.of(after)
    if (then.device, then.inode) != (now.device, now.inode):
        return True
    if stat.S_ISDIR(before.st_mode):
        return then.ctime_ns != now.ctime_ns and then.mtime_ns == now.mtime_ns
    return then != now


def _hub_blob_name(path: Path) -> str | None:
    """Return the SHA-256 in the name of the hub blob that `path` links to, if it does.

    Follows link by link: since huggingface_hub 2 a repository's blob may itself be a link into
    a store shared by all repositories, where the 64 hex digits are a Xet hash instead.
    """
    link = path
    for _ in range(8):
        if not link.is_symlink():
            return None
        target = link.parent / link.readlink()
        link = target.parent.resolve() / target.name
        if (
            re.fullmatch(r"[0-9a-f]{64}", link.name)
            and link.parent.name == "blobs"
            and link.parent.parent.name.startswith("models--")
        ):
            return link.name
    return None


class _Memo:
    """Identities of files by stamp, in one JSON file.

    A hint that saves reading: when it is missing, damaged or read-only, files are read again.
    Processes share it without a lock: it is replaced whole, and what the last writer
    overwrites is only learnt again.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._records: dict[tuple[int, int, str], _Record] | None = None

    def get(self, stamp: Stamp, algorithm: str) -> _Record | None:
        """Return the record of the same inode; its stamp may be an older one."""
        if self._records is None:
            self._records = self._load()
        return self._records.get((stamp.device, stamp.inode, algorithm))

    def learn(self, records: Iterable[_Record]) -> None:
        """Remember `records`, the newest `MEMO_RECORDS` of all; writes only what is new."""
        learnt = {record.slot: record for record in records}
        if not learnt or learnt.items() <= (self._records or {}).items():
            return
        older = {slot: record for slot, record in self._load().items() if slot not in learnt}
        newest = [*older.values(), *learnt.values()][-MEMO_RECORDS:]
        self._records = {record.slot: record for record in newest}
        self._store(newest)

    def _load(self) -> dict[tuple[int, int, str], _Record]:
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

    def _store(self, records: list[_Record]) -> None:
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
