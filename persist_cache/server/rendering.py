"""How a client's request becomes a prompt: for the commands, the admin API and the server.

`read_request` takes from a body what shapes its prompt, and nothing else: how an answer is sampled
does not matter here. `render` makes tokens of that with the very function that `mlx_lm.server`
answers with, so that an explanation cannot speak of another prompt than the one that is served.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
from msgspec import Struct, field

from persist_cache.errors import ModelError
from persist_cache.fingerprint.value import salt_digest
from persist_cache.server.chat_form import depends_on_template, fit_chat
from persist_cache.server.form import Form, Given, Templates
from persist_cache.server.names import DEFAULT
from persist_cache.server.protocols.anthropic_request import read_messages
from persist_cache.server.protocols.asked import Asked
from persist_cache.server.protocols.caching import no_store_of, salt_of
from persist_cache.server.protocols.openai import asked_of_cache, lenient
from persist_cache.server.protocols.recognized import CHAT, MESSAGES, RESPONSES, protocol_of
from persist_cache.server.protocols.responses_request import read_responses
from persist_cache.server.segments import system_end, system_tokens
from persist_cache.server.validation import (
    RefusedError,
    check_prompt,
    first_line,
    refuse_parts,
)
from persist_cache.stability.conversation import stabilize
from persist_cache.stability.moved import Moves
from persist_cache.stability.names import DEFAULTS

log = logging.getLogger(__name__)

_ANY_TURN = {"role": "user", "content": "Hello"}
"""Behind a head that is wanted alone; its text does not matter."""


class PromptRequest(Struct, frozen=True):
    """What of a request shapes its prompt.

    Attributes:
        messages: Of a chat, as the client sent them; empty for a text completion.
        text: Prompt of a text completion.
        tools: Tool definitions, or None.
        role_mapping: Roles as text, for models without a chat template, or None.
        template_args: Arguments of the chat template; they win over those of the server.
        asked: The request, with the same messages and tools, if it is of a protocol of ours.
        caching: What it asks of the cache, if it is a chat.
        is_head: It is nothing but the head of others, and its last message stands for any.
        stabilize: Names of the repairs that may be done.
        salt: Digest of the salt that keeps it apart from other requests, or "".
        no_store: It asks for nothing of it to be kept.
    """

    messages: list[dict[str, Any]]
    text: str = ""
    tools: list[dict[str, Any]] | None = None
    role_mapping: dict[str, str] | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    asked: Asked | None = None
    caching: Asked | None = None
    is_head: bool = False
    stabilize: frozenset[str] = DEFAULTS
    salt: str = ""
    no_store: bool = False


class Prompt(Struct, frozen=True):
    """A rendered prompt.

    Attributes:
        tokens: Token ids.
        system_tokens: Leading tokens that every conversation with the same system messages and
            tools shares; 0 when there is no system part.
        cuts: Further places up to which its client asks for it to be kept, in order. They are of
            use only for models whose cache cannot be cut anywhere.
        repaired: Names of what was changed before it was rendered.
        ignored: Names of what was asked for and cannot be said to the model.
        marks: Places that its client marked.
    """

    tokens: list[int]
    system_tokens: int
    cuts: tuple[int, ...] = ()
    repaired: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    marks: int = 0


def read_request(
    body: Mapping[str, Any], protocol: str = "", *, stabilize: frozenset[str] = DEFAULTS
) -> PromptRequest:
    """Take what shapes the prompt from the body of a request.

    A member that is null is absent.

    Args:
        body: Of a chat, of a text completion, of Anthropic's Messages or OpenAI's Responses.
        protocol: One of `PROTOCOLS`; "" to tell it by the body's shape.
        stabilize: Names of the repairs that may be done.

    Raises:
        RefusedError: The server would not understand it either, or it has images.
    """
    salt, no_store = salt_digest(salt_of(body)), no_store_of(body, respects_store=False)
    found = _read_prompt(body, protocol, stabilize)
    return msgspec.structs.replace(found, salt=salt, no_store=bool(no_store))


def _read_prompt(
    body: Mapping[str, Any], protocol: str, stabilize: frozenset[str]
) -> PromptRequest:
    if (protocol := protocol or protocol_of(body)) != CHAT:
        return _read_own(body, protocol, stabilize)
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
        caching=asked_of_cache(body, is_chat=True),
        stabilize=stabilize,
    )


def _read_own(body: Mapping[str, Any], protocol: str, stabilize: frozenset[str]) -> PromptRequest:
    """Read a request of a protocol of ours; without a conversation, it is a head."""
    of = {MESSAGES: "messages", RESPONSES: "input"}[protocol]
    items = body.get(of) or []
    is_head = isinstance(items, list) and all(map(_is_system, items))
    given = {**body, "model": body.get("model") or DEFAULT}
    if is_head:
        given[of] = [*items, _ANY_TURN]
    if protocol == MESSAGES:
        asked = read_messages({**given, "max_tokens": 1}, stabilize=stabilize)
    else:
        asked, _ = read_responses(given)
    return PromptRequest(
        asked.messages,
        tools=asked.tools,
        template_args=asked.template_args,
        asked=asked,
        is_head=is_head,
        stabilize=stabilize,
    )


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ("system", "developer")


def system_only(request: PromptRequest) -> bool:
    """Whether a request is nothing but the system part of others: its last message is no turn."""
    if request.asked is not None:
        return request.is_head
    return bool(request.messages) and request.messages[-1].get("role") == "system"


def head_of(body: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """The body of what precedes the first turn of a request: its system part.

    Raises:
        RefusedError: It has none.
    """
    of = "input" if protocol == RESPONSES else "messages"
    items = body.get(of)
    listed = items if isinstance(items, list) else []
    head = list(itertools.takewhile(_is_system, listed))
    apart = {MESSAGES: ("system", "tools"), RESPONSES: ("instructions", "tools")}.get(protocol, ())
    if not head and not any(body.get(name) for name in apart):
        raise RefusedError(409, "This request has no system part.")
    return {**body, of: head}


def render(
    tokenizer: Any,
    request: PromptRequest,
    *,
    template_args: Mapping[str, Any] | None = None,
    moves: Moves | None = None,
) -> Prompt:
    """Render a request as `mlx_lm.server` does, and find its system part.

    Args:
        tokenizer: As mlx-lm loads it.
        request: What `read_request` found.
        template_args: The server's `--chat-template-args`.
        moves: What a server remembers of moved text, which it does for conversations that it
            answers; None where that is not known.

    Raises:
        RefusedError: The chat template refuses it; with what the template said.
    """
    # Here, because it takes MLX to be imported.
    from persist_cache.server.upstream.prompts import tokenize

    defaults, own = dict(template_args or {}), dict(request.template_args)
    form: Form | None = None
    given = None if request.caching is None else Given(request.caching, Templates(), defaults)
    names: frozenset[str] = frozenset()
    if request.asked is None:
        done = stabilize(request.messages, request.tools, request.stabilize, moves, keep=False)
        messages, names = done.messages, frozenset(done.names)
        if given is not None:
            given.moved(done)
        tools = None if done.tools is None else list(done.tools)
        if getattr(tokenizer, "has_chat_template", False) and depends_on_template(
            messages, request.stabilize
        ):
            takes = Templates().abilities(tokenizer, defaults)
            chat = fit_chat(takes, messages, {**defaults, **own}, request.stabilize)
            messages, own = list(chat.messages), {**chat.template_args, **own}
            names |= chat.names
    else:
        form = Form(request.asked, Templates(), defaults)
        form.stabilize(request.stabilize, moves, keep=False)
        fitted = form.fit(tokenizer)
        messages, own = fitted.messages, fitted.template_args
        tools = None if fitted.tools is None else [dict(tool) for tool in fitted.tools]
    asked = SimpleNamespace(
        request_type="chat" if messages else "text",
        prompt=request.text,
        messages=copy.deepcopy(messages),  # they are changed in place
        tools=tools,
        role_mapping=request.role_mapping,
    )
    args = SimpleNamespace(chat_template_kwargs=own)
    tokens, segments, kinds = tokenize(tokenizer, asked, args, defaults)
    end = system_tokens(segments, kinds)
    if kinds == ["assistant"] and asked.messages:
        end = system_end(tokenizer, asked.messages, asked.tools, {**defaults, **own}, tokens)
    if given is not None:
        given.take(asked.messages, asked.tools, own)
    wishes, wanted = form or given, request.asked or request.caching
    if wishes is None or wanted is None:
        return Prompt(list(tokens), end, repaired=tuple(sorted(names)))
    places, end = wishes.cuts(tokenizer, tokens, end, trimmable=False)
    cuts = tuple(place for place in places if place > end)
    repaired = tuple(sorted(names)) if form is None else form.repaired
    ignored = () if form is None else form.ignored
    return Prompt(list(tokens), end, cuts, repaired, ignored, len(wanted.marks))


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
        stabilize=frozenset(),
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


def decode(tokenizer: Any, tokens: Sequence[int], *, plain: bool = False) -> str:
    """Tokens as text, to the letter; ids that stand for no text, such as images, are left out.

    Args:
        tokenizer: As mlx-lm loads it.
        tokens: Token ids.
        plain: Leave out the tokens that only structure a prompt, too.
    """
    known = [token for token in tokens if 0 <= token < len(tokenizer)]
    if not known:
        return ""
    return str(
        tokenizer.decode(known, skip_special_tokens=plain, clean_up_tokenization_spaces=False)
    )
