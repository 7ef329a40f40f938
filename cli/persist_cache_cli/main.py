"""The `persist-cache` command: its group, its global options, and how errors are shown.

Commands live in `commands`, one module each, and are imported only when they are asked for.
"""

from __future__ import annotations

import sys
from importlib import import_module

import click

from persist_cache import PersistCacheError, __version__

_COMMANDS = {
    "demo": "Watch a real model restart without computing its system prompt again.",
}


class LazyGroup(click.Group):
    """Imports a command's module when the command is run, so that others start at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = import_module(f"persist_cache_cli.commands.{name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="persist-cache")
@click.option(
    "--store",
    metavar="PATH",
    envvar="PERSIST_CACHE_HOME",
    help="Folder of the store.  [default: a folder in the platform's place for caches]",
)
@click.pass_context
def cli(ctx: click.Context, store: str | None) -> None:
    """A prompt cache for mlx-lm that survives restarts."""
    ctx.obj = store


def main() -> None:
    """Run the command line; every error raised on purpose becomes one sentence."""
    try:
        cli(standalone_mode=False)
    except PersistCacheError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
