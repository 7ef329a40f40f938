"""`persist-cache top`: what a running server's cache does, on a screen that is kept up to date."""

from __future__ import annotations

import shutil
import time
from typing import Any

import click

from persist_cache_cli.asking import Server, admin_token_option, running_server
from persist_cache_cli.dashboard import lines
from persist_cache_cli.output import is_terminal, painter, print_json
from persist_cache_cli.parse import DURATION
from persist_cache_cli.store_access import common_options

_REQUESTS = 100
_LARGEST = 20


@click.command("top")
@click.option("--once", is_flag=True, help="Show it once and end, as where there is no terminal.")
@click.option(
    "--interval",
    type=DURATION,
    default="2s",
    show_default=True,
    help="How long until it is shown again.",
)
@admin_token_option
@common_options()
@click.pass_obj
def command(
    store: str | None,
    *,
    once: bool,
    interval: float,
    admin_token: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show what the cache of a running server does, until Ctrl-C.

    What was saved, the disk against its budget, the latest requests, and the prompts that take
    most disk: the page of `persist-cache page`, in a terminal.

    \b
    Example:
      persist-cache top
    """
    with running_server(store, admin_token) as server:
        if as_json or quiet or once or not is_terminal():
            found = _asked(server)
            if as_json:
                print_json(found)
            elif not quiet:
                width = shutil.get_terminal_size().columns
                click.echo("\n".join(lines(**found, width=width, paint=painter())))
            return
        _show(server, interval)


def _show(server: Server, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    paint = painter()
    with Live(console=Console(), screen=True, auto_refresh=False) as live:
        while True:
            width, height = shutil.get_terminal_size()
            found = lines(**_asked(server), width=width, height=height, paint=paint)
            live.update(Text.from_ansi("\n".join(found[:height])), refresh=True)
            time.sleep(interval)


def _asked(server: Server) -> dict[str, Any]:
    """What `dashboard.lines` shows."""
    stats = server.get("stats")
    largest, previews = [], {}
    if stats["store"] is not None:
        largest = server.get(f"tree?sort=size&limit={_LARGEST}")["branches"]
    if largest:
        ids = ",".join(one["id"] for one in largest)
        previews = server.get(f"previews?ids={ids}")["previews"]
    return {
        "stats": stats,
        "history": server.get("history"),
        "requests": server.get(f"requests?limit={_REQUESTS}"),
        "largest": largest,
        "previews": previews,
    }
