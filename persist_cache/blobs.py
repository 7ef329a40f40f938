"""Blobs: immutable safetensors files, each with the KV of one run or the state at one position.

A blob is written once under a temporary name, made durable, and renamed to its final one; it is
never changed afterwards. While its writer lives it holds the file's `flock`, so a file that no
record names is garbage exactly when its lock is free. `docs/format.md` describes the bytes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any

import msgspec
import xxhash
from msgspec import Struct

from persist_cache import admin_token, exclusion, forked, fs
from persist_cache.entry import TOKEN_BYTES
from persist_cache.errors import CorruptBlobError, StoreFormatError

log = logging.getLogger(__name__)

FORMAT_VERSION = "1"
ALIGNMENT = 16 * 1024
"""Tensor data starts at a multiple of this: the page size of Apple silicon."""
TOKENS = "tokens"
"""Name of the tensor that holds a run's own token ids, int64."""
SUFFIX = ".safetensors"
_BLOB_FILE = re.compile("[0-9a-f]{32}" + re.escape(SUFFIX))
TAG_FILE = "CACHEDIR.TAG"
"""Tells backup programs to leave the folder out."""
PRESENCE_FILE = "store.lock"
"""Locked shared by every process that has the store open."""
SUSPECT_FILE = "index.suspect"
"""There while the index is known to be damaged: whoever opens the store alone makes a new one."""
_MEMO_FILE = "weights.json"
_STRAY_PROBE = re.compile(r"doctor\.[0-9a-f]{16}")
"""What `doctor` of earlier versions wrote to measure the disk, and left when it was killed."""
_STRAY_MEMO = re.compile(r"\." + re.escape(_MEMO_FILE) + r"\.[0-9a-f]{16}\.tmp")
_MEMO_MADE_S = 60.0
"""A memo is written in much less."""
_MAX_HEADER_BYTES = 32 << 20
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class Tensor(Struct, frozen=True):
    """A tensor to be written: its bytes, in pieces, in file order.

    Attributes:
        name: Unique in its blob.
        dtype: safetensors name, such as `BF16`.
        shape: Row-major shape of the pieces joined.
        pieces: Flat byte views; the writer reads them and nothing else, so whoever made them
            keeps the memory unchanged until the write has ended.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Sequence[memoryview]

    @property
    def nbytes(self) -> int:
        return sum(len(piece) for piece in self.pieces)


class Payload(Struct, frozen=True):
    """What a codec puts into one blob: tensors, and a note to itself.

    Attributes:
        tensors: The KV rows of a run, or the state at a position.
        detail: JSON by which the codec reads them back; opaque to the store.
    """

    tensors: Sequence[Tensor]
    detail: str = "{}"

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class TensorInfo(Struct, frozen=True, gc=False):
    """Where a stored tensor lies, and the digest of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    xxh3: str

    @property
    def end(self) -> int:
        """Position in the file behind its last byte."""
        return self.offset + self.nbytes


class _Place(Struct, frozen=True, gc=False):
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[int, int]


_decode_place = msgspec.json.Decoder(_Place).decode
_decode_table = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_strings = msgspec.json.Decoder(dict[str, str]).decode


class EntryMark(Struct, frozen=True, array_like=True):
    """An entry that ends within a run: where, its tier's label, when it was made (UTC seconds)."""

    end: int
    tier: str
    created: float


_decode_marks = msgspec.json.Decoder(tuple[EntryMark, ...]).decode


class BlobHeader(Struct, frozen=True):
    """What a blob says of itself; enough to rebuild the index from files alone.

    Attributes:
        kind: `run` or `checkpoint`.
        complete: The run holds rows of every layer, so any position in it can be resumed.
        fingerprint: Hex digest of the model identity.
        identity: JSON of the readable identity fields.
        layout: JSON of the cache classes and their geometry, by the codec.
        detail: The codec's note for this blob.
        start: Position of the first token.
        end: Position behind the last token; for a checkpoint both are the position it resumes.
        prefix: Hex digest of all tokens before `start`.
        parent: Name of the blob whose rows come right before, or "".
        tier: Label of the tier of the entry that it was written for.
        entry: An entry ends at `end`.
        created: UTC seconds.
        tensors: By name.
        replaces: Names of blobs it was made of: what hangs on those hangs on it.
        inner_entries: Those that end before `end`, as of when it was made of others.
    """

    kind: str
    complete: bool
    fingerprint: str
    identity: str
    layout: str
    detail: str
    start: int
    end: int
    prefix: str
    parent: str
    tier: str
    entry: bool
    created: float
    tensors: Mapping[str, TensorInfo] = {}
    replaces: tuple[str, ...] = ()
    inner_entries: tuple[EntryMark, ...] = ()


class Written(Struct, frozen=True):
    """A published file: what its index record must say."""

    name: str
    nbytes: int
    disk_bytes: int
    digest: bytes


def prefix_digest(packed: bytes | memoryview) -> str:
    """Hex digest of packed tokens, as a blob names the prefix before it."""
    return str(xxhash.xxh3_128_hexdigest(packed))


def header_bytes(header: BlobHeader, tensors: Sequence[Tensor]) -> bytes:
    """Serialise the safetensors header, padded so that the data is aligned."""
    table: dict[str, Any] = {}
    checksums: dict[str, str] = {}
    offset = 0
    for tensor in tensors:
        _check_shape(tensor)
        end = offset + tensor.nbytes
        table[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        checksums[tensor.name] = _checksum(tensor.pieces)
        offset = end
    metadata = {
        "format": "persist-cache",
        "version": FORMAT_VERSION,
        "kind": header.kind,
        "complete": str(int(header.complete)),
        "fingerprint": header.fingerprint,
        "identity": header.identity,
        "layout": header.layout,
        "detail": header.detail,
        "start": str(header.start),
        "end": str(header.end),
        "prefix": header.prefix,
        "parent": header.parent,
        "tier": header.tier,
        "entry": str(int(header.entry)),
        "created": repr(header.created),
        "checksums": msgspec.json.encode(checksums).decode(),
    }
    if header.replaces:
        metadata["replaces"] = " ".join(header.replaces)
    if header.inner_entries:
        metadata["inner_entries"] = msgspec.json.encode(header.inner_entries).decode()
    metadata["seal"] = _seal(metadata, table)
    raw = msgspec.json.encode({"__metadata__": metadata, **table})
    padding = -(8 + len(raw)) % ALIGNMENT
    raw += b" " * padding
    return len(raw).to_bytes(8, "little") + raw


def _check_shape(tensor: Tensor) -> None:
    count = 1
    for extent in tensor.shape:
        count *= extent
    if count * DTYPE_BYTES[tensor.dtype] != tensor.nbytes:
        raise ValueError(
            f"tensor {tensor.name!r} of {tensor.shape} {tensor.dtype} does not have "
            f"{tensor.nbytes} bytes"
        )


def _checksum(pieces: Sequence[memoryview]) -> str:
    if len(pieces) == 1:
        return str(xxhash.xxh3_128_hexdigest(pieces[0]))
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return str(digest.hexdigest())


def _seal(metadata: Mapping[str, str], table: Mapping[str, Any]) -> str:
    """Digest of everything a header says, so that it can be trusted without the index."""
    said = {name: value for name, value in metadata.items() if name != "seal"}
    return str(xxhash.xxh3_128_hexdigest(msgspec.json.encode([said, table], order="sorted")))


class BlobWriter:
    """One blob on its way to the disk; use as a context manager.

    The file exists from construction on, under a temporary name and with its lock held, so that
    its reservation can be told from a dead one. Leaving the context gives the lock back: do that
    only after the record is committed. A blob not published by then is removed.
    """

    def __init__(self, folder: BlobFolder) -> None:
        self._folder = folder
        self._done = False
        self._fd = -1
        forked.register(self)
        while True:
            self.name = _new_name()
            self.path = folder.temporary_path(self.name)
            self._fd = fs.create(self.path)
            # A sweep may have seen the file before its lock was taken; it is lost then.
            try:
                if fs.try_lock(self._fd) and _is_same_file(self.path, self._fd):
                    return
                self.discard()
            except BaseException:
                self.__exit__()
                raise
            self._close()

    def let_go(self) -> None:
        """In a forked child: the file, and its lock, are the parent's."""
        self._done = True
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def is_gone(self) -> bool:
        """Whether the file was removed again."""
        return not self.path.exists()

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.discard()
        finally:
            self._close()

    def discard(self) -> None:
        """Remove the file, unless `keep` was called."""
        if not self._done:
            with contextlib.suppress(OSError):
                fs.unlink(self.path)

    def write(self, header: BlobHeader, tensors: Sequence[Tensor]) -> Written:
        """Write the whole file and make its bytes durable.

        Raises:
            OSError: The disk is full or failed; leaving the context removes the file.
        """
        head = header_bytes(header, tensors)
        pieces = [memoryview(head)]
        for tensor in tensors:
            pieces.extend(tensor.pieces)
        fs.allocate(self._fd, sum(piece.nbytes for piece in pieces))
        nbytes = fs.write_all(self._fd, pieces)
        fs.sync(self._fd)
        digest = xxhash.xxh3_128_digest(head)
        return Written(self.name, nbytes, fs.disk_bytes(self.path), digest)

    def publish(self) -> None:
        """Give the file its final name, durably. The lock stays held."""
        target = self._folder.path(self.name)
        for attempts_left in range(9, -1, -1):
            try:
                self._folder.ensure_parent(target)
                fs.rename(self.path, target)
                break
            except FileNotFoundError:
                # `gc` of another process may have found the folder empty meanwhile.
                if not attempts_left or not self.path.exists():
                    raise
        self.path = target
        fs.sync_folder(target.parent)

    def keep(self) -> None:
        """Say that a record now names the file: it stays when the context is left."""
        self._done = True


class BlobReader:
    """One verified, open blob.

    Thread safety: `read` may be called from several threads at once (`preadv`, no shared state).
    """

    def __init__(self, path: Path, *, nbytes: int | None = None, digest: bytes | None = None):
        """Open and check the header.

        Args:
            path: The file.
            nbytes: Size its record names, if there is a record.
            digest: xxh3-128 of its header bytes, from the record; without it the header's own
                seal is checked.

        Raises:
            FileNotFoundError: The blob is gone.
            CorruptBlobError: The file is not what was written.
            StoreFormatError: It was written by an unknown version.
        """
        self.path = path
        self.name = path.name.removesuffix(SUFFIX)
        with _bad_sectors(path):
            self._fd = fs.open_read(path)
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise CorruptBlobError(path, "it is not a file")
            self.nbytes = status.st_size
            if nbytes is not None and self.nbytes != nbytes:
                raise CorruptBlobError(path, f"{self.nbytes} bytes long instead of {nbytes}")
            self.header = self._read_header(digest)
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def release(self) -> None:
        """Give the descriptor back until the next `read`.

        A path of thousands of runs would exceed the limit of open files. The name stands for
        the same bytes for ever, so opening it again is safe; it may be gone by then.
        """
        self.close()

    def __enter__(self) -> BlobReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read(self, name: str, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` with one tensor's bytes; see `read_adjacent`."""
        self.read_adjacent([(name, buffers)])

    def read_adjacent(self, parts: Sequence[tuple[str, Sequence[memoryview]]]) -> None:
        """Fill buffers with the bytes of tensors that lie end to end, and verify each.

        One call of the system reads all, as far as its limits allow.

        Args:
            parts: Per tensor, in file order: its name in `header.tensors`, and writable flat byte
                views for its bytes, whose lengths sum up to its size.

        Raises:
            CorruptBlobError: Torn or flipped bytes; the buffers then hold garbage.
        """
        tensors = self.header.tensors
        start = end = tensors[parts[0][0]].offset
        views: list[memoryview] = []
        for name, buffers in parts:
            info = tensors[name]
            if info.offset != end:
                raise ValueError(f"tensor {name!r} does not follow the one before it")
            end += info.nbytes
            views += buffers
        if sum(map(len, views)) != end - start:
            raise ValueError(f"the buffers do not sum up to {end - start} bytes")
        with _bad_sectors(self.path), self._descriptor() as fd:
            count = fs.read_into(fd, start, views)
        if count != end - start:
            names = (name for name, _ in parts if tensors[name].end > start + count)
            raise CorruptBlobError(self.path, f"ends within tensor {next(names)!r}")
        for name, buffers in parts:
            if _checksum(buffers) != tensors[name].xxh3:
                raise CorruptBlobError(self.path, f"checksum of tensor {name!r} differs")

    def read_bytes(self, name: str) -> bytes:
        """The verified bytes of a small tensor."""
        buffer = bytearray(self.header.tensors[name].nbytes)
        self.read(name, [memoryview(buffer)])
        return bytes(buffer)

    def check_place(self, fingerprint: str, packed: bytes, start: int, used: int) -> None:
        """Make sure that this blob belongs where the index, which has no checksums, puts it.

        Args:
            fingerprint: Hex digest of the model asked for.
            packed: The packed prompt.
            start: Position of the blob's first token in it.
            used: Tokens to be used of the blob; 0 for a checkpoint.

        Raises:
            CorruptBlobError: It is of another model or other tokens; nothing of it may be served.
        """
        header = self.header
        here = packed[start * TOKEN_BYTES : (start + used) * TOKEN_BYTES]
        before = memoryview(packed)[: start * TOKEN_BYTES]
        if (
            header.fingerprint != fingerprint
            or header.start != start
            or header.prefix != prefix_digest(before)
            or (used and not self.read_bytes(TOKENS).startswith(here))
        ):
            raise CorruptBlobError(self.path, "it holds another prompt than the index says")

    def verify(self) -> None:
        """Read every tensor and check it; nothing is kept.

        Raises:
            CorruptBlobError: Some bytes differ from what was written.
        """
        scratch = memoryview(bytearray(1 << 20))
        for name, info in self.header.tensors.items():
            digest = xxhash.xxh3_128()
            for start in range(0, info.nbytes, len(scratch)):
                part = scratch[: min(len(scratch), info.nbytes - start)]
                with _bad_sectors(self.path):
                    count = fs.read_into(self._fd, info.offset + start, [part])
                if count != len(part):
                    raise CorruptBlobError(self.path, f"ends within tensor {name!r}")
                digest.update(part)
            if digest.hexdigest() != info.xxh3:
                raise CorruptBlobError(self.path, f"checksum of tensor {name!r} differs")

    @contextlib.contextmanager
    def _descriptor(self) -> Iterator[int]:
        if self._fd >= 0:
            yield self._fd
            return
        fd = fs.open_read(self.path)
        try:
            yield fd
        finally:
            os.close(fd)

    def _read_header(self, digest: bytes | None) -> BlobHeader:
        # Mostly the whole header, because data begins at the next multiple of `ALIGNMENT`.
        raw = self._exactly(0, max(8, min(ALIGNMENT, self.nbytes)))
        size = int.from_bytes(raw[:8], "little")
        # A damaged length must not become an allocation of 2^60 bytes.
        if not 2 <= size <= min(_MAX_HEADER_BYTES, self.nbytes - 8):
            raise CorruptBlobError(self.path, "its header length is impossible")
        missing = 8 + size - len(raw)
        raw = raw + self._exactly(len(raw), missing) if missing > 0 else raw[: 8 + size]
        self.digest = xxhash.xxh3_128_digest(raw)
        if digest is not None and self.digest != digest:
            raise CorruptBlobError(self.path, "its header differs from what was written")
        return self._parse(raw[8:], data_start=8 + size, sealed=digest is not None)

    def _exactly(self, offset: int, size: int) -> bytes:
        buffer = bytearray(size)
        with _bad_sectors(self.path):
            count = fs.read_into(self._fd, offset, [memoryview(buffer)])
        if count != size:
            raise CorruptBlobError(self.path, "ends within its header")
        return bytes(buffer)

    def _parse(self, raw: bytes, data_start: int, *, sealed: bool) -> BlobHeader:
        """Decode a header; `sealed` says that the index vouches for it already."""
        try:
            table = _decode_table(raw)
            metadata = _decode_strings(table.pop("__metadata__"))
            said = {} if sealed else {name: msgspec.json.decode(one) for name, one in table.items()}
        except (msgspec.DecodeError, KeyError, UnicodeDecodeError, RecursionError):
            raise CorruptBlobError(self.path, "its header is not that of a blob") from None
        if metadata.get("format") != "persist-cache":
            raise CorruptBlobError(self.path, "it was not written by persist-cache")
        if metadata.get("version") != FORMAT_VERSION:
            raise StoreFormatError(
                f"{self.path.name} has blob format {metadata.get('version')!r}, "
                f"this version of persist-cache reads {FORMAT_VERSION!r} only."
            )
        if not sealed and metadata.get("seal") != _seal(metadata, said):
            raise CorruptBlobError(self.path, "its header contradicts its seal")
        try:
            return BlobHeader(
                kind=metadata["kind"],
                complete=metadata["complete"] == "1",
                fingerprint=metadata["fingerprint"],
                identity=metadata["identity"],
                layout=metadata["layout"],
                detail=metadata["detail"],
                start=int(metadata["start"]),
                end=int(metadata["end"]),
                prefix=metadata["prefix"],
                parent=metadata["parent"],
                tier=metadata["tier"],
                entry=metadata["entry"] == "1",
                created=float(metadata["created"]),
                tensors=self._tensors(table, metadata["checksums"], data_start),
                replaces=tuple(metadata.get("replaces", "").split()),
                inner_entries=_decode_marks(metadata.get("inner_entries", "[]")),
            )
        except (KeyError, ValueError, TypeError, msgspec.DecodeError) as error:
            raise CorruptBlobError(self.path, f"its header is malformed ({error})") from None

    def _tensors(
        self, table: Mapping[str, msgspec.Raw], checksums: str, data_start: int
    ) -> dict[str, TensorInfo]:
        digests = _decode_strings(checksums)
        tensors: dict[str, TensorInfo] = {}
        expected = 0
        for name, said in table.items():
            place = _decode_place(said)
            begin, end = place.data_offsets
            count = prod(place.shape) * DTYPE_BYTES[place.dtype]
            if begin != expected or end - begin != count:
                raise ValueError(f"tensor {name!r} does not fit its place")
            tensors[name] = TensorInfo(
                place.dtype, place.shape, data_start + begin, count, digests[name]
            )
            expected = end
        if data_start + expected != self.nbytes:
            raise ValueError("the file is not as long as its tensors")
        return tensors


class BlobFolder:
    """The folders that hold blobs: `blobs/<2 hex>/` for the living, `tmp/`, `quarantine/`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs"
        self.temporary = root / "tmp"
        self.quarantined = root / "quarantine"

    def create(self) -> None:
        for folder in (self.blobs, self.temporary, self.quarantined):
            fs.make_folder(folder)

    def path(self, name: str) -> Path:
        return self.blobs / name[:2] / (name + SUFFIX)

    def temporary_path(self, name: str) -> Path:
        return self.temporary / (name + SUFFIX)

    def quarantine_path(self, name: str) -> Path:
        return self.quarantined / (name + SUFFIX)

    def ensure_parent(self, path: Path) -> None:
        if not path.parent.is_dir():
            fs.make_folder(path.parent)
            fs.sync_folder(self.blobs)

    def names(self) -> Iterator[tuple[str, Path]]:
        """Every file that looks like a published blob, also one in a folder not its own."""
        for folder in sorted(self.blobs.iterdir()):
            if len(folder.name) == 2 and folder.is_dir():
                yield from _blob_files(folder)

    def lengths(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Per folder of the fan-out what is in it, blob or not, with its length.

        The length is -1 where there is none to tell. Paths as objects would take most of the time
        of looking at a large store.
        """
        for fan in sorted(os.listdir(self.blobs)):
            if len(fan) != 2:
                continue
            path = f"{self.blobs}/{fan}"
            try:
                names = os.listdir(path)
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                lengths = _lengths(names, folder)
            finally:
                os.close(folder)
            yield fan, dict(zip(names, lengths, strict=True))

    def remove_empty(self) -> None:
        """Remove folders of the fan-out in which nothing is left."""
        for folder in sorted(self.blobs.iterdir()):
            if len(folder.name) == 2:
                # One that is not empty, or no folder, says so itself: looking first would race.
                with contextlib.suppress(OSError):
                    fs.remove_folder(folder)

    def temporaries(self) -> Iterator[tuple[str, Path]]:
        """Every file that looks like a blob on its way."""
        yield from _blob_files(self.temporary)

    def in_quarantine(self) -> Iterator[tuple[str, Path]]:
        """Every damaged blob that was put aside."""
        yield from _blob_files(self.quarantined)

    def overhead_bytes(self) -> int:
        """What the folders themselves take on disk, and the small files of the store."""
        places = (self.root, self.blobs, self.temporary, self.quarantined)
        total = sum(fs.disk_bytes(place) for place in places)
        with os.scandir(self.root) as found:
            names = [one.name for one in found]
        own = {TAG_FILE, PRESENCE_FILE, SUSPECT_FILE, _MEMO_FILE, exclusion.INDEX_FILE}
        total += sum(
            fs.disk_bytes(self.root / name) for name in names if name in own or _is_stray(name)
        )
        total += sum(map(fs.disk_bytes, admin_token.files_in(self.root)))
        with os.scandir(self.blobs) as fans:
            # One that is empty may be removed at this moment by another process.
            total += sum(fs.disk_bytes(Path(fan.path)) for fan in fans)
        return total

    def remove_strays(self) -> None:
        """Remove files beside the blobs whose writers were killed."""
        with os.scandir(self.root) as found:
            strays = [Path(one.path) for one in found if _is_stray(one.name)]
        for path in strays:
            with contextlib.suppress(OSError):
                age_s = time.time() - path.lstat().st_mtime
                if _STRAY_PROBE.fullmatch(path.name) or not 0 <= age_s < _MEMO_MADE_S:
                    fs.unlink(path)

    def remove(self, name: str) -> None:
        """Unlink a blob, published or in quarantine; one that is gone already is fine.

        Raises:
            OSError: The folder does not let go of it; the caller tries again later.
        """
        for path in (self.path(name), self.quarantine_path(name)):
            with contextlib.suppress(FileNotFoundError):
                _unlink_or_rmdir(path)

    def quarantine(self, name: str) -> bool:
        """Move a damaged blob aside, for whoever wants to see it; returns whether it was there."""
        try:
            fs.rename(self.path(name), self.quarantine_path(name))
        except FileNotFoundError:
            return False
        return True


def is_blob_file(name: str) -> bool:
    """Whether `name` is 32 lower-case hex digits and the suffix: no other file is ever touched."""
    return _BLOB_FILE.fullmatch(name) is not None


def _is_stray(name: str) -> bool:
    return bool(_STRAY_PROBE.fullmatch(name) or _STRAY_MEMO.fullmatch(name))


def _new_name() -> str:
    return os.urandom(16).hex()


def _lengths(names: Sequence[str], folder: int) -> list[int]:
    """The length of each of these files of an open folder, -1 where there is none to tell."""
    try:
        return [os.stat(name, dir_fd=folder).st_size for name in names]
    except OSError:  # one is gone meanwhile, or a link to nowhere
        if len(names) == 1:
            return [-1]
        return [length for name in names for length in _lengths([name], folder)]


def _blob_files(folder: Path) -> Iterator[tuple[str, Path]]:
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:  # empty, and removed by another process
        return
    for path in paths:
        if is_blob_file(path.name):
            yield path.name.removesuffix(SUFFIX), path


def _unlink_or_rmdir(path: Path) -> None:
    """Remove a name that is ours, also where an empty folder took the place of the file."""
    try:
        fs.unlink(path)
    except (IsADirectoryError, PermissionError):  # macOS says "operation not permitted"
        if path.is_symlink() or not path.is_dir():
            raise
        fs.remove_folder(path)


def _is_same_file(path: Path, fd: int) -> bool:
    """Whether `path` still names the open file `fd`."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(fd))


@contextlib.contextmanager
def _bad_sectors(path: Path) -> Iterator[None]:
    """What can never be read again is corrupt, and must not be tried at every request."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EIO, errno.ELOOP, errno.EISDIR):
            raise CorruptBlobError(path, f"it cannot be read ({error.strerror})") from error
        raise


def try_remove_orphan(path: Path, is_known: Callable[[], bool]) -> bool:
    """Remove the file `path` if its writer is dead and no record names it.

    Args:
        path: A temporary or published blob that looked unknown.
        is_known: Called without arguments while the lock is held: looks again, in a fresh
            transaction, whether a record names the file by now.

    Returns:
        Whether the file was removed; one that cannot be is left for another time.
    """
    try:
        fd = fs.open_read(path)
    except OSError as error:
        if error.errno != errno.ELOOP or is_known():
            return False
        # A symbolic link has no writer, and whatever it leads to is not ours.
        with contextlib.suppress(OSError):
            fs.unlink(path)
            return True
        return False
    try:
        # Whoever renamed it to its final place meanwhile may have committed it: look twice.
        if not fs.try_lock(fd) or is_known() or not _is_same_file(path, fd):
            return False
        _unlink_or_rmdir(path)
    except OSError as error:
        log.warning("%s is an orphan and cannot be removed: %s", path, error)
        return False
    finally:
        os.close(fd)
    return True
