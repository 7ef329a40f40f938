"""What a model's chat template takes, found out by rendering, and messages put in that form.

Templates are programs: they refuse roles by raising, or leave out without a word what they do not
know. What one of them cannot take is said in the closest form that it can, in its place, and named.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from persist_cache.server.protocols.asked import THINKING_FIELD
from persist_cache.server.protocols.openai import one_head
from persist_cache.stability import thinking
from persist_cache.stability.repairs import inline_system_as_user

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None], str]

SYSTEM_ROLE = "system-role"
TOOL_CALLS = "tool-calls"
TURNS = "turns"
OPTIONS = frozenset({"thinking_budget", "reasoning_effort"})
"""Options that not all templates have."""
_SHORT_ID = 9
"""The length of call ids that templates of the Mistral kind insist on."""
_BETWEEN = "\n\n"


class Abilities(Struct, frozen=True):
    """What a template takes.

    Attributes:
        system: A system message at the head.
        heads: Several of them there.
        inline_system: One in mid-conversation, which stays in its place.
        turns: Several messages of the user in a row; of the assistant, too, where it takes those.
        tools: Definitions of tools.
        calls: Tool calls of the assistant, and their results.
        short_ids: Calls have ids of nine letters or digits, and no others.
        thinking_field: Of a message, that holds what the model thought.
        options: Names of those options that clients may set.
        keeps_thinking: The options by which it keeps what was thought in earlier turns, each with
            its value for that.
    """

    system: bool = True
    heads: bool = True
    inline_system: bool = True
    turns: bool = True
    tools: bool = True
    calls: bool = True
    short_ids: bool = False
    thinking_field: str = THINKING_FIELD
    options: frozenset[str] = frozenset()
    keeps_thinking: tuple[tuple[str, bool], ...] = ()


class Fitted(Struct, frozen=True):
    """A conversation as its template takes it.

    Attributes:
        messages: The conversation.
        tools: Definitions, or None.
        template_args: Options that the template has.
        names: Of what had to be said in another form.
        ignored: Of what could not be said at all: options, or `tools`.
    """

    messages: list[dict[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    template_args: dict[str, Any]
    names: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def probe(render: Render, source: str = "") -> Abilities:
    """Find out what a template takes.

    Args:
        render: Renders messages and tools; raises when the template refuses them.
        source: The template's text, in which its options are looked for; "" when it has none.
    """

    def keeps(order: str, *messages: Message, tools: Any = None) -> bool:
        """Whether all words of `order` are in the prompt, in that order."""
        try:
            prompt = render(messages, tools)
        except Exception:  # whatever it is that a template does not like
            return False
        places = [prompt.find(word) for word in order.split()]
        return -1 not in places and places == sorted(places)

    user, again = _said("user", "Qone"), _said("user", "Qtwo")
    answer = _said("assistant", "Aone")
    head, inline = _said("system", "Sone"), _said("system", "Stwo")
    tool = {
        "type": "function",
        "function": {
            "name": "Tone",
            "description": "Ttwo",
            "parameters": {"type": "object", "properties": {}},
        },
    }
    system = keeps("Sone Qone", head, user)
    turn = [
        [user, _calling("Tone", name), {**_said("tool", "Rone"), **_answered("Tone", name)}]
        for name in ("toolu_0123456789", "a1b2c3d4e")
    ]
    calls = [
        keeps("Qone Tone Carg Rone", *one) or keeps("Qone Tone Carg Rone", *one, tools=[tool])
        for one in turn
    ]
    fields = [
        field for field in thinking.FIELDS if keeps("Qone Hone", user, {**answer, field: "Hone"})
    ]
    return Abilities(
        system=system,
        heads=keeps("Sone Stwo Qone", head, inline, user),
        inline_system=keeps(
            "Sone Qone Aone Stwo Qtwo", *[head] * system, user, answer, inline, again
        )
        if system
        else keeps("Qone Aone Stwo Qtwo", user, answer, inline, again),
        turns=keeps("Qone Qtwo", user, again),
        tools=keeps("Tone", user, tools=[tool]),
        calls=any(calls),
        short_ids=calls == [False, True],
        thinking_field=fields[0] if fields else THINKING_FIELD,
        options=OPTIONS.intersection(re.findall(r"\w+", source)),
        keeps_thinking=tuple(thinking.options_in(source).items()),
    )


def fit(
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template_args: Mapping[str, Any],
    takes: Abilities,
) -> Fitted:
    """Put a conversation in a form that the template takes, on copies.

    Args:
        messages: Content is text; thinking is in the field `reasoning_content`.
        tools: Definitions, or None.
        template_args: Options of the template.
        takes: What `probe` found.
    """
    said: list[Any] = list(messages)
    names: list[str] = []
    if not takes.calls:
        plain = [_plain(message) for message in said]
        names += [TOOL_CALLS] * any(a is not b for a, b in zip(plain, said, strict=True))
        said = plain
    elif takes.short_ids:
        said = [_with_short_ids(message) for message in said]
    if not takes.inline_system:
        said, repaired = inline_system_as_user(said)
        names += repaired
    if not takes.system:
        head, rest = _head(said)
        if head:
            said = [_said("user", head), *rest]
            said = _in_turns(said[:2]) + said[2:]
            names.append(SYSTEM_ROLE)
    elif not takes.heads:
        # Some templates raise at a second one, others leave it out without a word.
        said = one_head(said) or said
    if not takes.turns:
        merged = _in_turns(said)
        names += [TURNS] * (len(merged) < len(said))
        said = merged
    if takes.thinking_field != THINKING_FIELD:
        said = [_renamed(message, takes.thinking_field) for message in said]
    unknown = (OPTIONS - takes.options) & template_args.keys()
    ignored = [*unknown]
    if tools and not takes.tools:
        tools = None
        ignored.append("tools")
    return Fitted(
        said,
        tools,
        {name: value for name, value in template_args.items() if name not in unknown},
        tuple(sorted(names)),
        tuple(sorted(ignored)),
    )


def _renamed(message: Message, field: str) -> Message:
    """A message with what the model thought in another field."""
    if THINKING_FIELD not in message:
        return message
    return {field if name == THINKING_FIELD else name: message[name] for name in message}


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _calling(tool: str, name: str) -> dict[str, Any]:
    call = {"name": tool, "arguments": {"key": "Carg"}}
    calls = [{"id": name, "type": "function", "function": call}]
    return {**_said("assistant", ""), "tool_calls": calls}


def _answered(tool: str, name: str) -> dict[str, Any]:
    return {"name": tool, "tool_call_id": name}


def _head(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """The text of the system messages at the head, and what follows them."""
    head = list(itertools.takewhile(lambda one: one.get("role") == "system", messages))
    texts = [str(one.get("content") or "") for one in head]
    return _BETWEEN.join(filter(None, texts)), list(messages[len(head) :])


def _in_turns(messages: Sequence[Message]) -> list[Message]:
    """Messages with neighbours of the user's, and of the assistant's, as one."""
    found: list[Message] = []
    for message in messages:
        if found and message.get("role") == found[-1].get("role") in ("user", "assistant"):
            found[-1] = _merged(found[-1], message)
        else:
            found.append(message)
    return found


def _merged(one: Message, other: Message) -> dict[str, Any]:
    """Two messages of one role as one: texts with an empty line between them, calls in order."""
    said = {**one, **other}
    for name in ("content", THINKING_FIELD):
        if name in one and name in other:
            texts = [one[name] or "", other[name] or ""]
            said[name] = _BETWEEN.join(filter(None, texts))
    if calls := [*(one.get("tool_calls") or ()), *(other.get("tool_calls") or ())]:
        said["tool_calls"] = calls
    return said


def _plain(message: Any) -> Any:
    """A message with its tool calls, or as a tool's result, as text."""
    if message.get("role") == "tool":
        name = f' name="{message["name"]}"' if "name" in message else ""
        text = f"<tool_result{name}>\n{message.get('content') or ''}\n</tool_result>"
        return _said("user", text)
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [message.get("content") or ""]
    texts += [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in calls
    ]
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**kept, "content": "\n".join(filter(None, texts))}


def _with_short_ids(message: Any) -> Any:
    if "tool_call_id" in message:
        return {**message, "tool_call_id": _short(message["tool_call_id"])}
    if calls := message.get("tool_calls"):
        return {**message, "tool_calls": [{**call, "id": _short(call["id"])} for call in calls]}
    return message


def _short(name: str) -> str:
    """An id of nine letters or digits, always the same one for a name."""
    if len(name) == _SHORT_ID and name.isascii() and name.isalnum():
        return name
    return hashlib.blake2b(name.encode(errors="replace"), digest_size=8).hexdigest()[:_SHORT_ID]
