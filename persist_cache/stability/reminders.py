"""Reminders that a client puts into its user's messages: their lists come in any order.

`<system-reminder>` blocks list skills, servers, deferred tools, what hooks said. Lists within them
are sorted, and blocks that follow each other are. Nothing is removed, and instructions of a project
that stand in such a block keep their order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from persist_cache.stability.lines import lines_of

OPEN, CLOSE = "<system-reminder>", "</system-reminder>"
_INSTRUCTIONS = re.compile(
    r"^# claudeMd\b|^Contents of \S+|^Codebase and user instructions", re.MULTILINE
)
"""Texts of the user's own, whose lists are nobody's to sort."""
_ITEM = re.compile(r"[-*] \S")
_WORD = re.compile(r"[A-Za-z][\w.:/@-]*")
_SECTION = re.compile(r"## \S")
_FENCES = ("```", "~~~")


def blocks_of(text: str) -> Iterator[tuple[int, int]]:
    """Where the reminders of a message are: from tag to tag, each on lines of its own."""
    if CLOSE not in text:
        return
    start: int | None = None
    for line in lines_of(text):
        if line.text == OPEN and start is None and not line.is_example:
            start = line.start
        elif line.text == CLOSE and start is not None:
            yield start, line.end
            start = None


def in_order(text: str) -> str:
    """A message with its reminders in an order that does not change."""
    found = list(blocks_of(text))
    if not found:
        return text
    kept, at, place = [], 0, 0
    while place < len(found):
        last = place
        while last + 1 < len(found) and not text[found[last][1] : found[last + 1][0]].strip():
            last += 1
        group = found[place : last + 1]
        said = sorted(_sorted_within(text[start:end]) for start, end in group)
        for (start, end), one in zip(group, said, strict=True):
            kept += [text[at:start], one]
            at = end
        place = last + 1
    kept.append(text[at:])
    return "".join(kept)


def _sorted_within(block: str) -> str:
    """A reminder with its lists sorted."""
    if _INSTRUCTIONS.search(block) or any(fence in block for fence in _FENCES):
        return block
    lines = block.split("\n")
    head, body, foot = lines[:1], lines[1:-1], lines[-1:]
    return "\n".join([*head, *_sorted_sections(body), *foot])


def _sorted_sections(lines: Sequence[str]) -> list[str]:
    """Lines with their lists in order, and the sections that follow each other in one list."""
    starts = [place for place, line in enumerate(lines) if _SECTION.match(line)]
    if len(starts) < 2 or any(re.match(r"# |### ", line) for line in lines[starts[0] :]):
        return _sorted_lists(lines)
    sections = [
        _sorted_lists(lines[start:end])
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)
    ]
    # White space between two of them stays in its place, or the last one would take it along.
    texts = ["\n".join(one) for one in sections]
    stripped = [text.rstrip("\n") for text in texts]
    gaps = [text[len(bare) :] for text, bare in zip(texts, stripped, strict=True)]
    joined = [text + gap for text, gap in zip(sorted(stripped), gaps, strict=True)]
    return [*_sorted_lists(lines[: starts[0]]), *"\n".join(joined).split("\n")]


def _sorted_lists(lines: Sequence[str]) -> list[str]:
    """Lines with each run of items sorted: points with what is indented below them, or names."""
    found: list[str] = []
    at = 0
    while at < len(lines):
        items, end = _items(lines, at)
        if len(items) < 2:
            end, run = _names(lines, at)
            items = [[name] for name in run]
        if len(items) < 2:
            found.append(lines[at])
            at += 1
            continue
        for item in sorted(items):
            found += item
        at = end
    return found


def _items(lines: Sequence[str], at: int) -> tuple[list[list[str]], int]:
    """Points from a line on, and where they end."""
    items: list[list[str]] = []
    while at < len(lines):
        if _ITEM.match(lines[at]):
            items.append([lines[at]])
        elif items and lines[at].startswith((" ", "\t")) and lines[at].strip():
            items[-1].append(lines[at])
        else:
            break
        at += 1
    return items, at


def _names(lines: Sequence[str], at: int) -> tuple[int, list[str]]:
    """Lines from one on that are one name each, and where they end."""
    end = at
    while end < len(lines) and _WORD.fullmatch(lines[end]):
        end += 1
    return end, list(lines[at:end])
