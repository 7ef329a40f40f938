"""How a client's request becomes a prompt: for the commands, the admin API and the server.

`read_request` takes from a body what shapes its prompt, and nothing else: how an answer is sampled
does not matter here. `render` makes tokens of that with the very function that `mlx_lm.server`
answers with, so that an explanation cannot speak of another prompt than the one that is served.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from persist_cache.errors import ModelError
from persist_cache.server.protocols.openai import lenient
from persist_cache.server.segments import system_end, system_tokens
from persist_cache.server.validation import (
    RefusedError,
    check_prompt,
    first_line,
    refuse_parts,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """What of a request shapes its prompt.

    Attributes:
        messages: Of a chat, as the client sent them; empty for a text completion.
        text: Prompt of a text completion.
        tools: Tool definitions, or None.
        role_mapping: Roles as text, for models without a chat template, or None.
        template_args: Arguments of the chat template; they win over those of the server.
    """

    messages: list[dict[str, Any]]
    text: str = ""
    tools: list[dict[str, Any]] | None = None
    role_mapping: dict[str, str] | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        tokens: Token ids.
        system_tokens: Leading tokens that every conversation with the same system messages and
            tools shares; 0 when there is no system part.
    """

    tokens: list[int]
    system_tokens: int


def read_request(body: Mapping[str, Any]) -> PromptRequest:
    """Take what shapes the prompt from the body of a chat or of a text completion request.

    A member that is null is absent.

    Raises:
        RefusedError: The server would not understand it either, or it has images.
    """
    body = lenient(body)
    check_prompt(body)
    if body.get("messages") is None:
        return PromptRequest([], text=body["prompt"])
    refuse_parts(body["messages"], why="only text can be explained or warmed")
    return PromptRequest(
        body["messages"],
        tools=body.get("tools") or None,
        role_mapping=body.get("role_mapping"),
        template_args=body.get("chat_template_kwargs") or {},
    )


def system_only(request: PromptRequest) -> bool:
    """Whether a request is nothing but the system part of others: its last message is no turn."""
    return bool(request.messages) and request.messages[-1].get("role") == "system"


def render(
    tokenizer: Any, request: PromptRequest, *, template_args: Mapping[str, Any] | None = None
) -> Prompt:
    """Render a request as `mlx_lm.server` does, and find its system part.

    Args:
        tokenizer: As mlx-lm loads it.
        request: What `read_request` found.
        template_args: The server's `--chat-template-args`.

    Raises:
        RefusedError: The chat template refuses it; with what the template said.
    """
    # Here, because it takes MLX to be imported.
    from persist_cache.server.upstream.prompts import tokenize

    defaults = dict(template_args or {})
    asked = SimpleNamespace(
        request_type="chat" if request.messages else "text",
        prompt=request.text,
        messages=copy.deepcopy(request.messages),  # they are changed in place
        tools=request.tools,
        role_mapping=request.role_mapping,
    )
    args = SimpleNamespace(chat_template_kwargs=dict(request.template_args))
    tokens, segments, kinds = tokenize(tokenizer, asked, args, defaults)
    end = system_tokens(segments, kinds)
    if kinds == ["assistant"] and asked.messages:
        options = {**defaults, **request.template_args}
        end = system_end(tokenizer, asked.messages, asked.tools, options, tokens)
    return Prompt(list(tokens), end)


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> Prompt:
    """Render a chat request as `mlx_lm.server` does, and find its system part.

    Raises:
        ModelError: The model has no chat template, or the template refuses the messages.
    """
    asked = PromptRequest(
        [dict(message) for message in messages],
        tools=[dict(tool) for tool in tools] if tools else None,
    )
    try:
        return render(tokenizer, asked, template_args=template_args)
    except RefusedError as refusal:
        raise ModelError(str(refusal)) from refusal


def unrenderable(error: Exception) -> RefusedError:
    """What a client is told when its prompt could not be made into tokens."""
    log.debug("a prompt could not be rendered", exc_info=error)
    sentence = f"The chat template refuses these messages: {first_line(error)}."
    return RefusedError(400, sentence, param="messages")


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Tokens as text, to the letter; ids that stand for no text, such as images, are left out."""
    known = [token for token in tokens if 0 <= token < len(tokenizer)]
    return str(tokenizer.decode(known, clean_up_tokenization_spaces=False)) if known else ""
