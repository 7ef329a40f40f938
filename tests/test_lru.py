from __future__ import annotations

from collections import deque
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from persist_cache.cache.lru import TieredLRU
from persist_cache.entry import TIER_LABELS
from tests.examples import examples

KEYS = st.integers(0, 12)
TIERS = st.sampled_from(TIER_LABELS)
SIZES = st.integers(0, 1_000)


class LRUMachine(RuleBasedStateMachine):
    """Against plain deques popped by mlx-lm's own rule."""

    def __init__(self) -> None:
        super().__init__()
        self.lru: TieredLRU[int] = TieredLRU()
        self.order: dict[str, deque[int]] = {tier: deque() for tier in TIER_LABELS}
        self.sizes: dict[int, int] = {}
        self.spared: list[int] = []

    def tier_of(self, key: int) -> str:
        return next(tier for tier, keys in self.order.items() if key in keys)

    def forget(self, key: int) -> None:
        self.order[self.tier_of(key)].remove(key)
        del self.sizes[key]
        self.use(key)

    def use(self, key: int) -> None:
        if key in self.spared:
            self.spared.remove(key)

    def upstream_pop(self) -> int:
        """`LRUPromptCache.CacheOrder.pop` of mlx-lm 0.32, three tiers."""
        for tier, above in pairwise(TIER_LABELS):
            if self.order[tier] and len(self.order[tier]) >= len(self.order[above]):
                return self.order[tier][0]
        return self.order[TIER_LABELS[-1]][0]

    @rule(key=KEYS, tier=TIERS, nbytes=SIZES)
    def push(self, key: int, tier: str, nbytes: int) -> None:
        self.lru.push(key, tier, nbytes)
        if key in self.sizes:
            tier = max(tier, self.tier_of(key), key=TIER_LABELS.index)
            self.forget(key)
        self.order[tier].append(key)
        self.sizes[key] = nbytes

    @rule(key=KEYS)
    def touch(self, key: int) -> None:
        if key not in self.sizes:
            with pytest.raises(KeyError):
                self.lru.touch(key)
            return
        self.lru.touch(key)
        self.use(key)
        keys = self.order[self.tier_of(key)]
        keys.remove(key)
        keys.append(key)

    @rule(key=KEYS)
    def spare(self, key: int) -> None:
        self.touch(key)
        if key in self.sizes:
            self.lru.spare(key)
            self.spared.append(key)

    @rule(key=KEYS)
    def remove(self, key: int) -> None:
        if key not in self.sizes:
            with pytest.raises(KeyError):
                self.lru.remove(key)
            return
        self.lru.remove(key)
        self.forget(key)

    @precondition(lambda self: self.sizes)
    @rule()
    def pop(self) -> None:
        expected = self.spared[0] if self.spared else self.upstream_pop()
        assert self.lru.pop() == expected
        self.forget(expected)

    @rule(key=KEYS, tier=st.sampled_from(["", "tool", "System"]), nbytes=SIZES)
    def push_to_unknown_tier(self, key: int, tier: str, nbytes: int) -> None:
        with pytest.raises(ValueError, match="unknown tier"):
            self.lru.push(key, tier, nbytes)

    @invariant()
    def accounts_agree(self) -> None:
        assert len(self.lru) == len(self.sizes)
        assert self.lru.nbytes == sum(self.sizes.values())
        for tier, keys in self.order.items():
            nbytes = sum(self.sizes[key] for key in keys)
            assert self.lru.count(tier) == len(keys)
            assert self.lru.nbytes_of(tier) == nbytes
            assert self.lru.stats()[tier] == {"n_sequences": len(keys), "n_bytes": nbytes}
            assert all(self.lru.tier_of(key) == tier and key in self.lru for key in keys)


TestLRUMachine = LRUMachine.TestCase
TestLRUMachine.settings = settings(
    deadline=None, max_examples=examples(20, 60), stateful_step_count=40
)


def test_pop_balances_tiers_as_upstream_does() -> None:
    lru: TieredLRU[str] = TieredLRU()
    for key, tier in [
        ("a1", "assistant"),
        ("s1", "system"),
        ("u1", "user"),
        ("u2", "user"),
        ("s2", "system"),
        ("s3", "system"),
    ]:
        lru.push(key, tier, 1)

    # One assistant for two users, and two users for three systems: the systems pile up.
    assert [lru.pop() for _ in range(len(lru))] == ["s1", "u1", "a1", "s2", "u2", "s3"]


def test_candidates_are_what_pop_returns_in_order() -> None:
    lru: TieredLRU[int] = TieredLRU()
    for key in range(30):
        lru.push(key, TIER_LABELS[key * key % 7 % 3], key, 10 ** (key % 4))

    expected = list(lru.candidates())

    assert sorted(expected) == list(range(30))
    assert [lru.pop() for _ in range(len(lru))] == expected


def test_touch_saves_a_key_from_being_next() -> None:
    # Upstream never reorders on use: first in, first out.
    lru: TieredLRU[str] = TieredLRU()
    lru.push("old", "user", 1)
    lru.push("new", "user", 1)

    lru.touch("old")

    assert lru.pop() == "new"


def test_later_assistant_push_does_not_demote_a_system_key() -> None:
    lru: TieredLRU[str] = TieredLRU()
    lru.push("prompt", "system", 10)

    lru.push("prompt", "assistant", 12)

    assert lru.tier_of("prompt") == "system"
    assert lru.stats() == {
        "assistant": {"n_sequences": 0, "n_bytes": 0},
        "user": {"n_sequences": 0, "n_bytes": 0},
        "system": {"n_sequences": 1, "n_bytes": 12},
    }


def test_push_to_a_higher_tier_promotes() -> None:
    lru: TieredLRU[str] = TieredLRU()
    lru.push("prompt", "assistant", 10)

    lru.push("prompt", "system", 10)

    assert lru.tier_of("prompt") == "system"
    assert lru.nbytes_of("assistant") == 0
    assert len(lru) == 1


@pytest.mark.parametrize("tiers", [("only",), ("low", "high"), tuple("abcde")])
def test_any_number_of_tiers(tiers: tuple[str, ...]) -> None:
    # Upstream raises UnboundLocalError with a single tier.
    lru: TieredLRU[int] = TieredLRU(tiers)
    for key in range(10):
        lru.push(key, tiers[key % len(tiers)], 1)

    assert lru.tiers == tiers
    assert sorted(lru.pop() for _ in range(10)) == list(range(10))
    assert lru.nbytes == 0


@pytest.mark.parametrize("tiers", [TIER_LABELS, ("only",)])
def test_pop_of_nothing_is_a_key_error(tiers: tuple[str, ...]) -> None:
    lru: TieredLRU[int] = TieredLRU(tiers)

    with pytest.raises(KeyError, match="nothing to evict"):
        lru.pop()


@pytest.mark.parametrize("tiers", [(), ("user", "user")])
def test_ordering_without_different_names_is_refused(tiers: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="different names"):
        TieredLRU(tiers)


@pytest.mark.parametrize(("tier", "nbytes"), [("tool", 5), ("user", -1)])
def test_refused_push_changes_nothing(tier: str, nbytes: int) -> None:
    lru: TieredLRU[str] = TieredLRU()
    lru.push("a", "user", 1)
    lru.push("b", "user", 2)
    before = lru.stats()

    with pytest.raises(ValueError):
        lru.push("a", tier, nbytes)

    assert lru.stats() == before
    assert list(lru.candidates()) == ["a", "b"]


def test_unknown_tier_is_named_with_the_ones_there_are() -> None:
    lru: TieredLRU[str] = TieredLRU(["low", "high"])

    with pytest.raises(ValueError, match="unknown tier 'tool': use one of low, high"):
        lru.count("tool")
    with pytest.raises(ValueError, match="unknown tier"):
        lru.nbytes_of("tool")


# ---- what is short beside the oldest -----------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def filled(*entries: tuple[str, int], clock: Clock | None = None) -> TieredLRU[str]:
    lru: TieredLRU[str] = TieredLRU(["only"], clock or Clock())
    for key, num_tokens in entries:
        lru.push(key, "only", 1, num_tokens)
    return lru


def test_entry_below_an_eighth_of_the_oldest_goes_before_it() -> None:
    lru = filled(("conversation", 16_000), ("title", 1_999), ("other", 2_000))

    assert [lru.pop() for _ in range(3)] == ["title", "conversation", "other"]


def test_of_several_short_ones_the_oldest_goes_first() -> None:
    lru = filled(("conversation", 16_000), ("first", 300), ("second", 300), ("third", 300))
    lru.touch("first")

    assert [lru.pop() for _ in range(4)] == ["second", "third", "first", "conversation"]


def test_short_conversation_beside_a_long_one_outlives_what_is_short_beside_both() -> None:
    lru = filled(("long", 160_000), ("short", 2_000), ("title", 200))

    assert [lru.pop() for _ in range(3)] == ["title", "short", "long"]


def test_short_one_that_is_oldest_goes_first_as_ever() -> None:
    lru = filled(("title", 200), ("conversation", 16_000), ("newer", 300))

    assert lru.pop() == "title"


def test_length_says_nothing_across_tiers() -> None:
    lru: TieredLRU[str] = TieredLRU(["low", "high"])
    lru.push("long", "low", 1, 16_000)
    lru.push("short", "high", 1, 100)

    assert lru.pop() == "long"


def test_conversation_unused_for_an_hour_yields_to_short_ones() -> None:
    clock = Clock()
    lru = filled(("yesterday", 16_000), ("today", 300), clock=clock)

    clock.now = 3_599.0
    assert next(lru.candidates()) == "today"
    clock.now = 3_601.0
    assert next(lru.candidates()) == "yesterday"
    lru.touch("yesterday")
    lru.touch("today")
    assert next(lru.candidates()) == "today"


def test_spared_key_goes_before_all_tiers_until_it_is_used() -> None:
    lru: TieredLRU[str] = TieredLRU(["low", "high"])
    lru.push("reply", "low", 1, 10)
    lru.push("lent", "high", 1, 9_000)
    lru.push("prompt", "high", 1, 300)

    lru.spare("lent")
    lru.spare("prompt")
    assert list(lru.candidates()) == ["lent", "prompt", "reply"]
    lru.touch("lent")
    assert [lru.pop() for _ in range(3)] == ["prompt", "reply", "lent"]
