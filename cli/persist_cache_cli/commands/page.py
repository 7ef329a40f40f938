"""`persist-cache page`: a link to the page of a running server."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import click

from persist_cache.server.admin_token import stored_token
from persist_cache.server.discovery import Serving, running_servers
from persist_cache_cli.asking import admin_token_option, no_server, secret_of
from persist_cache_cli.store_access import common_options, store_path


@click.command("page")
@click.option(
    "--url",
    metavar="URL",
    help="Where the page is, as a browser finds it, if that is not where the server listens.",
)
@admin_token_option
@common_options()
@click.pass_obj
def command(
    store: str | None, *, url: str | None, admin_token: str | None, as_json: bool, quiet: bool
) -> None:
    """Print a link to the page of each server that runs on this store.

    The link holds the admin token: whoever has it can read prompts, and delete them.

    \b
    Example:
      persist-cache page
    """
    root = store_path(store)
    servers = running_servers(root)
    if url is not None:
        if not url.startswith(("http://", "https://")) or "#" in url or "?" in url:
            raise click.UsageError("--url needs an address such as http://localhost:8080/cache.")
        servers = [Serving(url, servers[0].own_token if servers else False)]
    if not servers:
        raise no_server(store)
    token = stored_token(root)
    links = [_link(server, token, admin_token) for server in servers]
    if as_json:
        click.echo(json.dumps(links, indent=2))
    elif not quiet:
        for one in links:
            click.echo(one["link"])


def _link(server: Serving, stored: str | None, given: str | None) -> dict[str, Any]:
    token = secret_of(server, stored, given)
    return {
        "url": server.url,
        "link": f"{server.url}#token={quote(token, safe='')}",
        "model": server.model,
        "pid": server.pid or None,
    }
