"""The live caches in memory: which one serves a prompt, whose it is, and which one goes first.

A trie finds them and a tiered LRU orders them, to the contract of mlx-lm's `LRUPromptCache`.
Caches are opaque here; a codec knows how to copy and trim them.

Thread safety: none of its own; `PromptCache` holds its lock around every call.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from typing import Any

from msgspec import Struct, field

from persist_cache.cache.footprint import Footprint
from persist_cache.cache.lru import TieredLRU
from persist_cache.cache.owners import Owner
from persist_cache.cache.stats import Tally
from persist_cache.cache.trie import PromptTrie
from persist_cache.codec import LiveCaches, Witness, sharing
from persist_cache.entry import Tier
from persist_cache.tokens import TOKEN_BYTES


class Held(Struct, eq=False):
    """One live cache and what is known of it.

    Attributes:
        owner: Whose KV it is.
        packed: Its tokens.
        cache: mlx-lm's list of layers.
        nbytes: Memory it takes, buffers that it shares with others included.
        tier: Label of its tier.
        prefill_s: Seconds that computing all of it took, if known.
        saved: It is on disk, so that losing it costs a load and nothing else.
        wanted: It is to be on disk, and no job for that waits or has failed for good.
        witness: Tells whether its former owner changed it; None if the codec has no such thing.
        partial: It is on the way to a longer one that is being computed, and goes when that comes.
        passed: That one has come, and has its rows: saving it would be for nothing.
        stays: It is copied when it is used, not lent: the next one of the same conversation shares
            its buffers.
        keep_s: By tier, for how long its client asks to keep it on disk behind each use.
        group: That its client counts it to, or "".
        memory_only: It is never to be on disk.
        since: When it came into memory, by `time.monotonic`.
    """

    owner: Owner
    packed: bytes
    cache: Any
    nbytes: int
    tier: str
    prefill_s: float = 0.0
    saved: bool = False
    wanted: bool = False
    witness: Witness | None = None
    partial: bool = False
    passed: bool = False
    stays: bool = False
    keep_s: Mapping[Tier, int] = field(default_factory=dict)
    group: str = ""
    memory_only: bool = False
    since: float = field(default_factory=time.monotonic)

    @property
    def num_tokens(self) -> int:
        return len(self.packed) // TOKEN_BYTES


class Candidate(Struct, frozen=True):
    """A held cache, and the leading tokens of it that serve a prompt."""

    held: Held
    num_tokens: int


class Resident:
    """All live caches."""

    def __init__(self, codec: LiveCaches, max_size: int, max_bytes: int, tally: Tally) -> None:
        """Hold none yet.

        Args:
            codec: Measures and trims caches.
            max_size: Caches to keep.
            max_bytes: Bytes of caches to keep.
            tally: Counts caches that were changed by their former owner.
        """
        self.max_size = max_size
        self.max_bytes = max_bytes
        self._codec = codec
        self._tally = tally
        self._current: dict[Hashable, Owner] = {}
        """Per model key, whose KV is computed now."""
        self._trie: PromptTrie[Held] = PromptTrie()
        self._lru: TieredLRU[Held] = TieredLRU()
        self._sharing = sharing(codec)
        self._footprint: Footprint[Held] = Footprint()

    def __len__(self) -> int:
        return len(self._lru)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches; what several share is counted once."""
        return self._lru.nbytes

    def stats(self) -> dict[str, dict[str, int]]:
        """Sequences and bytes per tier, in the shape of upstream's `stats_by_type`."""
        return self._lru.stats()

    def held(self) -> list[Held]:
        return [held for _, _, held in self._trie]

    def search(self, owner: Owner, packed: bytes, limit: int) -> Candidate | None:
        """Find the cache that serves the longest prefix of `packed`, at most `limit` tokens."""
        length = len(packed) // TOKEN_BYTES
        match = self._trie.search(owner, packed)
        best: Candidate | None = None

        def consider(held: Held, usable: int) -> None:
            nonlocal best
            usable = min(usable, limit)
            if usable < held.num_tokens and not self._codec.can_trim(held.cache):
                return
            if best is None or usable > best.num_tokens:
                best = Candidate(held, usable)

        if match.exact is not None:
            consider(match.exact, length)
        if match.shorter is not None and match.shorter.num_tokens:
            consider(match.shorter.value, match.shorter.num_tokens)
        if match.longer is not None:
            # Cutting a longer cache always leaves a token to compute, as upstream does.
            usable = min(match.common_prefix, length - 1)
            if usable > 0 or length == 1:
                consider(match.longer.value, usable)
        if best is None and match.shorter is not None:
            # What matches cannot be trimmed to the limit: fall back to a shorter checkpoint.
            for num_tokens, held in reversed(self._trie.prefixes(owner, packed)):
                if 0 < num_tokens <= limit:
                    return Candidate(held, num_tokens)
        return best

    def find(self, owner: Owner, packed: bytes, limit: int) -> Candidate | None:
        """As `search`, among caches that are as they were inserted; lets go of the others."""
        while True:
            candidate = self.search(owner, packed, limit)
            if candidate is None or self.is_unchanged(candidate.held):
                return candidate

    def known_rows(self, owner: Owner, packed: bytes) -> Any | None:
        """Rows of a prompt's first tokens, of the cache that has most of them."""
        if self._sharing is None:
            return None
        while (found := self._longest(owner, packed)) is not None:
            if self.is_unchanged(found.held):
                return self._sharing.known_rows(found.held.cache, found.num_tokens)
        return None

    def _longest(self, owner: Owner, packed: bytes) -> Candidate | None:
        """The cache that has most of a prompt's first tokens, and how many."""
        match = self._trie.search(owner, packed)
        if match.exact is not None:
            return Candidate(match.exact, match.exact.num_tokens)
        shorter = match.shorter
        if match.longer is not None and (
            shorter is None or shorter.num_tokens < match.common_prefix
        ):
            return Candidate(match.longer.value, match.common_prefix)
        return None if shorter is None else Candidate(shorter.value, shorter.num_tokens)

    def is_unchanged(self, held: Held) -> bool:
        """Whether a cache is as it was inserted; lets go of one that is not.

        Its former owner may have decoded on, or trimmed it and computed other tokens.
        """
        counted = self._codec.num_tokens(held.cache)
        has_length = counted is None or counted == held.num_tokens
        if has_length and (held.witness is None or held.witness.fits(held.cache)):
            return True
        held.wanted = False
        self.remove(held)
        self._tally.problem("changed_after_insert")
        return False

    def now_computed_by(self, owner: Owner) -> bool:
        """Note whose KV a model key stands for from now on.

        Returns:
            Whether it was another's before. False, too, when that one was loaded later: then the
            calling thread was overtaken by a load, and nothing is noted.
        """
        former = self._current.get(owner.model, owner)
        is_other = not former.is_same_model(owner)
        if is_other and owner.is_older(former):
            return False
        self._current[owner.model] = owner
        return is_other

    def is_current(self, owner: Owner) -> bool:
        """Whether its model key stands for no other weights than these."""
        return self._current.get(owner.model, owner).is_same_model(owner)

    def of_former_owners(self) -> list[Held]:
        """Caches of weights that their model key stands for no more."""
        return [held for held in self.held() if not self.is_current(held.owner)]

    def common_tokens(self, owner: Owner, packed: bytes) -> int:
        """Leading tokens shared with any cache, whether it can be resumed there or not."""
        return self._trie.search(owner, packed).common_prefix

    def parting(self, owner: Owner, packed: bytes) -> tuple[int, bool]:
        """As `common_tokens`, and whether a cache goes on from there."""
        match = self._trie.search(owner, packed)
        return match.common_prefix, match.longer is not None

    def touch(self, held: Held) -> None:
        self._lru.touch(held)

    def spare(self, held: Held) -> None:
        """Keep `held` only until its room is needed, or it is used again."""
        self._lru.spare(held)

    def add(self, held: Held, *, spare: bool = False) -> list[Held]:
        """Keep `held`, and let go of what it replaces or crowds out.

        A cache that can be trimmed serves all of its prefixes, so those go, but for one that marks
        more than a reply and waits for its save: the longer cache has its rows, not its tier. Those
        that were kept on the way to it go in any case.

        Args:
            held: The cache.
            spare: Keep it only as long as nothing else needs its room.

        Returns:
            What was let go to keep within the limits, in that order; replaced ones are not in it.
        """
        previous = self._trie.add(held.owner, held.packed, held)
        if previous is not None:
            held.tier = max(previous.tier, held.tier, key=self._lru.tiers.index)
            held.partial = held.partial and previous.partial
            self._forget(previous)
        self._lru.push(held, held.tier, self._measured(held), held.num_tokens)
        can_trim = self._codec.can_trim(held.cache)
        for _, prefix in self._trie.prefixes(held.owner, held.packed):
            if prefix.partial and self._is_as_high(held, prefix):
                prefix.wanted, prefix.passed = False, True
                self.remove(prefix)
            elif can_trim and (not prefix.wanted or prefix.tier == self._lru.tiers[0]):
                self.remove(prefix)
        if spare:
            self.spare(held)
        return self.trim_to(self.max_size, self.max_bytes)

    def _is_as_high(self, held: Held, other: Held) -> bool:
        """Whether a cache is to be saved no later than another."""
        return self._lru.tiers.index(held.tier) >= self._lru.tiers.index(other.tier)

    def remove(self, held: Held) -> None:
        """Let go of `held`, if it is still here."""
        if held in self._lru:
            self._forget(held)
            self._trie.pop(held.owner, held.packed)

    def replace(self, held: Held, cache: Any) -> None:
        """Keep the same rows of `held` in other buffers, if it is still here."""
        if held in self._lru:
            self._inherit(held)
            held.cache = cache
            self._lru.resize(held, self._measured(held))

    def _measured(self, held: Held) -> int:
        """Note the buffers of a cache; returns the bytes of those that no other one has."""
        if self._sharing is None:
            return self._footprint.add(held, {id(held): held.nbytes})
        return self._footprint.add(held, self._sharing.buffers(held.cache))

    def _inherit(self, held: Held) -> None:
        """Let others account for what they share with a cache."""
        for heir, nbytes in self._footprint.remove(held):
            self._lru.resize(heir, nbytes)

    def _forget(self, held: Held) -> None:
        self._inherit(held)
        self._lru.remove(held)

    def trim_to(self, n_sequences: int, n_bytes: int) -> list[Held]:
        """Let go of caches until both limits hold; returns them, first gone first."""
        gone = []
        while len(self._lru) > n_sequences or self._lru.nbytes > n_bytes:
            held = self._lru.pop()
            self._inherit(held)
            self._trie.pop(held.owner, held.packed)
            gone.append(held)
        return gone
