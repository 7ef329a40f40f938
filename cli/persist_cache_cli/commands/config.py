"""`persist-cache config`: what the settings of the server are, and where they come from."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
from click.core import ParameterSource

from persist_cache.sharing import NO_REMOTE
from persist_cache.store.store import default_store_path
from persist_cache_cli.config import config_of
from persist_cache_cli.config_place import default_path
from persist_cache_cli.output import Column, plain, print_json, table, terminal_width
from persist_cache_cli.store_access import common_options

_SECRETS = ("key", "token", "salt", "secret", "password")
_NO_SECRETS = ("remote-secret-file", "remote-public-key")
"""A place, and what everybody may know."""
_REMEMBERED = (
    *("disk-bytes", "min-free", "quota", "ttl", "remote"),
    *("remote-secret-file", "remote-public-key", "remote-budget"),
    *("publish-plain", "publish-tiers", "publish-after"),
)
"""What the store remembers: where nothing is said of it, what was said last holds."""
_RULES = ("quota", "ttl")
_SALT_OF_RULE = re.compile(r"\bsalt:.*(?==)", re.DOTALL)
"""What a rule is about may be a salt."""


@dataclass(frozen=True)
class Setting:
    """One setting as it holds.

    Attributes:
        name: Of the option, without its dashes.
        value: What holds; a secret is masked.
        source: `flag`, `environment`, `file` or `default`.
        place: The variable, or file and line.
    """

    name: str
    value: Any
    source: str
    place: str


@click.command("config", context_settings={"ignore_unknown_options": True})
@click.argument("action", type=click.Choice(["show"]))
@click.argument("serve_arguments", nargs=-1, type=click.UNPROCESSED)
@common_options()
@click.pass_context
def command(
    ctx: click.Context, *, action: str, serve_arguments: tuple[str, ...], as_json: bool, quiet: bool
) -> None:
    """Say what `serve` would be run with, and whence each setting is.

    Flags win over the environment, that over persist-cache.toml, and that over defaults. Given the
    options of `serve`, it takes them into account. Secrets are masked.

    \b
    Examples:
      persist-cache config show
      persist-cache config show --port 9000
    """
    file = config_of(ctx).path
    found = [_store(ctx), *_of_serve(ctx, list(serve_arguments))]
    if as_json:
        print_json(
            {
                "file": None if file is None else str(file),
                "settings": [asdict(one) for one in found],
            }
        )
    elif not quiet:
        click.echo(f"File: {file or f'none ({default_path()} is not there)'}")
        remembered = _remembered(found)
        rows = [
            [
                one.name,
                remembered.get(one.name) or _shown(one.value),
                f"{one.source} {one.place}".rstrip(),
            ]
            for one in found
        ]
        columns = [Column("setting"), Column("value", least=12), Column("from", least=38)]
        for line in table(columns, rows, width=terminal_width(), paint=plain):
            click.echo(line)


def _store(ctx: click.Context) -> Setting:
    """Where the store is; the one setting of all commands."""
    config, group = config_of(ctx), ctx.parent
    source = None if group is None else group.get_parameter_source("store")
    behind = ctx.get_parameter_source("store")
    if ParameterSource.COMMANDLINE in (source, behind):
        return Setting("store", ctx.obj, "flag", "--store")
    if source is ParameterSource.ENVIRONMENT:
        return Setting("store", ctx.obj, "environment", "PERSIST_CACHE_HOME")
    if config.store is not None:
        return Setting("store", config.store, "file", config.place("store"))
    return Setting("store", str(default_store_path()), "default", "")


def _of_serve(ctx: click.Context, arguments: list[str]) -> list[Setting]:
    from persist_cache.server.run import flags_of_upstream
    from persist_cache_cli.commands.serve import command as serve
    from persist_cache_cli.commands.serve import understood

    config = config_of(ctx)
    parsed = serve.make_context("serve", arguments, parent=ctx.parent)
    whole, _ = understood(parsed)
    found = []
    for option in serve.params:
        if not isinstance(option, click.Option) or not option.expose_value:
            continue
        if option.name in ("show_help", "own_store"):
            continue
        name = option.opts[0].lstrip("-")
        source = parsed.get_parameter_source(str(option.name))
        said = {
            ParameterSource.COMMANDLINE: ("flag", f"--{name}"),
            ParameterSource.ENVIRONMENT: ("environment", str(option.envvar)),
            ParameterSource.DEFAULT_MAP: ("file", config.place(name)),
        }.get(source or ParameterSource.DEFAULT, ("default", ""))
        found.append(Setting(name, _masked(name, parsed.params[str(option.name)]), *said))
    parser = flags_of_upstream()
    from_file = _given(config.flags(serve, parser.known), parser.known)
    from_flags = _given(parsed.args, parser.known)
    holds = vars(parser.parse_known_args(whole)[0])
    for action in parser.known:
        if action.dest == "help":
            continue
        name = action.option_strings[-1].lstrip("-")
        said = ("default", "")
        if action.dest in from_flags:
            said = ("flag", f"--{name}")
        elif action.dest in from_file:
            said = ("file", config.place(name))
        found.append(Setting(name, _masked(name, holds[action.dest]), *said))
    return found


def _given(arguments: Sequence[str], known: Sequence[argparse.Action]) -> set[str]:
    """Which flags a command line gives, by where their values go."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, add_help=False)
    for action in known:
        if action.dest == "help":
            continue
        takes: dict[str, Any] = {"action": "store_true"} if action.nargs == 0 else {}
        parser.add_argument(*action.option_strings, dest=action.dest, **takes)
    return set(vars(parser.parse_known_args(list(arguments))[0]))


def _masked(name: str, value: Any) -> Any:
    """A value that may be shown."""
    if value and name not in _NO_SECRETS and any(part in _SECRETS for part in name.split("-")):
        return "********"
    if name in _RULES:
        return [_SALT_OF_RULE.sub("salt:********", one) for one in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return list(value) if isinstance(value, tuple) else value


def _remembered(settings: Sequence[Setting]) -> dict[str, str]:
    """What to say in place of values that the store remembers, by the names of the settings."""
    unsaid = {one.name for one in settings if one.source == "default"} & set(_REMEMBERED)
    said = dict.fromkeys(unsaid, "as last set")
    (remote,) = [one for one in settings if one.name == "remote"]
    if remote.source != "default":
        # What was said of another remote does not hold for this one.
        holds = "" if remote.value == NO_REMOTE else "as last set for this remote"
        said |= {name: holds for name in unsaid if name.startswith(("remote-", "publish-"))}
    return said


def _shown(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
