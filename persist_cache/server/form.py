"""A request of a protocol of ours in the form that the model's chat template takes.

What is known of a request before its tokenizer is loaded does not say how it is to be rendered. So
the form travels with the ticket, and is asked wherever the prompt is made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from persist_cache.entry import Tier
from persist_cache.server.chat_form import keeping_thinking
from persist_cache.server.marks import moved_marks, place_marks
from persist_cache.server.protocols.asked import Asked, Mark
from persist_cache.server.protocols.openai import as_text
from persist_cache.server.templates import (
    SYSTEM_ROLE,
    TOOL_CALLS,
    TURNS,
    Abilities,
    Fitted,
    fit,
    probe,
)
from persist_cache.server.validation import RefusedError
from persist_cache.stability.conversation import Stabilized, stabilize
from persist_cache.stability.moved import Moves
from persist_cache.stability.names import DEFAULTS, INLINE_SYSTEM, THINKING

log = logging.getLogger(__name__)

_MOST_HEADS = 256
_LACKS = {
    INLINE_SYSTEM: "system messages in mid-conversation",
    SYSTEM_ROLE: "a system prompt",
    TOOL_CALLS: "tool calls and their results",
}
"""What a template lacks when something was said in another form, in words."""
_NEAR_TOKENS = 8
"""Two places that are no further apart are one: each costs a whole state."""


class Templates:
    """What is known of chat templates, and of the prompts that they made.

    Thread safety: may be shared between threads; `_lock` guards what is remembered.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._abilities: weakref.WeakKeyDictionary[Any, Abilities] = weakref.WeakKeyDictionary()
        self._heads: dict[bytes, int] = {}

    def abilities(self, tokenizer: Any, template_args: Mapping[str, Any]) -> Abilities:
        """What a tokenizer's template takes; found out when it is first asked for."""
        with self._lock:
            found = self._abilities.get(tokenizer)
        if found is None:
            source = getattr(tokenizer, "chat_template", None)
            found = probe(
                lambda messages, tools: _text(tokenizer, messages, tools, template_args),
                source if isinstance(source, str) else "",
            )
            with self._lock:
                self._abilities[tokenizer] = found
        return found

    def head(self, key: bytes) -> int | None:
        """How many tokens the head of a prompt has, if it is remembered."""
        with self._lock:
            return self._heads.get(key)

    def remember_head(self, key: bytes, tokens: int) -> None:
        """Remember that."""
        with self._lock:
            if len(self._heads) >= _MOST_HEADS:
                self._heads.clear()
            self._heads[key] = tokens


class Given:
    """A request that is rendered as its client gave it, and what that asks of the cache.

    Thread safety: for one thread at a time.

    Attributes:
        fitted: The conversation as it was rendered last; None before.
    """

    def __init__(
        self,
        request: Asked,
        templates: Templates,
        template_args: Mapping[str, Any],
        *,
        is_remembered: bool = True,
    ) -> None:
        """Ask nothing yet.

        Args:
            request: What was asked.
            templates: What is known of templates.
            template_args: Options of the server, which those of the request win over.
            is_remembered: Its prompt's head may be remembered, by a digest.
        """
        self._is_remembered = is_remembered
        self._request = request
        self._templates = templates
        self._defaults = dict(template_args)
        self.fitted: Fitted | None = None
        self._chosen: Collection[str] = DEFAULTS
        self._keeps_thinking: dict[str, bool] = {}

    @property
    def group(self) -> str:
        """That the request belongs to, or ""."""
        return self._request.caching.group

    @property
    def only_marked(self) -> bool:
        """Whether nothing is to be kept but what ends at a mark."""
        return self._request.caching.only_marked

    def moved(self, done: Stabilized) -> None:
        """Note how the conversation was repaired before it is rendered."""
        said = [{**one, "content": as_text(one.get("content"))} for one in done.messages]
        given, done = self._request, msgspec.structs.replace(done, messages=said)
        marks = moved_marks(given.marks, given.messages, done)
        self._request = msgspec.structs.replace(given, messages=said, marks=marks)

    def take(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        template_args: Mapping[str, Any],
    ) -> None:
        """Note what the prompt was made of."""
        self.fitted = Fitted([dict(one) for one in messages], tools, dict(template_args))

    def keep_s(self, *, has_head: bool) -> dict[Tier, int]:
        """For how many seconds behind each use the client asks to keep what is stored, by tier.

        Args:
            has_head: Some of the prompt is kept for all conversations; else what was asked for
                that is asked for the whole.
        """
        given = self._request.messages
        heads = next((at for at, one in enumerate(given) if one["role"] != "system"), len(given))
        asked_s = self._request.caching.ttl_s
        found = {Tier.SYSTEM: asked_s, Tier.USER: asked_s} if asked_s else {}
        for mark in self._request.marks:
            tier = Tier.SYSTEM if has_head and mark.message < heads else Tier.USER
            found[tier] = max(found.get(tier, 0), mark.ttl_s)
        return found

    def cuts(
        self, tokenizer: Any, prompt: Sequence[int], system_tokens: int, *, trimmable: bool
    ) -> tuple[list[int], int]:
        """Find where a prompt is to be kept because its client asks for it.

        Args:
            tokenizer: That made the prompt of what `fit` returned.
            prompt: Token ids.
            system_tokens: Length of the part that is kept anyway for all conversations.
            trimmable: The model's cache can be resumed anywhere, so that it is of no use to keep
                what stands in the middle of a conversation.

        Returns:
            The places, and how much of the prompt is of the tier `system`.
        """
        marks = self.marks
        heads = self._heads()
        head_mark = _head_mark(marks, heads)
        if trimmable:
            marks = [head_mark] if head_mark is not None and not system_tokens else []
        elif system_tokens:
            marks = [mark for mark in marks if not self._is_end(mark, heads - 1)]
        marks = [mark for mark in marks if not self._is_end(mark, len(self._messages) - 1)]
        if not marks:
            return [], system_tokens
        key = self._head_key(head_mark, heads)
        if marks == [head_mark] and (remembered := self._templates.head(key)) is not None:
            return [remembered], max(remembered, system_tokens)
        places = self._place(tokenizer, prompt, marks)
        head = next((at for at, mark in zip(places, marks, strict=True) if mark == head_mark), None)
        if head is not None and self._is_remembered:
            self._templates.remember_head(key, head)
        found = {place for place in places if place is not None}
        # The system part ends as well as there.
        found -= set(range(system_tokens, system_tokens + _NEAR_TOKENS))
        return sorted(found), max(head or 0, system_tokens)

    def marked(self, tokenizer: Any, prompt: Sequence[int]) -> tuple[list[int], int]:
        """Find all places that are marked, whether the prompt is kept there anyway or not.

        Returns:
            The places, in order, and how much of the prompt is of the tier `system`.
        """
        marks = self.marks
        places = self._place(tokenizer, prompt, marks)
        head_mark = _head_mark(marks, self._heads())
        head = next((at for at, mark in zip(places, marks, strict=True) if mark == head_mark), None)
        return sorted({place for place in places if place is not None}), head or 0

    def _place(
        self, tokenizer: Any, prompt: Sequence[int], marks: Sequence[Mark]
    ) -> list[int | None]:
        """The tokens in front of each mark; None where that cannot be told."""
        try:
            return place_marks(
                self._messages,
                self._tools,
                marks,
                prompt,
                render=lambda messages, tools: _text(tokenizer, messages, tools, self._args()),
                encode=lambda text: _encode(tokenizer, text),
            )
        except Exception as error:  # a template is a program of its own
            log.debug("no marks could be placed: %s", error)
            return [None] * len(marks)

    @property
    def _messages(self) -> list[dict[str, Any]]:
        return [] if self.fitted is None else self.fitted.messages

    @property
    def _tools(self) -> Sequence[Mapping[str, Any]] | None:
        return None if self.fitted is None else self.fitted.tools

    def _heads(self) -> int:
        """How many system messages are at the head."""
        roles = [one["role"] for one in self._messages]
        return next((at for at, role in enumerate(roles) if role != "system"), len(roles))

    def _is_end(self, mark: Mark, message: int) -> bool:
        """Whether a mark is at the end of a message, where the prompt is kept without it."""
        if mark.message != message or message < 0:
            return False
        return mark.characters in (None, len(self._messages[message]["content"]))

    def _args(self) -> dict[str, Any]:
        own = {} if self.fitted is None else self.fitted.template_args
        return {**self._defaults, **own}

    @property
    def marks(self) -> list[Mark]:
        """Marks in the conversation as it is rendered."""
        given, said = self._request.messages, self._messages
        if len(given) != len(said):
            return []  # Messages were put together: what was marked is not there any more.
        return [
            mark
            for mark in self._request.marks
            if mark.message < 0 or given[mark.message]["content"] == said[mark.message]["content"]
        ]

    def _head_key(self, mark: Mark | None, heads: int) -> bytes:
        roles = [one["role"] for one in self._messages[heads : heads + 1]]
        place = None if mark is None else (mark.message, mark.characters)
        salt = self._request.caching.salt
        head = [self._messages[:heads], roles, self._tools, self._args(), place, salt]
        whole = json.dumps(head, default=str).encode()
        return hashlib.blake2b(whole, digest_size=16).digest()


class Form(Given):
    """A request of a protocol of ours, to be put before a chat template."""

    def stabilize(
        self, chosen: Collection[str], moves: Moves | None = None, *, keep: bool = True
    ) -> None:
        """Do the repairs that need no template; the others are done by `fit`.

        Args:
            chosen: Names of those that may be done.
            moves: What was told where in earlier requests, or None.
            keep: Remember where this one is told what.
        """
        given = self._request
        done = stabilize(given.messages, given.tools, chosen, moves, keep=keep)
        self._chosen = chosen
        self._request = msgspec.structs.replace(
            given,
            messages=done.messages,
            tools=None if done.tools is None else list(done.tools),
            marks=moved_marks(given.marks, given.messages, done),
            repaired=tuple(sorted({*given.repaired, *done.names})),
        )

    def fit(self, tokenizer: Any) -> Fitted:
        """The conversation as the tokenizer's template takes it.

        Raises:
            RefusedError: It could be said in a form that may not be used.
        """
        request = self._request
        takes = self._templates.abilities(tokenizer, self._defaults)
        self._keeps_thinking = keeping_thinking(
            takes, request.messages, {**self._defaults, **request.template_args}, self._chosen
        )
        options = {**self._keeps_thinking, **request.template_args}
        self.fitted = fit(request.messages, request.tools, options, takes)
        if INLINE_SYSTEM in self.fitted.names and INLINE_SYSTEM not in self._chosen:
            raise RefusedError(
                400,
                "The chat template of this model takes no system message in mid-conversation; "
                f"leave it out, or allow {INLINE_SYSTEM} to have it said as the user's.",
            )
        return self.fitted

    @property
    def repaired(self) -> tuple[str, ...]:
        """Names of what was changed."""
        fitted = () if self.fitted is None else self.fitted.names
        thinking = [THINKING] * bool(self._keeps_thinking)
        return tuple(sorted({*self._request.repaired, *fitted, *thinking}))

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of what was asked for and is not done."""
        return tuple(sorted({*self._request.ignored, *self._unsaid()}))

    def _unsaid(self) -> list[str]:
        """What the template has no place for, as the client calls it."""
        fitted = () if self.fitted is None else self.fitted.ignored
        return [self._request.option_names.get(name, name) for name in fitted]

    def refuse_unfit(self) -> None:
        """Refuse what is asked for and was said in another form, or not at all, as it was fitted.

        Messages of one role in a row are one turn in this protocol, however they are said.

        Raises:
            RefusedError: There is such a thing.
        """
        fitted = () if self.fitted is None else (*self.fitted.names, *self._unsaid())
        if found := [_LACKS.get(name, name) for name in fitted if name != TURNS]:
            raise RefusedError(
                400,
                f"The chat template of this model does not take {', '.join(found)}, and this "
                "server was started with --strict; leave that out.",
            )


def _head_mark(marks: Sequence[Mark], heads: int) -> Mark | None:
    """The last mark in tools and system messages, of which there are so many at the head."""
    return max(
        (mark for mark in marks if mark.message < heads),
        key=lambda mark: (mark.message, mark.characters or 0),
        default=None,
    )


def _text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template_args: Mapping[str, Any],
) -> str:
    """The text of a prompt, whose tokens upstream makes of the same arguments."""
    return str(
        tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            add_generation_prompt=True,
            tokenize=False,
            **template_args,
        )
    )


def _encode(tokenizer: Any, text: str) -> tuple[Sequence[int], Sequence[tuple[int, int]]]:
    found = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    return found.ids, found.offsets
