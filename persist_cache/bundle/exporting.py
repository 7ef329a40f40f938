"""Exporting entries: their blobs are read, cut as planned, and written into a bundle.

`planning` says what goes into it, `output` how its file comes to be.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import xxhash

from persist_cache import fs
from persist_cache.blobs.folder import SUFFIX
from persist_cache.blobs.header import TOKENS, BlobHeader, header_bytes, prefix_digest
from persist_cache.blobs.reader import BlobReader
from persist_cache.blobs.rows import Cut, StoredTensor, cut_runs, whole
from persist_cache.bundle.container import (
    CHECKSUM,
    MANIFEST,
    BlobSection,
    checksum_text,
)
from persist_cache.bundle.output import length_of, pieces_of, write_file
from persist_cache.bundle.planning import BlobCut, Plan
from persist_cache.codec import Tensor
from persist_cache.errors import CorruptBlobError, StoreAccessError, StoreError
from persist_cache.store.store import Store

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: The bundle.
        nbytes: Its length.
        entries: Ids of its entries, the shortest prefix first.
        blobs: Number of blobs.
        num_tokens: Tokens whose rows it holds; shared ones count once.
    """

    path: Path
    nbytes: int
    entries: tuple[str, ...]
    blobs: int
    num_tokens: int


def export(
    store: Store,
    ids: Sequence[str],
    file: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write the entries `ids` of `store` into the new file `file`.

    It is written next to its place under another name, made durable, and moved there. Only its
    owner can read it: KV reveals its prompt.

    Args:
        store: An open store; nothing in it is changed.
        ids: Full ids.
        file: The bundle to be.
        force: Replace `file` if it exists.
        progress: Every byte is read twice and counted each time.

    Raises:
        KeyError: An entry is not stored.
        FileExistsError: There is a `file`, and `force` was not given.
        StoreFullError: The disk of `file` is full.
        StoreAccessError: `file` cannot be written there, or is no file.
        StoreError: A blob is damaged, or was evicted meanwhile.
    """
    if file.is_dir():
        raise StoreAccessError(f"{file} is a folder; name the file that is to be written.")
    if file.exists() and not file.is_file():
        # Its name would go, and with it a device or another program's pipe.
        raise StoreAccessError(f"{file} is a device, a pipe or a socket; name a file.")
    if file.resolve().is_relative_to(store.root.resolve()):
        raise StoreAccessError(
            f"{file} cannot be written into the folder of the store; name a file elsewhere."
        )
    if not force and os.path.lexists(file):
        raise FileExistsError(file)
    return _tried(store, ids, lambda: _export(store, ids, file, force, progress))


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A bundle that is sent piece by piece.

    Attributes:
        nbytes: Its length.
        pieces: Its bytes, once. They end early with a `StoreError` when a blob cannot be read any
            more; until they are closed, its entries are not evicted by this process.
    """

    nbytes: int
    pieces: Generator[memoryview]


def outgoing(store: Store, ids: Sequence[str]) -> Outgoing:
    """Prepare a bundle of the entries `ids`, all of whose bytes are verified before the first one.

    Raises:
        KeyError: An entry is not stored.
        StoreError: A blob is damaged, or was evicted meanwhile.
    """
    return _tried(store, ids, lambda: _outgoing(store, ids))


def _tried(store: Store, ids: Sequence[str], attempt: Callable[[], T]) -> T:
    """Make an attempt again while files are merged beside it."""
    for attempts_left in (2, 1, 0):
        try:
            return attempt()
        except _GoneError:
            # Merging and compaction, here or in another process, give rows a file of a new name.
            with store.read() as txn:
                stored = all(txn.entry(int(one, 16)) is not None for one in ids)
            if not attempts_left or not stored:
                raise
    raise AssertionError("unreachable")


def _outgoing(store: Store, ids: Sequence[str]) -> Outgoing:
    stack = contextlib.ExitStack()

    def pieces(found: _Prepared) -> Generator[memoryview]:
        with stack:
            yield memoryview(b"")  # so that there is something to be closed from now on
            yield from pieces_of(_members(found.manifest, found.blobs))

    try:
        found = stack.enter_context(_prepared(store, ids, None))
    except BaseException:
        stack.close()
        raise
    checksum = checksum_text(found.manifest)
    sizes = [len(found.manifest), len(checksum), *(blob.nbytes for blob in found.blobs)]
    sent = pieces(found)
    next(sent)
    return Outgoing(length_of(sizes), sent)


class _GoneError(StoreError):
    """A blob is not there any more."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    plan: Plan
    blobs: Sequence[_Blob]
    manifest: bytes


@contextlib.contextmanager
def _prepared(store: Store, ids: Sequence[str], progress: Progress | None) -> Iterator[_Prepared]:
    """What a bundle of these entries is made of; they stay while the block lasts."""
    with store.read() as txn:
        plan = Plan(txn, list(dict.fromkeys(ids)))
    with store.serving(plan.ids), _read_errors():
        count = _Counter(progress)
        blobs = [_Blob(store, plan, cut, count) for cut in plan.cuts.values()]
        count.total = 2 * sum(blob.stored_bytes for blob in blobs)
        for blob in blobs:
            blob.seal()
        sections = [blob.section() for blob in blobs]
        manifest = msgspec.json.encode(plan.manifest(sections, store.clock()))
        yield _Prepared(plan, blobs, manifest)


def _export(
    store: Store, ids: Sequence[str], file: Path, force: bool, progress: Progress | None
) -> Exported:
    with _prepared(store, ids, progress) as found:
        nbytes = write_file(file, force, _members(found.manifest, found.blobs))
    return Exported(
        path=file,
        nbytes=nbytes,
        entries=tuple(found.plan.ids),
        blobs=len(found.blobs),
        num_tokens=sum(cut.num_tokens for cut in found.plan.cuts.values()),
    )


class _Counter:
    """Adds up the bytes that were read."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._done = 0
        self.total = 0

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self.total)


class _Blob:
    """One blob on its way into a bundle; its file is open only while it is read."""

    def __init__(self, store: Store, plan: Plan, cut: BlobCut, count: _Counter) -> None:
        self.cut = cut
        with _blob_errors(cut.source):
            self._reader = store.open_blob(cut.source)
            self._reader.release()
            self._tensors = _tensors(self._reader, cut, count)
        self._identity = plan.identity(cut.model)
        self._head = b""

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors)

    @property
    def stored_bytes(self) -> int:
        """Bytes that are read for it, each time."""
        return sum(one.nbytes for one in self._tensors if isinstance(one, StoredTensor))

    @property
    def nbytes(self) -> int:
        return len(self._head) + self.tensor_bytes

    def seal(self) -> None:
        """Read and verify all of it, for the checksums that stand in front of it."""
        cut, old = self.cut, self._reader.header
        header = BlobHeader(
            kind=old.kind,
            complete=old.complete,
            fingerprint=self._identity.hex,
            identity=self._identity.to_json().decode(),
            layout=old.layout,
            detail="{}" if cut.is_run else old.detail,
            start=cut.start,
            end=cut.end,
            prefix=prefix_digest(cut.tokens(0, cut.start)),
            parent="" if cut.parent is None else cut.parent.name,
            tier=cut.tier.label,
            entry=cut.ends,
            created=old.created,
        )
        with _blob_errors(cut.source):
            self._head = header_bytes(header, self._tensors)

    def section(self) -> BlobSection:
        digest = xxhash.xxh3_128_hexdigest(self._head)
        return BlobSection(self.cut.name, self.nbytes, str(digest))

    def pieces(self) -> Iterator[memoryview]:
        yield memoryview(self._head)
        with _blob_errors(self.cut.source):
            for tensor in self._tensors:
                yield from tensor.pieces


def _tensors(reader: BlobReader, cut: BlobCut, count: _Counter) -> list[Tensor]:
    """What a blob of the bundle holds.

    Raises:
        CorruptBlobError: The blob in the store is not what the index says.
    """
    header = reader.header
    if cut.is_run:
        own = cut.tokens(cut.start, cut.end)
        return cut_runs([Cut(reader, cut.start, cut.end, own)], count)
    if header.kind != "checkpoint" or header.end != cut.start:
        raise CorruptBlobError(reader.path, "is another checkpoint than the index says")
    return [whole(reader, name, count) for name in header.tensors if name != TOKENS]


def _members(
    manifest: bytes, blobs: Sequence[_Blob]
) -> Iterator[tuple[str, int, Iterator[memoryview]]]:
    checksum = checksum_text(manifest)
    yield MANIFEST, len(manifest), iter([memoryview(manifest)])
    yield CHECKSUM, len(checksum), iter([memoryview(checksum)])
    for blob in blobs:
        yield blob.cut.name + SUFFIX, blob.nbytes, blob.pieces()


@contextlib.contextmanager
def _blob_errors(name: str) -> Iterator[None]:
    """What is wrong with a blob of the store, in a sentence."""
    try:
        yield
    except CorruptBlobError as error:
        raise StoreError(
            f"Blob {name} is damaged ({error.reason}); run `persist-cache check --repair`."
        ) from error
    except FileNotFoundError as error:
        raise _GoneError(
            "An entry was evicted while it was exported, or its file is missing; "
            "run `persist-cache check` and try again."
        ) from error


@contextlib.contextmanager
def _read_errors() -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise fs.translated(error, "while an entry was read") from error
