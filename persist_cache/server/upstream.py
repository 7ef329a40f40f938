"""`mlx_lm.server`'s own classes with a `PromptCache`: the only importer of that module.

What is added: where prompts are cut (tool turns, checkpoints at branches), what an answer says
about the cache, and which files a model was loaded from. What is used of its private seam is
listed in `SEAM`, and checked by a test. It is long because nothing else may know upstream's
classes; what does not need them lies beside it (`ticket`, `segments`, `alone`, `streaming`).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import HTTPServer
from queue import Empty, Queue
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm import server as upstream
from mlx_lm.models.cache import make_prompt_cache

from persist_cache import tensors
from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.errors import MissingDependencyError, ModelError, UnsupportedCacheError
from persist_cache.fingerprint.identifier import Identifier
from persist_cache.fingerprint.model_files import folder_of
from persist_cache.prefill import loadable, loading
from persist_cache.prefill.clock import PrefillClock
from persist_cache.prefill.loading import model_errors
from persist_cache.prefill.run import even_out_draft
from persist_cache.server.admin import Admin
from persist_cache.server.alone import Alone, tokens_looked_back_at
from persist_cache.server.answers import json_response
from persist_cache.server.form import Templates
from persist_cache.server.guard import ModelGuard
from persist_cache.server.http import Front
from persist_cache.server.lengths import context_tokens, room
from persist_cache.server.messages import Messages
from persist_cache.server.names import DEFAULT, Names
from persist_cache.server.protocols.anthropic_request import MessagesRequest
from persist_cache.server.protocols.openai import one_head
from persist_cache.server.rendering import unrenderable
from persist_cache.server.segments import as_system, cut_at, cut_turn, system_tokens
from persist_cache.server.streaming import SIGN_S, Streaming
from persist_cache.server.ticket import CutPrompt, Ticket, TicketedCache, TicketTokens
from persist_cache.server.validation import RefusedError
from persist_cache.store.trail import Trail

log = logging.getLogger(__name__)

SEAM = {
    "run": ("host", "port", "model_provider", "server_class", "handler_class"),
    "_run_http_server": ("host", "port", "response_generator", "server_class", "handler_class"),
    "ResponseGenerator._tokenize": ("self", "tokenizer", "request", "args"),
    "ResponseGenerator._serve_single": ("self", "request", "stream"),
    "ResponseGenerator.generation_available": ("self",),
    "ResponseGenerator.generate": (
        "self",
        "request",
        "generation_args",
        "progress_callback",
    ),
    "ResponseGenerator.stop_and_join": ("self",),
    "BatchGenerator.next": ("self",),
    "ModelProvider.load_default": ("self",),
    "ModelProvider._load": ("self", "model_path", "adapter_path", "draft_model_path"),
    "APIHandler.handle_completion": ("self", "request", "stop_words"),
    "APIHandler._set_completion_headers": ("self", "status_code"),
    "APIHandler._set_stream_headers": ("self", "status_code"),
}
"""What of mlx_lm.server is replaced or called, with its parameters."""
_MIN_BRANCH_TOKENS = 64
"""A shared prefix beyond the last checkpoint is worth one of its own from this length on."""


@dataclasses.dataclass
class TicketedRequest(upstream.CompletionRequest):  # type: ignore[misc]
    """Upstream's request with its ticket: the generation thread gets nothing else of it."""

    ticket: Ticket = dataclasses.field(default_factory=Ticket)

    @classmethod
    def of(cls, request: Any, ticket: Ticket | None = None) -> TicketedRequest:
        """The same request with a ticket: its own, `ticket` or a new one."""
        if isinstance(request, cls):
            return request
        values = {one.name: getattr(request, one.name) for one in dataclasses.fields(request)}
        return cls(**values, ticket=ticket or Ticket())


class Generator(upstream.ResponseGenerator):  # type: ignore[misc]
    """Upstream's generation loop, cutting prompts where a restart will want to resume them."""

    names: Names | None = None
    """Makes one key of all names of a model; without it they are taken as upstream takes them."""
    strict = False
    """Whether requests for what is not done are refused."""
    _alone: Alone | None = None
    """The request that is served alone."""

    def __init__(self, model_provider: Any, prompt_cache: PromptCache) -> None:
        self.cache = prompt_cache  # upstream deletes its own reference at the end
        self._in_flight = 0
        self._tokenizing = threading.Lock()
        self.templates = Templates()
        self._reader = ThreadPoolExecutor(1, "persist-cache-read-ahead")
        self.admin: Admin | None = None
        self.guard: ModelGuard | None = None
        self.prefill_clock = PrefillClock()
        self._changed = threading.Condition()
        prompt_cache.is_busy = lambda: self._in_flight > 0
        super().__init__(model_provider, TicketedCache(prompt_cache, self))

    # ---- the thread that answers -------------------------------------------------------------

    def generate(
        self,
        request: Any,
        generation_args: Any,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> Any:
        """As upstream's, which it replaces: the ticket is made and tokenized before the queue.

        Raises:
            Exception: What went wrong before the outcome was known. In a stream that has begun
                meanwhile, asking for the answer raises it.
        """
        if not self.generation_available():
            raise RuntimeError("generation thread died")
        if self.names is not None:
            asked = generation_args.model
            key = self.names.key(asked.model, asked.adapter, asked.draft)
            self.names.check(key)
            # What is compared and loaded; the answer says what the client said.
            generation_args.model = upstream.ModelDescription(key.model, key.draft, key.adapter)
        only_fills = generation_args.max_tokens == 0
        request = TicketedRequest.of(request)
        ticket = request.ticket
        answers = _Answers(ticket)
        try:
            self.tokenize_ahead(request, generation_args)
            self.requests.put((answers, request, generation_args))
            ctx = self._next_answer(answers, ticket)
            if isinstance(ctx, Exception):
                raise ctx
            # When requests are served one at a time, the context is handed out before the look.
            while not ticket.wait(SIGN_S) and self.generation_available():
                ticket.sign()
            if ticket.fetch is None:
                failed = self._next_answer(answers, ticket)
                if isinstance(failed, Exception):
                    raise failed
                raise RuntimeError("The request was answered without a look into the cache.")
        except BaseException as error:
            ticket.drop()
            if not isinstance(error, Exception) or not ticket.has_begun():
                raise
            return _failed(error)
        told = self._told(ctx, answers, ticket, progress_callback)
        return ctx, (one for one in told if not only_fills)

    def _told(
        self,
        ctx: Any,
        answers: _Answers,
        ticket: Ticket,
        progress_callback: Callable[[int, int], None] | None,
    ) -> Iterator[Any]:
        """The answer, with the usage of `ctx` corrected before it is read.

        Upstream takes what it is handed for what was cached; that may have been computed just now.
        """
        while (one := self._next_answer(answers, ticket)) is not None:
            if isinstance(one, Exception):
                raise one
            if isinstance(one, tuple):
                ticket.computed = one
                if progress_callback is not None:
                    progress_callback(*one)
                continue
            ticket.times.first_token = ticket.times.first_token or time.monotonic()
            ctx.prompt_cache_count = 0 if ticket.fetch is None else ticket.fetch.num_tokens
            yield one
        ticket.times.ended = time.monotonic()

    def _next_answer(self, answers: _Answers, ticket: Ticket) -> Any:
        """What the generation thread says next; there are signs of life until it does."""
        while True:
            try:
                return answers.get(timeout=SIGN_S)
            except Empty:
                # Wherever the request was when the thread died, nothing more will come.
                if not self.generation_available():
                    raise RuntimeError("generation thread died") from None
                ticket.sign()

    def tokenize_ahead(self, request: TicketedRequest, args: Any) -> None:
        """Tokenize a request before it is queued, if its model is the one that is loaded.

        So the generation thread need not, what is wrong with it is said at once, and what it will
        want of the disk can be read while others are answered.

        Raises:
            RefusedError: It cannot be rendered, or is beyond the model's context.
            ConnectionError: The client is gone.
        """
        provider, ticket = self.model_provider, request.ticket
        key, spare = provider.model_key, getattr(provider, "spare", None)
        wanted = args.model.model
        if wanted == "default_model":
            wanted = self.cli_args.model
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
        if self._in_flight > 1:
            self._reader.submit(self.cache.read_ahead, key, prompt.tokens, trail=ticket.trail)

    def _cut_beside(self, spare: Spare, request: TicketedRequest, args: Any) -> CutPrompt:
        """Tokenize and cut a request beside the generation thread."""
        # Rendering a prompt changes its messages.
        mine = copy.copy(request)
        mine.messages = copy.deepcopy(request.messages)
        with self._spare_for(request.ticket):
            prompt = self._cut(spare.tokenizer, mine, args)
        prompt = dataclasses.replace(prompt, tokenizer=spare.of)
        request.ticket.tokenized(prompt)
        return prompt

    @contextlib.contextmanager
    def _spare_for(self, ticket: Ticket) -> Iterator[None]:
        """Have the spare tokenizer alone."""
        while not self._tokenizing.acquire(timeout=SIGN_S):
            ticket.sign()
        try:
            yield
        finally:
            self._tokenizing.release()

    # ---- requests of protocols of our own ------------------------------------------------------

    def answer(self, asked: MessagesRequest, ticket: Ticket) -> Any:
        """Answer a request that upstream has no handler for; as `generate`."""
        return self.generate(*self._as_upstreams(asked, ticket))

    def count_tokens(self, asked: MessagesRequest, ticket: Ticket) -> int:
        """How many tokens the prompt of a request has.

        Raises:
            RefusedError: No model is loaded, or the template refuses the request.
        """
        request, args = self._as_upstreams(asked, ticket)
        provider, names = self.model_provider, self.names
        key = None if names is None else names.key(args.model.model)
        is_own = names is None or key == names.key(None)
        while provider.spare is None and is_own and self.generation_available():
            time.sleep(SIGN_S)  # it is being loaded
        spare = provider.spare
        if spare is None or key not in (None, provider.model_key):
            if key is None:
                raise RefusedError(503, "No model is loaded, so there is nothing to count with.")
            other = loading.load_tokenizer(key.model)
            return len(self._cut(other, request, args).tokens)
        return len(self._cut_beside(spare, request, args).tokens)

    def stop_tokens(self, words: Sequence[str], ticket: Ticket) -> dict[str, list[int]]:
        """The tokens by which upstream recognizes stop words."""
        spare = self.model_provider.spare
        if not words or spare is None:
            return {word: [] for word in words}
        with self._spare_for(ticket):
            return {word: spare.tokenizer.encode(word, add_special_tokens=False) for word in words}

    def _as_upstreams(
        self, asked: MessagesRequest, ticket: Ticket
    ) -> tuple[TicketedRequest, upstream.GenerationArguments]:
        cli, sampling = self.cli_args, asked.sampling
        # Clients of this protocol ask for models of its maker, which stand for the one here.
        is_known = self.names is not None and self.names.is_here(asked.model)
        args = upstream.GenerationArguments(
            model=upstream.ModelDescription(asked.model if is_known else DEFAULT, DEFAULT, None),
            sampling=upstream.SamplingArguments(
                temperature=sampling.get("temperature", cli.temp),
                top_p=sampling.get("top_p", cli.top_p),
                top_k=self._top_k(sampling.get("top_k", cli.top_k)),
                min_p=cli.min_p,
                xtc_probability=0.0,
                xtc_threshold=0.1,
            ),
            logits=upstream.LogitsProcessorArguments(None, 0.0, 20, 0.0, 20, 0.0, 20),
            stop_words=asked.stop_words,
            max_tokens=asked.max_tokens,
            num_draft_tokens=cli.num_draft_tokens,
            logprobs=False,
            top_logprobs=-1,
            seed=None,
            chat_template_kwargs=asked.template_args or None,
        )
        request = TicketedRequest("chat", "", asked.messages, asked.tools, None, ticket=ticket)
        if self._is_distributed and ticket.form is not None:
            # Ranks send each other requests as upstream knows them.
            fitted = ticket.form.fit(self.model_provider.tokenizer)
            request.messages, request.tools = fitted.messages, fitted.tools
            args.chat_template_kwargs = fitted.template_args
            ticket.form = None
        return request, args

    def _top_k(self, top_k: int) -> int:
        """No more than there are tokens, which mlx-lm would fail at; 0 takes all of them."""
        tokenizer = self.model_provider.tokenizer
        return 0 if tokenizer is None or top_k >= len(tokenizer) else top_k

    # ---- where prompts are cut ---------------------------------------------------------------

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """The prompt of the ticket; tokenized here only if the model came later than it."""
        ticket: Ticket = request.ticket
        ticket.in_batch = self._alone is None
        if self._is_given_up(ticket):
            raise ConnectionAbortedError("The client is gone.")
        prompt = ticket.prompt
        if prompt is None or prompt.tokenizer is not tokenizer:
            prompt = self._cut(tokenizer, request, args)
        args.max_tokens = self._room(prompt, args)
        segments, kinds = [list(one) for one in prompt.segments], list(prompt.kinds)
        if prompt.vision is None:
            segments, kinds = self._cut_at_branch(prompt.tokens, segments, kinds, ticket.trail)
        else:
            prompt.vision.cache_key = TicketTokens(prompt.vision.cache_key, ticket)
        ticket.tokenized(dataclasses.replace(prompt, segments=segments, kinds=kinds))
        # Upstream takes pieces away from its lists.
        tokens = TicketTokens(prompt.tokens, ticket)
        return tokens, list(segments), list(kinds), prompt.initial_state, prompt.vision

    def _is_given_up(self, ticket: Ticket) -> bool:
        """Whether a request need not be computed any further."""
        # Only one of several ranks knows, and the others would wait for it.
        return not self._is_distributed and ticket.is_over

    def _cut(self, tokenizer: Any, request: Any, args: Any) -> CutPrompt:
        """Tokenize a request, and cut it into its system part and its turns."""
        form = request.ticket.form
        if form is not None:
            fitted = form.fit(tokenizer)
            request.messages, request.tools = fitted.messages, fitted.tools
            args = dataclasses.replace(args, chat_template_kwargs=fitted.template_args)
        tokenize = super()._tokenize
        tokens, segments, kinds, initial_state, vision = _rendered(
            request, lambda: tokenize(tokenizer, request, args)
        )
        if not tokens:
            # Upstream's generation thread does not survive it.
            raise RefusedError(400, "The prompt has no tokens.")
        if vision is None and kinds == ["assistant"]:
            options = {**self.cli_args.chat_template_args, **(args.chat_template_kwargs or {})}
            segments, kinds = cut_turn(
                tokenizer, request.messages, request.tools, options, list(tokens)
            )
        if form is not None and vision is None:
            trimmable = getattr(self.model_provider, "is_trimmable", True)
            head = system_tokens(segments, kinds)
            places, head = form.cuts(tokenizer, tokens, head, trimmable=trimmable)
            for place in places:
                segments, kinds = cut_at(place, segments, kinds)
            kinds = as_system(head, segments, kinds)
        messages = request.messages
        return CutPrompt(tokenizer, messages, tokens, segments, kinds, initial_state, vision)

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
        trail: Trail,
    ) -> tuple[list[list[int]], list[str]]:
        """Place a checkpoint where this prompt leaves a stored one that cannot be cut there.

        Then the next conversation that leaves it at the same point finds something to resume.
        """
        branch = self.cache.branch_point(
            self.model_provider.model_key, prompt, min_gain_tokens=_MIN_BRANCH_TOKENS, trail=trail
        )
        return cut_at(branch, segments, kinds)

    # ---- requests that are served alone ------------------------------------------------------

    def _serve_single(self, request: Any, stream: Any) -> None:
        """One request at a time, where upstream knows no segments."""
        answers, asked, args = request
        ticket: Ticket = asked.ticket
        ticket.leave_tokens = tokens_looked_back_at(args.logits)

        self._alone = Alone(
            ticket,
            answers,
            self.model_provider,
            on_stream=lambda: mx.stream(stream),
            is_given_up=lambda: self._is_given_up(ticket),
            is_ending=lambda: self._stop and not self._is_distributed,
        )
        try:
            super()._serve_single((self._alone, asked, args), stream)
        finally:
            self._alone = None
            ticket.settle()

    def complete(
        self, model: Hashable, tokens: Sequence[int], cache: Any | None, rest: Sequence[int], /
    ) -> tuple[Any | None, Sequence[int]]:
        """Compute and keep what upstream's loop does not, when it serves a request alone.

        It is called within the look, when the context of the answer is out: so the client sees
        progress.
        """
        if self._alone is None:
            return cache, rest
        return self._alone.complete(self.cache, self.prefill_clock, model, tokens, cache, rest)

    def even_out(self, cache: Any, /) -> None:
        """Bring a reply's draft layers to where those of prompts are."""
        if self.model_provider.draft_model is not None:
            even_out_draft(self.model_provider.model, cache)

    # ---- what is being answered --------------------------------------------------------------

    @contextlib.contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count a request that is being answered: the end of the server waits for it."""
        with self._changed:
            self._in_flight += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    # ---- the end -----------------------------------------------------------------------------

    def drain(self, grace_s: float) -> bool:
        """Wait for running requests; returns whether all of them ended in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._in_flight <= 0, grace_s)


class Batch(upstream.BatchGenerator):  # type: ignore[misc]
    """Upstream's batch, timing prefill alone: not the queue, nor decoding for others.

    A sequence leaves it as views of the batch, of which `insert_cache` copies what is new.
    """

    def __init__(self, prefill_clock: PrefillClock, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._prefill_clock = prefill_clock
        # Upstream keeps these two as long as the batch, and moves sequences into and out of them.
        for batch in (self._prompt_batch, self._generation_batch):
            batch.extract_cache = functools.partial(_extract, batch)

    def next(self) -> Any:
        with self.stats() as spent:
            prompts, tokens = super().next()
        computed = sum(not one.end_of_prompt for one in prompts)
        if computed:
            self._prefill_clock.add(spent.prompt_time, computed)
        return prompts, tokens


def _check_draft(model: Any) -> None:
    """Refuse a draft model whose wrong guesses the cache of `model` could not take back.

    Upstream notices for the classes that say so, with the first request; a sliding window says so
    only when it has slid, and answers wrongly from then on.

    Raises:
        ValueError: They could not be.
    """
    layers = tensors.supported(make_prompt_cache(model))
    names = sorted({layer.class_name for layer in layers if layer.storage != "rows"})
    if names:
        raise ValueError(
            f"it cannot have a draft model: wrong guesses could not be taken back from its "
            f"cache ({', '.join(names)}); leave the draft model out"
        )


def _extract(batch: Any, index: int) -> list[Any]:
    return tensors.extract(batch.prompt_cache, index)


class Spare(NamedTuple):
    """A copy of a tokenizer, to be used by one thread at a time: not all bear company.

    Attributes:
        of: What the generation thread uses.
        tokenizer: The copy.
    """

    of: Any
    tokenizer: Any


class Provider(upstream.ModelProvider):  # type: ignore[misc]
    """Upstream's model provider; a model's identity is that of the files it was loaded from."""

    identifier: Identifier | None = None
    is_trimmable = True
    """The loaded model's cache can be resumed at any token."""
    spare: Spare | None = None
    """Of what is loaded, for use beside the generation thread."""
    context: int | None = None
    """Tokens that the loaded model was made for, if its configuration says so."""
    context_given: int | None = None
    """What counts instead; 0 for no limit."""
    failed: ModelError | MissingDependencyError | None = None
    """Why the model of the command line could not be loaded, which ends the server."""

    def load_default(self) -> None:
        try:
            super().load_default()
        except (ModelError, MissingDependencyError) as error:
            self.failed = error
            # This is the generation thread: without it upstream would listen on, and never answer.
            # Not by SIGINT, which is ignored in what a shell's script starts in the background.
            os.kill(os.getpid(), signal.SIGTERM)
            raise SystemExit from None

    def _load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> None:
        # The key is formed as upstream forms it when the model is loaded.
        model_key = (model_path, adapter_path, draft_model_path)

        def read() -> None:
            super(Provider, self)._load(*model_key)
            loading.evaluate(self.model, self.draft_model)

        with model_errors(model_path) if model_path else contextlib.nullcontext():
            if self.identifier is None or self.is_distributed:
                # A rank loads a shard, which has no identity.
                self.spare = None
                super()._load(*model_key)
            else:
                # What cannot be had costs the model in memory neither its place nor its name.
                for name in filter(None, (model_path, draft_model_path)):
                    fetched = loading.fetch(name)
                    if self.model is not None or draft_model_path is not None:
                        adapter = adapter_path if name == model_path else None
                        trusted = self.cli_args.trust_remote_code
                        built = loadable.build(name, fetched, adapter, trust_remote_code=trusted)
                        if draft_model_path is not None and name == model_path:
                            _check_draft(built)
                self.spare = None
                # The weights in memory go, and with them what is known of their files.
                self.identifier.forget()
                self.identifier.around_load(model_key, read)
            self.context = self.context_given or None
            folder = folder_of(model_path) if model_path else None
            if self.context_given is None and folder is not None:
                self.context = context_tokens(loadable.read_config(folder))
        self.is_trimmable = self.model is None or _is_trimmable(self.model)
        self.spare = Spare(self.tokenizer, copy.deepcopy(self.tokenizer))


def _is_trimmable(model: Any) -> bool:
    """Whether all layers of a model keep rows; a cache that cannot be kept needs no places."""
    try:
        layers = tensors.supported(make_prompt_cache(model))
    except UnsupportedCacheError:
        return True
    return all(layer.storage == "rows" for layer in layers)


class Handler(Messages, Streaming, Front, upstream.APIHandler):  # type: ignore[misc]
    """Upstream's HTTP handler behind our front, saying where the prompt's cache came from."""

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        self.begin(Ticket(self.body_as_read, keeps=self.keeps))
        try:
            with self.response_generator.in_flight():
                super().handle_completion(TicketedRequest.of(request, self.ticket), stop_words)
        except ConnectionError:
            raise
        except Exception as error:
            if not self.has_begun():
                raise
            log.error("a request failed in its stream: %s", type(error).__name__)
            log.debug("the failure", exc_info=True)
            self.say_error(error)
        finally:
            self.ticket = None

    def handle_health_check(self) -> None:
        """Tell a sick disk from a sick model; only the latter makes the server unavailable."""
        healthy = self.response_generator.is_healthy
        said = health_said(self.response_generator.cache, healthy=healthy)
        self._send(json_response(said, 200 if healthy else 503))


def health_said(cache: PromptCache, *, healthy: bool) -> dict[str, str]:
    """What `/health` answers.

    Args:
        cache: The server's.
        healthy: The generation thread lives.
    """
    said = {
        "status": "ok" if healthy else "unavailable",
        "model": "ok" if healthy else "the generation thread died",
        "disk": f"off: {cache.disk_off}" if cache.disk_off else "ok",
    }
    if paused := cache.eviction_paused:
        said["eviction"] = f"paused: {paused}"
    return said


class _Answers(Queue[Any]):
    """What the generation thread has to say of a request.

    Its context comes first. From then on the ticket tells the loop that nobody waits any more.
    """

    def __init__(self, ticket: Ticket) -> None:
        super().__init__()
        self._ticket = ticket

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        if isinstance(item, upstream.GenerationContext):
            stop, item.stop = item.stop, self._ticket.drop
            self._ticket.runs(stop)
        super().put(item, block, timeout)


def _failed(error: Exception) -> tuple[Any, Iterator[Any]]:
    """An answer whose stream has begun, and which then fails."""

    def answer() -> Iterator[Any]:
        raise error
        yield

    context = upstream.GenerationContext(
        has_tool_calling=False,
        has_thinking=False,
        tool_parser=None,
        text_sm=upstream.TextStateMachine(),
        initial_state="normal",
        prompt=[],
    )
    return context, answer()


def main(
    args: Sequence[str],
    run: Callable[..., None],
    parser: type[argparse.ArgumentParser],
    prefill_clock: PrefillClock,
) -> None:
    """Run upstream's `main`, which parses, sets up logging, and calls `run` by its global name.

    Args:
        args: Command line for upstream's parser.
        run: Called with host, port and model provider.
        parser: Class of the parser.
        prefill_clock: Times the prefill of batches.
    """
    with (
        _replaced(
            upstream,
            "argparse",
            SimpleNamespace(**{**vars(argparse), "ArgumentParser": parser}),
        ),
        _replaced(upstream, "run", run),
        _replaced(upstream, "ModelProvider", Provider),
        _replaced(upstream, "BatchGenerator", functools.partial(Batch, prefill_clock)),
        _replaced(sys, "argv", ["persist-cache serve", *args]),
    ):
        upstream.main()


def listen(host: str, port: int, generator: Generator, server: type[HTTPServer]) -> None:
    """Answer requests with `generator` until it is stopped.

    Raises:
        OSError: The port cannot be listened on.
    """
    upstream._run_http_server(host, port, generator, server_class=server, handler_class=Handler)


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


def place_in_group() -> tuple[int, int]:
    """This process's rank, and how many there are that share the model."""
    group = mx.distributed.init()
    return int(group.rank()), int(group.size())


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
