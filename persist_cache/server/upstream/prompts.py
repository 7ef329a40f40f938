"""Where requests become prompts: tokenized once, and cut where a restart wants to resume them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec
from mlx_lm import server as upstream

from persist_cache.cache.ahead import Ahead
from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.prefill import loading
from persist_cache.server.alone import tokens_looked_back_at
from persist_cache.server.chat_form import depends_on_template, fit_chat
from persist_cache.server.form import Templates
from persist_cache.server.lengths import room
from persist_cache.server.names import Names
from persist_cache.server.privacy import Rules
from persist_cache.server.protocols.asked import Asked
from persist_cache.server.protocols.openai import one_head
from persist_cache.server.quiet import quiet
from persist_cache.server.rendering import decode, unrenderable
from persist_cache.server.segments import (
    as_system,
    cut_at,
    cut_only_at,
    cut_turn,
    system_tokens,
    thought_start,
)
from persist_cache.server.streaming import SIGN_S
from persist_cache.server.ticket import CutPrompt, Ticket, TicketTokens
from persist_cache.server.upstream.provider import Provider, Spare
from persist_cache.server.upstream.requests import TicketedRequest, as_upstreams
from persist_cache.server.validation import RefusedError
from persist_cache.server.wishes import Wishes
from persist_cache.stability.conversation import stabilize
from persist_cache.stability.moved import SaltedMoves
from persist_cache.stability.names import DEFAULTS

_SPARE_S = 1.0
"""How long a text that is shown waits for a tokenizer."""
_MIN_BRANCH_TOKENS = 64
"""A shared prefix beyond the last checkpoint is worth one of its own from this length on."""


class Prompts(upstream.ResponseGenerator):  # type: ignore[misc]
    """The part of upstream's generator that makes prompts of requests.

    Most of it runs on the threads that answer, beside the generation thread.
    """

    names: Names | None = None
    """Makes one key of all names of a model; without it they are taken as upstream takes them."""
    strict = False
    """Whether requests for what is not done are refused."""
    stabilize = DEFAULTS
    """Names of the repairs that may be done to requests that do not say which."""
    rules = Rules()
    """What is kept of requests that do not say."""
    _in_flight = 0
    """Requests that are being answered."""

    def __init__(self, model_provider: Any, prompt_cache: Any, cache: PromptCache) -> None:
        """Make prompts for a model provider's models.

        Args:
            model_provider: Has the model.
            prompt_cache: What upstream's loop asks.
            cache: The cache behind that.
        """
        self.cache = cache  # upstream deletes its own reference at the end
        self.templates = Templates()
        self.moves = SaltedMoves()
        self._tokenizing = threading.Lock()
        self._reader = ThreadPoolExecutor(1, "persist-cache-load-ahead")
        super().__init__(model_provider, prompt_cache)

    # ---- beside the generation thread ----------------------------------------------------------

    def tokenize_ahead(self, request: TicketedRequest, args: Any) -> None:
        """Tokenize a request before it is queued, if its model is the one that is loaded.

        So the generation thread need not, and what is wrong with it is said at once.

        Raises:
            RefusedError: It cannot be rendered, or is beyond the model's context.
            ConnectionError: The client is gone.
        """
        provider, ticket = self.model_provider, request.ticket
        key, spare = provider.model_key, getattr(provider, "spare", None)
        wanted = args.model.model
        if wanted == "default_model":
            wanted = self.cli_args.model
        if spare is None and isinstance(provider, Provider) and self._waits_for_spare(ticket):
            spare, key = self._awaited_spare(wanted, ticket), provider.model_key
        if spare is None or key is None or wanted != key[0]:
            return
        try:
            if any(upstream._image_parts(request.messages)):
                return
            prompt = self._cut_beside(spare, request, args)
            self._room(prompt, args)
        except Exception:
            if ticket.is_over or provider.spare is spare:
                raise
            return  # another model was loaded meanwhile
        ticket.model_key = key

    def _waits_for_spare(self, ticket: Ticket) -> bool:
        """Whether a request is to be tokenized beside the generation thread, if it can be."""
        # Those before it are enough to keep that thread busy.
        return self._in_flight > 1

    def _awaited_spare(self, model: str, ticket: Ticket) -> Spare | None:
        """The spare tokenizer, as soon as it is there; None if `model` is not what is loaded.

        What is loaded first is taken to be the command line's.
        """
        provider: Provider = self.model_provider

        def is_coming() -> bool:
            if provider.has_no_spare:
                return False
            if provider.model_key is None:
                return provider.is_loading and model == self.cli_args.model
            return bool(provider.model_key[0] == model)

        while provider.spare is None and is_coming() and self.generation_available():
            provider.wants_spare = True
            time.sleep(SIGN_S / 10)
            ticket.waits()
        return provider.spare

    def load_ahead(self, request: TicketedRequest, args: Any) -> None:
        """Have in memory what the disk has of a tokenized request, before it is queued.

        So the generation thread need not wait for the disk while it decodes for others.

        Raises:
            ConnectionError: The client is gone.
        """
        ticket = request.ticket
        prompt, key = ticket.prompt, ticket.model_key
        if prompt is None or key is None or self._is_distributed:
            return
        in_batch = super()._is_batchable(args)
        reading = self._reader.submit(
            self.cache.load_ahead,
            key,
            prompt.tokens,
            trail=ticket.trail,
            leave_tokens=0 if in_batch else tokens_looked_back_at(args.logits),
            to_copy=in_batch,
            salt=ticket.privacy.salt,
            in_passing=ticket.privacy.no_store,
        )
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    ticket.ahead = reading.result(SIGN_S)
                    return
                ticket.waits()
        except ConnectionError:
            if not reading.cancel():
                reading.add_done_callback(lambda done: self._release(done.result()))
            raise

    def _release(self, ahead: Ahead | None) -> None:
        """Let go of what was read ahead for a request that is not answered."""
        if ahead is not None:
            self.cache.release(ahead)

    def _cut_beside(self, spare: Spare, request: TicketedRequest, args: Any) -> CutPrompt:
        """Tokenize and cut a request beside the generation thread."""
        # Rendering a prompt changes its messages.
        mine = copy.copy(request)
        mine.messages = copy.deepcopy(request.messages)
        with self._spare_for(request.ticket):
            prompt = self._cut(spare.tokenizer, mine, args)
        prompt = msgspec.structs.replace(prompt, tokenizer=spare.of)
        request.ticket.tokenized(prompt)
        return prompt

    @contextlib.contextmanager
    def _spare_for(self, ticket: Ticket) -> Iterator[None]:
        """Have the spare tokenizer alone."""
        while not self._tokenizing.acquire(timeout=SIGN_S):
            ticket.waits()
        try:
            yield
        finally:
            self._tokenizing.release()

    def decode_beside(self, model: Any, tokens: Sequence[int]) -> str:
        """Tokens as text; "" where there is no spare tokenizer of that model, soon."""
        provider = self.model_provider
        give_up = time.monotonic() + _SPARE_S
        while getattr(provider, "lacks_spare", False) and model == provider.model_key:
            if time.monotonic() > give_up or not self.generation_available():
                break
            provider.wants_spare = True
            time.sleep(SIGN_S / 10)
        with self._tokenizing:
            spare = getattr(provider, "spare", None)
            if spare is None or model != provider.model_key:
                return ""
            return decode(spare.tokenizer, tokens)

    def count_tokens(self, asked: Asked, ticket: Ticket) -> int:
        """How many tokens the prompt of a request has.

        Raises:
            RefusedError: No model is loaded, or the template refuses the request.
        """
        request, args = self._as_upstreams(asked, ticket, keep=False)
        provider, names = self.model_provider, self.names
        key = None if names is None else names.key(args.model.model)
        is_own = names is None or key == names.key(None)
        spare = self._awaited_spare(self.cli_args.model, ticket) if is_own else provider.spare
        if spare is None or key not in (None, provider.model_key):
            if key is None:
                raise RefusedError(503, "No model is loaded, so there is nothing to count with.")
            if names is not None:
                names.check(key)
            other = loading.load_tokenizer(key.model)
            return len(self._cut(other, request, args).tokens)
        return len(self._cut_beside(spare, request, args).tokens)

    def _as_upstreams(
        self, asked: Asked, ticket: Ticket, *, keep: bool = True
    ) -> tuple[TicketedRequest, upstream.GenerationArguments]:
        if ticket.form is not None:
            is_kept = keep and not ticket.keeps and not ticket.privacy.no_store
            moves = self.moves.of(ticket.privacy.salt)
            ticket.form.stabilize(ticket.stabilize, moves, keep=is_kept)
        is_known = self.names is not None and self.names.is_here(asked.model)
        return as_upstreams(asked, ticket, self.model_provider, is_known=is_known)

    def _stabilized(self, request: TicketedRequest) -> TicketedRequest:
        """A chat of upstream's own protocol with its repairs; those of others are their form's."""
        ticket = request.ticket
        if request.request_type != "chat" or ticket.form is not None:
            return request
        keep = not ticket.keeps and not ticket.privacy.no_store
        moves = self.moves.of(ticket.privacy.salt)
        done = stabilize(request.messages, request.tools, ticket.stabilize, moves, keep=keep)
        ticket.changes |= frozenset(done.names)
        if ticket.wishes is not None:
            ticket.wishes.moved(done)
        request = copy.copy(request)
        request.messages, request.tools = done.messages, done.tools
        return request

    def _as_template_takes(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """Do the repairs of a chat that depend on its template; returns the arguments for it."""
        chosen = request.ticket.stabilize
        if (
            request.request_type != "chat"
            or not tokenizer.has_chat_template
            or not depends_on_template(request.messages, chosen)
        ):
            return args
        defaults, own = self.cli_args.chat_template_args, args.chat_template_kwargs or {}
        takes = self.templates.abilities(tokenizer, defaults)
        fitted = fit_chat(takes, request.messages, {**defaults, **own}, chosen)
        request.messages = list(fitted.messages)
        request.ticket.changes |= fitted.names
        return dataclasses.replace(args, chat_template_kwargs={**fitted.template_args, **own})

    # ---- on the generation thread --------------------------------------------------------------

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """The prompt of the ticket; tokenized here only if the model came later than it."""
        ticket: Ticket = request.ticket
        ticket.in_batch = self._alone is None
        if self._is_given_up(ticket):
            raise ConnectionAbortedError("The client is gone.")
        prompt = ticket.prompt
        if prompt is None or prompt.tokenizer is not tokenizer:
            prompt = self._cut_in_passing(tokenizer, request, args)
        args.max_tokens = self._room(prompt, args)
        args.sampling = _sampled_from(args.sampling, tokenizer, self.model_provider)
        if ticket.form is not None:
            words = dict.fromkeys(args.stop_words)
            ticket.stop_tokens = {
                word: tokenizer.encode(word, add_special_tokens=False) for word in words
            }
        segments, kinds = [list(one) for one in prompt.segments], list(prompt.kinds)
        is_to_be_cut = ticket.wishes is None or not ticket.wishes.only_marked
        if prompt.vision is None and is_to_be_cut and not ticket.privacy.no_store:
            segments, kinds = self._cut_at_branch(prompt.tokens, segments, kinds, ticket)
        if not ticket.keeps:
            ticket.origin.memory_only = len(prompt.tokens) < self.rules.min_tokens
        if prompt.vision is not None:
            prompt.vision.cache_key = TicketTokens(prompt.vision.cache_key, ticket)
        ticket.tokenized(msgspec.structs.replace(prompt, segments=segments, kinds=kinds))
        # Upstream takes pieces away from its lists.
        tokens = TicketTokens(prompt.tokens, ticket)
        return tokens, list(segments), list(kinds), prompt.initial_state, prompt.vision

    def _is_given_up(self, ticket: Ticket) -> bool:
        """Whether a request need not be computed any further."""
        # Only one of several ranks knows, and the others would wait for it.
        return not self._is_distributed and ticket.is_over

    def _cut_in_passing(self, tokenizer: Any, request: Any, args: Any) -> CutPrompt:
        """As `_cut`, on a thread that ends with it.

        The `tokenizers` library keeps the words that a thread has had tokenized until the thread
        ends, for each load of a tokenizer anew.
        """
        if any(upstream._image_parts(request.messages)):
            return self._cut(tokenizer, request, args)

        def cut() -> CutPrompt:
            with quiet(request.ticket.privacy.no_store):
                return self._cut(tokenizer, request, args)

        with ThreadPoolExecutor(1, "persist-cache-tokenize") as passing:
            return passing.submit(cut).result()

    def _cut(self, tokenizer: Any, request: Any, args: Any) -> CutPrompt:
        """Tokenize a request, and cut it into its system part and its turns."""
        form = request.ticket.form
        if form is not None:
            fitted = form.fit(tokenizer)
            if self.strict:
                form.refuse_unfit()
            request.messages, request.tools = fitted.messages, fitted.tools
            args = dataclasses.replace(args, chat_template_kwargs=fitted.template_args)
        else:
            args = self._as_template_takes(tokenizer, request, args)
        tokenize = super()._tokenize
        tokens, segments, kinds, initial_state, vision = _rendered(
            request, lambda: tokenize(tokenizer, request, args)
        )
        if not tokens:
            # Upstream's generation thread does not survive it.
            raise RefusedError(400, "The prompt has no tokens.")
        is_fixed = bool(getattr(tokenizer, "response_initial_state", None))
        if initial_state == "reasoning" and not is_fixed:
            # Upstream takes a mark anywhere in the conversation for an open thought at its end.
            is_open = thought_start(tokenizer, tokens) < len(tokens)
            initial_state = "reasoning" if is_open else "normal"
        if vision is None and kinds == ["assistant"]:
            options = {**self.cli_args.chat_template_args, **(args.chat_template_kwargs or {})}
            segments, kinds = cut_turn(
                tokenizer, request.messages, request.tools, options, list(tokens)
            )
        wishes: Wishes | None = request.ticket.wishes
        if wishes is not None and form is None:
            wishes.take(request.messages, request.tools, args.chat_template_kwargs or {})
        if wishes is not None:
            segments, kinds = self._cut_as_wished(
                wishes,
                request.ticket,
                tokenizer,
                tokens,
                segments,
                kinds,
                has_images=vision is not None,
            )
        messages = request.messages
        return CutPrompt(tokenizer, messages, tokens, segments, kinds, initial_state, vision)

    def _cut_as_wished(
        self,
        wishes: Wishes,
        ticket: Ticket,
        tokenizer: Any,
        tokens: Sequence[int],
        segments: list[list[int]],
        kinds: list[str],
        *,
        has_images: bool,
    ) -> tuple[list[list[int]], list[str]]:
        """Cut a prompt where its client asks for it, and note for how long that is to be kept."""
        head = system_tokens(segments, kinds)
        if wishes.only_marked:
            places, head = ([], 0) if has_images else wishes.marked(tokenizer, tokens)
            segments, kinds = cut_only_at(places, tokens)
            ticket.keep_limit = places[-1] if places else 0
        elif not has_images:
            trimmable = getattr(self.model_provider, "is_trimmable", True)
            places, head = wishes.cuts(tokenizer, tokens, head, trimmable=trimmable)
            for place in places:
                segments, kinds = cut_at(place, segments, kinds)
        ticket.origin.keep_s = wishes.keep_s(has_head=head > 0)
        return segments, as_system(head, segments, kinds)

    def _room(self, prompt: CutPrompt, args: Any) -> int:
        """Tokens that the answer may have, by the context of the model that is loaded.

        Raises:
            RefusedError: The prompt leaves no room for it.
        """
        context = getattr(self.model_provider, "context", None)
        param = "messages" if prompt.messages else "prompt"
        return room(len(prompt.tokens), args.max_tokens, context, param=param)

    def _cut_at_branch(
        self,
        prompt: Sequence[int],
        segments: list[list[int]],
        kinds: list[str],
        ticket: Ticket,
    ) -> tuple[list[list[int]], list[str]]:
        """Place a checkpoint where this prompt leaves a stored one that cannot be cut there.

        Then the next conversation that leaves it at the same point finds something to resume.
        """
        branch = self.cache.branch_point(
            self.model_provider.model_key,
            prompt,
            min_gain_tokens=_MIN_BRANCH_TOKENS,
            trail=ticket.trail,
            salt=ticket.privacy.salt,
        )
        return cut_at(branch, segments, kinds)


def _sampled_from(sampling: Any, tokenizer: Any, provider: Any) -> Any:
    """How a model's tokens are sampled; upstream's generation thread ends with too large a `top_k`.

    Only here is it known which model that is.
    """
    if sampling.top_k == 0:
        return sampling
    known = getattr(getattr(provider.model, "args", None), "vocab_size", None)
    size = min(len(tokenizer), known) if isinstance(known, int) else len(tokenizer)
    return sampling if sampling.top_k < size else dataclasses.replace(sampling, top_k=0)


def tokenize(
    tokenizer: Any, request: Any, args: Any, template_args: Mapping[str, Any]
) -> tuple[list[int], list[list[int]], list[str]]:
    """Make tokens of a request as upstream's loop does, without a model.

    Args:
        tokenizer: As mlx-lm loads it.
        request: What has the members of upstream's `CompletionRequest` that shape a prompt; its
            messages are changed in place.
        args: What has `chat_template_kwargs`.
        template_args: The server's `--chat-template-args`.

    Returns:
        Token ids, the segments that they are cut into, and the kind of each.
    """
    provider = SimpleNamespace(
        processor=None, cli_args=SimpleNamespace(chat_template_args=dict(template_args))
    )
    tokens, segments, kinds, _, _ = _rendered(
        request,
        lambda: upstream.ResponseGenerator._tokenize(
            SimpleNamespace(model_provider=provider), tokenizer, request, args
        ),
    )
    return tokens, segments, kinds


def _rendered(request: Any, tokenize: Callable[[], Any]) -> Any:
    """What `tokenize` makes of a request.

    If the chat template refuses its messages, they are tried with a single system message at the
    head, and kept so in the request.

    Raises:
        RefusedError: The template refuses that, too; with what it said.
    """
    try:
        try:
            return tokenize()
        except Exception:
            messages = one_head(request.messages)
            if messages is None:
                raise
            request.messages = messages
            return tokenize()
    except Exception as error:  # templates are programs of their own
        raise unrenderable(error) from error
