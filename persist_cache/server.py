"""`mlx_lm.server` with a `PromptCache`: the same API and flags, restartable.

Upstream's model provider, generation loop and HTTP handler do the work. What is added here: where
prompts are cut (tool turns, checkpoints at branches), what an answer says about the cache, and an
orderly end. This is the only importer of `mlx_lm.server` besides `rendering`; what is used of its
private seam is listed in `SEAM` and checked by a test.
"""

from __future__ import annotations

import _thread
import contextlib
import copy
import dataclasses
import errno
import functools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from mlx_lm import server as upstream

from persist_cache import loading
from persist_cache.access import (
    LOOPBACK_ORIGINS,
    OUTCOME_HEADER,
    PAGE_PATH,
    ModelGuard,
    is_loopback,
)
from persist_cache.admin import Admin
from persist_cache.admin_token import AdminToken, Serving, announced
from persist_cache.cache import PromptCache
from persist_cache.errors import (
    MissingDependencyError,
    ModelError,
    PersistCacheError,
    StoreError,
)
from persist_cache.fingerprint import Identifier
from persist_cache.front import Front
from persist_cache.listening import NamelessServer
from persist_cache.opening import is_impossible
from persist_cache.prefills import PrefillClock
from persist_cache.rendering import system_end, system_tokens
from persist_cache.store import Store, default_store_path
from persist_cache.tally import Fetch
from persist_cache.ticket import Ticket, TicketedCache
from persist_cache.warm import model_errors

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

DEFAULT_GRACE_S = 20.0
_LEAST_SAVE_S = 3.0
"""What saving gets when the requests took all of the grace."""
_CLOSE_S = 1.0
_stopped = 0.0
"""When the first signal to end came, by the monotonic clock; 0 before."""
_MIN_BRANCH_TOKENS = 64
"""A shared prefix beyond the last checkpoint is worth one of its own from this length on."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `persist-cache serve` adds to the flags of `mlx_lm.server`.

    Attributes:
        store: Folder of the store; None for the default one.
        disk_bytes: Budget on disk, None as last set.
        min_free_bytes: Free space to leave, None as last set.
        daily_write_bytes: Written per UTC day at most, None for no limit.
        memory_bytes: Bytes of live caches kept in memory, None for `--prompt-cache-bytes`.
        persist: Labels of the tiers that go to disk.
        grace_s: Seconds that running requests may take to end after SIGTERM.
        admin_token: Secret that the admin API asks for, None for the store's own.
        api_key: Secret that everything else asks for, None for none.
        salt: Keeps this server's entries apart from others'.
    """

    store: str | None = None
    disk_bytes: int | None = None
    min_free_bytes: int | None = None
    daily_write_bytes: int | None = None
    memory_bytes: int | None = None
    persist: tuple[str, ...] = ("system", "user", "assistant")
    grace_s: float = DEFAULT_GRACE_S
    admin_token: str | None = None
    api_key: str | None = None
    salt: str = ""


class Generator(upstream.ResponseGenerator):  # type: ignore[misc]
    """Upstream's generation loop, cutting prompts where a restart will want to resume them."""

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
        prompt, segments, types, initial_state, vision = super()._tokenize(tokenizer, request, args)
        if vision is None:
            if len(segments) == 1 and types == ["assistant"] and request.request_type == "chat":
                segments, types = self._cut_tool_turn(tokenizer, request, args, prompt)
            segments, types = self._cut_at_branch(prompt, segments, types)
        ticket = getattr(request, "ticket", None)
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
        end = self._system_end(tokenizer, request, args, prompt)
        if 0 < end < len(prompt):
            return [prompt[:end], prompt[end:]], ["system", "user"]
        return [prompt], ["user"] if request.messages else ["assistant"]

    def _system_end(self, tokenizer: Any, request: Any, args: Any, prompt: Sequence[int]) -> int:
        """Tokens of `prompt` that any conversation with the same system messages shares."""
        options = {**self.cli_args.chat_template_args, **(args.chat_template_kwargs or {})}
        return system_end(tokenizer, request.messages, request.tools, options, prompt)

    def _cut_at_branch(
        self, prompt: Sequence[int], segments: list[list[int]], types: list[str]
    ) -> tuple[list[list[int]], list[str]]:
        """Place a checkpoint where this prompt leaves a stored one that cannot be cut there.

        Then the next conversation that leaves it at the same point finds something to resume.
        """
        branch = self.cache.branch_point(
            self.model_provider.model_key, prompt, min_gain_tokens=_MIN_BRANCH_TOKENS
        )
        if branch == 0:
            return segments, types
        start = 0
        for index, segment in enumerate(segments):
            end = start + len(segment)
            if start < branch < end:
                halves = [segment[: branch - start], segment[branch - start :]]
                kind = types[index]
                return (
                    [*segments[:index], *halves, *segments[index + 1 :]],
                    [*types[:index], kind, *types[index:]],
                )
            start = end
        return segments, types

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
        from persist_cache.warm import KVQuantization, new_cache, prefill, snapshot

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
        ticket = vars(request).setdefault("ticket", self.new_ticket())
        if self._in_flight > 1:
            # Rendering a prompt changes its messages, so each thread has its own.
            mine = dataclasses.replace(request, messages=copy.deepcopy(request.messages))
            self._reader.submit(self._read_ahead, mine, generation_args)
        ctx, response = super().generate(request, generation_args, progress_callback)
        # When requests are served one at a time, the context is handed out before the look.
        while not ticket.wait(1.0) and self.generation_available():
            pass
        if ticket.fetch is None:
            # It failed before the look: asking for the answer raises why.
            next(response, None)
            raise RuntimeError("The request was answered without a look into the cache.")
        return ctx, _told(ctx, response, ticket.fetch)

    def new_ticket(self) -> Ticket:
        """A ticket for the request that this thread is about to make."""
        return Ticket(getattr(self._answering, "part", ""))

    def _read_ahead(self, request: Any, args: Any) -> None:
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
            self.cache.read_ahead(key, super()._tokenize(tokenizer, request, args)[0])
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
    failed: ModelError | MissingDependencyError | None = None
    """Why the model of the command line could not be loaded, which ends the server."""

    def load_default(self) -> None:
        try:
            super().load_default()
        except (ModelError, MissingDependencyError) as error:
            self.failed = error
            # This is the generation thread: without it upstream would listen on, and never answer.
            _thread.interrupt_main()
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
                for name in filter(None, (model_path, draft_model_path)):
                    # What cannot be had costs the model in memory neither its place nor its name.
                    loading.fetch(name)
                self.spare_tokenizer = None
                # The weights in memory go, and with them what is known of their files.
                self.identifier.forget()
                self.identifier.around_load(model_key, read)
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
        body = json.dumps(said).encode()
        self._set_completion_headers(200 if healthy else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


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


def cache_header(fetch: Fetch) -> str:
    """The value of `x-persist-cache`: `disk|memory|miss; tokens=N`, and why it is no more."""
    value = f"{fetch.source}; tokens={fetch.num_tokens}"
    if fetch.reason:
        reason = (
            fetch.reason.replace("→", "->").encode("ascii", "replace").decode().replace('"', "'")
        )
        value += f'; reason="{" ".join(reason.split())[:200]}"'
    return value


def serve(upstream_args: Sequence[str], options: ServeOptions) -> None:
    """Run `mlx_lm.server` with our cache until SIGTERM or SIGINT, which end the process.

    Args:
        upstream_args: Command line for `mlx_lm.server`'s own parser.
        options: What is not in it.

    Raises:
        PersistCacheError: The port is taken, or the model cannot be loaded.
    """

    clock = PrefillClock()

    def run(host: str, port: int, provider: Any, *_: Any) -> None:
        _run(host, port, provider, options, clock)

    # Upstream parses, sets up logging, and calls `run` by its global name.
    with (
        _replaced(upstream, "run", run),
        _replaced(upstream, "ModelProvider", Provider),
        _replaced(upstream, "BatchGenerator", functools.partial(Batch, clock)),
        # Upstream's default lets every page in. What is given after it wins.
        _replaced(
            sys,
            "argv",
            ["persist-cache serve", "--allowed-origins", LOOPBACK_ORIGINS, *upstream_args],
        ),
    ):
        upstream.main()


def _run(
    host: str, port: int, provider: Any, options: ServeOptions, prefill_clock: PrefillClock
) -> None:
    args = provider.cli_args
    alone = mx.distributed.init().size() == 1
    if alone or mx.distributed.init().rank() == 0:
        # Before anything is loaded: threads of MLX that are cut short abort the process.
        _try_to_bind(host, port)
    identifier = Identifier(
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        quantized_kv_start=args.quantized_kv_start,
        salt=options.salt,
    )
    provider.identifier = identifier
    store, why_off = _open_store(options, distributed=not alone)
    limits = (options.memory_bytes, args.prompt_cache_bytes, 1 << 63)
    memory_bytes = next(limit for limit in limits if limit is not None)  # 0 keeps nothing
    cache = PromptCache(
        args.prompt_cache_size,
        memory_bytes,
        store=store,
        identify=identifier,
        leave_tokens=1,
        persist=options.persist,
        disk_off=why_off,
        prefill_clock=prefill_clock,
    )
    log.info("%s", _start_line(store, why_off, args.prompt_cache_size, memory_bytes, options))
    folder = store.root if store is not None else Path(options.store or default_store_path())
    token = AdminToken(folder, options.admin_token)
    if token.trouble:
        log.warning("commands cannot find the admin token: %s", token.trouble)
    if options.api_key is None and not is_loopback(host):
        log.warning(
            "listening on %s without --api-key: whoever reaches this port can send prompts, and "
            "learn from cached_tokens what others sent",
            host or "all addresses",
        )
    try:
        generator = Generator(provider, cache)
        generator.prefill_clock = prefill_clock
        generator.admin = Admin(cache, token=token, host=host, generator=generator)
        generator.guard = ModelGuard(args.allowed_origins, options.api_key)
        signal.signal(signal.SIGTERM, _interrupt)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, _interrupt)
        if mx.distributed.init().rank() == 0:
            with contextlib.ExitStack() as told:

                def tell(bound_port: int) -> None:
                    told.enter_context(_page_told(host, bound_port, folder, token))

                _listen(host, port, generator, options.grace_s, tell)
        else:
            generator.join()
    except KeyboardInterrupt:
        if provider.failed is None:
            raise
    finally:
        _close(cache, store, _stopped or time.monotonic(), options.grace_s)
    if provider.failed is not None:
        raise provider.failed
    # Threads that answer or were cut may still be about. The interpreter's end would have them run
    # into what is gone already, MLX and standard error, which aborts the process.
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            stream.flush()
    os._exit(0)


def _close(cache: PromptCache, store: Store | None, stopped: float, grace_s: float) -> None:
    """Save what waits, for as long as that makes progress; never hang on a store that is stuck.

    Args:
        cache: The cache.
        store: Its store.
        stopped: When the end began, by the monotonic clock.
        grace_s: What the end may take, as far as it is in our hands.
    """
    now = time.monotonic()
    give_up = max(stopped + grace_s - 2 * _CLOSE_S, now + min(grace_s, _LEAST_SAVE_S))
    saves = cache.stats().saves
    while not cache.flush(max(0.0, give_up - time.monotonic())):
        done = cache.stats().saves
        if cache.disk_off or done == saves:
            log.warning("not everything was saved: %s", cache.disk_off or "it took too long")
            break
        saves, give_up = done, time.monotonic() + grace_s
    cache.close(_CLOSE_S)
    if store is not None:
        store.close(_CLOSE_S)


def _listen(
    host: str, port: int, generator: Generator, grace_s: float, tell: Callable[[int], None]
) -> None:
    """Answer requests until the process is to end; `tell` is called once somebody can ask."""
    stop = generator.stop_and_join

    class Listening(NamelessServer):
        def server_activate(self) -> None:
            super().server_activate()
            tell(self.server_address[1])

    def drain_then_stop() -> None:
        if generator.model_provider.failed is not None:
            return
        log.info("stopping: waiting up to %.0f s for running requests", grace_s)
        if not generator.drain(grace_s):
            log.warning("running requests were cut after %.0f s", grace_s)
        stop()

    generator.stop_and_join = drain_then_stop
    try:
        upstream._run_http_server(
            host, port, generator, server_class=Listening, handler_class=Handler
        )
    except KeyboardInterrupt:
        # Before it listened, or for the second time: whoever waits does so in vain.
        stop()
    except OSError as error:
        stop()
        raise _cannot_listen(host, port, error) from error


def _try_to_bind(host: str, port: int) -> None:
    """See whether the server will be able to listen.

    Raises:
        PersistCacheError: It will not.
    """
    if not 0 <= port <= 65_535:
        raise PersistCacheError(f"There is no port {port}; --port goes from 0 to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: Exception) -> PersistCacheError:
    why = getattr(error, "strerror", None) or str(error)
    is_host = isinstance(error, (socket.gaierror, UnicodeError)) or (
        isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL
    )
    what = "--host" if is_host else "--port"
    return PersistCacheError(f"Cannot listen on {host}:{port} ({why}); choose another {what}.")


@contextlib.contextmanager
def _page_told(host: str, port: int, folder: Path, token: AdminToken) -> Iterator[None]:
    """Tell people and commands where the page is; nothing of this goes to the log."""
    url = page_url(host, port)
    with contextlib.suppress(OSError):  # nobody reads it
        if token.is_given:
            print(f"Page: {url} (it asks for the secret of --admin-token)", flush=True)
        else:
            print(f"Page: {url}#token={token()}", flush=True)
    if token.trouble:
        yield
        return
    with announced(folder, Serving(url, token.is_given)):
        yield


def page_url(host: str, port: int) -> str:
    """Where a browser on this machine finds the page of a server that is bound so."""
    if host in ("", "0.0.0.0", "::"):
        host = "127.0.0.1" if host != "::" else "::1"
    host = host.strip("[]")
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{PAGE_PATH}"


def _open_store(options: ServeOptions, *, distributed: bool) -> tuple[Store | None, str]:
    """The store, or why there is none: a server without its disk still answers.

    Raises:
        StoreError: Its path can be none, now or later.
    """
    if not options.persist:
        return None, "no store was given (--persist none)"
    if distributed:
        return None, "several ranks share one model, and shards are not stored yet"
    try:
        return (
            Store.open(
                options.store,
                max_bytes=options.disk_bytes,
                min_free_bytes=options.min_free_bytes,
                daily_write_bytes=options.daily_write_bytes,
            ),
            "",
        )
    except StoreError as error:
        place = default_store_path() if options.store is None else options.store
        if is_impossible(error) and not os.path.lexists(place):
            # No disk that comes back later will make a store of such a path.
            raise
        return None, str(error)


def _start_line(
    store: Store | None, why_off: str, max_size: int, memory_bytes: int, options: ServeOptions
) -> str:
    memory = f"{max_size} caches"
    if memory_bytes < 1 << 62:
        memory += f", {_gib(memory_bytes)}"
    if store is None:
        return f"prompt cache: memory {memory}; disk off: {why_off}"
    return (
        f"prompt cache: memory {memory}; disk {store.root}, at most "
        f"{_gib(store.limits.max_bytes)}, {_gib(store.limits.min_free_bytes)} left free, "
        f"tiers {', '.join(options.persist)}"
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.2f} GiB"


def _interrupt(signum: int, frame: Any) -> None:
    """SIGTERM and SIGHUP end the server as Ctrl-C does; a second SIGTERM ends it at once."""
    global _stopped
    _stopped = time.monotonic()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A terminal that is closed may say so more than once.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
