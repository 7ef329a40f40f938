"""Where in a prompt's tokens the places are that a client marks, to be kept up to there.

The conversation is rendered once more, as text, with a sign at each mark. Without the signs it is
the prompt, and the tokenizer says which of its tokens end in front of each.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from persist_cache.server.protocols.asked import Mark
from persist_cache.stability.conversation import Stabilized

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None], str]
Encode = Callable[[str], tuple[Sequence[int], Sequence[tuple[int, int]]]]

_OPEN, _CLOSE = "Zq5ca1x", "x5ca1qZ"
"""Letters and digits, which all templates print as they are, also within JSON."""
_SIGN = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


def place_marks(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    marks: Sequence[Mark],
    prompt: Sequence[int],
    *,
    render: Render,
    encode: Encode,
) -> list[int | None]:
    """Count the tokens in front of each mark.

    Args:
        messages: As the prompt was rendered from them; content is text.
        tools: Definitions, or None.
        marks: In any order.
        prompt: Token ids.
        render: Makes the prompt's text of messages and tools.
        encode: Makes tokens of a text, with the characters from which to which each goes.

    Returns:
        For each mark the number of tokens; None where it cannot be told, because the template
        does not print the marked text as it is.
    """
    signed = _Signed(messages, tools)
    places = [signed.sign(mark) for mark in marks]
    if not marks or any(_OPEN in str(one) for one in (messages, tools)):
        return [None] * len(marks)
    text, found = _without_signs(render(signed.messages, signed.tools))
    tokens, spans = encode(text)
    ends = [end for _, end in spans]
    same = _shared(tokens, prompt)
    counted: list[int | None] = []
    for place in places:
        characters = place(found)
        count = 0 if characters is None else bisect.bisect_right(ends, characters)
        counted.append(count if 0 < count <= same else None)
    return counted


Place = Callable[[Mapping[int, int]], int | None]
"""Says where a mark is, when it is known where each sign stood."""


class _Signed:
    """A conversation with signs in it."""

    def __init__(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> None:
        self.messages = list(messages)
        self.tools = None if tools is None else list(tools)
        self._given = messages
        self._signs: dict[tuple[int, int], int] = {}
        self._shifts: dict[int, list[tuple[int, int]]] = {}
        self._tool: int | None = None

    def sign(self, mark: Mark) -> Place:
        """Put a sign at a mark."""
        if mark.message < 0:
            return self._behind_tools()
        if mark.characters is not None or not self._given[mark.message].get("tool_calls"):
            content = str(self._given[mark.message].get("content") or "")
            at = len(content) if mark.characters is None else mark.characters
            return self._at(mark.message, at)
        # Tool calls are printed behind the content, so it is where the next message begins.
        return self._at(mark.message + 1, 0)

    def _behind_tools(self) -> Place:
        first = next((at for at, one in enumerate(self._given) if one.get("role") != "system"), 0)
        head, rest, tool = self._at(0, 0), self._at(first, 0), self._on_last_tool()

        def place(found: Mapping[int, int]) -> int | None:
            # Some templates print the system prompt behind the tools, others in front of them.
            start, end = head(found), tool(found)
            return start if start is not None and end is not None and end < start else rest(found)

        return place

    def _at(self, message: int, characters: int) -> Place:
        if message >= len(self._given):
            return lambda _: None
        number = self._signs.get((message, characters))
        if number is None:
            number = self._signs[message, characters] = len(self._signs)
            shifts = self._shifts.setdefault(message, [])
            content = str(self.messages[message].get("content") or "")
            at = characters + sum(size for where, size in shifts if where <= characters)
            sign = f"{_OPEN}{number}{_CLOSE}"
            shifts.append((characters, len(sign)))
            said = content[:at] + sign + content[at:]
            self.messages[message] = {**self.messages[message], "content": said}
        return lambda found: found.get(number)

    def _on_last_tool(self) -> Place:
        if not self.tools:
            return lambda _: None
        if self._tool is None:
            self._tool = self._signs[-1, 0] = len(self._signs)
            function = self.tools[-1]["function"]
            said = f"{function.get('description') or ''}{_OPEN}{self._tool}{_CLOSE}"
            self.tools[-1] = {**self.tools[-1], "function": {**function, "description": said}}
        number = self._tool
        return lambda found: found.get(number)


def moved_marks(marks: Sequence[Mark], before: Sequence[Message], done: Stabilized) -> list[Mark]:
    """Marks where they are after repairs; those in the midst of what was changed are left out.

    Args:
        marks: Of the request.
        before: Its messages as they were given.
        done: The same after the repairs.
    """
    found = []
    for mark in marks:
        place = done.places[mark.message] if mark.message >= 0 else mark.message
        if place is None:
            # All of it was taken out: what is in front of it ends there.
            place = max((at for at in done.places[: mark.message] if at is not None), default=-1)
            found.append(replace(mark, message=place, characters=None))
            continue
        characters = mark.characters
        if characters is not None:
            old, new = before[mark.message]["content"], done.messages[place]["content"]
            characters = _moved(characters, old, new)
            if characters is None:
                continue
        found.append(replace(mark, message=place, characters=characters))
    return found


def _moved(at: int, old: str, new: str) -> int | None:
    """A place in a text, in another one that differs in its middle."""
    if old[:at] == new[:at]:
        return at
    behind = old[at:]
    return len(new) - len(behind) if new.endswith(behind) else None


def _without_signs(text: str) -> tuple[str, dict[int, int]]:
    """A text without its signs, and where each of them stood."""
    found: dict[int, int] = {}
    parts, before, length = [], 0, 0
    for match in _SIGN.finditer(text):
        parts.append(text[before : match.start()])
        length += match.start() - before
        before = match.end()
        found.setdefault(int(match[1]), length)
    parts.append(text[before:])
    return "".join(parts), found


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts have in common at their beginning."""
    if list(a) == list(b):
        return len(a)
    return next(
        (place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
        min(len(a), len(b)),
    )
