"""What two texts differ in where they part: a date, a folder, a count, a list in another order.

Shapes are those of known clients, and of dates and paths in general.
"""

from __future__ import annotations

import re
from bisect import bisect_left

from persist_cache.stability import lookalike
from persist_cache.stability.causes.kinds import Kind

_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*"
_DAY = r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]*"
_CLOCK = r"\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?: ?[AaPp]\.?[Mm]\.?)?"
_DATE = re.compile(
    "|".join(
        (
            rf"\d{{4}}-\d{{2}}-\d{{2}}(?:[T ]{_CLOCK}(?:Z|[+-]\d{{2}}:?\d{{2}})?)?",
            r"\d{4}[/.]\d{1,2}[/.]\d{1,2}",
            r"\d{1,2}[/.]\d{1,2}[/.]\d{2,4}",
            rf"(?:{_DAY},? )?{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?(?:,? \d{{4}})?(?:,? {_CLOCK})?",
            rf"(?:{_DAY},? )?\d{{1,2}}\.? {_MONTH}(?:,? \d{{4}})?(?:,? {_CLOCK})?",
            rf"{_CLOCK}(?: (?:UTC|GMT|Z))?",
            _DAY,
            r"\b1[6-9]\d{8}(?:\d{3})?\b",
        )
    )
)
_DATE_LABEL = re.compile(
    r"\b(?:today|current|local|now)\b.{0,12}\b(?:date|time|day|year)\b|\btoday(?:'s| is)\b"
    r"|\b(?:date|time|day)(?: is)?: ",
    re.IGNORECASE,
)
_ENV_LABEL = re.compile(
    r"working director|\bcwd\b|git(?: ?status| repo|Status)|current branch|main branch"
    r"|recent commits|workspace|project (?:root|folder|directory)|^\s*platform:|os version"
    r"|director(?:y|ies)\b|folder structure|^\s*(?:status|shell):|<cwd>",
    re.IGNORECASE,
)
_ENV_TAGS = (
    "env",
    "environment",
    "environment_context",
    "environment_details",
    "environment-details",
    "git_status",
    "workspace_info",
    "directories",
    "files",
    "project_layout",
)
_PATH = re.compile(r"(?:~|[A-Za-z]:)?(?:[/\\][\w.@+ -]+){2,}[/\\]?")
_COMMIT = re.compile(r"\b[0-9a-f]{7,40}\b")
_CLEARED = re.compile(r"\[Old tool result content cleared[^\]\n]*\]")
_BILLING = "x-anthropic-billing-header:"
_COUNT = "<total_tokens>"
_NEAR = 160
_REACH = 4_000
"""Characters in which the tag is looked for that a place is in."""


def shared(old: str, new: str) -> int:
    """How many leading characters two texts have in common."""
    if old[: len(new)] == new[: len(old)]:
        return min(len(old), len(new))
    end = min(len(old), len(new))
    return bisect_left(range(1, end + 1), True, key=lambda size: old[:size] != new[:size])


def shape(old: str, i: int, new: str, j: int) -> Kind | None:
    """What kind of difference there is where one text parts from the other.

    Args:
        old: A text.
        i: Where it parts.
        new: The other one.
        j: Where that parts.

    Returns:
        The kind; None for texts that differ in what they say.
    """
    lines = _line(old, i)[0], _line(new, j)[0]
    if any(one.startswith(_BILLING) for one in lines):
        return Kind.BILLING
    if any(_COUNT in _around(text, at, 40) for text, at in ((old, i), (new, j))):
        return Kind.COUNTDOWN
    cleared = _within(_CLEARED, old, i), _within(_CLEARED, new, j)
    if any(cleared):
        return Kind.CLEARED if all(cleared) else Kind.RESULT_CLEARED
    if _is_date(old, i, new, j):
        return Kind.DATE
    if is_look_alike(old[i:], new[j:]):
        return Kind.LOOK_ALIKE
    reminder = _reminder(old, i), _reminder(new, j)
    if _is_env(old, i, new, j):
        return Kind.ENV
    if None not in reminder:
        same = sorted(str(reminder[0]).split("\n")) == sorted(str(reminder[1]).split("\n"))
        return Kind.REMINDER_ORDER if same else Kind.REMINDERS
    return None


def is_look_alike(old: str, new: str) -> bool:
    """Whether two texts look the same at their beginning, and are not."""
    left, right = old[:_NEAR], new[:_NEAR]
    if min(len(left), len(right)) < 1 or left[0] == right[0]:
        return False
    return lookalike.difference(left[:-1] or left, right[:-1] or right) is not None


def _line(text: str, at: int) -> tuple[str, int]:
    """The line that a place is in, and where in it that is."""
    start = text.rfind("\n", max(0, at - _REACH), at) + 1
    end = text.find("\n", at, at + _REACH)
    return text[start : end if end >= 0 else at + _REACH], at - start


def _around(text: str, at: int, size: int) -> str:
    return text[max(0, at - size) : at + size]


def _within(pattern: re.Pattern[str], text: str, at: int) -> bool:
    line, place = _line(text, at)
    start = max(0, place - _NEAR)
    piece = line[start : place + _NEAR]
    return any(one.start() <= place - start <= one.end() for one in pattern.finditer(piece))


def _is_date(old: str, i: int, new: str, j: int) -> bool:
    if _within(_DATE, old, i) and _within(_DATE, new, j):
        return True
    line, other = _line(old, i)[0], _line(new, j)[0]
    found = _DATE_LABEL.search(line), _DATE_LABEL.search(other)
    if None in found or line == other:
        return False
    # The line names a date or a time, and differs in nothing but what may be one.
    return _DATE.sub("", line) == _DATE.sub("", other)


def _is_env(old: str, i: int, new: str, j: int) -> bool:
    if any(_in_tag(old, i, tag) and _in_tag(new, j, tag) for tag in _ENV_TAGS):
        return True
    lines = _line(old, i)[0], _line(new, j)[0]
    if all(_ENV_LABEL.search(one) for one in lines):
        return True
    if _within(_PATH, old, i) and _within(_PATH, new, j):
        return True
    heads = _around(old, i, _REACH // 4), _around(new, j, _REACH // 4)
    is_git = all("gitStatus" in one or "git status" in one.lower() for one in heads)
    return is_git and (_within(_COMMIT, old, i) or _within(_COMMIT, new, j) or _in_status(lines))


def _in_status(lines: tuple[str, str]) -> bool:
    """Whether both lines are of what `git status --short` prints, or one is its end."""
    return all(re.match(r"\s*(?:[MADRCU?! ]{1,2} \S|\(clean\)|$)", one) for one in lines)


def _reminder(text: str, at: int) -> str | None:
    """The reminder that a place is in."""
    return _in_tag(text, at, "system-reminder")


def _in_tag(text: str, at: int, tag: str) -> str | None:
    """What is in the tag that a place is in; None if it is in no such one."""
    start = text.rfind(f"<{tag}", 0, at)
    closed = text.rfind(f"</{tag}>", 0, at)
    if start < 0 or closed > start:
        return None
    end = text.find(f"</{tag}>", at)
    return None if end < 0 else text[start:end]
