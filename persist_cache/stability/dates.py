"""Sentences that tell today's date or the time, as clients write them into their prompts.

Whole lines and whole sentences are found, never a part of a sentence or a quotation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from persist_cache.stability.lines import Line

_DAY = r"(?:Mon|Tues?|Wed(?:nes)?|Thu(?:rs)?|Fri|Sat(?:ur)?|Sun)(?:day)?"
_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
    r"|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)
_CLOCK = r"\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d{1,9})?)?(?:\s?[AaPp]\.?[Mm]\b\.?)?"
_ZONE = (
    r"(?:\s?(?:Z\b|(?:UTC|GMT)[+-]\d{1,2}(?::?\d{2})?(?!\d)|[+-]\d{2}:?\d{2}(?!\d)"
    r"|(?-i:[A-Z]{3,5}\b|[A-Z]\w+/\w+)))"
)
_NUMBERS = r"(?:\d{4}[-/.]\d{2}[-/.]\d{2}|\d{1,2}[/.]\d{1,2}[/.]\d{2,4})"
_WORDS = (
    rf"(?:{_MONTH}\.?\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}}"
    rf"|\d{{1,2}}(?:st|nd|rd|th|\.)?\s+(?:of\s+)?{_MONTH}\.?,?\s+\d{{4}}"
    rf"|{_MONTH}\s+\d{{1,2}}\s+{_CLOCK}(?:{_ZONE})?\s+\d{{4}})"
)
_DATE = rf"(?:{_DAY},?\s+)?(?:{_NUMBERS}|{_WORDS})(?:\s*\({_DAY}\)|,?\s+{_DAY})?"
_TIME = rf"{_CLOCK}{_ZONE}?"
_VALUE = (
    rf"(?:{_DATE}(?:(?:T|,?\s+(?:at\s+)?){_TIME})?{_ZONE}?"
    rf"|{_TIME}(?:,?\s+(?:on\s+)?{_DATE})?|{_DAY})(?:\s*\([^()\n]{{1,80}}\))?"
)
_WHAT = (
    r"(?:date(?:\s*(?:and|&|/|,)?\s*time)?|time(?:\s+and\s+date)?|datetime|timestamp|day|moment)"
)
_KEY = (
    rf"(?:(?:The\s+)?(?:current|today['’]?s|present)\s+(?:local\s+|system\s+|UTC\s+|ISO\s+)?{_WHAT}"
    rf"(?:\s+\([^()\n]{{1,40}}\))?|The\s+{_WHAT}|{_WHAT}\s+today|Today)"
)
_SAYS = r"(?:\*{0,2}\s*[:=]\s*\*{0,2}\s*|\s+is(?:\s+(?:now|currently|today))?\s*:?\s+\*{0,2})"
_SENTENCE = (
    rf"\*{{0,2}}(?:{_KEY}{_SAYS}|(?:It\s+is|It['’]s)\s+(?:now|currently)\s+){_VALUE}\*{{0,2}}"
)
_BULLET = r"(?:[-*•]\s+)?"
_LINE = re.compile(rf"{_BULLET}{_SENTENCE}(?:\.\s+{_SENTENCE})*\s*\.?\s*", re.IGNORECASE)
_TAGGED = re.compile(
    rf"<((?:current|today)[_-]?(?:date|time|datetime|date[_-]time)|date|time|datetime)>\s*{_VALUE}"
    r"\s*</\1>",
    re.IGNORECASE,
)
_STAMP = re.compile(rf"\d{{4}}-\d{{2}}-\d{{2}}[T ]{_CLOCK}(?:{_ZONE})?")
_WHOLE = re.compile(
    rf"(?:\A|(?<=[^.\s][.!?])\s+)({_SENTENCE}(?:\.\s+{_SENTENCE})*(?:\.(?=\s)|\.?\s*\Z))",
    re.IGNORECASE,
)
_HINTS = ("date", "time", "today", "current", "now", "moment", "day")
_LONGEST = 400
"""Characters of a line that may be nothing but such sentences."""
_QUOTES = '`"“'


def is_date_line(text: str) -> bool:
    """Whether a line tells the date or the time, and nothing else.

    Args:
        text: Without the white space in front of it.
    """
    stripped = text.strip()
    if len(stripped) > _LONGEST or not _may_tell(stripped):
        return False
    return any(form.fullmatch(stripped) for form in (_LINE, _TAGGED, _STAMP))


def sentences(line: Line) -> Iterator[tuple[int, int]]:
    """Where such sentences stand in a line of other things.

    Yields:
        Beginning and end within the text, so that what is left reads as before.
    """
    text = line.text
    if not text or text[0].isspace() or text[0] in ">|#0123456789" or not _may_tell(text):
        return
    for found in _WHOLE.finditer(text):
        before = text[: found.start(1)]
        if any(before.count(quote) % 2 for quote in _QUOTES):
            continue
        end = found.end()
        if found.start() == 0:
            end += len(text[end:]) - len(text[end:].lstrip())
        yield line.start + found.start(), line.start + end


def _may_tell(text: str) -> bool:
    """Whether it is worth looking closer; quick."""
    small = text.lower()
    return small[:1].isdigit() or any(hint in small for hint in _HINTS)
