"""Writing a bundle: the blobs of some entries, cut to what these entries need.

A blob may go on beyond the end of an entry with the text of another conversation, so every run is
written anew with the rows of the exported entries only, and paths on this machine are left out.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import msgspec
import xxhash

from persist_cache import __version__, fs
from persist_cache.blobs.folder import SUFFIX
from persist_cache.blobs.header import TOKENS, BlobHeader, header_bytes, prefix_digest
from persist_cache.blobs.reader import BlobReader
from persist_cache.blobs.rows import Cut, StoredTensor, cut_runs, whole
from persist_cache.bundle.container import (
    CHECKSUM,
    END,
    FORMAT,
    MANIFEST,
    VERSION,
    BlobSection,
    EntrySection,
    Identity,
    Manifest,
    ModelSection,
    checksum_text,
    member_header,
    padding,
)
from persist_cache.codec import Tensor
from persist_cache.entry import Tier
from persist_cache.errors import CorruptBlobError, StoreAccessError, StoreError
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.index import tree
from persist_cache.index.records import NO_BLOB, EntryRecord, NamespaceRecord, entry_id
from persist_cache.index.transaction import Reader
from persist_cache.store.catalog import identity_of, known_blob
from persist_cache.store.store import Store
from persist_cache.tokens import TOKEN_BYTES

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total."""

_PART = re.compile(r"\..+\.[0-9a-f]{16}\.part")
_PAUSE_S = 60.0
_PATH_FIELDS = frozenset({"path", "draft.path"})


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
        StoreAccessError: `file` cannot be written there, or is a folder.
        StoreError: A blob is damaged, or was evicted meanwhile.
    """
    if file.is_dir():
        raise StoreAccessError(f"{file} is a folder; name the file that is to be written.")
    if file.resolve().is_relative_to(store.root.resolve()):
        raise StoreAccessError(
            f"{file} cannot be written into the folder of the store; name a file elsewhere."
        )
    if not force and os.path.lexists(file):
        raise FileExistsError(file)
    for attempts_left in (2, 1, 0):
        try:
            return _export(store, ids, file, force, progress)
        except _GoneError:
            # Merging and compaction, here or in another process, give rows a file of a new name.
            with store.read() as txn:
                stored = all(txn.entry(int(one, 16)) is not None for one in ids)
            if not attempts_left or not stored:
                raise
    raise AssertionError("unreachable")


class _GoneError(StoreError):
    """A blob is not there any more."""


def _export(
    store: Store, ids: Sequence[str], file: Path, force: bool, progress: Progress | None
) -> Exported:
    with store.read() as txn:
        plan = _Plan(txn, list(dict.fromkeys(ids)))
    with store.serving(plan.ids), _read_errors():
        count = _Counter(progress)
        blobs = [_Blob(store, plan, cut, count) for cut in plan.cuts.values()]
        count.total = 2 * sum(blob.stored_bytes for blob in blobs)
        for blob in blobs:
            blob.seal()
        manifest = msgspec.json.encode(plan.manifest(blobs, store.clock()))
        nbytes = _write_file(file, force, manifest, blobs)
    return Exported(
        path=file,
        nbytes=nbytes,
        entries=tuple(plan.ids),
        blobs=len(blobs),
        num_tokens=sum(cut.num_tokens for cut in plan.cuts.values()),
    )


def portable(fingerprint: Fingerprint) -> Fingerprint:
    """The same identity without what says where on this machine its files are."""
    info = {
        name: PurePath(value).name if _is_path(value) else value
        for name, value in fingerprint.info.items()
        if name not in _PATH_FIELDS
    }
    return Fingerprint(fingerprint.fields, info)


def _is_path(text: str) -> bool:
    """Whether `text` is no hub id: those are `name` or `owner/name`."""
    return text.startswith(("/", ".", "~")) or text.count("/") > 1


@dataclass(slots=True)
class _Cut:
    """The leading tokens of a run that the exported entries need, or a checkpoint.

    Attributes:
        source: Name of the blob in the store.
        model: Index into the plan's models.
        start: Position of its first token, or the one that a checkpoint resumes.
        end: Position behind its last token.
        path: Tokens of an entry that uses all of it.
        parent: The run before it, or None.
        tier: Of the highest entry that uses it.
        ends: An exported entry ends where it ends.
    """

    source: str
    model: int
    start: int
    end: int
    path: bytes
    parent: _Cut | None
    tier: Tier
    is_run: bool = True
    ends: bool = True
    name: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    def tokens(self, start: int, end: int) -> memoryview:
        """Packed tokens of its path."""
        return memoryview(self.path)[start * TOKEN_BYTES : end * TOKEN_BYTES]


class _Plan:
    """What goes into a bundle, as of one look at the index.

    Attributes:
        ids: Of the entries, the shortest first.
        cuts: Blobs by their number in the index, a run before those that hang on it.
    """

    def __init__(self, txn: Reader, ids: Sequence[str]) -> None:
        self.ids: list[str] = []
        self.cuts: dict[int, _Cut] = {}
        self._sections: list[EntrySection] = []
        self._namespaces = {record.number: record for _, record in txn.namespaces()}
        self._models: dict[int, int] = {}
        found: list[tuple[int, EntryRecord]] = []
        for one in ids:
            record = txn.entry(int(one, 16))
            if record is None:
                raise KeyError(one)
            found.append((int(one, 16), record))
        for number, record in sorted(found, key=lambda item: (item[1].num_tokens, item[0])):
            self._add(txn, number, record)

    def _add(self, txn: Reader, number: int, record: EntryRecord) -> None:
        if record.namespace not in self._namespaces:
            raise tree.damaged("an entry names a namespace without record")
        model = self._models.setdefault(record.namespace, len(self._models))
        packed = tree.tokens_of(txn, record.node)
        runs: dict[int, _Cut] = {}
        above: _Cut | None = None
        position = 0
        for _, edge in tree.path_of(txn, record.node):
            blob = known_blob(txn, edge.blob)
            if blob.start + edge.first_row != position:
                raise tree.damaged("an edge begins elsewhere than its rows")
            position += edge.rows
            cut = self.cuts.get(edge.blob)
            if cut is None:
                source = blob.name.hex()
                cut = self.cuts[edge.blob] = _Cut(
                    source, model, blob.start, position, packed, above, record.tier, ends=False
                )
            elif position > cut.end:
                cut.end, cut.path, cut.ends = position, packed, False
            cut.tier = max(cut.tier, record.tier)
            runs[edge.blob] = above = cut
        if above is None or not position == len(packed) // TOKEN_BYTES == record.num_tokens:
            raise tree.damaged("an entry has another length than its path")
        above.ends |= above.end == record.num_tokens
        checkpoint = None
        if record.checkpoint != NO_BLOB:
            blob = known_blob(txn, record.checkpoint)
            end = record.num_tokens
            source = blob.name.hex()
            checkpoint = self.cuts[record.checkpoint] = _Cut(
                source, model, end, end, packed, above, record.tier, is_run=False
            )
        self.ids.append(entry_id(number))
        self._sections.append(
            EntrySection(
                id=entry_id(number),
                model=model,
                tier=record.tier.label,  # type: ignore[arg-type]
                num_tokens=record.num_tokens,
                runs=[cut.name for cut in runs.values()],
                checkpoint=None if checkpoint is None else checkpoint.name,
                created=record.created_us / 1e6,
                prefill_s=record.prefill_s,
                label=record.label,
            )
        )

    def identity(self, model: int) -> Fingerprint:
        return portable(identity_of(self._namespace(model)))

    def _namespace(self, model: int) -> NamespaceRecord:
        return self._namespaces[list(self._models)[model]]

    def manifest(self, blobs: Sequence[_Blob], now: float) -> Manifest:
        models = []
        for model in range(len(self._models)):
            identity = self.identity(model)
            models.append(
                ModelSection(
                    Identity(dict(identity.fields), dict(identity.info)),
                    self._namespace(model).layout,
                )
            )
        return Manifest(
            format=FORMAT,  # type: ignore[arg-type]
            version=VERSION,
            writer=f"persist-cache {__version__}",
            created=now,
            models=models,
            blobs=[blob.section() for blob in blobs],
            entries=self._sections,
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

    def __init__(self, store: Store, plan: _Plan, cut: _Cut, count: _Counter) -> None:
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


def _tensors(reader: BlobReader, cut: _Cut, count: _Counter) -> list[Tensor]:
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


def _write_file(file: Path, force: bool, manifest: bytes, blobs: Sequence[_Blob]) -> int:
    remove_parts(file.parent)
    with _write_errors(file):
        fd, part = _begin(file)
    try:
        with _write_errors(file):
            nbytes = sum(_write_one(fd, *member) for member in _members(manifest, blobs))
            nbytes += fs.write_all(fd, [memoryview(END)])
            fs.sync(fd)
        with _write_errors(file):
            if part is None and not force:
                fs.give_name(fd, file)
            else:
                if part is None:
                    part = _part_of(file)
                    fs.give_name(fd, part)
                _move(part, file, force)
            fs.sync_folder(file.parent)
    finally:
        # First: the name of a part without a lock is removed by whoever comes by.
        if part is not None:
            with contextlib.suppress(OSError):
                fs.unlink(part)
        os.close(fd)
    return nbytes


def _begin(file: Path) -> tuple[int, Path | None]:
    """A file beside `file`, and its name: None where files need none until they are whole.

    KV reveals its prompt, so what a killed export wrote must not stay. A part that needs a name is
    locked while its writer lives, and removed by the next export into the same folder.
    """
    with contextlib.suppress(OSError):
        fd = fs.create_nameless(file.parent)
        if os.path.exists(f"/proc/self/fd/{fd}"):
            return fd, None
        os.close(fd)
    part = _part_of(file)
    fd = fs.create(part)
    fs.try_lock(fd)
    return fd, part


def _part_of(file: Path) -> Path:
    return file.with_name(f".{file.name}.{secrets.token_hex(8)}.part")


def remove_parts(folder: Path) -> int:
    """Remove what exports that were killed left in `folder`; returns how many files."""
    removed = 0
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        for one in list(found):
            if _PART.fullmatch(one.name) and one.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    removed += _remove_part(Path(one.path))
    return removed


def _remove_part(path: Path) -> bool:
    fd = fs.open_read(path)
    try:
        status = os.fstat(fd)
        head = os.pread(fd, len(MANIFEST), 0)
        # Earlier versions take no lock, but never pause while they write.
        is_old = not 0 <= time.time() - status.st_mtime < _PAUSE_S
        is_ours = status.st_uid == os.geteuid() and MANIFEST.encode().startswith(head)
        if not (is_ours and is_old and fs.try_lock(fd)):
            return False
        fs.unlink(path)
        return True
    finally:
        os.close(fd)


def _members(
    manifest: bytes, blobs: Sequence[_Blob]
) -> Iterator[tuple[str, int, Iterator[memoryview]]]:
    checksum = checksum_text(manifest)
    yield MANIFEST, len(manifest), iter([memoryview(manifest)])
    yield CHECKSUM, len(checksum), iter([memoryview(checksum)])
    for blob in blobs:
        yield blob.cut.name + SUFFIX, blob.nbytes, blob.pieces()


def _write_one(fd: int, name: str, nbytes: int, pieces: Iterator[memoryview]) -> int:
    head, tail = member_header(name, nbytes), padding(nbytes)
    written = fs.write_all(fd, [memoryview(head)])
    for piece in pieces:
        written += fs.write_all(fd, [piece])
    written += fs.write_all(fd, [memoryview(tail)])
    assert written == len(head) + nbytes + len(tail), "a member is longer or shorter than announced"
    return written


def _move(temporary: Path, file: Path, force: bool) -> None:
    """Give the file its name, in one step that never replaces another unless `force`."""
    if force:
        os.replace(temporary, file)
        return
    try:
        os.link(temporary, file)
    except FileExistsError:
        raise
    except OSError:
        # Some file systems have no links; then there is a moment in which another may appear.
        if os.path.lexists(file):
            raise FileExistsError(file) from None
        fs.rename(temporary, file)


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


@contextlib.contextmanager
def _write_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise StoreAccessError(f"{file} cannot be written ({error.strerror}).") from error
    except OSError as error:
        raise fs.translated(error, f"while {file} was written") from error
