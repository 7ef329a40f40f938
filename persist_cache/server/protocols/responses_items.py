"""Items of OpenAI's Responses as messages of a chat: what a template takes, in the client's order.

One answer of a model comes back as several items: what it thought, said and called. They are one
message again here, so that the next prompt begins with what was said.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from msgspec import Struct, field

from persist_cache.server.protocols.asked import SERVER_TOOLS, THINKING_FIELD, Mark, joined
from persist_cache.server.protocols.caching import breakpoint_of
from persist_cache.server.protocols.fields import kind, text_of
from persist_cache.server.protocols.responses_tools import Named, Toolbox, arguments_of
from persist_cache.server.validation import RefusedError, wrong

SEALED = "reasoning.encrypted_content"
"""What clients call thoughts that they cannot read, and what names those of other servers."""
_SEAL = "persist-cache:"
_TEXTS = ("input_text", "output_text", "text")
_THOUGHTS = ("reasoning_text", "text")
_SUMMARIES = ("summary_text", "text")
_MEDIA = {
    "input_image": "an image",
    "input_file": "a file",
    "input_audio": "a sound",
    "computer_screenshot": "an image",
}
_REFUSED = {
    "item_reference": (
        "refers to an item, and this server keeps none; send the item itself, as the AI SDK does "
        "with `store: false` in providerOptions.openai."
    ),
    "compaction": "is another server's compaction, which cannot be read; send the conversation.",
    "compaction_trigger": "asks for a compaction, which this server does not do.",
}
_LEFT_OUT = (
    *("mcp_list_tools", "mcp_approval_request", "mcp_approval_response"),
    *("program", "program_output", "tool_search_output"),
)
_CALL_ENDS = ("_call", "_call_output")
"""End the types of calls, and outputs, of tools that this server does not have."""


class Transcript(Struct):
    """Messages of a chat, while they are translated.

    Attributes:
        tools: Of the request; items may add some.
        messages: As templates take them; content is text.
        marks: Places up to which the prompt is to be kept, in order.
        ignored: Names of what is not given to the model.
    """

    tools: Toolbox
    messages: list[dict[str, Any]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    _seen_names: dict[str, str] = field(default_factory=dict)
    _is_said: bool = False
    """The last item was something that the assistant said."""

    def instruct(self, text: str) -> None:
        """Add a system message; none of an empty text."""
        if text:
            self.messages.append({"role": "system", "content": text})

    def add_input(self, given: Any) -> None:
        """Add the input of a request: a text, or a list of items.

        Raises:
            RefusedError: It is malformed, empty, or holds what cannot be given to a model.
        """
        if isinstance(given, str):
            given = [{"role": "user", "content": given}]
        if not isinstance(given, list) or not given:
            raise wrong("input", "must be a text, or a list of at least one item.")
        for place, item in enumerate(given):
            name = f"input[{place}]"
            if not isinstance(item, dict):
                raise wrong(name, "must be an object.")
            self._add(item, name)
        if not self.messages:
            raise wrong("input", "has nothing in it that a model can be given.")

    def _add(self, item: Mapping[str, Any], name: str) -> None:
        was_said, self._is_said = self._is_said, False
        match _type_of(item, name):
            case "message":
                self._add_message(item, name, was_said=was_said)
            case "reasoning":
                self._add_thought(item, name, was_said=was_said)
            case "function_call":
                self._add_call(item, _arguments(item, name), name)
            case "custom_tool_call":
                self._add_call(item, arguments_of(text_of(item, "input", name)), name)
            case "function_call_output" | "custom_tool_call_output":
                self._add_output(item, name)
            case "additional_tools":
                self.tools.add(item.get("tools"), f"{name}.tools", again=True)
            case "configuration_update":
                self.ignored.add("configuration_update")
            case other if other in _REFUSED:
                raise wrong(name, _REFUSED[other])
            case other if other in _LEFT_OUT or other.endswith(_CALL_ENDS):
                # Templates have no form for them.
                self.ignored.add(SERVER_TOOLS)
            case _:
                raise wrong(f"{name}.type", "is none that this server can use.")

    def _add_message(self, item: Mapping[str, Any], name: str, *, was_said: bool) -> None:
        role, content = item.get("role"), item.get("content")
        at = f"{name}.content"
        match role:
            case "user":
                self.messages.append({"role": "user", "content": self._text(content, at)})
            case "system" | "developer":
                self.instruct(self._text(content, at))
            case "assistant":
                # The parts of an answer, with nothing between them that was not said.
                parts = _parts(content, at, (*_TEXTS, "refusal"))
                if was_said:
                    self.messages.append({"role": "assistant", "content": ""})
                turn = self._turn()
                for text, ttl_s in parts:
                    turn["content"] += text
                    self._mark(len(self.messages) - 1, turn["content"], ttl_s)
                self._is_said = True
            case _:
                raise wrong(f"{name}.role", "must be user, assistant, system or developer.")

    def _text(self, content: Any, name: str) -> str:
        """The text of the message that is added next, whose parts may be marked."""
        said = ""
        for text, ttl_s in _parts(content, name, _TEXTS):
            said = joined(said, text)
            self._mark(len(self.messages), said, ttl_s)
        return said

    def _mark(self, message: int, said: str, ttl_s: int | None) -> None:
        """Mark the end of what a message says so far, if that is asked for."""
        if ttl_s is not None:
            # Without a text so far, it is behind what is in front of this message.
            mark = Mark(message, len(said), ttl_s) if said else Mark(message - 1, None, ttl_s)
            self.marks.append(mark)

    def _turn(self) -> dict[str, Any]:
        """The assistant's message that its items belong to."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": ""})
        return self.messages[-1]

    def _add_thought(self, item: Mapping[str, Any], name: str, *, was_said: bool) -> None:
        thought = "".join(_texts(item.get("content") or [], f"{name}.content", _THOUGHTS))
        summary = joined_all(_texts(item.get("summary") or [], f"{name}.summary", _SUMMARIES))
        sealed = item.get("encrypted_content")
        if not thought and sealed is not None:
            thought = unsealed(text_of(item, "encrypted_content", name)) or ""
            if not thought and not summary:
                self.ignored.add(SEALED)
        if thought := thought or summary:
            if was_said:
                # Templates put a thought in front of what its message says.
                self.messages.append({"role": "assistant", "content": ""})
            turn = self._turn()
            turn[THINKING_FIELD] = turn.get(THINKING_FIELD, "") + thought
        else:
            self._is_said = was_said

    def _add_call(self, item: Mapping[str, Any], arguments: dict[str, Any], name: str) -> None:
        call, tool = text_of(item, "call_id", name), text_of(item, "name", name)
        space = item.get("namespace")
        seen = Named(tool, "" if space is None else text_of(item, "namespace", name)).seen
        self._seen_names[call] = seen
        function = {"name": seen, "arguments": arguments}
        calls = self._turn().setdefault("tool_calls", [])
        calls.append({"id": call, "type": "function", "function": function})

    def _add_output(self, item: Mapping[str, Any], name: str) -> None:
        call = text_of(item, "call_id", name)
        message = {"role": "tool", "tool_call_id": call}
        message["content"] = self._text(item.get("output"), f"{name}.output")
        if call in self._seen_names:
            message["name"] = self._seen_names[call]
        self.messages.append(message)


def sealed(thought: str) -> str:
    """A thought for clients that keep what they cannot read, and no other."""
    return _SEAL + base64.b64encode(thought.encode()).decode()


def unsealed(given: str) -> str | None:
    """The thought that `sealed` was given; None for what is another server's."""
    if not given.startswith(_SEAL):
        return None
    try:
        return base64.b64decode(given.removeprefix(_SEAL), validate=True).decode()
    except (binascii.Error, ValueError):
        return None


def joined_all(texts: Sequence[str]) -> str:
    """Texts of blocks as one text."""
    said = ""
    for text in texts:
        said = joined(said, text)
    return said


def _type_of(item: Mapping[str, Any], name: str) -> str:
    if item.get("type") is not None:
        return kind(item, name)
    return "message" if "role" in item or "id" not in item else "item_reference"


def _texts(content: Any, name: str, types: Collection[str]) -> list[str]:
    return [text for text, _ in _parts(content, name, types)]


def _parts(content: Any, name: str, types: Collection[str]) -> list[tuple[str, int | None]]:
    """The texts of content that can hold nothing but parts of these types, each with its mark."""
    if isinstance(content, str):
        return [(content, None)]
    if not isinstance(content, list):
        raise wrong(name, "must be a text or a list of parts.")
    found = []
    for place, part in enumerate(content):
        at = f"{name}[{place}]"
        if not isinstance(part, dict):
            raise wrong(at, "must be an object.")
        if (other := kind(part, at)) not in types:
            raise _unfit(other, at)
        text = text_of(part, "refusal" if other == "refusal" else "text", at)
        found.append((text, breakpoint_of(part, at)))
    return found


def _arguments(item: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Arguments of a call, which are an object as text."""
    text = text_of(item, "arguments", name)
    try:
        found = json.loads(text or "{}")
        # Templates print them: no number that is none, no half of a surrogate pair.
        json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise wrong(f"{name}.arguments", "must be a JSON object, as text.")
    return found


def _unfit(other: str, name: str) -> RefusedError:
    if other in _MEDIA:
        return wrong(name, f"is {_MEDIA[other]}; this server gives models text alone.")
    return wrong(name, "is of a type that does not belong there, or that this server cannot use.")
