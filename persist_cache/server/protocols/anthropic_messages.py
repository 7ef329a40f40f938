"""Anthropic's messages as those of a chat: what a template takes, in the order of the client.

Nothing is moved to another place and nothing is left out without a word: what cannot be given to
the model is refused, or named among what is ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from msgspec import Struct, field

from persist_cache.server.protocols.asked import (
    BETWEEN_BLOCKS,
    SERVER_TOOLS,
    THINKING_FIELD,
    Mark,
    joined,
)
from persist_cache.server.protocols.caching import breakpoint_of
from persist_cache.server.protocols.fields import below, kind, text_of
from persist_cache.server.validation import RefusedError, wrong
from persist_cache.stability import repairs
from persist_cache.stability.names import DEFAULTS

_TTLS = {"5m": 300, "1h": 3600}
_ERROR = "Error: "
_SAYS_ERROR = ("error", "<tool_use_error>")
_MEDIA = {
    "image": "an image",
    "document": "a document",
    "container_upload": "a file",
}
_CLOSED = "redacted_thinking"
_SERVER_CALLS = ("server_tool_use", "mcp_tool_use")
_SERVER_RESULT = "_tool_result"
"""Ends the type of what a tool of Anthropic's servers returned."""
_TEXTUAL = ("text", "document", "search_result", "tool_reference")
"""Types of blocks in tool results that may be nothing but text."""


class Conversation(Struct):
    """Messages of a chat, while they are translated.

    Attributes:
        stabilize: Names of the repairs that may be done.
        messages: As templates take them; content is text.
        marks: In order.
        repaired: Names of the repairs that changed a system text.
        ignored: Names of what is not given to the model.
    """

    stabilize: Collection[str] = DEFAULTS
    messages: list[dict[str, Any]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    repaired: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)
    tool_names: dict[str, str] = field(default_factory=dict)

    def add_system(self, content: Any, name: str) -> None:
        """Add a system prompt, or a system message in mid-conversation; none if nothing is left.

        Raises:
            RefusedError: It is neither a text nor a list of texts.
        """
        said, index = "", len(self.messages)
        for text, ttl_s in _texts(content, name):
            repaired = repairs.system_text(text, self.stabilize)
            self.repaired.update(repaired.names)
            said = joined(said, repaired.text)
            if ttl_s is not None:
                # Without a text so far, the mark is behind what is in front of this message.
                self._mark(index if said else index - 1, len(said) if said else None, ttl_s)
        if said:
            self.messages.append({"role": "system", "content": said})

    def add(self, message: Any, name: str) -> None:
        """Add a message.

        Raises:
            RefusedError: It is malformed, or holds what cannot be given to a model.
        """
        if not isinstance(message, dict):
            raise wrong(name, "must be an object.")
        role, content = message.get("role"), message.get("content")
        if not isinstance(content, str | list):
            raise wrong(f"{name}.content", "must be a text or a list of blocks.")
        match role:
            case "user":
                self._add_user(content, f"{name}.content")
            case "assistant":
                self._add_assistant(content, f"{name}.content")
            case "system":
                _refuse_empty(content, f"{name}.content")
                self.add_system(content, f"{name}.content")
            case _:
                raise wrong(f"{name}.role", "must be user, assistant or system.")

    def mark_end(self, ttl_s: int) -> None:
        """Mark the end of what was added so far."""
        self._mark(len(self.messages) - 1, None, ttl_s)

    def _mark(self, message: int, characters: int | None, ttl_s: int) -> None:
        self.marks.append(Mark(message, characters, ttl_s))

    def _add_user(self, content: Any, name: str) -> None:
        _refuse_empty(content, name)
        said: str | None = None
        for place, block in enumerate(blocks(content, name)):
            at = f"{name}.{place}"
            match kind(block, at):
                case "text":
                    said = joined(said or "", text_of(block, "text", at))
                    if (ttl_s := mark_of(block, at)) is not None:
                        self._mark(len(self.messages), len(said), ttl_s)
                case "document" | "search_result":
                    said = joined(said or "", written(block, at))
                    if (ttl_s := mark_of(block, at)) is not None:
                        self._mark(len(self.messages), len(said), ttl_s)
                case "tool_result":
                    if said is not None:
                        self.messages.append({"role": "user", "content": said})
                        said = None
                    self._add_result(block, at)
                case other:
                    raise _unfit(other, at)
        if said is not None:
            self.messages.append({"role": "user", "content": said})

    def _add_result(self, block: Mapping[str, Any], name: str) -> None:
        call = text_of(block, "tool_use_id", name)
        failed = block.get("is_error")
        if failed is not None and not isinstance(failed, bool):
            raise wrong(f"{name}.is_error", "must be true or false.")
        said, index = "", len(self.messages)
        content = block.get("content")
        parts = _texts("" if content is None else content, f"{name}.content", _TEXTUAL)
        for text, ttl_s in parts:
            if failed and not said and not text.lstrip().lower().startswith(_SAYS_ERROR):
                text = _ERROR + text
            said = joined(said, text)
            if ttl_s is not None:
                self._mark(index, len(said), ttl_s)
        said = said or (_ERROR if failed else "")
        message = {"role": "tool", "tool_call_id": call, "content": said}
        if call in self.tool_names:
            message["name"] = self.tool_names[call]
        self.messages.append(message)
        if (ttl_s := mark_of(block, name)) is not None:
            self._mark(index, len(said), ttl_s)

    def _add_assistant(self, content: Any, name: str) -> None:
        said, thought, calls = "", "", []
        index = len(self.messages)
        for place, block in enumerate(blocks(content, name)):
            at = f"{name}.{place}"
            characters: int | None = None
            match kind(block, at):
                case "text":
                    # The parts of an answer, with nothing between them that was not said.
                    said += text_of(block, "text", at)
                    characters = len(said)
                case "thinking":
                    thought += text_of(block, "thinking", at)
                case "redacted_thinking":
                    text_of(block, "data", at)
                    self.ignored.add(_CLOSED)
                case "tool_use":
                    calls.append(self._call(block, at))
                case other if other in _SERVER_CALLS or other.endswith(_SERVER_RESULT):
                    # Of tools that this server does not have: templates have no form for them.
                    self.ignored.add(SERVER_TOOLS)
                case other:
                    raise _unfit(other, at)
            if (ttl_s := mark_of(block, at)) is not None:
                self._mark(index, characters, ttl_s)
        message: dict[str, Any] = {"role": "assistant", "content": said}
        if thought:
            message[THINKING_FIELD] = thought
        if calls:
            message["tool_calls"] = calls
        self.messages.append(message)

    def _call(self, block: Mapping[str, Any], name: str) -> dict[str, Any]:
        call, tool = text_of(block, "id", name), text_of(block, "name", name)
        given = block.get("input")
        if not isinstance(given, dict):
            raise wrong(f"{name}.input", "must be an object.")
        self.tool_names[call] = tool
        return {"id": call, "type": "function", "function": {"name": tool, "arguments": given}}


def blocks(content: Any, name: str) -> Sequence[Mapping[str, Any]]:
    """Content as a list of blocks.

    Raises:
        RefusedError: It is something else.
    """
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise wrong(name, "must be a text or a list of blocks.")
    for place, block in enumerate(content):
        if not isinstance(block, dict):
            raise wrong(f"{name}.{place}", "must be an object.")
    return content


def written(block: Mapping[str, Any], name: str) -> str:
    """The text of a block, of whatever type.

    Raises:
        RefusedError: It holds something else.
    """
    match kind(block, name):
        case "text":
            return text_of(block, "text", name)
        case "tool_reference":
            return text_of(block, "tool_name", name)
        case "search_result":
            head = [text_of(block, member, name) for member in ("title", "source")]
            texts = [text for text, _ in _texts(block.get("content"), f"{name}.content")]
        case "document":
            head = [
                text_of(block, member, name)
                for member in ("title", "context")
                if block.get(member) is not None
            ]
            texts = _document(block.get("source"), name)
        case other:
            raise _unfit(other, name)
    return BETWEEN_BLOCKS.join(filter(None, [*head, *texts]))


def _document(source: Any, name: str) -> list[str]:
    """The texts of a document that is one."""
    at = f"{name}.source"
    if not isinstance(source, dict):
        raise wrong(at, "must be an object.")
    match kind(source, at):
        case "text":
            return [text_of(source, "data", at)]
        case "content":
            return [text for text, _ in _texts(source.get("content"), f"{at}.content")]
    raise _unfit("document", name)


def mark_of(block: Mapping[str, Any], name: str) -> int | None:
    """For how many seconds what ends with this block is to be kept; None if it has no mark.

    Raises:
        RefusedError: The mark is malformed.
    """
    mark = block.get("cache_control")
    if mark is None:
        return breakpoint_of(block, name)
    at = below(name, "cache_control")
    if not isinstance(mark, dict) or mark.get("type") != "ephemeral":
        raise wrong(at, "must be an object of the type ephemeral.")
    ttl = mark.get("ttl")
    if ttl is None:
        return _TTLS["5m"]
    if not isinstance(ttl, str) or ttl not in _TTLS:
        raise wrong(f"{at}.ttl", "must be 5m or 1h.")
    return _TTLS[ttl]


def _texts(
    content: Any, name: str, types: Collection[str] = ("text",)
) -> list[tuple[str, int | None]]:
    """The texts of content that can hold nothing but blocks of these types, each with its mark."""
    found = []
    for place, block in enumerate(blocks(content, name)):
        at = f"{name}.{place}"
        if (other := kind(block, at)) not in types:
            raise _unfit(other, at)
        found.append((written(block, at), mark_of(block, at)))
    return found


def _refuse_empty(content: Any, name: str) -> None:
    if not content:
        raise wrong(name, "must not be empty.")


def _unfit(other: str, name: str) -> RefusedError:
    if other in _MEDIA:
        return wrong(name, f"is {_MEDIA[other]}; this server gives models text alone.")
    return wrong(name, "is of a type that does not belong there, or that this server cannot use.")
