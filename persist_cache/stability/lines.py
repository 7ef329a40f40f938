"""A text line by line, and which of its lines are shown as an example of something."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_FENCES = ("```", "~~~")
_EXAMPLE = re.compile(r"<(/?)(?:good_|bad_)?examples?\b[^>\n]*>", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a text.

    Attributes:
        start: Where it begins.
        text: Without its end.
        is_example: It is within a code fence, or within a tag that says example.
    """

    start: int
    text: str
    is_example: bool

    @property
    def end(self) -> int:
        """Where it ends, in front of the line break."""
        return self.start + len(self.text)

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing in it."""
        return not self.text.strip()


def lines_of(text: str) -> list[Line]:
    """The lines of a text, in order."""
    found, at, fence, depth = [], 0, "", 0
    for text_line in text.split("\n"):
        mark = text_line.lstrip()[:3]
        is_fence = mark in _FENCES and mark == (fence or mark)
        tags = [] if fence or is_fence else list(_EXAMPLE.finditer(text_line))
        # A tag that is mentioned within a sentence opens nothing.
        begins = [tag for tag in tags if not tag[1] and not text_line[: tag.start()].strip()]
        opened = depth + len(begins)
        found.append(Line(at, text_line, bool(fence or is_fence or opened)))
        if is_fence:
            fence = "" if fence else mark
        depth = max(0, opened - sum(bool(tag[1]) for tag in tags))
        at += len(text_line) + 1
    return found


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a text.

    Attributes:
        start: Where it begins.
        end: Where it ends.
        names: Of the repairs that move it.
    """

    start: int
    end: int
    names: frozenset[str]


def without(text: str, spans: Sequence[Span]) -> str:
    """A text without some of its parts, which are in order, and without white space left at its end
    if they were there."""
    kept, at = [], 0
    for span in spans:
        kept.append(text[at : span.start])
        at = span.end
    rest = text[at:]
    left = "".join(kept) + rest
    return left if not spans or rest.strip() else left.rstrip()
