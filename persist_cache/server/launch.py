"""What `persist-cache serve` is started with: its own options, upstream's flags, and the store."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct, field

from persist_cache.errors import StoreError
from persist_cache.server.guard import LOOPBACK_ORIGINS
from persist_cache.server.lengths import NO_LIMIT
from persist_cache.server.privacy import Rules
from persist_cache.server.warming import WarmPrompt
from persist_cache.sharing import RemoteChoice
from persist_cache.stability.names import DEFAULTS
from persist_cache.store.opening import is_impossible
from persist_cache.store.store import Store, default_store_path

DEFAULT_GRACE_S = 20.0


class ServeOptions(Struct, frozen=True):
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
        aliases: Further names of models, and what they stand for.
        strict: Refuse what is asked for and not done, instead of saying so.
        context_tokens: Longest prompt and answer together, None for what the model's
            configuration says, 0 for no limit.
        stabilize: Names of the repairs that may be done to requests.
        quotas: Bytes on disk of models and salts; see `Store.open`. None as last set.
        ttl: Default lifetimes in seconds; see there. None as last set.
        rules: What is kept of requests that do not say.
        remote: What was said of the remote.
        show_text: Whether page and admin API may show prompts as text.
        note: What is worth saying when it starts; "" for nothing.
        while_locked: End when nobody holds this file locked any more; None to stay.
        unload_after_s: Seconds without a request after which the model leaves memory, None for
            never.
        warm: Prompts to be computed at the start.
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
    aliases: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    context_tokens: int | None = None
    stabilize: frozenset[str] = DEFAULTS
    show_text: bool = True
    note: str = ""
    while_locked: str | None = None
    unload_after_s: float | None = None
    warm: tuple[WarmPrompt, ...] = ()
    quotas: Mapping[str, int] | None = None
    ttl: Mapping[str, int] | None = None
    rules: Rules = field(default_factory=Rules)
    remote: RemoteChoice = field(default_factory=RemoteChoice)


class Parser(argparse.ArgumentParser):
    """Upstream's parser, with a help that is true here: we give some flags another default.

    Attributes:
        known: Its flags.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.known: list[argparse.Action] = []
        super().__init__(*args, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        if "--allowed-origins" in names:
            options["help"] = (
                "Web pages that may ask, by their origins, separated by commas; `loopback` for "
                f"those of this machine, on any port, `*` for all (default: {LOOPBACK_ORIGINS})"
            )
        if "--max-tokens" in names:
            options["default"] = NO_LIMIT
            options["help"] = (
                "Default maximum number of tokens to generate (default: to the end of the model's "
                "context)"
            )
        action = super().add_argument(*names, **options)
        self.known.append(action)
        return action


def open_disk(
    options: ServeOptions, *, distributed: bool
) -> tuple[Store | None, str, Callable[[], Store] | None]:
    """The store, or why there is none: a server without its disk still answers.

    Returns:
        The store, why there is none, and how to open one later if that may help.

    Raises:
        StoreError: Its path can be none, now or later.
    """
    if not options.persist:
        return None, "no store was given (--persist none)", None
    if distributed:
        return None, "several ranks share one model, and shards are not stored yet", None
    open_store = functools.partial(
        Store.open,
        options.store,
        max_bytes=options.disk_bytes,
        min_free_bytes=options.min_free_bytes,
        daily_write_bytes=options.daily_write_bytes,
        quotas=options.quotas,
        ttl=options.ttl,
    )
    try:
        return open_store(), "", None
    except StoreError as error:
        place = default_store_path() if options.store is None else options.store
        if is_impossible(error) and not os.path.lexists(place):
            # No disk that comes back later will make a store of such a path.
            raise
        return None, str(error), open_store


def start_line(
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
