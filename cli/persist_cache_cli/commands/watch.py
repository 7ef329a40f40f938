"""`persist-cache watch`: the requests of a running server, a line each, as they come."""

from __future__ import annotations

import select
import sys

import click
import msgspec

from persist_cache_cli.asking import admin_token_option, running_server
from persist_cache_cli.output import is_terminal, painter, terminal_width
from persist_cache_cli.requests import LEGEND, line
from persist_cache_cli.store_access import common_options

_WAIT_S = 2
_MOST = 1_000


@click.command("watch")
@click.option(
    "--last",
    metavar="N",
    type=click.IntRange(0, _MOST),
    default=5,
    show_default=True,
    help="Begin with so many requests that are over.",
)
@admin_token_option
@common_options()
@click.pass_obj
def command(
    store: str | None, *, last: int, admin_token: str | None, as_json: bool, quiet: bool
) -> None:
    """Show the requests of a running server as they come, until Ctrl-C.

    A line has the time, a bar, tokens reused of all, the time to the first token, why it was not
    more, and who asked. `explain --last` says more of the latest one.

    \b
    Example:
      persist-cache watch
    """
    with running_server(store, admin_token) as server:
        listed = server.get(f"requests?limit={max(1, last)}")
        after = listed[0]["number"] if listed else 0
        found = list(reversed(listed))[-last:] if last else []
        paint = painter()
        if is_terminal() and not as_json and not quiet:
            click.echo(paint(LEGEND, "faint"))
        while True:
            for one in found:
                if as_json:
                    click.echo(msgspec.json.encode(one).decode())
                elif not quiet:
                    click.echo(line(one, terminal_width(), paint))
            sys.stdout.flush()
            _end_unread()
            path = f"requests?limit={_MOST}&after={after}&wait_s={_WAIT_S}"
            found = list(reversed(server.get(path, _WAIT_S)))
            after = found[-1]["number"] if found else after


def _end_unread() -> None:
    """End where nobody reads the output any more, as with `| head`.

    Raises:
        BrokenPipeError: Nobody does.
    """
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    if any(event & (select.POLLERR | select.POLLNVAL) for _, event in watched.poll(0)):
        raise BrokenPipeError
