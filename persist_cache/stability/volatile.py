"""What changes from day to day and from folder to folder in the text of a system message."""

from __future__ import annotations

import functools
from collections.abc import Collection

from persist_cache.stability import environment
from persist_cache.stability.dates import is_date_line, sentences
from persist_cache.stability.lines import Span, lines_of, without
from persist_cache.stability.names import DATE, ENV

_REMINDER = "system-reminder>"


_LONGEST = 1 << 17
"""Characters of a text whose result is remembered: most requests repeat their system prompt."""


def take_out(
    text: str, chosen: Collection[str], *, keep: bool = False
) -> tuple[str, tuple[str, ...], frozenset[str]]:
    """Take out of a system text what tells the date or the folder.

    Args:
        text: The text.
        chosen: Names of repairs, of which `date` and `env` are these.
        keep: The text may be remembered, with its result.

    Returns:
        What is left, what was taken, in order, and the names of the repairs that did it.
    """
    asked = frozenset(chosen) & {DATE, ENV}
    act = _remembered if keep and len(text) <= _LONGEST else _take_out
    return act(text, asked)


def _take_out(text: str, chosen: frozenset[str]) -> tuple[str, tuple[str, ...], frozenset[str]]:
    spans = volatile_spans(text, chosen)
    taken = [text[span.start : span.end].strip("\n") for span in spans]
    names = frozenset[str]().union(*(span.names for span in spans))
    return without(text, spans), tuple(_flush(one) for one in taken if one.strip()), names


_remembered = functools.lru_cache(maxsize=32)(_take_out)


def volatile_spans(text: str, chosen: Collection[str]) -> list[Span]:
    """Where a system text tells the date or the folder: whole lines or sentences, in order."""
    wants_date, wants_env = DATE in chosen, ENV in chosen
    if not wants_date and not (wants_env and environment.may_tell_environment(text)):
        return []
    lines = lines_of(text)
    dated = [not one.is_example and is_date_line(one.text.strip()) for one in lines]
    ranges = environment.blocks(lines) if wants_env else []
    spans = []
    for start, end in ranges:
        names = {ENV, DATE} if wants_date and any(dated[start:end]) else {ENV}
        spans.append(_whole(text, lines[start].start, lines[end - 1].end, frozenset(names)))
    if wants_date:
        covered = {place for start, end in ranges for place in range(start, end)}
        for place, line in enumerate(lines):
            if place in covered or line.is_example:
                continue
            if dated[place] and _is_own_line(line.text):
                spans.append(_whole(text, line.start, line.end, frozenset({DATE})))
            elif not dated[place]:
                spans += [Span(a, b, frozenset({DATE})) for a, b in sentences(line)]
    spans.sort(key=lambda span: span.start)
    # In a message of the user, half of such a tag would take the rest of it for a reminder.
    return [one for one in _joined(spans) if _REMINDER not in text[one.start : one.end]]


def _is_own_line(text: str) -> bool:
    """Whether a line is not set off as a quotation or as code, by four blanks or more."""
    return len(text) - len(text.lstrip()) < 4 and not text.startswith("\t")


def _whole(text: str, start: int, end: int, names: frozenset[str]) -> Span:
    """Lines with the break behind them, or in front of them where they are the last ones."""
    if end < len(text):
        return Span(start, end + 1, names)
    return Span(max(0, start - 1), end, names)


def _joined(spans: list[Span]) -> list[Span]:
    """Spans without overlaps, those that touch as one."""
    found: list[Span] = []
    for span in spans:
        if found and span.start <= found[-1].end:
            last = found[-1]
            found[-1] = Span(last.start, max(last.end, span.end), last.names | span.names)
        else:
            found.append(span)
    return found


def _flush(text: str) -> str:
    """A sentence as a line of its own; lines stay as they are."""
    return text if "\n" in text else text.strip()
