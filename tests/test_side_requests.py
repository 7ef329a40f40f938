"""Short side requests (titles, tags) beside long conversations in memory: who stays."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persist_cache import PromptCache
from persist_cache.entry import TIER_LABELS
from tests.examples import examples
from tests.fakes import fingerprint
from tests.live_fakes import MODEL, FakeCodec, FakeLayer

BYTES_PER_TOKEN = 64  # of `FakeCodec`
LONG = 80
"""Tokens that a conversation begins with."""
SHORT = LONG // 8 - 1


def in_memory(max_size: int, max_bytes: int = 1 << 40) -> PromptCache:
    return PromptCache(
        max_size, max_bytes, codec=FakeCodec(), identify=lambda model: fingerprint(), idle_s=60
    )


def insert(cache: PromptCache, tokens: Sequence[int], tier: str = "assistant") -> None:
    cache.insert_cache(MODEL, tokens, [FakeLayer(tokens)], cache_type=tier)


def prompt(name: int, num_tokens: int) -> list[int]:
    return [1_000 * name + position for position in range(num_tokens)]


@settings(deadline=None, max_examples=examples(30, 60))
@given(
    data=st.data(),
    conversations=st.integers(1, 4),
    tier=st.sampled_from(TIER_LABELS),
    by_bytes=st.booleans(),
)
def test_conversations_stay_whatever_side_requests_come_between_their_turns(
    data: st.DataObject, conversations: int, tier: str, by_bytes: bool
) -> None:
    lengths = [data.draw(st.integers(LONG, 4 * LONG)) for _ in range(conversations)]
    side = st.tuples(st.just("side"), st.integers(100, 103), st.integers(1, SHORT))
    turn = st.tuples(st.just("turn"), st.integers(0, conversations - 1), st.integers(0, 40))
    resend = st.tuples(st.just("resend"), st.integers(100, 103), st.integers(1, SHORT))
    steps = data.draw(st.lists(st.one_of(turn, side, resend), max_size=40))
    room = sum(lengths) + sum(growth for kind, _, growth in steps if kind == "turn")
    cache = in_memory(
        1 << 20 if by_bytes else conversations,
        room * BYTES_PER_TOKEN if by_bytes else 1 << 40,
    )
    for number, length in enumerate(lengths):
        insert(cache, prompt(number, length), tier)

    for kind, name, num_tokens in steps:
        if kind == "turn":
            lengths[name] += num_tokens
            insert(cache, prompt(name, lengths[name]), tier)
        else:
            tokens = prompt(name, num_tokens)
            if kind == "resend":
                cache.fetch_nearest_cache(MODEL, tokens)
            insert(cache, tokens, tier)

        assert len(cache) <= cache.max_size
        assert cache.nbytes <= cache.max_bytes
        for number, length in enumerate(lengths):
            assert cache.known_tokens(MODEL, prompt(number, length)) == length


def test_side_requests_that_fill_the_bytes_leave_before_a_conversation() -> None:
    long, short = prompt(1, LONG), [prompt(100 + number, SHORT) for number in range(10)]
    cache = in_memory(100, (LONG + 3 * SHORT) * BYTES_PER_TOKEN)
    insert(cache, long)

    for tokens in short:
        insert(cache, tokens)

    kept = [cache.known_tokens(MODEL, tokens) == SHORT for tokens in short]
    assert cache.known_tokens(MODEL, long) == LONG
    assert kept == [False] * 7 + [True] * 3


@pytest.mark.parametrize("conversations", [2, 5])
def test_several_prefixes_alternate_without_losing_one_another(conversations: int) -> None:
    cache = in_memory(conversations)
    lengths = [LONG + 10 * number for number in range(conversations)]
    for number in range(conversations):
        insert(cache, prompt(number, lengths[number]))

    for _ in range(3):
        for number in range(conversations):
            tokens = prompt(number, lengths[number] + 7)
            kv, rest = cache.fetch_nearest_cache(MODEL, tokens)
            assert kv is not None
            assert len(rest) == 7
            insert(cache, prompt(200 + number, SHORT))
            insert(cache, tokens)
            lengths[number] += 7


def test_newest_one_stays_if_it_is_no_side_request() -> None:
    cache = in_memory(2)
    for number in range(2):
        insert(cache, prompt(number, LONG))

    insert(cache, prompt(2, SHORT + 1))

    assert cache.known_tokens(MODEL, prompt(2, SHORT + 1)) == SHORT + 1
    assert len(cache) == 2
