"""Running the server: from its options to its orderly end.

Upstream's model provider, generation loop and HTTP handler do the work (`upstream`); here they are
put together with a `PromptCache`, and ended so that nothing is lost.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.errors import (
    PersistCacheError,
)
from persist_cache.fingerprint.identifier import Identifier
from persist_cache.prefill.clock import PrefillClock
from persist_cache.server import quiet
from persist_cache.server.admin_token import AdminToken
from persist_cache.server.discovery import Serving, announced
from persist_cache.server.guard import (
    LOOPBACK_ORIGINS,
    PAGE_PATH,
    ModelGuard,
    is_loopback,
)
from persist_cache.server.launch import Parser, ServeOptions, open_disk, start_line
from persist_cache.server.listening import NamelessServer
from persist_cache.server.names import names_of, public_name
from persist_cache.server.needed import is_held, when_free
from persist_cache.server.residence import status_line
from persist_cache.server.upstream.generator import Generator
from persist_cache.server.upstream.program import flags_parser, listen, main, place_in_group
from persist_cache.server.warming import Warming
from persist_cache.sharing import Sharing
from persist_cache.store.store import Store, default_store_path
from persist_cache.system import endings, memory
from persist_cache.system.notify import Notifier

log = logging.getLogger(__name__)
LEAST_SAVE_S = 3.0
"""What saving gets when the requests took all of the grace."""
CLOSE_S = 1.0
LAST_WORDS_S = 1.0
"""What requests get that were cut, to tell their clients."""
_stopped = 0.0
"""When the first signal to end came, by the monotonic clock; 0 before."""


def serve(upstream_args: Sequence[str], options: ServeOptions) -> None:
    """Run `mlx_lm.server` with our cache until SIGTERM or SIGINT, which end the process.

    Args:
        upstream_args: Command line for `mlx_lm.server`'s own parser.
        options: What is not in it.

    Raises:
        PersistCacheError: The port is taken, or the model, or that of an alias, cannot be loaded,
            or nobody holds the file of `while_locked`.
    """

    clock = PrefillClock()

    def run(host: str, port: int, provider: Any, *_: Any) -> None:
        _run(host, port, provider, options, clock)

    # Upstream's default lets every page in. What is given after it wins.
    main(["--allowed-origins", LOOPBACK_ORIGINS, *upstream_args], run, Parser, clock)


def flags_of_upstream() -> Parser:
    """The parser of `mlx_lm.server`'s flags, with the defaults that they have here."""
    found = flags_parser(Parser)
    assert isinstance(found, Parser)
    found.set_defaults(allowed_origins=LOOPBACK_ORIGINS)
    return found


def _run(
    host: str, port: int, provider: Any, options: ServeOptions, prefill_clock: PrefillClock
) -> None:
    args, manager = provider.cli_args, Notifier.of()
    quiet.install()
    rank, ranks = place_in_group()
    alone = ranks == 1
    if options.unload_after_s is not None:
        memory.share_one_heap()
    if rank == 0:
        # Before anything is loaded: threads of MLX that are cut short abort the process.
        _try_to_bind(host, port)
    if options.while_locked is not None and not is_held(Path(options.while_locked)):
        raise PersistCacheError(
            f"No process holds {options.while_locked} locked, so nobody needs this server; take "
            "the lock before it starts, as `flock -s FILE COMMAND` does, or leave out "
            "--while-locked."
        )
    identifier = Identifier(
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        quantized_kv_start=args.quantized_kv_start,
        salt=options.salt,
    )
    provider.identifier = identifier
    provider.context_given = options.context_tokens
    names = names_of(provider, options.aliases)
    if rank == 0:
        names.check_aliases()
    store, why_off, open_store = open_disk(options, distributed=not alone)
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
        open_store=open_store,
        prefill_clock=prefill_clock,
    )
    log.info("%s", start_line(store, why_off, args.prompt_cache_size, memory_bytes, options))
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
    if options.note:
        log.warning("%s", options.note)
    sharing: Sharing | None = None
    try:
        if alone:
            sharing = Sharing(cache, options.remote)
        signal.signal(signal.SIGTERM, _interrupt)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, _interrupt)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, _interrupt_again)
        if options.while_locked is not None:
            when_free(Path(options.while_locked), lambda: os.kill(os.getpid(), signal.SIGTERM))
        # Modules stay for good: no search for garbage, in which no thread runs, need visit them.
        gc.freeze()
        generator = Generator(provider, cache)  # which begins to load, and may say that it failed
        from persist_cache.server.admin import Admin  # meanwhile

        generator.prefill_clock, generator.sharing = prefill_clock, sharing
        generator.admin = Admin(
            cache,
            token=token,
            host=host,
            generator=generator,
            texts=options.show_text,
            default_store=options.store is None,
        )
        if rank == 0:
            generator.admin.history.disk.start()
        generator.names, generator.strict = names, options.strict
        generator.stabilize, generator.rules = options.stabilize, options.rules
        warming = Warming(options.warm)
        generator.warming = warming
        if alone:
            generator.unload_after_s = options.unload_after_s
        elif options.unload_after_s is not None:
            log.warning("--unload-after does nothing: several ranks share one model")
        generator.guard = ModelGuard(args.allowed_origins, options.api_key)
        if rank == 0:

            def stopping() -> None:
                manager.stopping()
                warming.stop()
                generator.cut_own()

            with contextlib.ExitStack() as told:

                def tell(bound_port: int) -> None:
                    cache.on_disk = told.enter_context(
                        _page_told(
                            host, bound_port, folder, token, args.model, options.while_locked or ""
                        )
                    )
                    warming.start(page_url(host, bound_port), token())
                    manager.say(READY=1)
                    manager.keep_saying(
                        lambda: status_line(generator), lambda: bool(generator.is_healthy)
                    )

                answer_until_ended(host, port, generator, options.grace_s, tell, stopping)
        else:
            generator.join()
    except KeyboardInterrupt:
        if provider.failed is None:
            raise
    finally:
        endings.arrived()
        manager.stopping()
        if sharing is not None:
            sharing.close(CLOSE_S)
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
    give_up = max(stopped + grace_s - 2 * CLOSE_S, now + min(grace_s, LEAST_SAVE_S))
    saves = cache.stats().saves
    while not cache.flush(max(0.0, give_up - time.monotonic())):
        done = cache.stats().saves
        if cache.disk_off or done == saves:
            log.warning("not everything was saved: %s", cache.disk_off or "it took too long")
            break
        saves, give_up = done, time.monotonic() + grace_s
    cache.close(CLOSE_S)
    if store is not None:
        store.close(CLOSE_S)


def answer_until_ended(
    host: str,
    port: int,
    generator: Generator,
    grace_s: float,
    tell: Callable[[int], None],
    stopping: Callable[[], None] = lambda: None,
) -> None:
    """Answer requests until the process is to end.

    Args:
        host: To listen on.
        port: To listen on.
        generator: Answers.
        grace_s: What running requests get to end.
        tell: Called once somebody can ask, with the port.
        stopping: Called when the end begins.

    Raises:
        PersistCacheError: It cannot listen.
    """
    stop_computing, has_stopped = generator.stop_and_join, False
    listening: list[NamelessServer] = []

    class Listening(NamelessServer):
        def server_activate(self) -> None:
            super().server_activate()
            listening.append(self)
            try:
                tell(self.server_address[1])
            except KeyboardInterrupt:
                endings.arrived()
                stop()  # before its socket is closed, and with it those of the clients
                raise

    def stop() -> None:
        nonlocal has_stopped
        if has_stopped:
            return
        stop_computing()
        for server in listening:
            server.answer_rest(LAST_WORDS_S)
        has_stopped = True

    def drain_then_stop() -> None:
        endings.arrived()
        if generator.model_provider.failed is not None:
            return
        stopping()
        log.info("stopping: waiting up to %.0f s for running requests", grace_s)
        if not generator.drain(grace_s):
            log.warning("running requests were cut after %.0f s", grace_s)
        stop()
        if not generator.drain(LAST_WORDS_S):
            log.warning("some clients could not be told that their requests were cut")

    generator.stop_and_join = drain_then_stop
    try:
        listen(host, port, generator, Listening)
    except KeyboardInterrupt:
        # Before it listened, or for the second time: whoever waits does so in vain.
        endings.arrived()
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
def _page_told(
    host: str,
    port: int,
    folder: Path,
    token: AdminToken,
    model: str | None,
    while_locked: str,
) -> Iterator[Callable[[], None]]:
    """Tell people and commands where the page is; nothing of this goes to the log.

    Yields what tells commands again, where the store's folder was made anew.
    """
    url = page_url(host, port)
    told = ""

    def tell() -> None:
        nonlocal told
        token.renew()
        if token() == told:
            return
        told = token()
        with contextlib.suppress(OSError):  # nobody reads it
            if token.is_given:
                print(f"Page: {url} (it asks for the secret of --admin-token)", flush=True)
            else:
                print(f"Page: {url}#token={told}", flush=True)

    tell()
    serving = Serving(
        url,
        token.is_given,
        model=None if model is None else public_name(model),
        pid=os.getpid(),
        started=time.time(),
        while_locked=while_locked,
    )
    with announced(folder, serving, tell) as again:
        yield again


def page_url(host: str, port: int) -> str:
    """Where a browser on this machine finds the page of a server that is bound so."""
    if host in ("", "0.0.0.0", "::"):
        host = "127.0.0.1" if host != "::" else "::1"
    host = host.strip("[]")
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{PAGE_PATH}"


def _interrupt(signum: int, frame: Any) -> None:
    """SIGTERM and SIGHUP end the server as Ctrl-C does; a second SIGTERM ends it at once."""
    global _stopped
    if signum == signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A terminal that is closed may say so more than once.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if _stopped:
        return  # SIGTERM follows SIGHUP at a logout: that end is under way
    _stopped = time.monotonic()
    endings.insist(KeyboardInterrupt)


def _interrupt_again(signum: int, frame: Any) -> None:
    """Ctrl-C; each further one is heard as well."""
    endings.insist(KeyboardInterrupt)
