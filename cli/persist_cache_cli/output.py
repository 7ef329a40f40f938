"""How values are shown: sizes, times, tables, trees, JSON. Pure functions but for the last ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import repeat
from typing import Any

import click
import msgspec
from msgspec import Struct

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")
_GAP = "  "
_ELLIPSIS = "…"

Painter = Callable[[str, str], str]
"""Takes a text and the name of a style, and returns the text with its colours."""


def format_bytes(nbytes: int) -> str:
    """`1536` is `1.5 KiB`; three digits, so that columns stay narrow."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in _UNITS:
        value /= 1024
        if abs(value) < 1023.5 or unit == _UNITS[-1]:
            digits = 1 if abs(value) < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
    raise AssertionError("unreachable")


def format_duration(seconds: float) -> str:
    """`95` is `1.6 min`: a length of time, to two or three digits."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    for limit, length, unit in ((59.5, 1, "s"), (3570, 60, "min"), (171_000, 3600, "h")):
        if seconds < limit:
            value = seconds / length
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    return f"{seconds / 86400:,.0f} d"


def format_age(seconds: float) -> str:
    """`7300` is `2 h`: how long ago, in whole units."""
    if seconds < 1:
        return "now"
    whole = int(seconds)
    for limit, length, unit in ((60, 1, "s"), (3600, 60, "min"), (172_800, 3600, "h")):
        if whole < limit:
            return f"{whole // length} {unit}"
    return f"{whole // 86400:,} d"


def format_time(seconds: float) -> str:
    """UTC seconds as local time, to the second; a damaged record may hold what is no date."""
    import datetime

    try:
        return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        return "no date"


def keeping(pinned: bool, expires: float | None, now: float) -> str:
    """Whether an entry is pinned, and how long it has until it expires."""
    words = ["pinned"] if pinned else []
    if expires is not None:
        left = expires - now
        words.append(format_age(left) if left > 0 else "expired")
    return ", ".join(words)


def plural(count: int, one: str, many: str = "") -> str:
    """`1 entry`, `2,000 entries`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def printable(text: str) -> str:
    """Show what a terminal would obey: labels and prompts may hold control characters."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def printable_lines(text: str) -> str:
    """Like `printable`, with line ends and tabs left alone."""
    return "\n".join(
        "\t".join(printable(part) for part in line.split("\t")) for line in text.split("\n")
    )


def text_width(text: str) -> int:
    """Columns that `text` takes on a terminal."""
    return len(text) if text.isascii() else sum(map(_character_width, text))


@cache
def _character_width(one: str) -> int:
    import unicodedata

    if unicodedata.combining(one):
        return 0
    return 1 + (unicodedata.east_asian_width(one) in "WF")


def shorten(text: str, width: int, cut: str = "middle") -> str:
    """Make `text` fit; names of models differ at both ends, so the middle is cut out."""
    if text_width(text) <= width:
        return text
    room = max(0, width - 1)
    behind = room // 2 if cut == "middle" else 0
    return _take(text, room - behind) + _ELLIPSIS + _take(text[::-1], behind)[::-1]


def _take(text: str, width: int) -> str:
    """As much of the beginning of `text` as fits."""
    taken = ""
    for one in text:
        width -= text_width(one)
        if width < 0:
            break
        taken += one
    return taken


class Column(Struct, frozen=True):
    """A column of a table.

    Attributes:
        title: Its heading.
        right: Aligned to the right, as numbers are.
        least: May be shortened to so many columns; 0 if it may not.
        cut: Where it is shortened: `middle` or `end`.
        drop: Left out where there is no room: the highest goes first, 0 never goes.
        style: Name of its colour.
    """

    title: str
    right: bool = False
    least: int = 0
    cut: str = "middle"
    drop: int = 0
    style: str = ""


def plain(text: str, style: str) -> str:
    """The painter that paints nothing."""
    return text


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str] | str],
    *,
    width: int | None = None,
    paint: Painter = plain,
) -> list[str]:
    """Lay out a table as lines; nothing wraps.

    Args:
        columns: What there is.
        rows: A cell for each column; or a text that heads the rows that follow.
        width: Columns of the terminal; None shows everything.
        paint: Adds colours.
    """
    cells = [row for row in rows if not isinstance(row, str)]
    by_column = list(zip(*cells, strict=True)) or [()] * len(columns)
    heading, *lines = table_of_columns(columns, by_column, width=width, paint=paint)
    if len(lines) == len(rows):
        return [heading, *lines]
    following = iter(lines)
    return [
        heading,
        *(
            paint(shorten(row, width or text_width(row)), "heading")
            if isinstance(row, str)
            else next(following)
            for row in rows
        ),
    ]


def table_of_columns(
    columns: Sequence[Column],
    texts: Sequence[Sequence[str]],
    *,
    width: int | None = None,
    paint: Painter = plain,
) -> list[str]:
    """Like `table`, but with the cells of each column together."""
    sizes = [_sizes(cells) for cells in texts]
    natural = [
        max([text_width(column.title), *size.values()])
        for column, size in zip(columns, sizes, strict=True)
    ]
    shown = list(range(len(columns)))
    widths = list(natural)
    if width is not None:
        shown = _choose(columns, natural, sizes, width)
        widths = _fit(columns, natural, shown, width)
    laid = []
    for place in shown:
        column, size, cells = columns[place], widths[place], texts[place]
        title = column.title
        heading = _pad(column, title, text_width(title), size, "heading", paint)
        laid.append([heading, *_lay(column, cells, sizes[place], size, paint)])
    return list(map(str.rstrip, map(_GAP.join, zip(*laid, strict=True))))


def _lay(
    column: Column, cells: Sequence[str], sizes: Mapping[str, int], width: int, paint: Painter
) -> Iterator[str]:
    """The cells of one column, all `width` wide."""
    only_pads = (paint is plain or not column.style) and max(sizes.values(), default=0) <= width
    if only_pads and 2 * len(sizes) > len(cells) and all(map(str.isascii, sizes)):
        return map(str.rjust if column.right else str.ljust, cells, repeat(width))
    padded = {
        text: _pad(column, text, taken, width, column.style, paint) for text, taken in sizes.items()
    }
    return map(padded.__getitem__, cells)


def _sizes(cells: Sequence[str]) -> dict[str, int]:
    """Each text with the columns that it takes.

    Most columns say the same again and again: each text is measured and laid out once.
    """
    different = set(cells)
    if all(map(str.isascii, different)):
        return dict(zip(different, map(len, different), strict=True))
    return {text: text_width(text) for text in different}


def _pad(column: Column, text: str, taken: int, width: int, style: str, paint: Painter) -> str:
    """Fit `text`, which is `taken` columns wide, into `width`."""
    if taken > width:
        text = shorten(text, width, column.cut)
        taken = text_width(text)
    padding = " " * (width - taken)
    return padding + paint(text, style) if column.right else paint(text, style) + padding


def _choose(
    columns: Sequence[Column], natural: Sequence[int], texts: Sequence[Iterable[str]], width: int
) -> list[int]:
    """Columns for which there is room, and that say anything at all."""
    shown = [place for place, column in enumerate(columns) if not column.drop or any(texts[place])]

    def least() -> int:
        sizes = [min(natural[place], columns[place].least or natural[place]) for place in shown]
        return sum(sizes) + len(_GAP) * (len(shown) - 1)

    while least() > width:
        candidate = max(shown, key=lambda place: columns[place].drop)
        if not columns[candidate].drop:
            break
        shown.remove(candidate)
    return shown


def _fit(
    columns: Sequence[Column], natural: Sequence[int], shown: Sequence[int], width: int
) -> list[int]:
    """Widths of the columns: the widest flexible one gives way first."""
    widths = list(natural)
    flexible = [place for place in shown if columns[place].least]
    spare = width - sum(widths[place] for place in shown) - len(_GAP) * (len(shown) - 1)
    while spare < 0 and flexible:
        widest = max(flexible, key=lambda place: widths[place])
        if widths[widest] <= columns[widest].least:
            flexible.remove(widest)
            continue
        widths[widest] -= 1
        spare += 1
    return widths


def pairs(
    items: Iterable[tuple[str, str]], *, width: int | None = None, paint: Painter = plain
) -> list[str]:
    """Names and values below each other.

    Args:
        items: What there is; what has no value is left out.
        width: Columns of the terminal, at which values go on below; None for a line each.
        paint: Adds colours.
    """
    found = [(name, value) for name, value in items if value]
    widest = max((len(name) for name, _ in found), default=0)
    lines = []
    for name, value in found:
        head = name.ljust(widest)
        line = hanging(head + _GAP, value, width)
        lines.append(paint(head, "heading") + line[len(head) :])
    return lines


def hanging(head: str, text: str, width: int | None) -> str:
    """`text` behind `head`; what does not fit into `width` goes on below, between words.

    Args:
        head: Such as the name of what is said.
        text: One line.
        width: Columns of the terminal; None for one long line.
    """
    if width is None or text_width(head + text) <= width:
        return head + text
    import textwrap

    return textwrap.fill(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * text_width(head),
        break_on_hyphens=False,
    )


def _deep_json(value: Any) -> Iterator[str]:
    """The pieces of `value` as JSON, indented by two, however deep it is nested."""
    import json

    # What is still to be written, the next last: text as it is, or a value at its depth.
    pending: list[str | tuple[Any, int]] = [(value, 0)]
    while pending:
        one = pending.pop()
        if isinstance(one, str):
            yield one
            continue
        this, depth = one
        if not isinstance(this, (dict, list)) or not this:
            yield json.dumps(msgspec.to_builtins(this), allow_nan=False)
            continue
        is_object = isinstance(this, dict)
        members = list(this.items()) if isinstance(this, dict) else [("", one) for one in this]
        inside = "\n" + "  " * (depth + 1)
        rest: list[str | tuple[Any, int]] = ["{" if is_object else "["]
        for place, (name, member) in enumerate(members):
            rest.append("," * (place > 0) + inside)
            if is_object:
                rest.append(json.dumps(name) + ": ")
            rest.append((member, depth + 1))
        rest.append("\n" + "  " * depth + ("}" if is_object else "]"))
        pending += reversed(rest)


def print_json(value: Any) -> None:
    """Write `value` to standard output as JSON, readable, with dates and numbers as they are.

    Bytes of a file name that are no UTF-8 appear as escaped surrogates, as Python decodes them.
    """
    try:
        # A tenth of the time that `json` takes to indent.
        text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    except RecursionError:  # the tree of a long conversation
        text = "".join(_deep_json(value))
    except (OverflowError, UnicodeEncodeError) as error:  # integers of more than 64 bits; names
        import json

        is_name = isinstance(error, UnicodeEncodeError)
        value = msgspec.to_builtins(value)
        text = json.dumps(value, indent=2, ensure_ascii=is_name, allow_nan=False)
    click.echo(text)


_STYLES: dict[str, dict[str, Any]] = {
    "heading": {"bold": True},
    "id": {"fg": "yellow"},
    "good": {"fg": "green"},
    "bad": {"fg": "red"},
    "faint": {"dim": True},
}


def painter() -> Painter:
    """Colours on a terminal, unless `NO_COLOR` is set; otherwise none."""
    if not is_terminal() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return plain

    def paint(text: str, style: str) -> str:
        return click.style(text, **_STYLES[style]) if style and text.strip() else text

    return paint


def is_terminal() -> bool:
    return sys.stdout.isatty()


def terminal_width() -> int | None:
    """Columns of the terminal; None when the output goes elsewhere and nothing must be cut."""
    if not is_terminal():
        return None
    import shutil

    return max(40, shutil.get_terminal_size().columns)
