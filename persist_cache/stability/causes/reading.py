"""What a request asks for, whatever its protocol: options, tools, and texts with their places.

Bodies are read as they were answered, so nothing is refused here: what has no text is its JSON.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct, field

from persist_cache.stability import names, repairs

_MARKS = ("cache_control", "prompt_cache_breakpoint")
_SYSTEM_ROLES = ("system", "developer")
_OPTIONS = ("reasoning_effort", "thinking", "role_mapping")
_NESTED = ("chat_template_kwargs", "reasoning", "output_config")
_UNPRINTED = ("reasoning.summary", "output_config.format")
"""Options that no template sees, like all that are not named here."""
_OUTPUTS = ("function_call_output", "custom_tool_call_output")


class Block(Struct, frozen=True):
    """A piece of text of a request.

    Attributes:
        at: Where in the body, such as `messages.3.content.1`.
        kind: `text`, `thinking`, or the type of the block.
        text: What it says.
    """

    at: str
    kind: str
    text: str


class Message(Struct, frozen=True):
    """A turn.

    Attributes:
        at: Where in the body.
        role: Whose.
        blocks: What it consists of.
    """

    at: str
    role: str
    blocks: tuple[Block, ...]

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(one.text for one in self.blocks)


class Tool(Struct, frozen=True):
    """A definition.

    Attributes:
        at: Where in the body.
        name: Of the tool.
        text: As it was sent, without marks.
        canonical: The same with its keys sorted, and with single spaces.
    """

    at: str
    name: str
    text: str
    canonical: str


class Reading(Struct, frozen=True):
    """A request.

    Attributes:
        model: As the server knows it.
        salt: That keeps it apart, or "".
        options: What may change how it is printed, as JSON.
        tools: Definitions.
        system: Texts at the head.
        messages: The turns behind it, later system messages among them.
        repaired: Names of the repairs that it got.
    """

    model: str = ""
    salt: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    tools: Sequence[Tool] = ()
    system: Sequence[Block] = ()
    messages: Sequence[Message] = ()
    repaired: frozenset[str] = frozenset()

    @property
    def has_thoughts(self) -> bool:
        """Whether a turn says what the model thought."""
        return any(
            block.kind == "thinking" or "<think>" in block.text
            for message in self.messages
            for block in message.blocks
        )


def read_body(
    body: Mapping[str, Any], *, model: str = "", repaired: Collection[str] = ()
) -> Reading:
    """Read a body of a chat, a text completion, Messages or Responses.

    Args:
        body: That was answered.
        model: That answered it.
        repaired: Names of the repairs that it got: what they take out is not there.
    """
    messages = list(_turns(body))
    heads = 0
    while heads < len(messages) and messages[heads].role in _SYSTEM_ROLES:
        heads += 1
    system = [block for one in messages[:heads] for block in one.blocks]
    if {names.BILLING, names.COUNTDOWN} & set(repaired):
        system = [_repaired(block) for block in system]
    return Reading(
        model=model or str(body.get("model") or ""),
        salt=_json(body["cache_salt"]) if body.get("cache_salt") else "",
        options=dict(_options(body)),
        tools=tuple(_tools(body.get("tools"), "tools")),
        system=tuple(block for block in system if block.text),
        messages=tuple(messages[heads:]),
        repaired=frozenset(repaired),
    )


def _repaired(block: Block) -> Block:
    return Block(block.at, block.kind, repairs.system_text(block.text).text)


def _turns(body: Mapping[str, Any]) -> Iterator[Message]:
    for name in ("instructions", "system"):
        if (head := body.get(name)) is not None:
            yield Message(name, "system", tuple(_blocks(head, name)))
    if body.get("messages") is not None:
        for place, one in enumerate(_listed(body["messages"])):
            yield _message(one, f"messages.{place}")
        return
    given = body.get("input") if body.get("prompt") is None else body["prompt"]
    name = "input" if body.get("prompt") is None else "prompt"
    if isinstance(given, list) and any(isinstance(one, dict) for one in given):
        for place, one in enumerate(given):
            yield _message(one, f"{name}.{place}")
    elif given is not None:
        yield Message(name, "user", (Block(name, "text", _text(given)),))


def _message(given: Any, at: str) -> Message:
    if not isinstance(given, dict):
        return Message(at, "user", (Block(at, "text", _text(given)),))
    kind = given.get("type", "message")
    role = str(given.get("role") or _role_of(kind))
    blocks: list[Block] = []
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(thought := given.get(name), str) and thought:
            blocks.append(Block(f"{at}.{name}", "thinking", thought))
    if kind == "reasoning":
        for name in ("content", "summary"):
            blocks += [
                Block(one.at, "thinking", one.text)
                for one in _blocks(given.get(name), f"{at}.{name}")
            ]
    elif kind != "message" and "content" not in given:
        shown = given.get("output") if kind in _OUTPUTS else None
        if shown is not None:
            blocks += _blocks(shown, f"{at}.output")
        else:
            blocks.append(Block(at, str(kind), _call_text(given)))
    else:
        blocks += _blocks(given.get("content"), f"{at}.content")
    for place, call in enumerate(_listed(given.get("tool_calls"))):
        function = call.get("function", call) if isinstance(call, dict) else call
        blocks.append(Block(f"{at}.tool_calls.{place}", "tool_call", _call_text(function)))
    return Message(at, role, tuple(blocks))


def _role_of(kind: Any) -> str:
    if kind in _OUTPUTS:
        return "tool"
    return "user" if kind == "message" else "assistant"


def _blocks(content: Any, at: str) -> Iterator[Block]:
    if content is None:
        return
    if not isinstance(content, list):
        yield Block(at, "text", _text(content))
        return
    for place, one in enumerate(content):
        here = f"{at}.{place}"
        if not isinstance(one, dict):
            yield Block(here, "text", _text(one))
            continue
        kind = str(one.get("type") or "text")
        if kind in ("thinking", "reasoning_text", "summary_text"):
            yield Block(here, "thinking", str(one.get("thinking") or one.get("text") or ""))
        elif isinstance(one.get("text"), str):
            yield Block(here, "text", one["text"])
        elif kind == "tool_result":
            for block in _blocks(one.get("content"), f"{here}.content"):
                yield Block(block.at, kind, block.text)
        elif kind == "tool_use":
            yield Block(here, kind, _call_text(one))
        else:
            yield Block(here, kind, _json(_unmarked(one)))


def _call_text(call: Any) -> str:
    """A call as templates print it; its id is mostly left out by them."""
    if not isinstance(call, dict):
        return _json(call)
    given = next((call[name] for name in ("arguments", "input") if name in call), None)
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            return f"{call.get('name')} {given}"
    return f"{call.get('name')} {_json(given)}"


def _tools(given: Any, at: str) -> Iterator[Tool]:
    for place, one in enumerate(_listed(given)):
        here = f"{at}.{place}"
        if isinstance(one, dict) and one.get("type") == "namespace":
            yield from _tools(one.get("tools"), f"{here}.tools")
            continue
        tool = _unmarked(one)
        yield Tool(here, _tool_name(tool), _json(tool), _json(_spaced(tool), sort=True))


def _tool_name(tool: Any) -> str:
    if not isinstance(tool, dict):
        return ""
    function = tool.get("function")
    named = function.get("name") if isinstance(function, dict) else tool.get("name")
    return str(named or tool.get("type") or "")


def _options(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in _OPTIONS:
        if body.get(name) is not None:
            yield name, _json(body[name])
    for name in _NESTED:
        inner = body.get(name)
        if isinstance(inner, dict):
            for key, value in inner.items():
                if value is not None and f"{name}.{key}" not in _UNPRINTED:
                    yield f"{name}.{key}", _json(value)


def _unmarked(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: one for name, one in value.items() if name not in _MARKS and one is not None}
    return value


def _spaced(value: Any) -> Any:
    """A value whose texts have single spaces."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, dict):
        return {name: _spaced(one) for name, one in value.items()}
    return [_spaced(one) for one in value] if isinstance(value, list) else value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _json(value: Any, *, sort: bool = False) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=sort)
