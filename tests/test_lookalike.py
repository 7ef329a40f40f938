"""Two texts that differ are printed differently, and what cannot be seen is named."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persist_cache.stability.lookalike import (
    common_text,
    difference,
    escaped,
    is_invisible,
    shown_apart,
)

PAIRS = [
    ("café au lait", "cafe\u0301 au lait", "normalization"),
    ("\uac00 na", "\u1100\u1161 na", "normalization"),
    ("a b", "a\u00a0b", "white_space"),
    ("a b", "a\u3000b", "white_space"),
    ("a  b", "a b", "white_space"),
    ("ab x", "a\u200bb x", "white_space"),
    ("ab x", "a\u2060b x", "white_space"),
    ("ab x", "a\ufeffb x", "white_space"),
    ("x\r\ny", "x\ny", "white_space"),
    ("x\ty", "x    y", "white_space"),
    ("ab x", "a\u200cb x", "invisible"),
    ("ab x", "a\u200db x", "invisible"),
    ("ab x", "a\u00adb x", "invisible"),
    ("ab x", "a\u202eb x", "invisible"),
    ("ab x", "a\u3164b x", "invisible"),
    ("\u2764 x", "\u2764\ufe0f x", "invisible"),
    ("ab x", "a\U000e0041b x", "invisible"),
    ("it's", "it\u2019s", "look_alike"),
    ("say \u201cx\u201d", 'say "x"', "look_alike"),
    ("p\u0430ypal", "paypal", "look_alike"),
    ("\uff21B", "AB", "look_alike"),
    ("é x y", "e\u0301\u00a0x y", "normalization+white_space"),
]


@pytest.mark.parametrize(("one", "other", "code"), PAIRS)
def test_texts_that_look_the_same_print_differently_and_are_named(
    one: str, other: str, code: str
) -> None:
    shown = shown_apart(one, other)
    named = difference(one, other)

    assert shown[0] != shown[1]
    assert all(text.isprintable() for text in shown)
    # Without what is escaped, they are no longer the same text to the eye.
    assert unicodedata.normalize("NFKC", shown[0]) != unicodedata.normalize("NFKC", shown[1])
    assert named is not None
    assert named[0] == code
    assert difference(other, one) == named


@pytest.mark.parametrize(
    ("one", "other"),
    [("London is", "Paris of é"), ("Мир и", "Война и"), ("é", "è"), ("日本", "中国"), ("a", "a b")],
)
def test_what_is_seen_is_neither_escaped_nor_named(one: str, other: str) -> None:
    assert shown_apart(one, other) == (one, other)
    assert difference(one, other) is None


@given(st.text(), st.text())
def test_texts_print_equally_only_when_they_are_equal(one: str, other: str) -> None:
    shown = shown_apart(one, other)

    assert (shown[0] == shown[1]) == (one == other)
    assert not any(is_invisible(character) for character in "".join(shown))


@given(st.text())
def test_nothing_reaches_the_terminal_that_acts_on_it(text: str) -> None:
    assert escaped(text).isprintable()
    assert escaped(text) == shown_apart(text, text)[0]


@given(st.text())
def test_composed_and_decomposed_never_print_alike(text: str) -> None:
    one, other = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    shown = shown_apart(one, other)

    if one != other:
        assert unicodedata.normalize("NFC", shown[0]) != unicodedata.normalize("NFC", shown[1])


def test_marks_stay_with_what_carries_them() -> None:
    assert common_text("cafe au", "cafe\u0301 au") == 3
    assert common_text("caf\u00e9", "cafe\u0301") == 3
    assert common_text("same", "same") == 4
