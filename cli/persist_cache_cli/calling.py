"""What makes a command easy to call: short names, near misses, `--store` behind any of them."""

from __future__ import annotations

from collections.abc import Iterable

import click

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
    """Let `--store` stand behind a command that has none of its own, too."""
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
    return command


def check_store(path: str | None) -> None:
    """Refuse a name that is empty, such as that of a variable that is not set.

    Raises:
        click.UsageError: It is.
    """
    if path == "":
        raise click.UsageError("--store needs a folder, not an empty name.")


def _choose(ctx: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """Have the command, and what completes its arguments, use this store."""
    check_store(path)
    if path is not None:
        ctx.obj = ctx.find_root().params["store"] = path
