"""`mlx_lm.server`'s own classes with a `PromptCache`: the only importer of that module.

What is added: where prompts are cut (tool turns, checkpoints at branches), what an answer says
about the cache, and which files a model was loaded from. What is used of its private seam is
listed in `SEAM`, and checked by a test.
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
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import HTTPServer
from types import SimpleNamespace
from typing import Any, Literal

import mlx.core as mx
from mlx_lm import server as upstream

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.cache.stats import Fetch
from persist_cache.errors import MissingDependencyError, ModelError
from persist_cache.fingerprint.identifier import Identifier
from persist_cache.fingerprint.model_files import folder_of
from persist_cache.prefill import loadable, loading
from persist_cache.prefill.clock import PrefillClock
from persist_cache.prefill.loading import model_errors
from persist_cache.server.admin import Admin
from persist_cache.server.answers import json_response
from persist_cache.server.guard import OUTCOME_HEADER, ModelGuard
from persist_cache.server.http import Front
from persist_cache.server.lengths import context_tokens, room
from persist_cache.server.names import Names
from persist_cache.server.protocols.openai import one_head
from persist_cache.server.rendering import unrenderable
from persist_cache.server.segments import cut_at, system_end, system_tokens
from persist_cache.server.ticket import Ticket, TicketedCache, cache_header
from persist_cache.store.trail import Trail

log = logging.getLogger(__name__)

SEAM = {
    "run": ("host", "port", "model_provider", "server_class", "handler_class"),
    "_run_http_server": ("host", "port", "response_generator", "server_class", "handler_class"),
    "ResponseGenerator._tokenize": ("self", "tokenizer", "request", "args"),
    "ResponseGenerator._serve_single": ("self", "request", "stream"),
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


class Generator(upstream.ResponseGenerator):  # type: ignore[misc]
    """Upstream's generation loop, cutting prompts where a restart will want to resume them."""

    names: Names | None = None
    """Makes one key of all names of a model; without it they are taken as upstream takes them."""
    strict = False
    """Whether requests for what is not done are refused."""

    def __init__(self, model_provider: Any, prompt_cache: PromptCache) -> None:
        self.cache = prompt_cache  # upstream deletes its own reference at the end
        self._answering = threading.local()
        self._serving = Ticket()
        self._stream: Any = None
        self._in_flight = 0
        self._reader = ThreadPoolExecutor(1, "persist-cache-read-ahead")
        self.admin: Admin | None = None
        self.guard: ModelGuard | None = None
        self.prefill_clock = PrefillClock()
        self._changed = threading.Condition()
        prompt_cache.is_busy = lambda: self._in_flight > 0
        super().__init__(model_provider, TicketedCache(prompt_cache, self))

    # ---- where prompts are cut ---------------------------------------------------------------

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        tokenize = super()._tokenize
        prompt, segments, types, initial_state, vision = _rendered(
            request, lambda: tokenize(tokenizer, request, args)
        )
        args.max_tokens = room(
            len(prompt),
            args.max_tokens,
            getattr(self.model_provider, "context", None),
            param="messages" if request.request_type == "chat" else "prompt",
        )
        ticket: Ticket | None = getattr(request, "ticket", None)
        if vision is None:
            if len(segments) == 1 and types == ["assistant"] and request.request_type == "chat":
                segments, types = self._cut_tool_turn(tokenizer, request, args, prompt)
            trail = None if ticket is None else ticket.trail
            segments, types = self._cut_at_branch(prompt, segments, types, trail)
        if ticket is not None:
            self._serving = ticket
            ticket.system_tokens = system_tokens(segments, types)
            if ticket.part:
                whole = ticket.part == "prompt"
                end = len(prompt) - 1 if whole else ticket.system_tokens
                self.cache.cut_answer(prompt, end, model=self.model_provider.model_key)
        return prompt, segments, types, initial_state, vision

    def _cut_tool_turn(
        self, tokenizer: Any, request: Any, args: Any, prompt: list[int]
    ) -> tuple[list[list[int]], list[str]]:
        """Give a prompt that ends in a tool's result its system and user segments.

        Upstream makes one `assistant` piece of it, so an agent's loop would leave no checkpoint.
        """
        options = {**self.cli_args.chat_template_args, **(args.chat_template_kwargs or {})}
        end = system_end(tokenizer, request.messages, request.tools, options, prompt)
        if 0 < end < len(prompt):
            return [prompt[:end], prompt[end:]], ["system", "user"]
        return [prompt], ["user"] if request.messages else ["assistant"]

    def _cut_at_branch(
        self,
        prompt: Sequence[int],
        segments: list[list[int]],
        types: list[str],
        trail: Trail | None,
    ) -> tuple[list[list[int]], list[str]]:
        """Place a checkpoint where this prompt leaves a stored one that cannot be cut there.

        Then the next conversation that leaves it at the same point finds something to resume.
        """
        branch = self.cache.branch_point(
            self.model_provider.model_key, prompt, min_gain_tokens=_MIN_BRANCH_TOKENS, trail=trail
        )
        return cut_at(branch, segments, types)

    def _serve_single(self, request: Any, stream: Any) -> None:
        """One request at a time: upstream knows no segments here."""
        self._stream = stream
        try:
            super()._serve_single(request, stream)
        finally:
            self._stream = None
            request[1].ticket.settle()

    def now_serving(self) -> Ticket:
        """The ticket of the request that was tokenized last."""
        return self._serving

    def complete(
        self,
        ticket: Ticket,
        model: Hashable,
        tokens: Sequence[int],
        cache: Any | None,
        rest: Sequence[int],
        /,
    ) -> tuple[Any | None, Sequence[int]]:
        """Compute and keep a prompt's system part, where upstream's loop does not.

        A draft model's cache lags behind, so with one the reply alone is kept.

        Returns:
            What is handed to upstream: the cache, and the tokens that it has not seen.
        """
        done, end = len(tokens) - len(rest), ticket.system_tokens
        if self._stream is None or done >= end or self.model_provider.draft_model is not None:
            return cache, rest
        from persist_cache.prefill.run import KVQuantization, new_cache, prefill, snapshot

        options = self.cli_args
        quantize = None
        if options.kv_bits is not None:
            quantize = KVQuantization(
                options.kv_bits, options.kv_group_size, options.quantized_kv_start
            )
        cache = new_cache(self.model_provider.model) if cache is None else cache
        with mx.stream(self._stream), self.prefill_clock.running():
            prefill(
                self.model_provider.model,
                cache,
                tokens[done:end],
                step_tokens=options.prefill_step_size,
                quantize=quantize,
            )
        self.cache.insert_cache(model, tokens[:end], snapshot(cache), cache_type="system")
        return cache, tokens[end:]

    # ---- what an answer says -----------------------------------------------------------------

    def generate(
        self,
        request: Any,
        generation_args: Any,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> Any:
        if not self.generation_available():
            return super().generate(request, generation_args, progress_callback)  # which says so
        if self.names is not None:
            asked = generation_args.model
            key = self.names.key(asked.model, asked.adapter, asked.draft)
            self.names.check(key)
            # What is compared and loaded; the answer says what the client said.
            generation_args.model = upstream.ModelDescription(key.model, key.draft, key.adapter)
        only_fills = generation_args.max_tokens == 0
        ticket = vars(request).setdefault("ticket", self.new_ticket())
        if self._in_flight > 1:
            # Rendering a prompt changes its messages, so each thread has its own.
            mine = dataclasses.replace(request, messages=copy.deepcopy(request.messages))
            self._reader.submit(self.read_ahead, mine, generation_args, ticket.trail)
        ctx, response = super().generate(request, generation_args, progress_callback)
        # When requests are served one at a time, the context is handed out before the look.
        while not ticket.wait(1.0) and self.generation_available():
            pass
        if ticket.fetch is None:
            # It failed before the look: asking for the answer raises why.
            next(response, None)
            raise RuntimeError("The request was answered without a look into the cache.")
        told = _told(ctx, response, ticket.fetch)
        return ctx, (one for one in told if not only_fills)

    def new_ticket(self) -> Ticket:
        """A ticket for the request that this thread is about to make."""
        return Ticket(getattr(self._answering, "part", ""))

    def read_ahead(self, request: Any, args: Any, trail: Trail) -> None:
        """Have the disk read what a request needs while the loop still decodes for others.

        It looks at new requests twice a second only. On a thread of its own, with a tokenizer of
        its own; what fails here is left to upstream to say.
        """
        provider = self.model_provider
        key, tokenizer = provider.model_key, getattr(provider, "spare_tokenizer", None)
        wanted = args.model.model
        if wanted == "default_model":
            wanted = self.cli_args.model
        if tokenizer is None or key is None or wanted != key[0]:
            return
        try:
            if any(upstream._image_parts(request.messages)):
                return
            prompt = super()._tokenize(tokenizer, request, args)[0]
            self.cache.read_ahead(key, prompt, trail=trail)
        except Exception as error:
            log.debug("nothing was read ahead: %s", error)

    @contextlib.contextmanager
    def keeping_only(self, part: Literal["prompt", "system"]) -> Iterator[None]:
        """Make requests of our own in this thread: they leave the cache of that part of theirs.

        They are not counted among the clients' requests.
        """
        self._answering.part = part
        try:
            yield
        finally:
            self._answering.part = ""

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
    """Upstream's batch, timing prefill alone: not the queue, nor decoding for others."""

    def __init__(self, prefill_clock: PrefillClock, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._prefill_clock = prefill_clock

    def next(self) -> Any:
        with self.stats() as spent:
            prompts, tokens = super().next()
        computed = sum(not one.end_of_prompt for one in prompts)
        if computed:
            self._prefill_clock.add(spent.prompt_time, computed)
        return prompts, tokens


class Provider(upstream.ModelProvider):  # type: ignore[misc]
    """Upstream's model provider; a model's identity is that of the files it was loaded from."""

    identifier: Identifier | None = None
    spare_tokenizer: Any = None
    """For use beside the generation thread: not all tokenizers bear company."""
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
                self.spare_tokenizer = None
                super()._load(*model_key)
            else:
                # What cannot be had costs the model in memory neither its place nor its name.
                for name in filter(None, (model_path, draft_model_path)):
                    fetched = loading.fetch(name)
                    if self.model is not None:
                        adapter = adapter_path if name == model_path else None
                        trusted = self.cli_args.trust_remote_code
                        loadable.build(name, fetched, adapter, trust_remote_code=trusted)
                self.spare_tokenizer = None
                # The weights in memory go, and with them what is known of their files.
                self.identifier.forget()
                self.identifier.around_load(model_key, read)
            self.context = self.context_given or None
            folder = folder_of(model_path) if model_path else None
            if self.context_given is None and folder is not None:
                self.context = context_tokens(loadable.read_config(folder))
        self.spare_tokenizer = copy.deepcopy(self.tokenizer)


class Handler(Front, upstream.APIHandler):  # type: ignore[misc]
    """Upstream's HTTP handler behind our front, saying where the prompt's cache came from."""

    _ticket: Ticket | None = None

    def handle_completion(self, request: Any, stop_words: list[str]) -> None:
        self._ticket = request.ticket = self.response_generator.new_ticket()
        try:
            with self.response_generator.in_flight():
                super().handle_completion(request, stop_words)
        finally:
            self._ticket = None

    def _set_completion_headers(self, status_code: int = 200) -> None:
        super()._set_completion_headers(status_code)
        self._say_cache(status_code)

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
        self._say_cache(status_code)

    def _say_cache(self, status_code: int) -> None:
        if status_code == 200 and self._ticket is not None and self._ticket.fetch is not None:
            self.send_header(OUTCOME_HEADER, cache_header(self._ticket.fetch))

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


def _told(ctx: Any, response: Iterator[Any], fetch: Fetch) -> Iterator[Any]:
    """The answer, with the usage of `ctx` corrected before it is read.

    Upstream takes what it is handed for what was cached; that may have been computed just now.
    """
    for one in response:
        ctx.prompt_cache_count = fetch.num_tokens
        yield one


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
