"""What is read from a bundle: its entries, and the blobs that they are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from persist_cache.blobs.folder import SUFFIX
from persist_cache.blobs.header import TOKENS, BlobHeader
from persist_cache.blobs.reader import BlobReader
from persist_cache.blobs.rows import Span, join, rows_between, whole
from persist_cache.bundle.container import BlobSection
from persist_cache.codec import Payload
from persist_cache.entry import Tier
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.index.records import namespace_key
from persist_cache.tokens import TOKEN_BYTES


class Member(BlobReader):
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
class BundledRun:
    """A run of the bundle, and what is known of the path above it.

    Attributes:
        packed: Its own tokens.
        parent: The run before it, or None.
    """

    reader: Member
    packed: bytes
    parent: BundledRun | None
    used: bool = False

    @property
    def header(self) -> BlobHeader:
        return self.reader.header

    def path(self, end: int) -> bytes:
        """Packed tokens from the beginning up to `end`, which lies within this run."""
        parts = []
        run: BundledRun | None = self
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
