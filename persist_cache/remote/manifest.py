"""What an anchor holds: the manifest of an entry, sealed for exactly that anchor.

Nothing of it is looked at before its seal was checked, and every size in it is bounded, so that
memory stays bounded whatever is downloaded.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from persist_cache.fingerprint.value import LAYOUT_VERSION, Fingerprint
from persist_cache.remote.trust import Seal
from persist_cache.tokens import TOKEN_BYTES

MAGIC = b"pc1 manifest\n"
VERSION = 1
MAX_MANIFEST_BYTES = 4 << 20
"""All anchors of a prompt, some fifteen, may be in memory at once."""
MAX_TOKENS = 1 << 20
MAX_PART_BYTES = 64 << 20
"""Of one object; larger blobs are in several."""
MAX_PARTS = 1 << 16

_Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
_Position = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
_Seconds = Annotated[float, Meta(ge=0, le=1e11)]
_Short = Annotated[str, Meta(max_length=1 << 16)]


class Part(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One object: its bytes' BLAKE2b-256, and how many they are. Its name follows from those."""

    digest: _Digest
    nbytes: Annotated[int, Meta(ge=1, le=MAX_PART_BYTES)]


class BlobSection(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One blob: rows of the tokens `[start, end)`, or the state at `start == end`.

    Attributes:
        start: Position of its first token.
        end: Position after its last one.
        parts: The objects whose bytes, one after the other, are the blob.
    """

    start: _Position
    end: _Position
    parts: Annotated[tuple[Part, ...], Meta(min_length=1, max_length=MAX_PARTS)]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """All that is needed to restore one entry elsewhere.

    Attributes:
        version: Of this format.
        writer: Program and version that made it.
        created: UTC seconds, by the publisher's clock.
        fields: What the fingerprint is made of.
        info: Recorded next to it; no path.
        layout: JSON of the cache classes and their geometry.
        tier: Label of the entry's role class.
        num_tokens: Length of the entry.
        complete: Rows suffice to resume at any position.
        prefill_s: Seconds that computing it took, 0 when nobody measured.
        blobs: Its rows, end to end.
        state: The state at its end, or None when rows suffice.
        tokens: Packed, compressed with zlib.
    """

    version: Literal[1]
    writer: Annotated[str, Meta(max_length=200)]
    created: _Seconds
    fields: Mapping[_Short, _Short]
    info: Mapping[_Short, _Short]
    layout: Annotated[str, Meta(max_length=1 << 20)]
    tier: Literal["system", "user", "assistant"]
    num_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    complete: bool
    prefill_s: _Seconds
    blobs: Annotated[tuple[BlobSection, ...], Meta(min_length=1, max_length=MAX_PARTS)]
    state: BlobSection | None
    tokens: bytes

    def usable(self, common: int, limit: int) -> int:
        """Tokens that a prompt can use which begins with `common` of these.

        Args:
            common: Leading tokens that both have.
            limit: The most that the prompt may use.
        """
        if self.complete:
            return min(common, limit)
        return self.num_tokens if self.num_tokens <= min(common, limit) else 0


class Found(Struct, frozen=True):
    """A manifest that is what its anchor says.

    Attributes:
        manifest: What it says.
        packed: Its tokens.
    """

    manifest: Manifest
    packed: bytes


class RefusedError(Exception):
    """What was downloaded is not what was published.

    Attributes:
        kind: A word for counters.
        reason: A clause for people.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


def encode_manifest(manifest: Manifest) -> bytes:
    """The part of a manifest that is the same under each of its anchors."""
    return msgspec.msgpack.encode(manifest)


def sealed(body: bytes, anchor: bytes, seal: Seal) -> bytes:
    """The content of the object of one anchor."""
    return MAGIC + seal.sign(_said(anchor, body)) + body


def open_manifest(raw: bytes, anchor: bytes, seal: Seal, fingerprint: Fingerprint) -> Found:
    """Check and decode what lies under an anchor.

    Args:
        raw: Its bytes.
        anchor: Its key, as it was asked for.
        seal: Of the remote.
        fingerprint: Identity of the model that was asked for.

    Raises:
        RefusedError: It is not what was published there.
    """
    start = len(MAGIC) + seal.nbytes
    if not raw.startswith(MAGIC) or len(raw) <= start:
        raise RefusedError("malformed", "it is no manifest")
    body = raw[start:]
    if not seal.vouches_for(_said(anchor, body), raw[len(MAGIC) : start]):
        raise RefusedError("seal", "nobody who is trusted vouches for it")
    try:
        manifest = msgspec.msgpack.decode(body, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RefusedError("malformed", f"it is malformed ({error})") from None
    if Fingerprint(manifest.fields).digest != fingerprint.digest:
        raise RefusedError("model", "it is of another model")
    if manifest.fields.get("layout") != str(LAYOUT_VERSION):
        raise RefusedError("malformed", "its blobs have another format")
    packed = _unpacked(manifest)
    _check_blobs(manifest.blobs, manifest.num_tokens)
    if manifest.state is not None and not (
        manifest.state.start == manifest.state.end == manifest.num_tokens
    ):
        raise RefusedError("malformed", "its state is of another position")
    if manifest.state is None and not manifest.complete:
        raise RefusedError("malformed", "it has neither all of its rows nor a state")
    return Found(manifest, packed)


def pack(packed: bytes) -> bytes:
    """Tokens as a manifest holds them."""
    return zlib.compress(packed, 6)


def _said(anchor: bytes, body: bytes) -> bytes:
    """What a seal is over: a manifest under another key than its own has none."""
    return MAGIC + anchor + body


def _unpacked(manifest: Manifest) -> bytes:
    wanted = manifest.num_tokens * TOKEN_BYTES
    reader = zlib.decompressobj()
    try:
        packed = reader.decompress(manifest.tokens, wanted + 1)
    except zlib.error:
        raise RefusedError("malformed", "its tokens cannot be unpacked") from None
    if len(packed) != wanted or reader.unconsumed_tail or reader.unused_data or not reader.eof:
        raise RefusedError("malformed", "it has not as many tokens as it says")
    return packed


def _check_blobs(blobs: Sequence[BlobSection], num_tokens: int) -> None:
    position = 0
    for blob in blobs:
        if blob.start != position or blob.end <= blob.start:
            raise RefusedError("malformed", "its blobs do not lie end to end")
        position = blob.end
    if position != num_tokens:
        raise RefusedError("malformed", "its blobs do not end where it does")
