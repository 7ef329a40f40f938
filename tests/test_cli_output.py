"""Sizes, times, tables: what people see, and what they may type."""

from __future__ import annotations

import click
import pytest

from persist_cache_cli.output import (
    Column,
    format_age,
    format_bytes,
    format_duration,
    format_time,
    hanging,
    painter,
    pairs,
    printable,
    printable_lines,
    shorten,
    table,
    text_width,
)
from persist_cache_cli.parse import parse_duration, parse_size


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (102_340, "99.9 KiB"),
        (102_400, "100 KiB"),
        (1_048_063, "1023 KiB"),
        (1_048_570, "1.0 MiB"),
        (5 << 30, "5.0 GiB"),
        (3 << 60, "3072 PiB"),
    ],
)
def test_format_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0004, "0 ms"),
        (0.05, "50 ms"),
        (0.0999, "0.1 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1.0 min"),
        (95, "1.6 min"),
        (3599, "1.0 h"),
        (86400, "24 h"),
        (604800, "7 d"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "now"), (0.5, "now"), (59, "59 s"), (7300, "2 h"), (86400 * 400, "400 d")],
)
def test_format_age(seconds: float, text: str) -> None:
    assert format_age(seconds) == text


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("1024", 1024),
        ("500MB", 500_000_000),
        ("500 mb", 500_000_000),
        ("2GiB", 2 << 30),
        ("1.5KiB", 1536),
        ("10G", 10_000_000_000),
        ("1TB", 10**12),
        ("7B", 7),
    ],
)
def test_parse_size(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "MB", "-1", "1e9", "inf", "nan", "5 apples", "1GB2", "٣x"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45), ("30m", 1800), ("12h", 43200), ("7d", 604800), ("2w", 1209600), ("1h30m", 5400)],
)
def test_parse_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-7d", "7 years", "1h30", "none", "101000w"])
def test_parse_duration_refuses(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_duration(text)


COLUMNS = (
    Column("id"),
    Column("model", least=8),
    Column("bytes", right=True),
    Column("label", least=6, cut="end", drop=1),
)
ROWS = (
    ("ab", "a-model-with-a-long-name-4bit", "1.0 MiB", "日本語のラベル"),
    ("cd", "short", "12 B", ""),
)


def test_table_aligns_numbers_and_shows_all_without_a_terminal() -> None:
    assert table(COLUMNS, ROWS) == [
        "id  model                            bytes  label",
        "ab  a-model-with-a-long-name-4bit  1.0 MiB  日本語のラベル",
        "cd  short                             12 B",
    ]


@pytest.mark.parametrize("width", [24, 30, 40, 50, 80])
def test_table_never_wraps(width: int) -> None:
    lines = table(COLUMNS, ROWS, width=width)

    assert max(text_width(line) for line in lines) <= width
    assert "1.0 MiB" in lines[1]


def test_table_drops_columns_that_do_not_fit_or_say_nothing() -> None:
    assert "label" not in table(COLUMNS, ROWS, width=24)[0]
    assert "label" in table(COLUMNS, ROWS, width=40)[0]
    assert "label" not in table(COLUMNS, [ROWS[1]], width=80)[0]


def test_table_has_rows_that_head_others() -> None:
    lines = table(COLUMNS, ["a heading that is longer than the table is wide", ROWS[1]], width=30)

    assert text_width(lines[1]) == 30
    assert lines[0].startswith("id  model  bytes")


def test_shorten_keeps_both_ends_or_the_beginning() -> None:
    assert shorten("Qwen3-30B-A3B-4bit", 11) == "Qwen3…-4bit"
    assert shorten("support agent", 8, "end") == "support…"
    assert shorten("short", 8) == "short"
    assert text_width(shorten("日本語のラベル", 6)) <= 6


def test_control_characters_are_shown_not_obeyed() -> None:
    assert printable("a\x1b[31mb\n") == "a\\x1b[31mb\\n"
    assert printable_lines("a\tb\n\x1bc") == "a\tb\n\\x1bc"


@pytest.mark.parametrize(
    ("terminal", "env", "coloured"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals(
    terminal: bool, env: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    assert ("\x1b" in painter()("text", "good")) == coloured


def test_what_is_no_date_is_called_so() -> None:
    assert format_time(1.8e13) == format_time(float("nan")) == "no date"


def test_long_text_goes_on_below_its_beginning() -> None:
    text = " two spaces  within, and a-word with-hyphens"

    assert hanging("  head  ", text, None) == "  head  " + text
    assert hanging("  head  ", text, 80) == "  head  " + text
    assert hanging("  head  ", text, 30).splitlines() == [
        "  head   two spaces  within,",
        "        and a-word",
        "        with-hyphens",
    ]
    assert hanging("", "x" * 50, 40).splitlines() == ["x" * 40, "x" * 10]


def test_values_go_on_below_their_beginning() -> None:
    items = [("one", "a value that is long"), ("", "more of it"), ("second", "")]

    assert pairs(items) == ["one  a value that is long", "     more of it"]
    assert pairs(items, width=20) == ["one  a value that is\n     long", "     more of it"]
    painted = pairs(items[:1], width=20, paint=lambda text, style: f"<{text}>")
    assert painted == ["<one>  a value that is\n     long"]
