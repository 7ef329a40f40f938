"""Prompts remembered by length and digest: enough to recognise one, without its tokens."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from persist_cache.entry import TOKEN_BYTES

_STRIDE_TOKENS = 256


def prompt_digest(packed: bytes) -> bytes:
    """The digest by which `PromptCache.recent_fetches` names a prompt.

    Args:
        packed: What `pack_tokens` made of its token ids.
    """
    return hashlib.blake2b(packed, digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class PrefixDigests:
    """The digests of some prefixes of one prompt; some 40 bytes for every 256 tokens.

    They recognise a prefix of any length, but for its last tokens: fewer than half of it, and
    fewer than 256. The prompt itself, and the prompt without its last token, are recognised
    exactly.

    Attributes:
        num_tokens: Lengths of the prefixes, ascending.
        digests: One for each of them.
    """

    num_tokens: tuple[int, ...]
    digests: tuple[int, ...]

    @classmethod
    def of(cls, packed: bytes) -> PrefixDigests:
        """Take the digests of a prompt, in one pass over it."""
        positions = tuple(_positions(len(packed) // TOKEN_BYTES))
        running, view, start = xxhash.xxh3_64(), memoryview(packed), 0
        digests = []
        for position in positions:
            end = position * TOKEN_BYTES
            running.update(view[start:end])
            digests.append(running.intdigest())
            start = end
        return cls(positions, tuple(digests))

    def begin_with(self, packed: bytes) -> bool:
        """Whether the prompt begins with `packed`, as far as the digests can tell."""
        length = len(packed) // TOKEN_BYTES
        if not self.num_tokens or length > self.num_tokens[-1]:
            return not length
        last = bisect_right(self.num_tokens, length) - 1
        if last < 0:
            return True
        head = memoryview(packed)[: self.num_tokens[last] * TOKEN_BYTES]
        return xxhash.xxh3_64_intdigest(head) == self.digests[last]


def _positions(length: int) -> Iterator[int]:
    """Powers of two, then every `_STRIDE_TOKENS`, then the last two lengths."""
    position = 1
    while position < length - 1:
        yield position
        position = position * 2 if position < _STRIDE_TOKENS else position + _STRIDE_TOKENS
    yield from range(max(1, length - 1), length + 1)
