"""The options that say which remote is used, and how: of `serve`, `warm` and `remote add`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from persist_cache.errors import RemoteError
from persist_cache.sharing import NO_REMOTE, TIERS, RemoteChoice
from persist_cache_cli.parse import SIZE

F = TypeVar("F", bound=Callable[..., Any])
_NAMES = (
    *("remote", "secret_file", "public_key", "publish_plain"),
    *("tiers", "publish_after", "budget"),
)
"""Parameters of a command with `remote_options`."""


def parse_url(text: str) -> str:
    """The URL of a remote in its one spelling, or `none`.

    Raises:
        click.BadParameter: It can be none, or holds a credential.
    """
    from persist_cache.remote import checked_url

    try:
        return text if text == NO_REMOTE else checked_url(text)
    except RemoteError as error:
        raise click.BadParameter(str(error)) from None


def _of_url(ctx: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    return None if text is None else parse_url(text)


def _of_tiers(
    ctx: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[str, ...] | None:
    if text is None:
        return None
    named = tuple(dict.fromkeys(one.strip() for one in text.split(",")))
    if unknown := [one for one in named if one not in TIERS]:
        raise click.BadParameter(f"unknown tier {unknown[0]!r}; use {', '.join(TIERS)}.")
    return named


def _of_key(ctx: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    key = None if text is None else text.strip().lower()
    if key and not re.fullmatch("[0-9a-f]{64}", key):
        raise click.BadParameter("a publisher's public key has 64 hex digits.")
    return key


def remote_options(command: F) -> F:
    """Add `--remote` and its companions."""
    url = click.option(
        "--remote",
        metavar="URL",
        envvar="PERSIST_CACHE_REMOTE",
        show_envvar=True,
        callback=_of_url,
        help="Where other machines share prompts: s3://bucket/prefix, a folder, or an https:// "
        "mirror. It is remembered; `none` ends that.",
    )
    return url(how_options("remote-")(command))


def how_options(prefix: str = "") -> Callable[[F], F]:
    """Add what is said of a remote beside its URL.

    Args:
        prefix: Of the names that would not be clear without it.
    """
    options = [
        click.option(
            f"--{prefix}secret-file",
            "secret_file",
            metavar="FILE",
            type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path),
            help="With the secret that all who share have; else it is the environment's.",
        ),
        click.option(
            f"--{prefix}public-key",
            "public_key",
            metavar="HEX",
            callback=_of_key,
            help="Trust what the owner of this key published, in place of a secret.",
        ),
        click.option(
            "--publish-plain/--no-publish",
            "publish_plain",
            default=None,
            help="Publish prompts that are used often, unencrypted, or only read.",
        ),
        click.option(
            "--publish-tiers",
            "tiers",
            metavar="TIERS",
            callback=_of_tiers,
            help="Which are: system, pinned, user, assistant.  [default: system,pinned]",
        ),
        click.option(
            "--publish-after",
            "publish_after",
            type=click.IntRange(min=1),
            help="At which hit.  [default: 2]",
        ),
        click.option(
            f"--{prefix}budget",
            "budget",
            type=SIZE,
            help="Most that is sent in a UTC day.  [default: no limit]",
        ),
    ]

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def remote_choice(
    *,
    remote: str | None,
    secret_file: Path | None,
    public_key: str | None,
    publish_plain: bool | None,
    tiers: tuple[str, ...] | None,
    publish_after: int | None,
    budget: int | None,
) -> RemoteChoice:
    """What was said with these options."""
    return RemoteChoice(
        url=remote,
        secret_file=None if secret_file is None else str(secret_file),
        public_key=public_key,
        publish_plain=publish_plain,
        tiers=tiers,
        publish_after=publish_after,
        budget_bytes_per_day=budget,
    )


def take_choice(given: dict[str, Any]) -> RemoteChoice:
    """What was said with `remote_options`, taken out of all that a command was given."""
    return remote_choice(**{name: given.pop(name) for name in _NAMES})
