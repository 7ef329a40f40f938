"""What makes a command easy to call: short names, near misses, `--store` behind any of them."""

from __future__ import annotations

from collections.abc import Iterable

import click

from persist_cache_cli import config_place

ALIASES = {"ls": "list", "rm": "evict"}
"""What else a command answers to."""
_KIN = {
    "delete": "evict",
    "remove": "evict",
    "prefill": "warm",
    "start": "serve",
    "verify": "check",
}
"""What other programs call it; only suggested, because they may mean something else by it."""


class Declined(click.ClickException):
    """The user was asked, and does not want it: no error, and no success either."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """The command that was probably meant by `name`, or ""."""
    from difflib import get_close_matches

    if name in _KIN:
        return _KIN[name]
    near = get_close_matches(name.lower(), [*known, *ALIASES], n=1, cutoff=0.6)
    return near[0] if near else ""


def with_store(command: click.Command) -> click.Command:
    """Let `--config`, and `--store` if it has none of its own, stand behind a command, too."""
    if any("--config" in parameter.opts for parameter in command.params):
        return command  # it was asked for before
    if not any("--store" in parameter.opts for parameter in command.params):
        command.params.append(
            click.Option(
                ["--store"],
                metavar="PATH",
                help="Folder of the store.",
                expose_value=False,
                callback=_choose,
            )
        )
    command.params.append(
        click.Option(
            ["--config"],
            metavar="FILE",
            help="Settings, instead of persist-cache.toml in its usual place.",
            expose_value=False,
            is_eager=True,
            callback=_configure,
        )
    )
    return command


def check_store(path: str | None) -> None:
    """Refuse a name that is empty, such as that of a variable that is not set.

    Raises:
        click.UsageError: It is.
    """
    if path == "":
        raise click.UsageError("--store needs a folder, not an empty name.")


def _configure(ctx: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """Have the command use this file of settings."""
    if path is None:
        return
    root, before = ctx.find_root(), ctx.obj
    config_place.apply(root, path)
    if before is None:
        ctx.obj = root.obj
    ctx.default_map = (root.default_map or {}).get(ctx.info_name or "")


def _choose(ctx: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """Have the command, and what completes its arguments, use this store."""
    check_store(path)
    if path is not None:
        ctx.obj = ctx.find_root().params["store"] = path
