"""Names of objects: keyed digests, so that they say nothing to those without the secret.

A prompt is looked up by the digests of its beginnings, at lengths that all machines agree on.
No name is ever taken from what was downloaded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

from msgspec import Struct

from persist_cache.fingerprint.value import Fingerprint
from persist_cache.tokens import TOKEN_BYTES

MIN_TOKENS = 256
"""The shortest beginning that is published; fewer are computed as fast as they are looked up."""
KEY_BYTES = 32


def rungs(num_tokens: int) -> list[int]:
    """The agreed lengths up to `num_tokens`: 256 times the powers of the square root of two."""
    found = []
    power = 0
    while (length := _rung(power)) <= num_tokens:
        found.append(length)
        power += 1
    return found


def _rung(power: int) -> int:
    """256 · 2^(power/2), rounded down; in integers, so that every machine gets the same."""
    if power % 2 == 0:
        return MIN_TOKENS << power // 2
    # isqrt of twice the square is the square root of two times the number, rounded down.
    return math.isqrt(2 * (MIN_TOKENS << power // 2) ** 2)


class Place(Struct, frozen=True):
    """A beginning of a prompt under which something may lie.

    Attributes:
        num_tokens: Its length.
        is_end: What lies there ends there; else it may go on.
    """

    num_tokens: int
    is_end: bool = False


def places_to_ask(known: int, num_tokens: int, ends: Iterable[int]) -> list[Place]:
    """Where a prompt may be found of which `known` tokens need not be computed; shortest first.

    An anchor stands for an entry that may be longer, so the last one before what is known counts
    as well, where there is room for a find between it and the next one.

    Args:
        known: Leading tokens that are there already.
        num_tokens: Tokens that may be used.
        ends: Lengths at which an entry may end.
    """
    if num_tokens - known < MIN_TOKENS:
        return []
    ladder = rungs(num_tokens)
    wanted = {one for one in ladder if one > known}
    below = [one for one in ladder if one <= known]
    if below and min(wanted, default=num_tokens + 1) > known + MIN_TOKENS:
        wanted.add(below[-1])
    least = max(known + 1, MIN_TOKENS)
    exact = {one for one in ends if least <= one <= num_tokens}
    found = [Place(one) for one in wanted] + [Place(one, is_end=True) for one in exact]
    return sorted(found, key=lambda place: (place.num_tokens, place.is_end))


def places_of_entry(num_tokens: int) -> list[Place]:
    """Where an entry is published; its end comes last."""
    return [*map(Place, rungs(num_tokens)), Place(num_tokens, is_end=True)]


class Keys:
    """Derives every name, and the key of the seal, from one secret.

    Thread safety: immutable.
    """

    def __init__(self, root: bytes) -> None:
        """Derive the keys.

        Args:
            root: The secret, or what takes its place.
        """
        digest = hashlib.blake2b(root, digest_size=64, person=b"pc1 remote root").digest()
        self._anchors = _derived(digest, b"anchors")
        self._blobs = _derived(digest, b"blobs")
        self._claims = _derived(digest, b"claims")
        self.seal_key = _derived(digest, b"seal")

    def anchors(
        self, fingerprint: Fingerprint, packed: bytes, places: Sequence[Place]
    ) -> dict[Place, bytes]:
        """The keys of the beginnings of a prompt, in one pass over it.

        Args:
            fingerprint: Identity of the model.
            packed: The prompt.
            places: The shortest first.
        """
        running = hashlib.blake2b(fingerprint.digest, key=self._anchors, digest_size=KEY_BYTES)
        view, start, found = memoryview(packed), 0, {}
        for place in places:
            end = place.num_tokens * TOKEN_BYTES
            running.update(view[start:end])
            digest = running.copy()
            if place.is_end:
                # Three bytes are no token, so no other beginning has this digest.
                digest.update(b"end")
            found[place] = digest.digest()
            start = end
        return found

    def blob_name(self, digest: bytes) -> str:
        """Where the object with this content lies."""
        return _name("b", hashlib.blake2b(digest, key=self._blobs, digest_size=KEY_BYTES).digest())

    def claim_name(self, anchor: bytes, generation: int) -> str:
        """What a process creates that is going to publish the entry of this anchor."""
        said = anchor + generation.to_bytes(4, "big")
        return _name("c", hashlib.blake2b(said, key=self._claims, digest_size=KEY_BYTES).digest())


def anchor_name(anchor: bytes) -> str:
    """Where the manifest of the beginning with this key lies."""
    return _name("a", anchor)


def probe_name(key: bytes) -> str:
    """Where `Remote.probe` tries whether it may create objects."""
    return _name("p", key)


def _name(kind: str, key: bytes) -> str:
    text = key.hex()
    return f"pc1/{kind}/{text[:2]}/{text}"


def _derived(digest: bytes, label: bytes) -> bytes:
    return hashlib.blake2b(label, key=digest, digest_size=64, person=b"pc1 derived").digest()
