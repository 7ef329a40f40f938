"""Bytes kept in pieces, each once: what one request has in common with earlier ones costs nothing.

Requests of one client say the same again and again. A body is cut where its own content says so, so
that a line that is put in leaves what follows it in the same pieces; tokens are cut every so many.
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

CHUNK_TOKENS = 512
_LINE = re.compile(rb"\\n|\},")
_LEAST, _MOST = 256, 16 << 10
_EVERY = 16
"""One line of so many ends a piece."""
_OVERHEAD = 320
"""Bytes that a piece takes beside its data: the objects, and its place among the others."""
_REFERENCE = 8


class Chunk:
    """A piece; the same object wherever it occurs.

    Attributes:
        digest: Of its data.
        data: Compressed.
        size: Before that.
        uses: How many times it is referred to.
    """

    __slots__ = ("data", "digest", "size", "uses")

    def __init__(self, digest: bytes, raw: bytes) -> None:
        self.digest = digest
        self.data = zlib.compress(raw, 1)
        self.size = len(raw)
        self.uses = 0

    def raw(self) -> bytes:
        """Its data."""
        return zlib.decompress(self.data)


Chunked = tuple[Chunk, ...]


class Chunks:
    """Pieces that are in use.

    Thread safety: for one thread at a time.

    Attributes:
        nbytes: What they take.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, Chunk] = {}
        self.nbytes = 0

    def add(self, pieces: Iterable[bytes]) -> Chunked:
        """Keep bytes that are cut in pieces."""
        found = []
        for raw in pieces:
            digest = _digest(raw)
            chunk = self._known.get(digest)
            if chunk is None:
                chunk = self._known[digest] = Chunk(digest, raw)
                self.nbytes += len(chunk.data) + _OVERHEAD
            chunk.uses += 1
            found.append(chunk)
        self.nbytes += _REFERENCE * len(found)
        return tuple(found)

    def drop(self, chunked: Chunked) -> None:
        """Let go of what `add` returned."""
        self.nbytes -= _REFERENCE * len(chunked)
        for chunk in chunked:
            chunk.uses -= 1
            if not chunk.uses:
                del self._known[chunk.digest]
                self.nbytes -= len(chunk.data) + _OVERHEAD


def joined(chunked: Chunked) -> bytes:
    """The bytes that were cut."""
    return b"".join(chunk.raw() for chunk in chunked)


def cut_body(body: bytes) -> Iterator[bytes]:
    """Cut a JSON text at lines of its texts and ends of its objects."""
    start = before = 0
    for end in (*(one.end() for one in _LINE.finditer(body)), len(body)):
        while end - start > _MOST:
            yield body[start : start + _MOST]
            start += _MOST
        line, before = body[max(before, start) : end], end
        if end - start >= _LEAST and zlib.crc32(line) % _EVERY == 0:
            yield body[start:end]
            start = end
    if start < len(body):
        yield body[start:]


def cut_tokens(tokens: Sequence[int]) -> Iterator[bytes]:
    """Cut token ids; those of images do not fit into four bytes."""
    for start in range(0, len(tokens), CHUNK_TOKENS):
        piece = tokens[start : start + CHUNK_TOKENS]
        try:
            yield b"I" + array("I", piece).tobytes()
        except OverflowError:
            yield b"q" + array("q", piece).tobytes()


def tokens_in(chunked: Chunked) -> list[int]:
    """The token ids that were cut."""
    return [token for chunk in chunked for token in _tokens(chunk)]


def shared_tokens(one: Chunked, other: Chunked) -> int:
    """How many leading tokens two prompts have in common."""
    at = shared_chunks(one, other)
    if at and at == min(len(one), len(other)):
        return (at - 1) * CHUNK_TOKENS + len(_tokens(one[at - 1]))
    if at == min(len(one), len(other)):
        return 0
    pieces = _tokens(one[at]), _tokens(other[at])
    pairs = enumerate(zip(*pieces, strict=False))
    rest = next((place for place, (x, y) in pairs if x != y), min(map(len, pieces)))
    return at * CHUNK_TOKENS + rest


def digests_of(tokens: Sequence[int]) -> list[bytes]:
    """The digests of the pieces that tokens are cut in."""
    return [_digest(raw) for raw in cut_tokens(tokens)]


def shared_with(kept: Chunked, tokens: Sequence[int], digests: Sequence[bytes]) -> int:
    """How many leading tokens a prompt that is kept has in common with others.

    Args:
        kept: The prompt.
        tokens: The others.
        digests: `digests_of` these.
    """
    pairs = enumerate(zip(kept, digests, strict=False))
    at = next((at for at, (a, b) in pairs if a.digest != b), min(len(kept), len(digests)))
    start = at * CHUNK_TOKENS
    if at == len(digests):
        return len(tokens)
    if at == len(kept):
        return start
    mine, theirs = _tokens(kept[at]), tokens[start : start + CHUNK_TOKENS]
    places = enumerate(zip(mine, theirs, strict=False))
    rest = next((place for place, (a, b) in places if a != b), min(len(mine), len(theirs)))
    return start + rest


def _digest(raw: bytes) -> bytes:
    return blake2b(raw, digest_size=16).digest()


def shared_chunks(one: Chunked, other: Chunked) -> int:
    """How many leading pieces two prompts have in common."""
    places = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in places if a is not b), min(len(one), len(other)))


def _tokens(chunk: Chunk) -> array[int]:
    raw = chunk.raw()
    found = array(chr(raw[0]))
    found.frombytes(raw[1:])
    return found
