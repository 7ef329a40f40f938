"""Whether a blob from elsewhere is one that a store could have written."""

from __future__ import annotations

import msgspec

from persist_cache.blobs.header import TOKENS
from persist_cache.blobs.layout import Shapes
from persist_cache.blobs.reader import BlobReader
from persist_cache.errors import CorruptBlobError
from persist_cache.store.rebuild import check_claims


def check_blob(blob: BlobReader, shapes: Shapes, max_tokens: int) -> None:
    """Hold a blob's header against its layout.

    Args:
        blob: Its header is verified.
        shapes: Of the layout that it has.
        max_tokens: Longest prompt.

    Raises:
        CorruptBlobError: It does not fit; its path says which blob.
    """
    header = blob.header
    if header.kind == "run":
        tokens = header.tensors.get(TOKENS)
        count = header.end - header.start
        if not 0 <= header.start < header.end <= max_tokens:
            raise CorruptBlobError(blob.path, "its span is impossible")
        if tokens is None or tokens.dtype != "I64" or tokens.shape != (count,):
            raise CorruptBlobError(blob.path, "its tokens do not fill its span")
    elif header.kind == "checkpoint":
        if not 0 < header.start == header.end <= max_tokens:
            raise CorruptBlobError(blob.path, "its span is impossible")
        if TOKENS in header.tensors or not _is_json_object(header.detail):
            raise CorruptBlobError(blob.path, "is not a checkpoint")
    else:
        raise CorruptBlobError(blob.path, f"is of unknown kind {header.kind!r}")
    try:
        check_claims(header)
        shapes.check(header)
    except ValueError as error:
        raise CorruptBlobError(blob.path, str(error)) from None


def _is_json_object(text: str) -> bool:
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, ValueError):
        return False
    return True
