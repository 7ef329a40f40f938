"""In what two requests differ: options, tools, texts, each with its place and what it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from msgspec import Struct

from persist_cache.stability.causes.kinds import Kind
from persist_cache.stability.causes.reading import Block, Message, Reading, Tool
from persist_cache.stability.causes.shapes import shape, shared

_MOST_LINES = 400
_MOST_PLACES = 16
_THOUGHT = "<think>"
_SUMMARY = ("summary", "summari", "compact", "continued from a previous", "ran out of context")
_REACH = 2_000
"""Characters of a message in which a summary says that it is one."""


class Difference(Struct, frozen=True):
    """One way in which two requests differ.

    Attributes:
        kind: What it is.
        where: `model`, `salt`, `option`, `tools`, `system` or `messages`.
        at: Where in the later body, or in the earlier one if it is not there any more.
        role: Of the message.
        character: Of that text, where it parts.
        old: The earlier text, as a whole.
        new: The later one.
        also: Kinds of further differences in that text.
    """

    kind: Kind
    where: str
    at: str
    role: str = ""
    character: int = 0
    old: str = ""
    new: str = ""
    also: tuple[Kind, ...] = ()


def differences_of(old: Reading, new: Reading) -> Iterator[Difference]:
    """What differs, in the order in which most templates print it."""
    if old.model != new.model:
        yield Difference(Kind.MODEL, "model", "model", old=old.model, new=new.model)
    if old.salt != new.salt:
        yield Difference(Kind.SALT, "salt", "cache_salt")  # a salt is a secret
    for name in dict.fromkeys((*old.options, *new.options)):
        values = old.options.get(name, ""), new.options.get(name, "")
        if values[0] != values[1]:
            yield Difference(Kind.OPTION, "option", name, old=values[0], new=values[1])
    is_side = _is_side_request(old, new)
    for one in (*_system(old, new), *_tools(old.tools, new.tools)):
        side = is_side and one.kind in (Kind.SYSTEM, Kind.TOOL_SET)
        yield Difference(
            Kind.SIDE_REQUEST if side else one.kind,
            *(one.where, one.at, one.role, one.character, one.old, one.new, one.also),
        )
    yield from _messages(old.messages, new.messages)


def _is_side_request(old: Reading, new: Reading) -> bool:
    """Whether two requests have neither a head nor a first message in common."""
    heads = ["\n".join(block.text for block in one.system) for one in (old, new)]
    if heads[0] == heads[1] or _is_alike(*heads):
        return False
    if not old.messages or not new.messages:
        return True
    first, second = old.messages[0].text, new.messages[0].text
    return first != second


def _is_alike(old: str, new: str) -> bool:
    """Whether two texts are versions of one: half of the lines, or of a line, are the same."""
    if not old or not new:
        return False
    most = max(len(old), len(new))
    head = shared(old, new)
    tail = shared(old[head:][::-1], new[head:][::-1])
    if 2 * (head + tail) >= most:
        return True
    lines = set(old.split("\n")) & set(new.split("\n"))
    return 2 * sum(len(one) + 1 for one in lines) >= most


def _system(old: Reading, new: Reading) -> Iterator[Difference]:
    for before, after in itertools.zip_longest(old.system, new.system):
        if before is None or after is None or before.text != after.text:
            yield _text_difference(before, after, "system", "system", Kind.SYSTEM)


def _text_difference(
    before: Block | None, after: Block | None, where: str, role: str, otherwise: Kind
) -> Difference:
    old, new = ("" if one is None else one.text for one in (before, after))
    place = after or before
    assert place is not None, "one of them is there"
    role = "tool" if place.kind == "tool_result" else role
    character = shared(old, new)
    kinds = list(dict.fromkeys(_kinds(old, new, character)))
    if not kinds:
        return Difference(otherwise, where, place.at, role, character, old, new)
    return Difference(kinds[0], where, place.at, role, character, old, new, tuple(kinds[1:]))


def _kinds(old: str, new: str, first: int) -> Iterator[Kind]:
    """The kinds of all differences between two texts; none if the first one is of no kind."""
    kind = shape(old, first, new, first)
    if kind is None:
        return
    yield kind
    for i, j in itertools.islice(_later_places(old, new, first), _MOST_PLACES):
        if (later := shape(old, i, new, j)) is not None:
            yield later


def _later_places(old: str, new: str, first: int) -> Iterator[tuple[int, int]]:
    """Where else two texts part, as far as they have the same lines in between."""
    start = old.rfind("\n", 0, first) + 1
    lines = old[start:].split("\n"), new[start:].split("\n")
    if max(map(len, lines)) > _MOST_LINES:
        return
    starts = [
        list(itertools.accumulate((len(one) + 1 for one in some), initial=start)) for some in lines
    ]
    for tag, a, b, c, d in SequenceMatcher(None, *lines, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        for x, y in itertools.zip_longest(range(a, b), range(c, d)):
            left = lines[0][x] if x is not None and x < len(lines[0]) else ""
            right = lines[1][y] if y is not None and y < len(lines[1]) else ""
            at = shared(left, right)
            i = starts[0][a if x is None else x] + at
            j = starts[1][c if y is None else y] + at
            if i != first or j != first:
                yield i, j


def _tools(old: Sequence[Tool], new: Sequence[Tool]) -> Iterator[Difference]:
    changed = next(
        (pair for pair in itertools.zip_longest(old, new) if _of(pair[0]) != _of(pair[1])), None
    )
    if changed is None:
        return
    before, after = changed
    names = sorted(one.name for one in old), sorted(one.name for one in new)
    if names[0] != names[1]:
        kind = Kind.TOOL_SET
    elif sorted(one.canonical for one in old) != sorted(one.canonical for one in new):
        kind = Kind.TOOL_SCHEMA
        # What stands before it may differ in order or white space alone.
        pairs = itertools.zip_longest(old, new)
        by_name = {one.name: one for one in old}
        before, after = next(
            (
                (by_name.get(b.name), b)
                for _, b in pairs
                if b is not None and _canonical(by_name.get(b.name)) != b.canonical
            ),
            changed,
        )
    elif [one.name for one in old] != [one.name for one in new]:
        kind = Kind.TOOL_ORDER
    else:
        kind = Kind.TOOL_SPELLING
    left, right = _of(before), _of(after)
    if kind is Kind.TOOL_SCHEMA and left and right:
        character = shared(left, right)
        kind = shape(left, character, right, character) or kind
    at = (after or before or changed[0] or changed[1]).at
    yield Difference(kind, "tools", at, "", shared(left, right), left, right)


def _of(tool: Tool | None) -> str:
    return "" if tool is None else tool.text


def _canonical(tool: Tool | None) -> str:
    return "" if tool is None else tool.canonical


def _messages(old: Sequence[Message], new: Sequence[Message]) -> Iterator[Difference]:
    """What differs in messages that the earlier request has."""
    for place, before in enumerate(old):
        after = new[place] if place < len(new) else None
        if after is not None and _same(before, after):
            continue
        yield from _message(old, new, place, before, after)


def _same(before: Message, after: Message) -> bool:
    return before.role == after.role and [(one.kind, one.text) for one in before.blocks] == [
        (one.kind, one.text) for one in after.blocks
    ]


def _message(
    old: Sequence[Message],
    new: Sequence[Message],
    place: int,
    before: Message,
    after: Message | None,
) -> Iterator[Difference]:
    otherwise = _kind_of_messages(old, new, place)
    if after is None:
        text = before.text
        yield Difference(otherwise, "messages", before.at, before.role, 0, text, "")
        return
    if before.role != after.role:
        yield Difference(otherwise, "messages", after.at, after.role, 0, before.text, after.text)
        return
    for left, right in itertools.zip_longest(before.blocks, after.blocks):
        if left is not None and right is not None and left.text == right.text:
            continue
        found = _text_difference(left, right, "messages", after.role, otherwise)
        if found.kind == otherwise and (_thinks(left, found) or _thinks(right, found)):
            found = Difference(
                Kind.THINKING,
                *(found.where, found.at, found.role, found.character, found.old, found.new),
            )
        yield found


def _thinks(block: Block | None, found: Difference) -> bool:
    """Whether a block says what the model thought, where it differs."""
    if block is None:
        return False
    here = block.text[max(0, found.character - len(_THOUGHT)) :][: 2 * len(_THOUGHT)]
    return block.kind == "thinking" or _THOUGHT in here


def _kind_of_messages(old: Sequence[Message], new: Sequence[Message], place: int) -> Kind:
    """What it means that messages differ from that one on."""
    if len(new) < len(old) or place == 0:
        if _is_compacted(old, new, place):
            return Kind.COMPACTED
        if _is_shortened(old, new, place):
            return Kind.SHORTENED
    if place == 0:
        is_text = new and new[0].at == "prompt"
        return Kind.TEXT if is_text else Kind.CONVERSATION
    return Kind.QUESTION if place >= len(new) - 1 else Kind.MESSAGE


def _is_compacted(old: Sequence[Message], new: Sequence[Message], place: int) -> bool:
    """Whether what is gone is summed up where the requests part."""
    said = new[place : place + 2]
    if any(one.kind.startswith("compaction") for message in said for one in message.blocks):
        return True
    if len(new) >= len(old):
        return False
    return any(word in message.text[:_REACH].lower() for message in said for word in _SUMMARY)


def _is_shortened(old: Sequence[Message], new: Sequence[Message], place: int) -> bool:
    """Whether the later request goes on with a message that comes later in the earlier one."""
    if place >= len(new):
        return True
    return any(_same(one, new[place]) for one in old[place + 1 :])
