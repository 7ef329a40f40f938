"""What the chat template of a model makes of a conversation, and the repairs that depend on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from msgspec import Struct

from persist_cache.server.templates import Abilities
from persist_cache.stability import thinking
from persist_cache.stability.names import INLINE_SYSTEM, THINKING
from persist_cache.stability.repairs import inline_system_as_user


class ChatForm(Struct, frozen=True):
    """A chat as its template takes it.

    Attributes:
        messages: The conversation.
        template_args: Options that were not asked for by the request.
        names: Of the repairs that were done.
    """

    messages: Sequence[Any]
    template_args: Mapping[str, Any]
    names: frozenset[str]


def depends_on_template(messages: Sequence[Mapping[str, Any]], chosen: Collection[str]) -> bool:
    """Whether there is anything to be done that a template has to be asked for."""
    return (INLINE_SYSTEM in chosen and _has_inline_system(messages)) or (
        THINKING in chosen and _has_thoughts(messages)
    )


def fit_chat(
    takes: Abilities,
    messages: Sequence[Mapping[str, Any]],
    template_args: Mapping[str, Any],
    chosen: Collection[str],
) -> ChatForm:
    """Do the repairs that depend on what a template takes, on copies.

    Args:
        takes: What it takes.
        messages: Of the request.
        template_args: Options of the server and of the request.
        chosen: Names of the repairs that may be done.
    """
    names: set[str] = set()
    said: Sequence[Any] = messages
    if INLINE_SYSTEM in chosen and not takes.inline_system and _has_inline_system(messages):
        said, by = inline_system_as_user([_as_text(one) for one in messages])
        names.update(by)
    options = keeping_thinking(takes, messages, template_args, chosen)
    if options:
        names.add(THINKING)
    return ChatForm(said, options, frozenset(names))


def keeping_thinking(
    takes: Abilities,
    messages: Sequence[Mapping[str, Any]],
    template_args: Mapping[str, Any],
    chosen: Collection[str],
) -> dict[str, bool]:
    """Options by which the template keeps what was thought in earlier turns.

    None where nothing was thought, nobody asks for it, or the request or the server has set one.
    """
    found = dict(takes.keeps_thinking)
    if THINKING not in chosen or not _has_thoughts(messages):
        return {}
    return {name: value for name, value in found.items() if name not in template_args}


def _has_inline_system(messages: Sequence[Mapping[str, Any]]) -> bool:
    is_system = [one.get("role") == "system" for one in messages]
    return False in is_system and any(is_system[is_system.index(False) :])


def _has_thoughts(messages: Sequence[Mapping[str, Any]]) -> bool:
    return any(
        one.get("role") == "assistant" and any(one.get(field) for field in thinking.FIELDS)
        for one in messages
    )


def _as_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A system message whose content is text, if it is nothing else."""
    content = message.get("content")
    if message.get("role") != "system" or not isinstance(content, list):
        return message
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
    known = [text for text in texts if isinstance(text, str)]
    return {**message, "content": "".join(known)} if len(known) == len(texts) else message
