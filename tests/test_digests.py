"""Prompts recognised by digest: what a match proves, and how little is kept for it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persist_cache.tokens import PrefixDigests, pack_tokens, prompt_digest

TOKENS = st.integers(min_value=-(1 << 63), max_value=(1 << 63) - 1)


@given(st.lists(TOKENS, max_size=40), st.data())
def test_every_prefix_is_recognised(prompt: list[int], data: Any) -> None:
    length = data.draw(st.integers(min_value=0, max_value=len(prompt)))

    assert PrefixDigests.of(pack_tokens(prompt)).begin_with(pack_tokens(prompt[:length]))


@pytest.mark.parametrize("length", [1, 2, 3, 255, 256, 257, 513, 5000])
def test_whole_prompt_and_all_but_its_last_token_are_told_from_any_other(length: int) -> None:
    prompt = list(range(length))
    digests = PrefixDigests.of(pack_tokens(prompt))

    assert digests.begin_with(pack_tokens(prompt))
    assert not digests.begin_with(pack_tokens([*prompt[:-1], -1]))
    assert not digests.begin_with(pack_tokens([*prompt, 1]))
    if length > 2:
        assert not digests.begin_with(pack_tokens([*prompt[:-2], -1]))


@pytest.mark.parametrize("length", [2, 9, 300, 1000])
def test_prefix_that_differs_in_its_first_half_is_told_apart(length: int) -> None:
    digests = PrefixDigests.of(pack_tokens(range(5000)))

    for at in {0, length // 2 - 1}:
        other = list(range(length))
        other[at] = -1
        assert not digests.begin_with(pack_tokens(other))


@pytest.mark.parametrize("length", [*range(1, 12), *range(126, 132), *range(254, 260), 511, 5000])
def test_prefix_of_any_length_is_recognised_by_its_digest(length: int) -> None:
    prompt = list(range(length))
    digests = PrefixDigests.of(pack_tokens(prompt))

    assert all(
        digests.begin_with(pack_tokens(prompt[:n])) for n in range(1, length + 1, 1 + length // 99)
    )
    assert digests.is_begun_by(pack_tokens([*prompt, 7]))
    assert not digests.is_begun_by(pack_tokens([*prompt[:-1], -1]))


def test_digests_of_a_long_prompt_are_small() -> None:
    digests = PrefixDigests.of(pack_tokens(range(30_000)))

    assert len(digests.digests) * digests.digests.itemsize < 1200


def test_prompts_have_the_same_digest_exactly_when_they_are_the_same() -> None:
    assert prompt_digest(pack_tokens([1, 2])) == prompt_digest(pack_tokens((1, 2)))
    assert prompt_digest(pack_tokens([1, 2])) != prompt_digest(pack_tokens([2, 1]))
