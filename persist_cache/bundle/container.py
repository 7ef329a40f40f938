"""The container of a bundle: a tar file of which every byte but the content is prescribed.

It is written and read without a general tar parser. A reader forms the headers that the manifest
calls for and compares: links, foreign paths, further or repeated members and absurd sizes differ
from what is expected, and need no rule of their own. Any tar program can list and unpack it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
import xxhash
from msgspec import Meta

FORMAT = "persist-cache-bundle"
VERSION = 1
MANIFEST = "manifest.json"
CHECKSUM = "manifest.xxh3"
BLOCK = 512
END = bytes(2 * BLOCK)
MAX_MANIFEST_BYTES = 64 << 20
MAX_TOKENS = 1 << 24

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_MAX_OCTAL = 8**11

_Name = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
_EntryId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")]
_Seconds = Annotated[float, Meta(ge=0, le=1e11)]


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a fingerprint is made of, and what is recorded next to it."""

    fields: Mapping[str, str]
    info: Mapping[str, str]


class ModelSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model identity with one cache layout.

    Attributes:
        identity: Readable fields; the fingerprint follows from them.
        layout: JSON of the cache classes and their geometry.
    """

    identity: Identity
    layout: str


class BlobSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One member.

    Attributes:
        name: 32 hex digits.
        nbytes: Length of the member.
        digest: xxh3-128 of its header bytes, hex; the header has checksums of the rest.
    """

    name: _Name
    nbytes: Annotated[int, Meta(ge=1, le=1 << 62)]
    digest: _Name


class EntrySection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry.

    Attributes:
        id: As in every store.
        model: Index into the manifest's models.
        tier: Label of its role class.
        num_tokens: Length of the prefix.
        runs: Blobs with its rows, in order; each is used up to where the next one begins.
        checkpoint: Blob with the state at its end, or None when rows suffice.
        created: UTC seconds.
        prefill_s: Seconds that computing it took, 0 when nobody measured.
        label: The user's name for it.
    """

    id: _EntryId
    model: Annotated[int, Meta(ge=0)]
    tier: Literal["system", "user", "assistant"]
    num_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    runs: Annotated[list[_Name], Meta(min_length=1)]
    checkpoint: _Name | None
    created: _Seconds
    prefill_s: _Seconds
    label: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle holds; its first member.

    Attributes:
        format: `persist-cache-bundle`.
        version: Of this format.
        writer: Program and version that made it.
        created: UTC seconds.
        models: Each used by an entry.
        blobs: In the order of the members, a run before those that hang on it.
        entries: In any order.
    """

    format: Literal["persist-cache-bundle"]
    version: int
    writer: str
    created: _Seconds
    models: Annotated[list[ModelSection], Meta(min_length=1)]
    blobs: Annotated[list[BlobSection], Meta(min_length=1)]
    entries: Annotated[list[EntrySection], Meta(min_length=1)]


class _Claim(msgspec.Struct, frozen=True):
    """What a manifest of any version says of itself."""

    format: str
    version: int


class MalformedError(Exception):
    """A part of a bundle is not what it has to be; says what."""


def claimed_version(raw: bytes) -> int | None:
    """The version a manifest claims, known or not; None if it is no manifest."""
    try:
        claim = msgspec.json.decode(raw, type=_Claim)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return claim.version if claim.format == FORMAT else None


def parse_manifest(raw: bytes) -> Manifest:
    """Decode a manifest of this version.

    Raises:
        MalformedError: It is something else.
    """
    try:
        return msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MalformedError(f"its manifest is malformed ({error})") from None


def checksum_text(raw: bytes) -> bytes:
    """Content of the second member: the digest of the first."""
    return str(xxhash.xxh3_128_hexdigest(raw)).encode() + b"\n"


def member_header(name: str, nbytes: int) -> bytes:
    """The tar header of a plain file `name`; the same for every bundle.

    Owner, date and mode say nothing of where it was made.
    """
    # Above 8 GiB the size is binary, as GNU tar, bsdtar and Python read it.
    size = b"%011o" % nbytes if nbytes < _MAX_OCTAL else b"\x80" + nbytes.to_bytes(11, "big")

    def block(checksum: bytes) -> bytes:
        return _HEADER.pack(
            name.encode(),
            b"0000600",
            b"0000000",
            b"0000000",
            size,
            b"%011o" % 0,
            checksum,
            b"0",
            b"",
            b"ustar\x0000",
            b"",
            b"",
            b"0000000",
            b"0000000",
            b"",
        )

    return block(b"%06o\0 " % sum(block(b" " * 8)))


def member_size(header: bytes, name: str) -> int:
    """The size in a tar header that must be that of a small plain file `name`.

    Raises:
        MalformedError: It is another one.
    """
    digits = header[124:135]
    if len(header) == BLOCK and digits.isdigit() and not set(digits) & set(b"89"):
        size = int(digits, 8)
        if header == member_header(name, size):
            return size
    raise MalformedError(f"it does not begin with {name}")


def padding(nbytes: int) -> bytes:
    """What fills the last block of a member up."""
    return bytes(-nbytes % BLOCK)
