"""A text line by line, and which of its lines are shown as an example of something."""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec import Struct

_FENCE = re.compile(r"\s*(`{3,}|~{3,})(.*)")
_EXAMPLE = re.compile(
    r"<(/?)(?:(?:[\w-]{0,40}[_-])?(?:examples?|samples?)(?:[_-][\w-]{0,40})?|pre|code|blockquote)\b"
    r"[^<>\n]*>",
    re.IGNORECASE,
)


class Line(Struct, frozen=True):
    """One line of a text.

    Attributes:
        start: Where it begins.
        text: Without its end.
        is_example: It is within a code fence, or within a tag that says example or code.
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
        after = _fence_after(text_line, fence)
        is_fence = after != fence
        tags = [] if fence or is_fence else list(_EXAMPLE.finditer(text_line))
        opened = depth + _opened(text_line, tags)
        found.append(Line(at, text_line, bool(fence or is_fence or opened)))
        fence = after
        depth = max(0, opened - sum(bool(tag[1]) for tag in tags))
        at += len(text_line) + 1
    return found


def _fence_after(line: str, fence: str) -> str:
    """The fence that is open after a line, or "": a shorter one within a longer one is text."""
    mark = _FENCE.match(line)
    if mark is None:
        return fence
    if not fence:
        return "" if mark[1][0] == "`" and "`" in mark[2] else mark[1]
    closes = mark[1].startswith(fence) and not mark[2].strip()
    return "" if closes else fence


def _opened(line: str, tags: Sequence[re.Match[str]]) -> int:
    """How many tags a line begins with; one that is mentioned within a sentence opens nothing."""
    opened = at = 0
    for tag in tags:
        if tag[1] or line[at : tag.start()].strip():
            break
        opened, at = opened + 1, tag.end()
    return opened


class Span(Struct, frozen=True):
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
