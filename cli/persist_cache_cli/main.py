"""The `persist-cache` command: its group, its global options, and how errors are shown.

Commands live in `commands` and are imported only when they are asked for.

Exit status: 0 done, 1 failed, 2 wrongly called, 3 nothing matched, 130 interrupted, 143 ended by
SIGTERM, 129 by SIGHUP.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from types import FrameType, ModuleType
from typing import Any, NamedTuple, NoReturn

import click

from persist_cache import PersistCacheError, __version__
from persist_cache.fingerprint.versions import unknown_mlx_lm
from persist_cache.system import endings
from persist_cache_cli import config_place
from persist_cache_cli.calling import ALIASES, Declined, check_store, suggestion, with_store


class _Place(NamedTuple):
    """Where a command is, and what it does in a few words."""

    help: str
    module: str
    attribute: str = "command"


_COMMANDS = {
    "serve": _Place("Run mlx_lm.server with a cache that survives restarts.", "serve"),
    "launch": _Place("Run an agent with a server, which is started if none runs.", "launch"),
    "warm": _Place("Prefill prompts ahead of traffic.", "warm"),
    "explain": _Place("Say how much of a request is cached, and why not more.", "explain"),
    "top": _Place("Show what the cache of a running server does, kept up to date.", "top"),
    "watch": _Place("Show the requests of a running server as they come.", "watch"),
    "ps": _Place("Show what a server has in memory, and what it computes.", "ps"),
    "config": _Place("Say what the settings of the server are, and where from.", "config"),
    "service": _Place("Have the server run as a service, from login on.", "service"),
    "page": _Place("Print a link to the page of a running server.", "page"),
    "list": _Place("List what is stored, as a table or a tree.", "list"),
    "show": _Place("Show everything about one entry.", "show"),
    "evict": _Place("Remove entries.", "evict"),
    "pin": _Place("Exempt entries from eviction.", "marks", "pin"),
    "unpin": _Place("Let pinned entries be evicted again.", "marks", "unpin"),
    "ttl": _Place("Let entries expire.", "marks", "ttl"),
    "label": _Place("Name an entry.", "marks", "label"),
    "stats": _Place("Show totals, budget, hits and misses.", "stats"),
    "check": _Place("Compare the index with the blobs, and mend.", "check"),
    "gc": _Place("Tidy up now.", "gc"),
    "demo": _Place("Watch a real model restart without computing its system prompt.", "demo"),
    "bench": _Place("Time an agent's session: cold, cached, after a restart.", "bench"),
    "export": _Place("Write entries into one file, for another machine.", "export"),
    "import": _Place("Add the entries of such a file.", "import_"),
    "remote": _Place("Share prompts with other machines, by a bucket or a folder.", "remote"),
    "doctor": _Place("Look at versions, disk, limits, and a model's caches.", "doctor"),
    "selftest": _Place("Check that disk, locks, device and server work here.", "selftest"),
}


class LazyGroup(click.Group):
    """Imports a command's module when the command is run, so that others start at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        place = _COMMANDS.get(ALIASES.get(name, name))
        if place is None:
            return None
        full_name = f"persist_cache_cli.commands.{place.module}"
        module = sys.modules.get(full_name) or _import_for_good(full_name)
        command: click.Command = getattr(module, place.attribute)
        return with_store(command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _COMMANDS and name not in ALIASES and not name.startswith("-"):
            near = suggestion(name, _COMMANDS)
            ctx.fail(f"No such command {name!r}.{f' Did you mean {near!r}?' if near else ''}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            name = ctx.invoked_subcommand
            if error.ctx is None and name is not None and (command := self.get_command(ctx, name)):
                # Click does not say which command's options it could not read.
                error.ctx = click.Context(command, info_name=name, parent=ctx)
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            also = {name: alias for alias, name in ALIASES.items()}
            formatter.write_dl(
                [
                    (f"{name}, {also[name]}" if name in also else name, place.help)
                    for name, place in _COMMANDS.items()
                ]
            )


def _import_for_good(name: str) -> ModuleType:
    """Import a module, and all that it needs, without a search for garbage.

    There is none in what an import makes. Searches meanwhile would take a tenth of its time; one
    of all modules, right behind it, as long again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="persist-cache")
@click.option(
    "--store",
    metavar="PATH",
    envvar="PERSIST_CACHE_HOME",
    help="Folder of the store.  [default: a folder in the platform's place for caches]",
)
@click.option(
    "--config",
    metavar="FILE",
    help="Settings.  [env var: PERSIST_CACHE_CONFIG; default: persist-cache.toml in the platform's "
    "place for settings]",
)
@click.pass_context
def cli(ctx: click.Context, store: str | None, config: str | None) -> None:
    """A prompt cache for mlx-lm that survives restarts."""
    check_store(store)
    ctx.obj = store
    config_place.apply(ctx, config)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; whatever goes wrong for a known reason becomes one sentence.

    Args:
        arguments: What follows the command's name; taken from the process when None.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if arguments is None:
        for one in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(one) == signal.SIG_DFL:
                signal.signal(one, _terminate)
        if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(signal.SIGINT, _interrupt)
        status = _run_to_the_end()
    else:
        status = _run(arguments)
    if arguments is None and (_is_alone() or "persist_cache.server.run" in sys.modules):
        # Threads of a server that could not start would abort the process.
        _leave(status)
    sys.exit(status)


class _Terminated(BaseException):
    """The process was asked to end; what is temporary is removed on the way out."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def _terminate(signum: int, frame: FrameType | None) -> None:
    # A second one does not wait, but a terminal that is closed may say so more than once.
    signal.signal(signum, signal.SIG_IGN if signum == signal.SIGHUP else signal.SIG_DFL)
    endings.insist(_Terminated, signum)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    endings.insist(KeyboardInterrupt)


def _run_to_the_end() -> int:
    """Run the process's command; a signal decides its exit status.

    What a signal raises may be turned into another error on its way, or come when all is done.
    """
    status = 1
    try:
        try:
            status = _run(None)
        finally:
            endings.rest()
    except BaseException:
        endings.rest()
        if endings.asked() is None:
            raise
    for one in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(one) in (_terminate, _interrupt):
            signal.signal(one, signal.SIG_DFL)  # nothing is left to be done in order
    asked = endings.asked()
    if asked is None:
        return status
    return 130 if asked.kind is KeyboardInterrupt else int(128 + asked.arguments[0])


def _is_alone() -> bool:
    """Whether nobody has anything to do at the end: threads, a model's libraries, a profiler."""
    watched = sys.getprofile() or sys.gettrace()
    return threading.active_count() == 1 and not watched and "mlx" not in sys.modules


def _leave(status: int) -> NoReturn:
    """End this process, but do not take it apart object by object: `show` would take longer."""
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        # Without standalone mode click returns a status where it would have exited with it.
        status = cli.main(arguments, prog_name="persist-cache", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.UsageError as error:
        return _fail(_usage_sentence(error), 2)
    except Declined as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return 130
    except _Terminated as ended:
        return 128 + ended.signum
    except PersistCacheError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        # Whoever read the output has seen enough; nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(_os_sentence(error), 1)
    except (ImportError, AttributeError, TypeError) as error:
        # As another version of mlx-lm would have it, whose parts are elsewhere.
        unknown = unknown_mlx_lm()
        if not unknown:
            raise
        return _fail(f"{unknown}. It failed with {type(error).__name__}: {error}.", 1)
    return status if isinstance(status, int) else 0


def _fail(sentence: str, status: int) -> int:
    click.echo("Error: " + " ".join(sentence.split()), err=True)
    return status


def _usage_sentence(error: click.UsageError) -> str:
    message = error.format_message()
    if message[-1:] not in ".?!":
        message += "."
    path = error.ctx.command_path if error.ctx else "persist-cache"
    return f"{message} See `{path} --help`."


def _os_sentence(error: OSError) -> str:
    what = error.strerror or str(error) or type(error).__name__
    return f"{os.fspath(error.filename)!s}: {what}." if error.filename is not None else f"{what}."
