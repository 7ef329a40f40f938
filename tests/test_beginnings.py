"""How stored prompts begin: what tells them apart, harmless whatever is in it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persist_cache.fingerprint.value import Fingerprint
from persist_cache.queries.beginnings import (
    MAX_CHARACTERS,
    beginnings,
    on_one_line,
    titles,
    told_apart,
)
from persist_cache.store.store import Store
from tests.fakes import FakeSource

MODEL = Fingerprint.from_fields({"weights": "w0"}, {"name": "org/A"})


def put(store: Store, text: str) -> str:
    """Store a prompt whose tokens are the characters of a text; returns its id."""
    tokens = [ord(one) for one in text]
    store.put(MODEL, tokens, FakeSource(tokens))
    return next(one.id for one in store.entries() if one.num_tokens == len(tokens))


def decoded(model: object, tokens: Sequence[int]) -> str:
    return "".join(map(chr, tokens))


def test_an_entry_begins_behind_the_one_that_it_continues(store: Store) -> None:
    system = put(store, "system\nYou help.\nuser\n")
    asked = put(store, "system\nYou help.\nuser\nWhat is new?\nassistant\n")

    found = titles(store, beginnings(store, [system, asked]), decoded)

    assert found == {system: "You help.", asked: "What is new?"}


def test_prompts_that_begin_alike_are_told_by_where_they_part(store: Store) -> None:
    rules = "You are a careful assistant of people who ask. " * 8
    ids = [put(store, f"{rules}The date is 2026-03-0{day}{'!' * day}") for day in (1, 2)]

    found = titles(store, beginnings(store, ids), decoded)

    assert [id for id in ids if "2026-03-0" in (found[id] or "")] == ids
    assert found[ids[0]] != found[ids[1]]
    assert all((found[id] or "").startswith("You are a careful assistant") for id in ids)


def test_an_entry_that_is_gone_is_left_out(store: Store) -> None:
    assert beginnings(store, ["0123456789abcdef"]) == {}


@settings(max_examples=30)
@given(st.text(max_size=600), st.booleans())
def test_a_title_is_one_short_line_that_nothing_obeys(text: str, is_cut: bool) -> None:
    for title in (on_one_line(text, is_cut=is_cut), told_apart("a title", text)):
        assert title.isprintable()
        assert len(title) <= MAX_CHARACTERS


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("left \u202eright", r"left \u202eright"),
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("שלום", "שלום"),
        ("user\nHello\nassistant\nHi\nuser\nMore", "Hello"),
        ("The user\nsaid: no", "The user said: no"),
        ("system\n", "system"),
        ("  \n ", ""),
    ],
)
def test_titles(text: str, title: str) -> None:
    assert on_one_line(text) == title


def test_a_line_of_a_megabyte_is_cut() -> None:
    assert on_one_line("x" * (1 << 20)) == "x" * (MAX_CHARACTERS - 1) + "…"
