"""Tiers, and tokens as bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persist_cache.entry import TIER_LABELS, Tier
from persist_cache.tokens import common_prefix_tokens, pack_tokens, unpack_tokens

IDS = st.integers(-(1 << 63), (1 << 63) - 1)


@given(st.lists(IDS))
def test_tokens_survive_packing(tokens: list[int]) -> None:
    assert unpack_tokens(pack_tokens(tokens)) == tokens


def test_packed_tokens_are_little_endian_everywhere() -> None:
    assert pack_tokens([1, -2]) == b"\x01" + bytes(7) + b"\xfe" + b"\xff" * 7


@pytest.mark.parametrize("tokens", [[1 << 63], [1.5], ["a"], [None]])
def test_what_is_no_id_is_refused(tokens: list[object]) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        pack_tokens(tokens)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_common_prefix_counts_whole_tokens(stem: list[int], a: list[int], b: list[int]) -> None:
    left, right = [*stem, *a], [*stem, *b]
    expected = 0
    for x, y in zip(left, right, strict=False):
        if x != y:
            break
        expected += 1
    assert common_prefix_tokens(pack_tokens(left), pack_tokens(right)) == expected


def test_tiers_are_ordered_and_parsed() -> None:
    assert TIER_LABELS == ("assistant", "user", "system")
    assert Tier.parse("System") is Tier.SYSTEM
    assert Tier.parse(Tier.USER) is Tier.USER
    for bad in ("", "tool", None):
        with pytest.raises(ValueError, match="unknown tier"):
            Tier.parse(bad)  # type: ignore[arg-type]
