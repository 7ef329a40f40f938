"""An entry outside of a store, as a source for the store's put: verified blobs, and their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from persist_cache.blobs.folder import SUFFIX
from persist_cache.blobs.header import TOKENS, BlobHeader
from persist_cache.blobs.reader import BlobReader
from persist_cache.blobs.rows import Span, join, rows_between, whole
from persist_cache.codec import Payload
from persist_cache.entry import Tier
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.index.records import namespace_key
from persist_cache.tokens import TOKEN_BYTES


class Member(BlobReader):
    """A blob inside a larger file, read through that file's descriptor."""

    def __init__(
        self, file: Path, name: str, fd: int, offset: int, nbytes: int, digest: bytes | None
    ) -> None:
        """Open and check the header.

        Args:
            file: The larger file, to be named in errors.
            name: Of the blob.
            fd: Open for reading; it stays open.
            offset: Where the blob begins.
            nbytes: Its length.
            digest: xxh3-128 of its header bytes, or None where another digest vouches for them.

        Raises:
            CorruptBlobError: It is not what was written.
            StoreFormatError: It was written by an unknown version.
        """
        self.path = file / (name + SUFFIX)
        self.name = name
        self.nbytes = nbytes
        self._fd = fd
        self._offset = offset
        self.header = self._read_header(digest)

    def close(self) -> None:
        """Leave the descriptor to its owner."""

    def _exactly(self, offset: int, size: int) -> bytes:
        return super()._exactly(self._offset + offset, size)

    def _parse(self, raw: bytes, data_start: int, *, sealed: bool) -> BlobHeader:
        # Something vouches for these bytes, but not for whoever wrote both.
        header = super()._parse(raw, data_start, sealed=False)
        tensors = {
            name: msgspec.structs.replace(info, offset=self._offset + info.offset)
            for name, info in header.tensors.items()
        }
        return msgspec.structs.replace(header, tensors=tensors)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens `[start, end)` of an entry, and the blob that has their rows."""

    reader: BlobReader
    start: int
    end: int


def spans_of(stretches: Sequence[Stretch], start: int, end: int) -> Iterator[list[Span]]:
    """The rows of tokens `[start, end)`, for each tensor that has rows for all of them.

    Raises:
        ValueError: There are no rows of some of the tokens.
    """
    parts = [one for one in stretches if one.start < end and start < one.end]
    if not parts or parts[0].start > start or parts[-1].end < end:
        raise ValueError(f"there are no rows of all tokens from {start} to {end}")
    for name in parts[0].reader.header.tensors:
        if name == TOKENS or not all(name in part.reader.header.tensors for part in parts):
            continue
        spans = []
        for part in parts:
            header = part.reader.header
            tokens = max(start, part.start), min(end, part.end)
            rows = rows_between(header, header.tensors[name], *tokens)
            spans.append(Span(part.reader, name, *rows))
        yield spans


@dataclass(frozen=True, slots=True)
class PortableEntry:
    """One verified entry, on its way into a store.

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
        return Payload([join(spans) for spans in spans_of(self.stretches, start, end)])

    def checkpoint(self) -> Payload | None:
        """State at the end, or None if rows suffice."""
        if self.state is None:
            return None
        header = self.state.header
        return Payload([whole(self.state, name) for name in header.tensors], header.detail)
