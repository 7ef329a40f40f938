"""Which entry leaves memory next: tiers in order, recency inside a tier, bytes of each.

Knows keys and sizes only; what they stand for is the caller's.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import pairwise
from typing import Generic, TypeVar

from msgspec import Struct

from persist_cache.entry import TIER_LABELS

K = TypeVar("K", bound=Hashable)

_SHORT = 8
"""An entry is short beside another if it has less than this fraction of its tokens."""
_PREFERRED_S = 3600.0
"""How long after its last use a long entry is kept before short ones that are newer."""


class _Entry(Struct):
    nbytes: int
    num_tokens: int
    used_at: float


class TieredLRU(Generic[K]):
    """Keys in tiers, each ordered by last use, with the bytes they account for.

    Between tiers, the policy of mlx-lm's `CacheOrder`: a tier gives up a key while it holds at
    least as many as the next higher tier, so the lower tiers shrink first, but not to nothing
    while a higher one piles up.

    Within a tier the oldest key goes, unless another has less than an eighth of its tokens: then
    the oldest such one goes before it. So the title of a conversation never evicts one, however
    many titles come. This holds until the oldest key has not been used for an hour: what is short
    and used all the time gets its place then.

    `candidates` and `pop` take time linear in the keys of a tier, all other methods none.

    Thread safety: none. The caller holds its lock around every call.
    """

    def __init__(
        self, tiers: Sequence[str] = TIER_LABELS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start empty.

        Args:
            tiers: Names, first to be evicted first. One is enough.
            clock: Seconds by which uses are dated.

        Raises:
            ValueError: there is no tier, or one is named twice.
        """
        if not tiers or len(set(tiers)) != len(tiers):
            raise ValueError(f"tiers must be one or more different names, not {list(tiers)}")
        self._tiers = tuple(tiers)
        self._rank = {tier: rank for rank, tier in enumerate(self._tiers)}
        self._clock = clock
        # Per tier, oldest first.
        self._order: list[OrderedDict[K, _Entry]] = [OrderedDict() for _ in self._tiers]
        self._rank_of: dict[K, int] = {}
        self._spare: dict[K, None] = {}
        self._nbytes = [0] * len(self._tiers)

    def __len__(self) -> int:
        return len(self._rank_of)

    def __contains__(self, key: object) -> bool:
        return key in self._rank_of

    @property
    def tiers(self) -> tuple[str, ...]:
        """Tier names, first to be evicted first."""
        return self._tiers

    @property
    def nbytes(self) -> int:
        """Bytes of all keys."""
        return sum(self._nbytes)

    def nbytes_of(self, tier: str) -> int:
        """Bytes of the keys in `tier`.

        Raises:
            ValueError: there is no such tier.
        """
        return self._nbytes[self._rank_in(tier)]

    def count(self, tier: str) -> int:
        """Number of keys in `tier`.

        Raises:
            ValueError: there is no such tier.
        """
        return len(self._order[self._rank_in(tier)])

    def tier_of(self, key: K) -> str:
        """Return the tier that `key` is in.

        Raises:
            KeyError: `key` is not here.
        """
        return self._tiers[self._rank_of[key]]

    def push(self, key: K, tier: str, nbytes: int, num_tokens: int = 0) -> None:
        """Add `key` as the most recently used of its tier.

        A key that is already here gets the new size, and the higher of both tiers: a system
        prompt stays one when an assistant's reply happens to end on the same tokens.

        Args:
            key: What may be evicted.
            tier: One of `tiers`.
            nbytes: Bytes that it accounts for.
            num_tokens: Its length; 0 if all keys are alike.

        Raises:
            ValueError: unknown tier or negative size; nothing changed.
        """
        rank = self._rank_in(tier)
        if nbytes < 0:
            raise ValueError(f"nbytes must not be negative, not {nbytes}")
        if key in self._rank_of:
            rank = max(rank, self._rank_of[key])
            self.remove(key)
        self._order[rank][key] = _Entry(nbytes, num_tokens, self._clock())
        self._rank_of[key] = rank
        self._nbytes[rank] += nbytes

    def touch(self, key: K) -> None:
        """Make `key` the most recently used of its tier.

        Raises:
            KeyError: `key` is not here.
        """
        order = self._order[self._rank_of[key]]
        self._spare.pop(key, None)
        order.move_to_end(key)
        order[key].used_at = self._clock()

    def spare(self, key: K) -> None:
        """Make `key` the next to go, before those of all tiers, until it is touched or pushed.

        Raises:
            KeyError: `key` is not here.
        """
        self.touch(key)
        self._spare[key] = None

    def resize(self, key: K, nbytes: int) -> None:
        """Let `key` account for other bytes than before.

        Raises:
            KeyError: `key` is not here.
        """
        rank = self._rank_of[key]
        entry = self._order[rank][key]
        self._nbytes[rank] += nbytes - entry.nbytes
        entry.nbytes = nbytes

    def remove(self, key: K) -> None:
        """Forget `key` and its bytes.

        Raises:
            KeyError: `key` is not here.
        """
        rank = self._rank_of.pop(key)
        self._spare.pop(key, None)
        self._nbytes[rank] -= self._order[rank].pop(key).nbytes

    def pop(self) -> K:
        """Remove and return the key to be evicted next.

        Raises:
            KeyError: there is none.
        """
        if not self._rank_of:
            raise KeyError("nothing to evict: no tier holds a key")
        key = next(iter(self._spare), None)
        if key is None:
            key = self._next(self._order)
        self.remove(key)
        return key

    def candidates(self) -> Iterator[K]:
        """Yield every key in the order in which `pop` would return them.

        Nothing must change meanwhile: take the first that will do, then `remove` it.
        """
        left = [order.copy() for order in self._order]
        spare = iter(list(self._spare))
        for _ in range(len(self)):
            key = next(spare, None)
            if key is None:
                key = self._next(left)
            del left[self._rank_of[key]][key]
            yield key

    def stats(self) -> dict[str, dict[str, int]]:
        """Count keys and bytes per tier, in the shape of upstream's `stats_by_type`."""
        return {
            tier: {"n_sequences": len(order), "n_bytes": nbytes}
            for tier, order, nbytes in zip(self._tiers, self._order, self._nbytes, strict=True)
        }

    def _next(self, orders: Sequence[OrderedDict[K, _Entry]]) -> K:
        """Choose among keys, of which there is at least one."""
        entries = iter(orders[_next_rank([len(order) for order in orders])].items())
        chosen, entry = next(entries)
        if self._clock() - entry.used_at > _PREFERRED_S:
            return chosen
        for key, other in entries:
            # What was passed over is too long to be short beside any later choice.
            if other.num_tokens * _SHORT < entry.num_tokens:
                chosen, entry = key, other
        return chosen

    def _rank_in(self, tier: str) -> int:
        try:
            return self._rank[tier]
        except (KeyError, TypeError):
            raise ValueError(
                f"unknown tier {tier!r}: use one of {', '.join(self._tiers)}"
            ) from None


def _next_rank(counts: list[int]) -> int:
    """Choose the tier to take from, given how many keys each holds; at least one holds any.

    The last resort is never empty: the highest tier that holds a key has no fewer than the
    empty one above it, so the loop would have stopped there.
    """
    for rank, (count, above) in enumerate(pairwise(counts)):
        if count and count >= above:
            return rank
    return len(counts) - 1
