"""Token ids: packed as bytes, which compare fast, and as digests, which recognise a prompt.

Digests are for what is remembered of prompts in memory, without their tokens.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterator, Sequence

import xxhash
from msgspec import Struct

TOKEN_BYTES = 8
"""Bytes per stored token id: signed 64 bits, because mlx-lm's image ids are 60-bit negatives."""


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Encode token ids as little-endian signed 64-bit integers.

    Comparing prompts as bytes is two orders of magnitude faster than as lists, so a
    request's list is converted once, here.

    Raises:
        ValueError: an id is not an integer of at most 64 bits.
    """
    try:
        packed = array("q", tokens)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"token ids must be integers of at most 64 bits: {error}") from None
    return _little_endian(packed).tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """Decode what `pack_tokens` made."""
    tokens = array("q")
    tokens.frombytes(packed)
    return _little_endian(tokens).tolist()


def _little_endian(tokens: array[int]) -> array[int]:
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def common_prefix_tokens(a: bytes, b: bytes) -> int:
    """Number of leading *tokens* that the packed `a` and `b` share.

    Bisects on `bytes` equality, which runs at the speed of memcmp.
    """
    low, high = 0, min(len(a), len(b)) // TOKEN_BYTES
    if a[: high * TOKEN_BYTES] == b[: high * TOKEN_BYTES]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if (
            a[low * TOKEN_BYTES : middle * TOKEN_BYTES]
            == b[low * TOKEN_BYTES : middle * TOKEN_BYTES]
        ):
            low = middle
        else:
            high = middle - 1
    return low


_STRIDE_TOKENS = 256
_STRIDE_PLACE = _STRIDE_TOKENS.bit_length() - 1
"""Which of the digests is that of the first `_STRIDE_TOKENS` tokens, if there are more."""


def prompt_digest(packed: bytes) -> bytes:
    """The digest by which `PromptCache.recent_fetches` names a prompt.

    Args:
        packed: What `pack_tokens` made of its token ids.
    """
    return hashlib.blake2b(packed, digest_size=16).digest()


class PrefixDigests(Struct, frozen=True):
    """The digests of some prefixes of one prompt; 8 bytes for every 256 tokens.

    They recognise a prefix of any length, but for its last tokens: fewer than half of it, and
    fewer than 256. The prompt itself, and the prompt without its last token, are recognised
    exactly.

    Attributes:
        num_tokens: Length of the prompt.
        digests: One for each of the lengths that `_positions` gives, 64 bits each.
    """

    num_tokens: int
    digests: array[int]

    @classmethod
    def of(cls, packed: bytes) -> PrefixDigests:
        """Take the digests of a prompt, in one pass over it."""
        length = len(packed) // TOKEN_BYTES
        running, view, start = xxhash.xxh3_64(), memoryview(packed), 0
        digests = array("Q")
        for position in _positions(length):
            end = position * TOKEN_BYTES
            running.update(view[start:end])
            digests.append(running.intdigest())
            start = end
        return cls(length, digests)

    def begin_with(self, packed: bytes) -> bool:
        """Whether the prompt begins with `packed`, as far as the digests can tell."""
        length = len(packed) // TOKEN_BYTES
        if length == 0 or length > self.num_tokens:
            return length == 0
        from_end = self.num_tokens - length
        if from_end <= 1:
            return self._agrees(len(self.digests) - 1 - from_end, packed, length)
        if length < _STRIDE_TOKENS:
            place = length.bit_length() - 1
            return self._agrees(place, packed, 1 << place)
        strides = length // _STRIDE_TOKENS
        return self._agrees(_STRIDE_PLACE + strides - 1, packed, strides * _STRIDE_TOKENS)

    def is_begun_by(self, packed: bytes) -> bool:
        """Whether `packed` begins with the whole prompt, which must not be empty."""
        if not self.digests or len(packed) < self.num_tokens * TOKEN_BYTES:
            return False
        return self._agrees(len(self.digests) - 1, packed, self.num_tokens)

    def _agrees(self, place: int, packed: bytes, num_tokens: int) -> bool:
        if num_tokens > _STRIDE_TOKENS and not self._agrees(_STRIDE_PLACE, packed, _STRIDE_TOKENS):
            return False  # most others differ early: no need to read on
        head = memoryview(packed)[: num_tokens * TOKEN_BYTES]
        return xxhash.xxh3_64_intdigest(head) == self.digests[place]


def _positions(length: int) -> Iterator[int]:
    """Powers of two, then every `_STRIDE_TOKENS`, then the last two lengths; ascending."""
    position = 1
    while position < length - 1:
        yield position
        position = position * 2 if position < _STRIDE_TOKENS else position + _STRIDE_TOKENS
    yield from range(max(1, length - 1), length + 1)
