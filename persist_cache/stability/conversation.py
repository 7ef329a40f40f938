"""A conversation of any protocol with its repairs: the one place that all requests pass."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from msgspec import Struct

from persist_cache.stability import reminders, tool_order
from persist_cache.stability.moved import Moves
from persist_cache.stability.names import (
    BILLING,
    CLEARED,
    COUNTDOWN,
    DATE,
    ENV,
    REMINDERS,
    TOOLS,
)
from persist_cache.stability.repairs import system_text

_CLEARED = re.compile(
    r"(\[Old tool result content cleared) at \d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?"
    r"(?: ?(?:Z|UTC|[+-]\d{2}:?\d{2}))?\]"
)
_BETWEEN = "\n\n"
_MOVING = frozenset({DATE, ENV})
_IN_TEXTS = frozenset({BILLING, COUNTDOWN, CLEARED})


class Stabilized(Struct, frozen=True):
    """A conversation after its repairs.

    Attributes:
        messages: What is left; those that were not changed are the same objects.
        tools: Definitions, or None.
        names: Of the repairs that changed something, in order.
        places: For each message that was given, where it is now; None for one that had nothing
            but what was taken out of it.
    """

    messages: list[Any]
    tools: Sequence[Any] | None
    names: tuple[str, ...]
    places: tuple[int | None, ...]


def stabilize(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    chosen: Collection[str],
    moves: Moves | None = None,
    *,
    keep: bool = True,
) -> Stabilized:
    """Repair what breaks the common prefix of a client's requests.

    Args:
        messages: Of a chat, as templates take them; content is text, or a list of parts.
        tools: Definitions of functions, or None.
        chosen: Names of the repairs that may be done.
        moves: What was told where in earlier requests; None when that is not known.
        keep: Remember where this request is told what; else nothing of it is kept.
    """
    names: set[str] = set()
    said: list[Any] = list(messages)
    if not _IN_TEXTS.isdisjoint(chosen):
        said = _with_repaired_texts(said, chosen, names)
    pieces = _taken_out(said, chosen, names, keep=keep)
    if REMINDERS in chosen:
        said = [
            _edited(one, reminders.in_order, REMINDERS, names) if one.get("role") == "user" else one
            for one in said
        ]
    placed = _placed(said, pieces, chosen, moves, keep=keep)
    if names.isdisjoint(_MOVING) and any(a is not b for a, b in zip(said, placed, strict=True)):
        names |= _MOVING.intersection(chosen)  # of an earlier request; its client tells it no more
    gone = {
        at
        for at, (old, new) in enumerate(zip(messages, placed, strict=True))
        if new is not old and new.get("role") == "system" and _text(new) == ""
    }
    if tools and TOOLS in chosen:
        ordered = tool_order.in_order(tools)
        if not tool_order.is_same(ordered, list(tools)):
            tools = ordered
            names.add(TOOLS)
    places: list[int | None] = []
    left: list[Any] = []
    for at, message in enumerate(placed):
        places.append(None if at in gone else len(left))
        if at not in gone:
            left.append(message)
    return Stabilized(left, tools, tuple(sorted(names)), tuple(places))


def _with_repaired_texts(
    messages: Sequence[Any], chosen: Collection[str], names: set[str]
) -> list[Any]:
    """Messages after the repairs that leave each text in its place."""
    found = []
    for message in messages:
        match message.get("role"):
            case "system":
                text = _text(message)
                repaired = None if text is None else system_text(text, chosen)
                if repaired is not None and repaired.names:
                    names.update(repaired.names)
                    message = {**message, "content": repaired.text}
            case "tool" if CLEARED in chosen:
                message = _edited(message, _without_time, CLEARED, names)
        found.append(message)
    return found


def _edited(message: Any, edit: Any, name: str, names: set[str]) -> Any:
    """A message with its text edited, or each of its parts that is a text."""
    content = message.get("content")
    if isinstance(content, str):
        new: Any = edit(content)
    elif isinstance(content, list):
        new = [
            {**part, "text": edit(part["text"])}
            if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            else part
            for part in content
        ]
    else:
        return message
    if new == content:
        return message
    names.add(name)
    return {**message, "content": new}


def _without_time(text: str) -> str:
    found = _CLEARED.fullmatch(text.strip())
    return text if found is None else text.replace(found[0], f"{found[1]}]")


def _taken_out(
    messages: list[Any], chosen: Collection[str], names: set[str], *, keep: bool
) -> list[str]:
    """Take out of a conversation what is to stand elsewhere; changes the list."""
    if _MOVING.isdisjoint(chosen) or _first_user(messages) is None:
        return []
    # What it looks for takes long to compile, and most servers never ask for it.
    from persist_cache.stability.volatile import take_out

    pieces: list[str] = []
    for at, message in enumerate(messages):
        if message.get("role") != "system":
            break
        text = _text(message)
        if text is None:
            continue
        before, found = None, list[str]()
        while text != before:  # what one of them leaves at the end may be the other one's
            before = text
            text, taken, by = take_out(text, chosen, keep=keep)
            repaired = system_text(text, chosen)
            text = repaired.text
            found += taken
            names |= by | set(repaired.names)
        if found:
            messages[at] = {**message, "content": text}
            pieces += found
    first = _first_user(messages)
    if DATE in chosen and first is not None:
        messages[first], dates = _without_dates_in_reminders(messages[first], keep=keep)
        pieces += dates
        names |= {DATE} if dates else set()
    return pieces


def _without_dates_in_reminders(message: Any, *, keep: bool) -> tuple[Any, list[str]]:
    """A message without what its reminders tell of the date, and that."""
    from persist_cache.stability.volatile import take_out

    taken: list[str] = []

    def edit(text: str) -> str:
        kept, at = [], 0
        for start, end in reminders.blocks_of(text):
            left, found, _ = take_out(text[start:end], {DATE}, keep=keep)
            kept += [text[at:start], left]
            taken.extend(found)
            at = end
        return "".join(kept) + text[at:]

    return _edited(message, edit, DATE, set()), taken


def _placed(
    messages: Sequence[Any],
    pieces: Sequence[str],
    chosen: Collection[str],
    moves: Moves | None,
    *,
    keep: bool,
) -> list[Any]:
    """Messages with what was taken out at the ends of messages of the user."""
    placed = list(messages)
    first = _first_user(messages)
    if first is None or _MOVING.isdisjoint(chosen):
        return placed
    if moves is None or (not pieces and not moves):
        places: Sequence[tuple[int, str]] = [(first, "\n".join(pieces))] if pieces else []
    else:
        places = moves.place(messages, pieces, keep=keep)
    for at, text in places:
        placed[at] = _with_end(placed[at], text)
    return placed


def _with_end(message: Any, text: str) -> Any:
    """A message with a text at its end."""
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": [*content, {"type": "text", "text": _BETWEEN + text}]}
    return {**message, "content": f"{content}{_BETWEEN}{text}" if content else text}


def _first_user(messages: Sequence[Any]) -> int | None:
    roles = [one.get("role") for one in messages]
    return roles.index("user") if "user" in roles else None


def _text(message: Any) -> str | None:
    """The text of a message as templates get it; None for one that is more than text."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [
            part.get("text")
            for part in content
            if isinstance(part, Mapping) and part.get("type") == "text"
        ]
        known = [text for text in texts if isinstance(text, str)]
        return "".join(known) if len(known) == len(content) else None
    return content if isinstance(content, str) else None
