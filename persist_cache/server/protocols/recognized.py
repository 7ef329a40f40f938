"""Which protocol a body is of, where nothing else says so: in a file, or for the admin API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

CHAT, MESSAGES, RESPONSES = "chat", "messages", "responses"
PROTOCOLS = (CHAT, MESSAGES, RESPONSES)
"""OpenAI's chat and text completions, Anthropic's Messages, and OpenAI's Responses."""

_OWN_FIELDS = ("system", "stop_sequences", "anthropic_version")
_OWN_BLOCKS = frozenset({"tool_use", "tool_result", "thinking", "redacted_thinking", "document"})
_CHAT_ROLES = frozenset({"tool", "developer", "function"})
_CHAT_FIELDS = ("prompt", "functions")


def protocol_of(body: Mapping[str, Any]) -> str:
    """The protocol of a body, by its shape.

    Many bodies are of both; they mean the same prompt in either, and count as chats. What only
    OpenAI's API has is stronger than what only the other one has.
    """
    if _is_of_responses(body):
        return RESPONSES
    return MESSAGES if _is_of_messages(body) and not _is_of_chat(body) else CHAT


def protocol_at(path: str) -> str:
    """The protocol that is spoken at a path; "" where that is not known."""
    at = path.partition("?")[0].rstrip("/")
    if at.endswith(("/messages", "/messages/count_tokens")):
        return MESSAGES
    if at.endswith(("/responses", "/responses/input_tokens")):
        return RESPONSES
    return CHAT if at.endswith("/completions") else ""


def _is_of_responses(body: Mapping[str, Any]) -> bool:
    """Whether there is what neither of the others has, and no list that both of them have."""
    if body.get("messages") is not None:
        return False
    return isinstance(body.get("input"), str | list) or isinstance(body.get("instructions"), str)


def _is_of_messages(body: Mapping[str, Any]) -> bool:
    return (
        any(body.get(name) is not None for name in _OWN_FIELDS)
        or any("input_schema" in tool for tool in _objects(body.get("tools")))
        or any(
            block.get("type") in _OWN_BLOCKS
            for message in _objects(body.get("messages"))
            for block in _objects(message.get("content"))
            if isinstance(block.get("type"), str)
        )
    )


def _is_of_chat(body: Mapping[str, Any]) -> bool:
    return (
        any(body.get(name) is not None for name in _CHAT_FIELDS)
        or any("function" in tool for tool in _objects(body.get("tools")))
        or any(
            "tool_calls" in message
            or (isinstance(message.get("role"), str) and message["role"] in _CHAT_ROLES)
            for message in _objects(body.get("messages"))
        )
    )


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """The objects in what may be a list."""
    return (one for one in value if isinstance(one, dict)) if isinstance(value, list) else iter(())
