"""`persist-cache launch`: an agent connected to a server, which is started if none runs."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from persist_cache_cli.calling import check_store
from persist_cache_cli.launch.become import become, need_until_end
from persist_cache_cli.launch.clients import CLIENTS, KEY_VARIABLE, Client, Served, Setup, setup_of
from persist_cache_cli.launch.server import Connection, Wanted, connected, not_running, running
from persist_cache_cli.launch.settings import overruled
from persist_cache_cli.store_access import command_line, store_path


@click.command("launch")
@click.argument("name", metavar="CLIENT", type=click.Choice(list(CLIENTS)))
@click.argument("words", metavar="[-- ARGS]...", nargs=-1)
@click.option("--print", "is_printed", is_flag=True, help="Show what would be set, and end.")
@click.option(
    "--model",
    metavar="PATH_OR_HUB_ID",
    help="Model to serve.  [default: that of the server that runs]",
)
@click.option("--store", "own_store", metavar="PATH", help="Folder of the store.")
@click.option(
    "--port",
    type=click.IntRange(1, 65_535),
    help="Of the server.  [default: that of the one that runs, or 8080 if it is free]",
)
@click.option(
    "--api-key",
    envvar=KEY_VARIABLE,
    show_envvar=True,
    help="Secret that the server asks for, if it does.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --print.")
@click.option("-q", "--quiet", is_flag=True, help="Print warnings and errors only.")
@click.pass_obj
def command(
    store: str | None,
    *,
    name: str,
    words: tuple[str, ...],
    is_printed: bool,
    model: str | None,
    own_store: str | None,
    port: int | None,
    api_key: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run an agent with a server of ours, which is started if none runs.

    The server is found by the store, or started with --model; one that was started ends with the
    last client that needs it. The client gets variables and arguments that send it there, and its
    own settings stay as they are. What follows -- is for the client.

    \b
    Examples:
      persist-cache launch claude --model mlx-community/Qwen3-4B-4bit
      persist-cache launch codex -- exec "What does this project do?"
      persist-cache launch aider --print
    """
    client = CLIENTS[name]
    if as_json and not is_printed:
        raise click.UsageError("--json goes with --print.")
    check_store(own_store)
    if model is not None and not model.strip():
        raise click.UsageError("--model needs a name, not an empty text.")
    if not (client.is_launched or is_printed):
        raise click.UsageError(
            f"{client.title} cannot be started from here; `persist-cache launch {name} --print` "
            "says what it needs."
        )
    given = store if own_store is None else own_store
    wanted = Wanted(store_path(given).absolute(), model, port, api_key or None)
    path = None if is_printed else _path_of(client)
    found = running(wanted)
    if found is None and model is None:
        raise click.ClickException(
            f"No server with a model runs on the store at {wanted.root}: name one to start with "
            f"--model, or start one with `{command_line(given, 'serve')}`."
        )
    if is_printed:
        served = not_running(wanted) if found is None else found.served
        port_said = served.url.rpartition(":")[2]
        start = f"serve --model {shlex.quote(served.model)} --port {port_said}"
        start = "" if found is not None else command_line(given, start)
        _show(client, words, served, start, as_json=as_json)
        return
    assert path is not None
    with contextlib.ExitStack() as starting:
        if found is None:
            # What the client cannot be given is said before a model is loaded for it.
            setup_of(client, not_running(wanted), os.environ, words)
            tell = (lambda sentence: None) if quiet else _tell
            found = starting.enter_context(connected(wanted, tell))
        _run(client, path, words, found)


def _path_of(client: Client) -> str:
    """Where the client is.

    Raises:
        click.ClickException: It is not installed.
    """
    path = shutil.which(client.program)
    if path is None:
        raise click.ClickException(
            f"{client.title} is not installed ({client.program} is not on PATH); install it with "
            f"`{client.install}`."
        )
    return path


def _run(client: Client, path: str, words: Sequence[str], found: Connection) -> None:
    """Become the client."""
    setup = setup_of(client, found.served, os.environ, words)
    for warning in _warnings(client, setup):
        _tell(f"Warning: {warning}")
    environment = {**os.environ, **setup.environment}
    for one in setup.unset:
        environment.pop(one, None)
    if found.needing is not None:
        assert found.folder is not None
        need_until_end(found.needing, found.folder)
    become(path, [client.program, *setup.arguments, *words], environment)


def _warnings(client: Client, setup: Setup) -> list[str]:
    if client.program != "claude":
        return []
    return overruled(setup.environment, setup.unset, os.environ, Path.cwd())


def _tell(sentence: str) -> None:
    click.echo(sentence, err=True)


# ---- what is printed -----------------------------------------------------------------------------


def _show(
    client: Client, words: Sequence[str], served: Served, start: str, *, as_json: bool
) -> None:
    """Print what the client needs; `start` starts its server, "" if that runs."""
    setup = setup_of(client, served, os.environ, words)
    warnings = _warnings(client, setup)
    environment = _without_key(setup.environment, served)
    line = [client.program, *setup.arguments, *words]
    if as_json:
        said: dict[str, Any] = {
            "client": client.program,
            "url": served.url,
            "model": served.model,
            "context_tokens": served.context_tokens,
            "running": not start,
            "environment": environment,
            "unset": list(setup.unset),
            "files": dict(setup.files),
            "command": line,
            "warnings": warnings,
        }
        click.echo(json.dumps(said, indent=2, ensure_ascii=False))
        return
    click.echo(f"# {client.title} with the server at {served.url}: {served.model}")
    if start:
        click.echo(f"# It does not run yet: {start}")
    for warning in warnings:
        click.echo(f"# Warning: {warning}")
    for file, text in setup.files.items():
        click.echo(f"# {file} needs:")
        click.echo("\n".join(f"#   {row}" for row in text.splitlines()))
    for one in setup.unset:
        click.echo(f"unset {one}")
    for variable, value in environment.items():
        click.echo(f"export {variable}={_quoted(value)}")
    click.echo(shlex.join(line))


def _without_key(environment: Mapping[str, str], served: Served) -> dict[str, str]:
    """Variables to be shown: the server's secret is not."""
    if served.api_key is None:
        return dict(environment)
    shown = {name: value for name, value in environment.items() if name != KEY_VARIABLE}
    return {
        name: f"${KEY_VARIABLE}" if value == served.api_key else value
        for name, value in shown.items()
    }


def _quoted(value: str) -> str:
    return f'"{value}"' if value == f"${KEY_VARIABLE}" else shlex.quote(value)
