"""`persist-cache ps`: what the servers of a store have in memory, and what they compute."""

from __future__ import annotations

import time
from typing import Any

import click

from persist_cache.server.admin_token import stored_token
from persist_cache.server.discovery import running_servers
from persist_cache_cli.asking import Server, admin_token_option, no_server, secret_of
from persist_cache_cli.output import (
    format_bytes,
    format_duration,
    plural,
    print_json,
    printable,
)
from persist_cache_cli.remote_words import REMOTE_WORDS
from persist_cache_cli.store_access import common_options, store_path


@click.command("ps")
@admin_token_option
@common_options()
@click.pass_obj
def command(store: str | None, *, admin_token: str | None, as_json: bool, quiet: bool) -> None:
    """Show what is in memory: models and until when, live caches, requests in flight.

    \b
    Example:
      persist-cache ps
    """
    root = store_path(store)
    servers = running_servers(root)
    if not servers:
        raise no_server(store)
    stored = stored_token(root)
    found = []
    for one in servers:
        server = Server(one, secret_of(one, stored, admin_token))
        try:
            found.append({"url": one.url, "started": one.started or None, **server.get("ps")})
        finally:
            server.close()
    if as_json:
        print_json(found)
    elif not quiet:
        for server_told in found:
            for line in _lines(server_told, time.time()):
                click.echo(line)


def _lines(told: dict[str, Any], now: float) -> list[str]:
    lines = [f"{told['url']}, process {told['pid']}"]
    lines.append(f"  {_model(told['model'], now)}")
    caches = f"  {plural(told['caches'], 'live cache')}, {format_bytes(told['cache_bytes'])}"
    if told["waiting_saves"]:
        caches += f"; {told['waiting_saves']} on their way to the disk"
    lines.append(caches)
    if remote := told.get("remote"):
        lines.append(f"  remote: {REMOTE_WORDS.get(remote, remote)}")
    warming = told["warming"]
    if warming is not None and warming["state"] == "running":
        lines.append(f"  warming: {warming['done']} of {warming['total']} prompts are done")
    lines += [f"  not warm: {printable(one)}" for one in (warming or {}).get("failed", ())]
    if not told["requests"]:
        lines.append("  no request in flight")
    lines += [f"  {_request(one, now)}" for one in told["requests"]]
    return lines


def _model(model: dict[str, Any] | None, now: float) -> str:
    if model is None:
        return "no model is loaded"
    name = printable(model["name"])
    if model["weights"] == "unloaded":
        return f"{name}, unloaded; the next request loads it"
    if model["weights"] == "loading":
        return f"{name} is being loaded"
    size, age = format_bytes(model["nbytes"]), format_duration(max(0.0, now - model["loaded"]))
    said = f"{name}, {size}, loaded {age} ago"
    if model["unloads"] is None:
        return f"{said}, stays"
    if model["unloads"] <= now:
        return f"{said}, goes as soon as nothing is computed"
    return f"{said}, goes in {format_duration(model['unloads'] - now)} without a request"


def _request(one: dict[str, Any], now: float) -> str:
    said = f"{one['path']}, {format_duration(now - one['time'])}: {one['state']}"
    if one["state"] == "prefilling":
        said += f", {one['computed_tokens']:,} of {one['num_tokens']:,} tokens"
    elif one["state"] == "answering":
        said += f", {one['num_tokens']:,} tokens read, {one['output_tokens']:,} written"
    return f"{said}  {printable(one['client'])}".rstrip()
