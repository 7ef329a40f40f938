"""`persist-cache service`: the server as a service of the user's."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import click
from click.core import ParameterSource

from persist_cache_cli.blas import advice, variables_for_service
from persist_cache_cli.config import config_of
from persist_cache_cli.config_place import default_path
from persist_cache_cli.service.managers import MANAGERS, Launchd, Manager, own_manager
from persist_cache_cli.service.units import Service, is_ours
from persist_cache_cli.store_access import NothingFound

_KEPT = (
    *("PERSIST_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"),
    *("PERSIST_CACHE_REMOTE", "PERSIST_CACHE_REMOTE_SECRET_FILE"),
    *("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ALLOW_HTTP"),
)
"""Variables that say where things are; a service is started without the shell's."""
_SECRETS = ("--api-key", "--admin-token", "--salt")


@click.command("service", context_settings={"ignore_unknown_options": True})
@click.argument("action", type=click.Choice(["install", "status", "logs", "uninstall"]))
@click.argument("serve_arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--print", "only_print", is_flag=True, help="Show the file, and install nothing.")
@click.option(
    "--manager",
    type=click.Choice(list(MANAGERS)),
    default=own_manager,
    help="Who runs the service.  [default: the system's own]",
)
@click.option("--lines", type=click.IntRange(1), default=100, show_default=True, help="Of the log.")
@click.option("--follow", is_flag=True, help="Go on showing the log, until Ctrl-C.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    action: str,
    serve_arguments: tuple[str, ...],
    only_print: bool,
    manager: str,
    lines: int,
    follow: bool,
) -> None:
    """Have the server run as a service: from login on, and again when it was killed.

    `install` takes the options of `serve`; paths are as seen from the folder it is called in.
    Secrets belong into persist-cache.toml.

    \b
    Examples:
      persist-cache service install --model mlx-community/Qwen3-4B-4bit --unload-after 15m
      persist-cache service install --print
      persist-cache service logs --follow
    """
    chosen = MANAGERS[manager]()
    if action != "install" and (serve_arguments or only_print):
        extra = serve_arguments[0] if serve_arguments else "--print"
        raise click.UsageError(f"`service {action}` takes no {extra}.")
    if action == "install":
        _install(ctx, chosen, serve_arguments, only_print=only_print)
        return
    if not chosen.path.exists():
        raise NothingFound(
            f"There is no service at {chosen.path}; `persist-cache service install` makes it."
        )
    if action == "uninstall":
        _refuse_foreign(chosen.path)
        try:
            chosen.stop()
        except click.ClickException as error:
            # It may not run at all, or the manager be out of reach: the file can go all the same.
            chosen.path.unlink()
            raise click.ClickException(f"Removed {chosen.path}, but {error.message}") from None
        chosen.path.unlink()
        click.echo(f"Stopped, and removed {chosen.path}.")
        return
    sys.exit(chosen.status() if action == "status" else chosen.logs(lines, follow=follow))


def _install(
    ctx: click.Context, manager: Manager, arguments: tuple[str, ...], *, only_print: bool
) -> None:
    service = _service(ctx, arguments)
    if not isinstance(manager, Launchd):
        service = replace(service, variables={**service.variables, **variables_for_service()})
    try:
        text = manager.text(service)
    except ValueError as error:
        raise click.UsageError(f"{error}.") from None
    if only_print:
        click.echo(text, nl=False)
        return
    path = manager.path
    _refuse_foreign(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    try:
        manager.start()
    except click.ClickException as error:
        raise click.ClickException(
            f"{path} is written, but not started: {error.message} "
            "`persist-cache service uninstall` removes it."
        ) from None
    click.echo(f"Installed as {path}, and started; `persist-cache service status` shows it.")
    for name in (
        *("PERSIST_CACHE_API_KEY", "PERSIST_CACHE_ADMIN_TOKEN", "HF_TOKEN"),
        *("PERSIST_CACHE_REMOTE_SECRET", "AWS_SECRET_ACCESS_KEY"),
    ):
        if os.environ.get(name):
            click.echo(f"Note: {name} is not handed on to the service.", err=True)
    if not service.variables.get("LD_PRELOAD") and (
        slow := advice("serve …", "then install the service again")
    ):
        click.echo(f"Note: {slow}", err=True)


def _service(ctx: click.Context, arguments: tuple[str, ...]) -> Service:
    """What is to be run, of options that `serve` understands.

    Raises:
        click.UsageError: It does not, or a secret is among them.
    """
    from persist_cache_cli.commands.serve import command as serve
    from persist_cache_cli.commands.serve import understood

    for one in arguments:
        if one.partition("=")[0] in _SECRETS:
            _refuse_secret(one.partition("=")[0])
    parsed = serve.make_context("serve", list(arguments), parent=ctx.parent)
    # What `serve` refuses would be started again and again, and fail each time.
    _, options = understood(parsed)
    for name, rules in (("quotas", options.quotas), ("ttl", options.ttl)):
        is_given = parsed.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if is_given and any(what.startswith("salt:") for what in rules or ()):
            _refuse_secret("--quota" if name == "quotas" else "--ttl", "the salt")
    given: list[str] = []
    if ctx.obj is not None:
        given += ["--store", os.path.abspath(os.path.expanduser(ctx.obj))]
    config = config_of(ctx)
    if config.path is not None and config.path != default_path():
        given += ["--config", str(config.path)]
    return Service(
        # -P: no module of the working directory takes the place of one of ours.
        command=[sys.executable, "-P", "-m", "persist_cache_cli", *given, "serve", *arguments],
        folder=str(Path.cwd()),
        variables={name: os.environ[name] for name in _KEPT if os.environ.get(name)},
        grace_s=options.grace_s,
        log=str(Launchd().log),
    )


def _refuse_secret(option: str, what: str = "it") -> NoReturn:
    """Keep a secret out of the file of the service.

    Raises:
        click.UsageError: Always.
    """
    subject = option if what == "it" else f"{what} in {option}"
    raise click.UsageError(
        f"{subject[:1].upper() + subject[1:]} would stand in the file of the service, and in lists "
        f"of processes; put {option.removeprefix('--')} under [serve] of persist-cache.toml."
    )


def _refuse_foreign(path: Path) -> None:
    """Leave alone what was not written here.

    Raises:
        click.ClickException: It was not.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    if not is_ours(text):
        raise click.ClickException(
            f"{path} was not written by `persist-cache service install`; move it away first."
        )
