"""Reading the body of a request from its connection: by its length, or in chunks (RFC 9112, 7.1).

What is refused leaves bytes unread, so the connection is of no further use then.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from email.message import Message
from io import BufferedIOBase

from persist_cache.server.validation import RefusedError

MAX_BODY_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20
_MAX_LINE_BYTES = 4096
_MAX_TRAILER_LINES = 100
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n]*")
_MALFORMED = "The chunks of the body cannot be understood."


def has_body(headers: Message) -> bool:
    """Whether a request announces a body that is not empty."""
    return "Transfer-Encoding" in headers or headers.get("Content-Length", "0") != "0"


def read_body(stream: BufferedIOBase, headers: Message, *, limit: int = MAX_BODY_BYTES) -> bytes:
    """Read the body that a request announces; as `body_pieces`."""
    return b"".join(body_pieces(stream, headers, limit=limit))


def body_pieces(stream: BufferedIOBase, headers: Message, *, limit: int) -> Generator[bytes]:
    """Read the body that a request announces piece by piece, none of them large.

    Raises:
        RefusedError: There is none, it makes no sense, is beyond `limit`, ends early, or does not
            arrive in time.
    """
    codings = headers.get_all("Transfer-Encoding") or []
    lengths = headers.get_all("Content-Length") or []
    try:
        if codings:
            # Two answers to where a request ends are how one is smuggled into another.
            if lengths:
                raise RefusedError(
                    400, "Send the body with Content-Length or in chunks, not with both."
                )
            if [one.strip().lower() for one in codings] != ["chunked"]:
                raise RefusedError(501, "The only Transfer-Encoding that is known is chunked.")
            yield from _read_chunks(stream, limit)
        else:
            yield from _read_length(stream, _length(lengths, limit))
    except TimeoutError:
        raise RefusedError(408, "The body did not arrive in time.") from None


def _length(lengths: list[str], limit: int) -> int:
    if not lengths:
        raise RefusedError(411, "Send the body with a Content-Length header, or in chunks.")
    text = lengths[0].strip()
    if len(set(lengths)) > 1 or not text.isascii() or not text.isdigit():
        raise RefusedError(400, "Content-Length must be one number of bytes.")
    if len(text) > 12 or int(text) > limit:
        raise _too_large(limit)
    return int(text)


def _read_length(stream: BufferedIOBase, length: int) -> Generator[bytes]:
    return _exactly(stream, length, "The body is shorter than its Content-Length.")


def _read_chunks(stream: BufferedIOBase, limit: int) -> Generator[bytes]:
    """What is in the chunks; extensions and trailers are read, and mean nothing here."""
    left = limit
    while size := _chunk_size(stream):
        left -= size
        if left < 0:
            raise _too_large(limit)
        yield from _exactly(stream, size, "The body ends within a chunk.")
        if stream.read(2) != b"\r\n":
            raise RefusedError(400, _MALFORMED)
    for _ in range(_MAX_TRAILER_LINES):
        line = _line(stream)
        if not line:
            return
        if not _TRAILER.fullmatch(line):
            raise RefusedError(400, _MALFORMED)
    raise RefusedError(400, f"The body has more than {_MAX_TRAILER_LINES} trailers.")


def _exactly(stream: BufferedIOBase, nbytes: int, too_short: str) -> Generator[bytes]:
    """So many bytes in pieces, none of them large; `too_short` is said when there are less."""
    while nbytes > 0:
        piece = stream.read(min(nbytes, _PIECE_BYTES))
        if not piece:
            raise RefusedError(400, too_short)
        nbytes -= len(piece)
        yield piece


def _chunk_size(stream: BufferedIOBase) -> int:
    found = _CHUNK_SIZE.fullmatch(_line(stream))
    if found is None:
        raise RefusedError(400, _MALFORMED)
    return int(found[1], 16)


def _line(stream: BufferedIOBase) -> bytes:
    line = stream.readline(_MAX_LINE_BYTES)
    if not line.endswith(b"\r\n"):
        raise RefusedError(400, _MALFORMED)
    return line[:-2]


def _too_large(limit: int) -> RefusedError:
    return RefusedError(413, f"The body is larger than {limit} bytes.")
