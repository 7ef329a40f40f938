"""Asking the server that runs on a store, for what it alone knows."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import click

from persist_cache.server.admin_token import stored_token
from persist_cache.server.discovery import Serving, running_servers
from persist_cache_cli.store_access import NothingFound, command_line, store_path

_PATIENCE_S = 30.0
"""Beyond what the server was asked to wait."""


def admin_token_option(command: Any) -> Any:
    """Add the option with the secret of the server."""
    return click.option(
        "--admin-token",
        envvar="PERSIST_CACHE_ADMIN_TOKEN",
        show_envvar=True,
        help="Secret that the server was started with.",
    )(command)


def no_server(store: str | None) -> NothingFound:
    """What to say where no server runs."""
    return NothingFound(
        f"No server runs on the store at {store_path(store)}: start one with "
        f"`{command_line(store, 'serve')}`, or name the store of the one that runs with --store."
    )


def secret_of(server: Serving, stored: str | None, given: str | None) -> str:
    """The token that a server asks for.

    Args:
        server: The server.
        stored: The token of its store, if there is one.
        given: What the user gave.

    Raises:
        click.ClickException: It has to be given, or there is none.
    """
    token = stored if given is None else given
    if server.own_token and given is None:
        raise click.ClickException(
            f"The server at {server.url} was started with --admin-token; give this command the "
            "same one."
        )
    if token is None:
        raise click.ClickException(
            "The store has no admin token; `persist-cache serve` makes one when it starts."
        )
    return token


class Server:
    """A server that runs, to be asked by one thread."""

    def __init__(self, serving: Serving, token: str) -> None:
        self._url = serving.url
        self._token = token
        parts = urlsplit(serving.url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port)

    def get(self, path: str, wait_s: float = 0.0) -> Any:
        """The decoded answer to a GET.

        Args:
            path: Under `/v1/cache`, with its query.
            wait_s: What the server may wait before it answers.

        Raises:
            NothingFound: There is no such thing.
            click.ClickException: It does not answer, or refuses.
        """
        headers = {"Authorization": f"Bearer {self._token}"}
        try:
            self._connection.timeout = wait_s + _PATIENCE_S
            self._connection.request("GET", f"/v1/cache/{path}", headers=headers)
            answer = self._connection.getresponse()
            raw = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise click.ClickException(
                f"The server at {self._url} does not answer ({why})."
            ) from error
        try:
            said = json.loads(raw)
        except ValueError:
            said = {}
        if answer.status == 200:
            return said
        sentence = said.get("error") if isinstance(said, dict) else None
        kind = NothingFound if answer.status == 404 else click.ClickException
        raise kind(str(sentence or f"The server at {self._url} answered {answer.status}."))

    def close(self) -> None:
        """Let go of the connection."""
        self._connection.close()


@contextlib.contextmanager
def running_server(store: str | None, admin_token: str | None) -> Iterator[Server]:
    """The server that was started last on a store.

    Args:
        store: The folder that was given, if one was.
        admin_token: The secret that was given, if one was.

    Raises:
        NothingFound: None runs.
    """
    root = store_path(store)
    servers = running_servers(root)
    if not servers:
        raise no_server(store)
    server = Server(servers[0], secret_of(servers[0], stored_token(root), admin_token))
    try:
        yield server
    finally:
        server.close()
