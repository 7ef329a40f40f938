"""`persist-cache serve`: mlx_lm.server with a cache that survives it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click
from msgspec.structs import replace

from persist_cache.entry import TIER_LABELS
from persist_cache.server.launch import DEFAULT_GRACE_S, ServeOptions
from persist_cache.server.names import parse_aliases
from persist_cache.server.privacy import Rules
from persist_cache.server.run import flags_of_upstream, serve
from persist_cache.stability.names import DEFAULTS
from persist_cache_cli.blas import advice
from persist_cache_cli.calling import check_store
from persist_cache_cli.config import config_of
from persist_cache_cli.parse import (
    DURATION,
    REPAIRS,
    SIZE,
    parse_duration,
    parse_rules,
    parse_size,
)
from persist_cache_cli.remote_options import remote_choice, remote_options
from persist_cache_cli.warm_file import read_warm_file


@click.command(
    "serve",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
@click.option("--store", "own_store", metavar="PATH", help="Folder of the store.")
@click.option("--disk-bytes", type=SIZE, help="Budget on disk, such as 50GB.")
@click.option("--memory-bytes", type=SIZE, help="Live caches in memory; also --prompt-cache-bytes.")
@click.option("--min-free", type=SIZE, help="Free disk space that is left alone.")
@click.option("--daily-write-bytes", type=SIZE, help="Most that is written in a UTC day.")
@click.option(
    "--persist",
    metavar="TIERS",
    default=",".join(reversed(TIER_LABELS)),
    show_default=True,
    help="Tiers that go to disk, or none.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=DEFAULT_GRACE_S,
    show_default=True,
    help="Seconds for running requests to end after SIGTERM.",
)
@click.option(
    "--admin-token",
    envvar="PERSIST_CACHE_ADMIN_TOKEN",
    show_envvar=True,
    help="Secret for the admin API, instead of the one kept in the store's folder.",
)
@click.option(
    "--api-key",
    envvar="PERSIST_CACHE_API_KEY",
    show_envvar=True,
    help="Secret that all other requests must send, as a Bearer token or x-api-key.",
)
@click.option("--salt", default="", help="Keep this server's entries apart from others'.")
@click.option(
    "--alias",
    "aliases",
    metavar="NAME=MODEL",
    multiple=True,
    help="Another name for a model; may be given several times.",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Refuse what is asked for and not done, such as response_format, instead of saying so.",
)
@click.option(
    "--stabilize",
    type=REPAIRS,
    default=",".join(sorted(DEFAULTS)),
    metavar="NAMES",
    help="Further repairs of what breaks prefixes: date, env, tools, reminders, cleared, thinking; "
    "or all, or none.",
)
@click.option(
    "--context-tokens",
    type=click.IntRange(min=0),
    help="Longest prompt and answer together, where the model's configuration is wrong; 0: any.",
)
@click.option(
    "--quota",
    "quotas",
    metavar="WHAT=SIZE",
    multiple=True,
    help="Disk that each `model` or `salt` may take, or one: model:NAME=4GB, salt:TEXT=1GB. "
    "`none` ends all quotas.",
)
@click.option(
    "--ttl",
    metavar="WHAT=TIME",
    multiple=True,
    help="How long entries stay after they were stored: a tier, `model`, `salt`, or one of them, "
    "such as assistant=7d. `none` ends all of it.",
)
@click.option(
    "--no-store-default",
    is_flag=True,
    help="Keep nothing of a request unless it says `x-persist-cache: store`.",
)
@click.option(
    "--respect-store",
    is_flag=True,
    help="Keep nothing of a request with `store: false`; Codex always sends that.",
)
@click.option(
    "--min-tokens",
    type=click.IntRange(min=0),
    default=0,
    help="Prompts with fewer tokens stay in memory alone.",
)
@click.option(
    "--text/--no-text",
    "show_text",
    default=True,
    show_default=True,
    help="Whether the page and the admin API may show prompts.",
)
@click.option(
    "--while-locked",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True),
    help="End when no process holds an flock on FILE any more.",
)
@click.option(
    "--warm",
    metavar="FILE.toml",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Prompts to compute at the start, a [[prompt]] each, while requests are answered.",
)
@click.option(
    "--unload-after",
    type=DURATION,
    help="Free the model's memory after so long without a request, such as 15m; the next request "
    "loads it again.",
)
@remote_options
@click.option("-h", "--help", "show_help", is_flag=True, help="Show this, and upstream's flags.")
@click.pass_context
def command(ctx: click.Context, /, *, show_help: bool, **_: Any) -> None:
    """Run mlx_lm.server with a prompt cache that survives restarts.

    Every flag of mlx_lm.server works; the API is the same.

    \b
    Example:
      persist-cache serve --model mlx-community/Qwen3-4B-4bit --port 8080
    """
    if show_help:
        click.echo(ctx.get_help())
        click.echo("\nFlags of mlx_lm.server:\n")
        serve(["--help"], ServeOptions())
        return
    arguments, options = understood(ctx)
    for handler in list(logging.getLogger().handlers):
        # Upstream sets up logging as its --log-level says, but only where nobody has done so yet.
        logging.getLogger().removeHandler(handler)
    with errors_in_one_sentence():
        serve(arguments, replace(options, note=advice("serve …")))


def understood(ctx: click.Context) -> tuple[list[str], ServeOptions]:
    """What the server would be run with: upstream's arguments, and ours.

    Args:
        ctx: A context of this command, which need not be the one that runs.

    Raises:
        click.UsageError: `serve` would refuse to be run so.
    """
    config = config_of(ctx)
    parser = flags_of_upstream()
    upstream = config.flags(ctx.command, parser.known) if config.serve else []
    arguments = [*upstream, *ctx.args]
    with errors_in_one_sentence():
        flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise click.UsageError(f"`serve` has no {unknown[0]}.")
    if not 0 <= flags.port <= 65_535:
        # The system would take its last 16 bits.
        raise click.UsageError(f"--port goes from 0 to 65535, not {flags.port}.")
    given = {name: value for name, value in ctx.params.items() if name != "show_help"}
    return arguments, _options(ctx.obj, **given)


def _options(
    store: str | None,
    *,
    own_store: str | None,
    disk_bytes: int | None,
    memory_bytes: int | None,
    min_free: int | None,
    daily_write_bytes: int | None,
    persist: str,
    grace: float,
    admin_token: str | None,
    api_key: str | None,
    salt: str,
    aliases: tuple[str, ...],
    strict: bool,
    stabilize: frozenset[str],
    context_tokens: int | None,
    quotas: tuple[str, ...],
    ttl: tuple[str, ...],
    no_store_default: bool,
    respect_store: bool,
    min_tokens: int,
    show_text: bool,
    while_locked: str | None,
    warm: Path | None,
    unload_after: float | None,
    **of_remote: Any,
) -> ServeOptions:
    """Our options of the server, each of which is looked at.

    Raises:
        click.UsageError: One cannot be.
    """
    check_store(own_store)
    for name in ("PERSIST_CACHE_ADMIN_TOKEN", "PERSIST_CACHE_API_KEY"):
        # To click it is as if it were not set, and nothing would be asked for.
        if os.environ.get(name) == "":
            raise click.UsageError(f"{name} is empty; give it a secret, or unset it.")
    for name, secret in (("--admin-token", admin_token), ("--api-key", api_key)):
        # It has to fit into a header, and be the same when it arrives.
        if secret is not None and not (
            secret.isascii() and secret.isprintable() and secret.strip() == secret and secret
        ):
            raise click.UsageError(
                f"{name} needs printable ASCII characters, without blanks around them."
            )
    tiers = () if persist == "none" else tuple(part.strip() for part in persist.split(","))
    unknown = [tier for tier in tiers if tier not in TIER_LABELS]
    if unknown:
        raise click.UsageError(
            f"--persist: unknown tier {unknown[0]!r}; use system, user, assistant, or none."
        )
    return ServeOptions(
        store=store if own_store is None else own_store,
        disk_bytes=disk_bytes,
        min_free_bytes=min_free,
        daily_write_bytes=daily_write_bytes,
        memory_bytes=memory_bytes,
        persist=tiers,
        grace_s=grace,
        admin_token=admin_token,
        api_key=api_key,
        salt=salt,
        aliases=_aliases(aliases),
        strict=strict,
        context_tokens=context_tokens,
        stabilize=stabilize,
        show_text=show_text,
        while_locked=while_locked,
        warm=() if warm is None else read_warm_file(warm),
        unload_after_s=unload_after,
        quotas=parse_rules(quotas, "--quota", parse_size, tiers=False),
        ttl=parse_rules(ttl, "--ttl", parse_duration, tiers=True),
        rules=Rules(no_store_default, respect_store, min_tokens),
        remote=remote_choice(**of_remote),
    )


def _aliases(given: tuple[str, ...]) -> dict[str, str]:
    try:
        return parse_aliases(given)
    except ValueError as error:
        raise click.UsageError(f"--alias: {error}.") from None


@contextlib.contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """Have upstream's parser complain as ours does, without a page of usage."""

    def refuse(_: argparse.ArgumentParser, message: str) -> NoReturn:
        raise click.UsageError(message[:1].upper() + message[1:])

    before = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = refuse  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.error = before  # type: ignore[method-assign]
