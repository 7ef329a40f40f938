"""Prompts on their way to the disk are known there, as long as that is the truth."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from persist_cache.cache.owners import Owner
from persist_cache.cache.promised import Promised
from persist_cache.tokens import common_prefix_tokens, pack_tokens

OWNER, OTHER = Owner("m", "one"), Owner("m", "other")
PROMPT = pack_tokens([1, 2, 3])
LONGER = pack_tokens([1, 2, 3, 4])


def test_prompt_is_known_from_its_queue_to_the_disk_and_to_its_owner_alone() -> None:
    promised = Promised()

    promised.add(OWNER, PROMPT)
    assert promised.tokens(OWNER, LONGER) == 3
    assert promised.tokens(OTHER, LONGER) == 0
    promised.ended(OWNER, PROMPT, saved=True)
    assert promised.tokens(OWNER, pack_tokens([1, 2, 9])) == 2


def test_what_arrived_before_the_disk_was_asked_is_the_disks_to_know() -> None:
    """It may have been evicted since."""
    promised = Promised()
    promised.add(OWNER, PROMPT)
    promised.ended(OWNER, PROMPT, saved=True)

    assert promised.tokens(OWNER, LONGER, promised.arrived) == 0
    asked = promised.arrived
    promised.add(OWNER, PROMPT)
    promised.ended(OWNER, PROMPT, saved=True)
    assert promised.tokens(OWNER, LONGER, asked) == 3


def test_what_could_not_be_saved_is_no_longer_known() -> None:
    promised = Promised()
    promised.add(OWNER, PROMPT)

    promised.ended(OWNER, PROMPT, saved=False)

    assert promised.tokens(OWNER, LONGER) == 0


def test_what_was_not_queued_as_a_prompt_is_none_when_it_is_saved() -> None:
    promised = Promised()

    promised.ended(OWNER, PROMPT, saved=True)

    assert promised.tokens(OWNER, LONGER) == 0


TOKENS = st.lists(st.integers(0, 2), max_size=6).map(pack_tokens)


@given(known=st.lists(TOKENS, max_size=8), prompt=TOKENS)
def test_as_much_is_known_as_any_of_them_has(known: list[bytes], prompt: bytes) -> None:
    promised = Promised()
    for one in known:
        promised.add(OWNER, one)

    found = promised.tokens(OWNER, prompt)

    assert found == max((common_prefix_tokens(prompt, one) for one in known), default=0)
