"""What files hold, as identities: from names, from remembered stamps, or by reading them.

`Contents` also notes each file that it was asked about, with its stamp and the way to it. Two
such notes, taken before and after, tell whether a model was changed while it was loaded.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from persist_cache.fingerprint.memo import Memo, Record, Stamp
from persist_cache.fingerprint.reading import CannotIdentify, open_regular, printable
from persist_cache.system.mounts import Mounts
from persist_cache.system.volumes import lasting_device

SETTLED_NS = 2_000_000_000
"""A file changed again within the tick of its file system's clock keeps its stamp.

Only a stamp older than this is remembered, or stands for the content: git's "racy" rule.
"""

_HASH_THREADS = 4
_MOST_LINKS = 40

_SHA256 = "sha256"
_XXH3 = "xxh3-128"


class ChangedMeanwhile(CannotIdentify):
    """A file was changed while it was looked at; it may be all right the next time."""


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
        self._memo = Memo(memo_path)
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
        with open_regular(path) as file:
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
        known: dict[Path, Record] = {}
        unread: list[tuple[Path, str]] = []
        unproven: set[Path] = set()
        for path in paths:
            if note:
                self._note_way(path)
            record, proves = self._recall(path, asked_ns)
            if not proves:
                unproven.add(path)
            if isinstance(record, Record):
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

    def _recall(self, path: Path, asked_ns: int) -> tuple[Record | str, bool]:
        """Return what is known of the file, or the algorithm to read it with.

        The second value tells whether the file's stamp can stand for its content.
        """
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CannotIdentify(f"{printable(path)} is not a file")
        stamp = Stamp.of(status)
        proves = self._mounts.ctime_proves(path, status)
        if self.only_look and proves and _settled(stamp, asked_ns):
            return Record(stamp, ""), proves
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
            return Record(stamp, f"{_SHA256}:{blob_name}"), proves
        # A blob is written once and renamed; if its stamp moved, its name proves nothing.
        return algorithm, proves

    def _read_all(self, files: Sequence[tuple[Path, str]]) -> dict[Path, Record]:
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


def _settled(stamp: Stamp, asked_ns: int) -> bool:
    return asked_ns - max(stamp.mtime_ns, stamp.ctime_ns) >= SETTLED_NS


def _lasting(path: Path, stamp: Stamp) -> Stamp:
    """The same stamp, by a device number that a restart of the machine does not change."""
    return stamp._replace(device=lasting_device(path, stamp.device))


def _read_identity(path: Path, algorithm: str) -> Record:
    import xxhash

    with path.open("rb", buffering=0) as file:
        stamp = Stamp.of(os.fstat(file.fileno()))
        digest = hashlib.file_digest(
            file, hashlib.sha256 if algorithm == _SHA256 else xxhash.xxh3_128
        )
        if Stamp.of(os.fstat(file.fileno())) != stamp:
            raise ChangedMeanwhile(f"{printable(path)} was changed while it was read")
    return Record(stamp, f"{algorithm}:{digest.hexdigest()}")


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
