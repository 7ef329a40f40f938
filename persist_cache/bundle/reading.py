"""Reading a bundle: everything it says is checked before any of it is used.

Memory stays bounded whatever a file claims: sizes are compared with the file's own length before
anything is allocated, and tensors are verified in small parts.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from persist_cache import fs
from persist_cache.blobs.folder import SUFFIX
from persist_cache.blobs.header import TOKENS, BlobHeader, prefix_digest
from persist_cache.blobs.layout import Shapes
from persist_cache.blobs.reader import BlobReader
from persist_cache.blobs.rows import Span, join, rows_between, whole
from persist_cache.bundle.container import (
    BLOCK,
    CHECKSUM,
    END,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_TOKENS,
    VERSION,
    BlobSection,
    EntrySection,
    MalformedError,
    Manifest,
    checksum_text,
    claimed_version,
    member_header,
    member_size,
    padding,
    parse_manifest,
)
from persist_cache.codec import Payload
from persist_cache.entry import Tier
from persist_cache.errors import CorruptBlobError, StoreAccessError, StoreFormatError
from persist_cache.fingerprint.value import LAYOUT_VERSION, Fingerprint
from persist_cache.index.records import entry_id, entry_number, namespace_key
from persist_cache.store.rebuild import check_claims
from persist_cache.tokens import TOKEN_BYTES

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total."""


class _Member(BlobReader):
    """A blob inside a bundle, read through the bundle's descriptor."""

    def __init__(self, bundle: Path, fd: int, offset: int, section: BlobSection) -> None:
        self.path = bundle / (section.name + SUFFIX)
        self.name = section.name
        self.nbytes = section.nbytes
        self._fd = fd
        self._offset = offset
        self.header = self._read_header(bytes.fromhex(section.digest))

    def close(self) -> None:
        """Leave the descriptor to the bundle."""

    def _exactly(self, offset: int, size: int) -> bytes:
        return super()._exactly(self._offset + offset, size)

    def _parse(self, raw: bytes, data_start: int, *, sealed: bool) -> BlobHeader:
        # The manifest vouches for these bytes, but not for whoever wrote both.
        header = super()._parse(raw, data_start, sealed=False)
        tensors = {
            name: msgspec.structs.replace(info, offset=self._offset + info.offset)
            for name, info in header.tensors.items()
        }
        return msgspec.structs.replace(header, tensors=tensors)


@dataclass(slots=True)
class _Run:
    """A run of the bundle, and what is known of the path above it.

    Attributes:
        packed: Its own tokens.
        parent: The run before it, or None.
    """

    reader: _Member
    packed: bytes
    parent: _Run | None
    used: bool = False

    @property
    def header(self) -> BlobHeader:
        return self.reader.header

    def path(self, end: int) -> bytes:
        """Packed tokens from the beginning up to `end`, which lies within this run."""
        parts = []
        run: _Run | None = self
        while run is not None:
            parts.append(run.packed[: (end - run.header.start) * TOKEN_BYTES])
            end, run = run.header.start, run.parent
        return b"".join(reversed(parts))


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens `[start, end)` of an entry, and the blob that has their rows."""

    reader: BlobReader
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class BundledEntry:
    """One verified entry of a bundle.

    Attributes:
        id: As in every store.
        fingerprint: Identity of its model.
        layout: JSON of the cache classes and their geometry.
        tier: Role class.
        packed: Its tokens.
        created: UTC seconds.
        prefill_s: Seconds that computing it took, 0 when nobody measured.
        label: The user's name for it.
        stretches: Its rows, end to end.
        state: The checkpoint at its end, or None.
    """

    id: str
    fingerprint: Fingerprint
    layout: str
    tier: Tier
    packed: bytes = field(repr=False)
    created: float
    prefill_s: float
    label: str
    stretches: tuple[Stretch, ...] = field(repr=False)
    state: BlobReader | None = field(repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.packed) // TOKEN_BYTES

    @property
    def namespace(self) -> bytes:
        """Key of its model and layout in an index."""
        return namespace_key(self.fingerprint.digest, self.layout)

    # What a put asks of a source. Tensors are read, and verified once more, while it writes.

    @property
    def complete(self) -> bool:
        """Rows of every layer exist, so that any position can be resumed."""
        return all(stretch.reader.header.complete for stretch in self.stretches)

    def rows(self, start: int, end: int) -> Payload:
        """The rows of tokens `[start, end)`, of all layers that have rows for all of them."""
        parts = [one for one in self.stretches if one.start < end and start < one.end]
        names = [
            name
            for name in parts[0].reader.header.tensors
            if name != TOKENS and all(name in part.reader.header.tensors for part in parts)
        ]
        tensors = []
        for name in names:
            spans = []
            for part in parts:
                header = part.reader.header
                tokens = max(start, part.start), min(end, part.end)
                rows = rows_between(header, header.tensors[name], *tokens)
                spans.append(Span(part.reader, name, *rows))
            tensors.append(join(spans))
        return Payload(tensors)

    def checkpoint(self) -> Payload | None:
        """State at the end, or None if rows suffice."""
        if self.state is None:
            return None
        header = self.state.header
        return Payload([whole(self.state, name) for name in header.tensors], header.detail)


class Bundle:
    """A verified bundle; use as a context manager.

    Attributes:
        path: The file.
        nbytes: Its length.
        created: UTC seconds.
        writer: Program and version that made it.
        entries: The shortest prefix first, so that one follows those that it continues.
    """

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        """Open the bundle at `path` and verify all of it.

        Raises:
            StoreAccessError: It cannot be read.
            StoreFormatError: It was written by an unknown version.
            CorruptBlobError: It is no bundle, or not what was written.
        """
        self.path = path
        # A pipe would have us wait for ever.
        with self._errors():
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            with self._errors():
                status = os.fstat(self._fd)
                if not stat.S_ISREG(status.st_mode):
                    raise MalformedError("it is not a file")
                self.nbytes = status.st_size
                manifest, offset = self._read_manifest()
                self.created, self.writer = manifest.created, manifest.writer
                members = self._read_members(manifest, offset)
                self.entries = _Reading(manifest, members, self.nbytes, progress).entries
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except MalformedError as error:
            raise CorruptBlobError(self.path, str(error)) from None
        except CorruptBlobError as error:
            raise CorruptBlobError(self.path, f"member {error}") from error
        except OSError as error:
            raise StoreAccessError(f"{self.path} cannot be read ({error.strerror}).") from error

    def _read_manifest(self) -> tuple[Manifest, int]:
        """The manifest, and where the members behind it begin."""
        try:
            size = member_size(self._bytes(0, BLOCK), MANIFEST)
        except MalformedError:
            raise MalformedError("it is not a bundle that `export` wrote") from None
        if size > MAX_MANIFEST_BYTES:
            raise MalformedError(f"its manifest has {size} bytes")
        raw = self._bytes(BLOCK, size)
        version = claimed_version(raw)
        if version is not None and version != VERSION:
            raise StoreFormatError(
                f"{self.path.name} is a bundle of version {version}; this version of "
                f"persist-cache reads version {VERSION} only."
            )
        offset = BLOCK + size
        offset = self._expect(offset, padding(size), "its manifest is not filled up")
        checksum = checksum_text(raw)
        header = member_header(CHECKSUM, len(checksum))
        offset = self._expect(offset, header, f"{CHECKSUM} does not follow its manifest")
        offset = self._expect(offset, checksum, "the checksum of its manifest differs")
        offset = self._expect(offset, padding(len(checksum)), f"{CHECKSUM} is not filled up")
        return parse_manifest(raw), offset

    def _read_members(self, manifest: Manifest, offset: int) -> dict[str, _Member]:
        """The blobs by name; their headers are verified, their tensors are not."""
        if len({blob.name for blob in manifest.blobs}) != len(manifest.blobs):
            raise MalformedError("its manifest names a member twice")
        end = offset + len(END)
        end += sum(BLOCK + blob.nbytes + len(padding(blob.nbytes)) for blob in manifest.blobs)
        if end != self.nbytes:
            raise MalformedError(f"it has {self.nbytes} bytes instead of {end}")
        members = {}
        for blob in manifest.blobs:
            name = blob.name + SUFFIX
            header = member_header(name, blob.nbytes)
            offset = self._expect(offset, header, f"member {name} is not where it should be")
            members[blob.name] = _Member(self.path, self._fd, offset, blob)
            offset += blob.nbytes
            offset = self._expect(offset, padding(blob.nbytes), f"member {name} is not filled up")
        self._expect(offset, END, "it does not end behind its last member")
        return members

    def _expect(self, offset: int, content: bytes, problem: str) -> int:
        """Compare what is at `offset`; returns the position behind it."""
        if self._bytes(offset, len(content)) != content:
            raise MalformedError(problem)
        return offset + len(content)

    def _bytes(self, offset: int, size: int) -> bytes:
        if offset + size > self.nbytes:
            raise MalformedError("it is truncated")
        buffer = bytearray(size)
        if fs.read_into(self._fd, offset, [memoryview(buffer)]) != size:
            raise MalformedError("it is truncated")
        return bytes(buffer)


class _Reading:
    """Puts members and manifest together and lets nothing pass that does not fit."""

    def __init__(
        self,
        manifest: Manifest,
        members: dict[str, _Member],
        nbytes: int,
        progress: Progress | None,
    ) -> None:
        self._members = members
        self._models = [_fingerprint(model.identity) for model in manifest.models]
        self._layouts = [model.layout for model in manifest.models]
        self._keys = [
            (fingerprint.hex, layout)
            for fingerprint, layout in zip(self._models, self._layouts, strict=True)
        ]
        if len(set(self._keys)) != len(self._keys):
            raise MalformedError("its manifest names a model twice")
        try:
            self._shapes = {key: Shapes(key[1]) for key in self._keys}
        except ValueError as error:
            raise MalformedError(f"a model cannot be used: {error}") from None
        self._runs: dict[str, _Run] = {}
        for name, member in members.items():
            self._check_header(member)
            if member.header.kind == "run":
                self._runs[name] = self._run(member)
        self._states: set[str] = set()
        entries = [self._entry(section) for section in manifest.entries]
        self._check_nothing_is_left(manifest, entries)
        done = 0
        for member in members.values():
            member.verify()
            done += member.nbytes
            if progress is not None:
                progress(done, nbytes)
        self.entries = sorted(entries, key=lambda entry: (entry.num_tokens, entry.id))

    def _check_header(self, member: _Member) -> None:
        header = member.header
        if (header.fingerprint, header.layout) not in self._keys:
            raise CorruptBlobError(member.path, "is of a model that the manifest does not name")
        if header.kind == "run":
            tokens = header.tensors.get(TOKENS)
            count = header.end - header.start
            if not 0 <= header.start < header.end <= MAX_TOKENS:
                raise CorruptBlobError(member.path, "its span is impossible")
            if tokens is None or tokens.dtype != "I64" or tokens.shape != (count,):
                raise CorruptBlobError(member.path, "its tokens do not fill its span")
        elif header.kind == "checkpoint":
            if not 0 < header.start == header.end <= MAX_TOKENS:
                raise CorruptBlobError(member.path, "its span is impossible")
            if TOKENS in header.tensors or not _is_json_object(header.detail):
                raise CorruptBlobError(member.path, "is not a checkpoint")
        else:
            raise CorruptBlobError(member.path, f"is of unknown kind {header.kind!r}")
        try:
            check_claims(header)
            self._shapes[_key(header)].check(header)
        except ValueError as error:
            raise CorruptBlobError(member.path, str(error)) from None

    def _run(self, member: _Member) -> _Run:
        header = member.header
        parent: _Run | None = None
        if header.start > 0:
            parent = self._runs.get(header.parent)
            if parent is None or not parent.header.start < header.start <= parent.header.end:
                raise CorruptBlobError(member.path, "does not follow the run that it hangs on")
            if _key(parent.header) != _key(header):
                raise CorruptBlobError(member.path, "hangs on a run of another model")
        elif header.parent:
            raise CorruptBlobError(member.path, "begins a prompt, but hangs on another run")
        before = b"" if parent is None else parent.path(header.start)
        if prefix_digest(before) != header.prefix:
            raise CorruptBlobError(member.path, "follows other tokens than it says")
        return _Run(member, member.read_bytes(TOKENS), parent)

    def _entry(self, section: EntrySection) -> BundledEntry:
        if section.model >= len(self._models):
            raise MalformedError(f"entry {section.id} is of a model that is not named")
        fingerprint, layout = self._models[section.model], self._layouts[section.model]
        runs = [self._known_run(section, name) for name in section.runs]
        if [run.parent for run in runs] != [None, *runs[:-1]]:
            raise MalformedError(f"the runs of entry {section.id} do not form a path")
        last = runs[-1]
        if not last.header.start < section.num_tokens <= last.header.end:
            raise MalformedError(f"entry {section.id} does not end in its last run")
        if _key(last.header) != self._keys[section.model]:
            raise MalformedError(f"entry {section.id} has the rows of another model")
        ends = [run.header.start for run in runs[1:]] + [section.num_tokens]
        packed = last.path(section.num_tokens)
        number = entry_number(namespace_key(fingerprint.digest, layout), packed)
        if entry_id(number) != section.id:
            raise MalformedError(f"entry {section.id} has other tokens than its id says")
        entry = BundledEntry(
            id=section.id,
            fingerprint=fingerprint,
            layout=layout,
            tier=Tier.parse(section.tier),
            packed=packed,
            created=section.created,
            prefill_s=section.prefill_s,
            label=section.label,
            stretches=tuple(
                Stretch(run.reader, run.header.start, end)
                for run, end in zip(runs, ends, strict=True)
            ),
            state=self._state(section, packed),
        )
        if entry.state is None and not entry.complete:
            raise MalformedError(f"entry {section.id} has neither all of its rows nor a state")
        if entry.state is not None:
            try:
                headers = [run.header for run in runs]
                self._shapes[self._keys[section.model]].check_entry(headers, entry.state.header)
            except ValueError as error:
                raise MalformedError(f"entry {section.id} cannot be used: {error}") from None
        return entry

    def _known_run(self, section: EntrySection, name: str) -> _Run:
        run = self._runs.get(name)
        if run is None:
            raise MalformedError(f"entry {section.id} names run {name}, which is not there")
        run.used = True
        return run

    def _state(self, section: EntrySection, packed: bytes) -> _Member | None:
        if section.checkpoint is None:
            return None
        member = self._members.get(section.checkpoint)
        if (
            member is None
            or member.header.kind != "checkpoint"
            or member.header.start != section.num_tokens
            or member.header.prefix != prefix_digest(packed)
            or member.header.parent != section.runs[-1]
            or _key(member.header) != self._keys[section.model]
            or section.checkpoint in self._states
        ):
            raise MalformedError(f"entry {section.id} names a checkpoint that is not its own")
        self._states.add(section.checkpoint)
        return member

    def _check_nothing_is_left(self, manifest: Manifest, entries: list[BundledEntry]) -> None:
        if len({entry.id for entry in entries}) != len(entries):
            raise MalformedError("its manifest names an entry twice")
        used = self._states | {name for name, run in self._runs.items() if run.used}
        if used != set(self._members):
            raise MalformedError("it has a member that no entry needs")
        if {section.model for section in manifest.entries} != set(range(len(self._models))):
            raise MalformedError("it names a model that no entry needs")


def _key(header: BlobHeader) -> tuple[str, str]:
    return header.fingerprint, header.layout


def _fingerprint(identity: object) -> Fingerprint:
    """The identity of a model whose blobs have a layout that is known here.

    Raises:
        StoreFormatError: They have not.
    """
    try:
        fingerprint = Fingerprint.from_json(msgspec.json.encode(identity))
    except ValueError as error:
        raise MalformedError(f"an identity is malformed ({error})") from None
    layout = fingerprint.fields.get("layout", "none")
    if layout != str(LAYOUT_VERSION):
        raise StoreFormatError(
            f"The bundle holds KV of layout version {layout}; this version of persist-cache "
            f"knows version {LAYOUT_VERSION} only."
        )
    return fingerprint


def _is_json_object(text: str) -> bool:
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, ValueError):
        return False
    return True
