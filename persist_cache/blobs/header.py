"""What a blob says of itself: the header of its safetensors file, as values and as bytes.

Pure: nothing here opens a file. `docs/format.md` describes the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any

import msgspec
import xxhash
from msgspec import Struct

from persist_cache.codec import Tensor, TensorInfo
from persist_cache.errors import CorruptBlobError, StoreFormatError

FORMAT_VERSION = "1"
ALIGNMENT = 16 * 1024
"""Tensor data starts at a multiple of this: the page size of Apple silicon."""
TOKENS = "tokens"
"""Name of the tensor that holds a run's own token ids, int64."""
MAX_HEADER_BYTES = 32 << 20
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


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
        checksums[tensor.name] = checksum(tensor.pieces)
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
    metadata["seal"] = seal(metadata, table)
    raw = msgspec.json.encode({"__metadata__": metadata, **table})
    padding = -(8 + len(raw)) % ALIGNMENT
    raw += b" " * padding
    return len(raw).to_bytes(8, "little") + raw


def parse_header(
    path: Path, raw: bytes, data_start: int, nbytes: int, *, sealed: bool
) -> BlobHeader:
    """Decode and check what `header_bytes` made.

    Args:
        path: The blob, to be named in errors.
        raw: The JSON of its header.
        data_start: Position in the file of the first tensor's bytes.
        nbytes: Length of the file.
        sealed: The index vouches for the header already; its seal is not checked.

    Raises:
        CorruptBlobError: It is not what a writer wrote, or does not fit the file.
        StoreFormatError: It was written by an unknown version.
    """
    try:
        table = _decode_table(raw)
        metadata = _decode_strings(table.pop("__metadata__"))
        said = {} if sealed else {name: msgspec.json.decode(one) for name, one in table.items()}
    except (msgspec.DecodeError, KeyError, UnicodeDecodeError, RecursionError):
        raise CorruptBlobError(path, "its header is not that of a blob") from None
    if metadata.get("format") != "persist-cache":
        raise CorruptBlobError(path, "it was not written by persist-cache")
    if metadata.get("version") != FORMAT_VERSION:
        raise StoreFormatError(
            f"{path.name} has blob format {metadata.get('version')!r}, "
            f"this version of persist-cache reads {FORMAT_VERSION!r} only."
        )
    if not sealed and metadata.get("seal") != seal(metadata, said):
        raise CorruptBlobError(path, "its header contradicts its seal")
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
            tensors=_tensors(table, metadata["checksums"], data_start, nbytes),
            replaces=tuple(metadata.get("replaces", "").split()),
            inner_entries=_decode_marks(metadata.get("inner_entries", "[]")),
        )
    except (KeyError, ValueError, TypeError, msgspec.DecodeError) as error:
        raise CorruptBlobError(path, f"its header is malformed ({error})") from None


def _tensors(
    table: Mapping[str, msgspec.Raw], checksums: str, data_start: int, nbytes: int
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
    if data_start + expected != nbytes:
        raise ValueError("the file is not as long as its tensors")
    return tensors


def _check_shape(tensor: Tensor) -> None:
    count = 1
    for extent in tensor.shape:
        count *= extent
    if count * DTYPE_BYTES[tensor.dtype] != tensor.nbytes:
        raise ValueError(
            f"tensor {tensor.name!r} of {tensor.shape} {tensor.dtype} does not have "
            f"{tensor.nbytes} bytes"
        )


def checksum(pieces: Sequence[memoryview]) -> str:
    if len(pieces) == 1:
        return str(xxhash.xxh3_128_hexdigest(pieces[0]))
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return str(digest.hexdigest())


def seal(metadata: Mapping[str, str], table: Mapping[str, Any]) -> str:
    """Digest of everything a header says, so that it can be trusted without the index."""
    said = {name: value for name, value in metadata.items() if name != "seal"}
    return str(xxhash.xxh3_128_hexdigest(msgspec.json.encode([said, table], order="sorted")))
