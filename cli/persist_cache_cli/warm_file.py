"""The file of `serve --warm`: prompts that a server computes when it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click
import msgspec

from persist_cache.server.rendering import read_request, system_only
from persist_cache.server.validation import RefusedError, check_prompt
from persist_cache.server.warming import WarmPrompt
from persist_cache_cli.parse import parse_duration, parse_label, parse_repairs
from persist_cache_cli.prompt_files import read_tables, understood
from persist_cache_cli.prompts import ManifestPrompt, body_of, read_request_json, read_text

_OPTION = "--warm"
_SERVERS = frozenset(ManifestPrompt.__struct_fields__)
"""What a manifest of `warm` may say."""


class _Entry(msgspec.Struct):
    """One `[[prompt]]`; of `system`, `prompt` and `request` it has one."""

    system: str | None = None
    prompt: str | None = None
    request: str | None = None
    messages: str | None = None
    tools: str | None = None
    protocol: Literal["chat", "messages", "responses"] | None = None
    model: str | None = None
    label: str = ""
    pin: bool = False
    ttl: str | None = None
    group: str = ""
    stabilize: str = ""


def read_warm_file(path: Path) -> tuple[WarmPrompt, ...]:
    """Read the prompts of a file; paths in it are relative to its folder.

    Raises:
        click.UsageError: It cannot be read or understood, or names a file that cannot be.
    """
    tables = read_tables(path, _OPTION)
    return tuple(_read(path, number, one) for number, one in enumerate(tables, 1))


def _read(path: Path, number: int, raw: dict[str, Any]) -> WarmPrompt:
    where = f"{_OPTION} {path}, prompt {number}"
    for name in raw:
        field = name.replace("-", "_")
        if field in _SERVERS and field not in _Entry.__struct_fields__:
            raise click.UsageError(
                f"{where}: {name} is the server's to say; leave it out, or give the server "
                f"--{field.replace('_', '-')}."
            )
    entry = understood(raw, _Entry, where)
    try:
        marks = _marks(entry)
        body, protocol = _body(path.parent, entry)
        if not protocol or protocol == "chat":
            check_prompt(body)
        system_only(read_request(body, protocol))
        if entry.stabilize:
            parse_repairs(entry.stabilize)
    except RefusedError as error:
        raise click.UsageError(f"{where}: {str(error).rstrip('.')}.") from None
    except click.ClickException as error:
        raise click.UsageError(f"{where}: {error.format_message()}") from None
    name = entry.label or f"prompt {number} of {path.name}"
    return WarmPrompt(name, body, protocol, marks, entry.stabilize)


def _marks(entry: _Entry) -> dict[str, Any]:
    marks: dict[str, Any] = {"pin": entry.pin, "label": parse_label(entry.label)}
    marks["group"] = entry.group
    if entry.ttl is not None:
        marks["ttl_s"] = parse_duration(entry.ttl)
    return marks


def _body(folder: Path, entry: _Entry) -> tuple[dict[str, Any], str]:
    """The request that an entry stands for, and its protocol, "" where its shape tells it."""
    given = [
        name
        for name in ("system", "prompt", "request", "messages")
        if getattr(entry, name) is not None
    ]
    if len(given) != 1:
        raise click.UsageError("give one of system, prompt and request.")
    protocol: str | None = entry.protocol
    body: dict[str, Any]
    if given[0] in ("request", "messages"):
        file = folder / str(entry.request or entry.messages)
        body, protocol = body_of(read_request_json(file, given[0]), protocol)
    elif given[0] == "system":
        text = _text(folder, entry.system or "", "system")
        body = {"messages": [{"role": "system", "content": text}]}
    else:
        body = {"prompt": _text(folder, entry.prompt or "", "prompt")}
    if entry.tools is not None:
        body = {**body, "tools": read_request_json(folder / entry.tools, "tools")}
    if entry.model is not None:
        own = folder / entry.model
        body = {**body, "model": str(own.resolve()) if own.is_dir() else entry.model}
    return body, protocol or ""


def _text(folder: Path, given: str, name: str) -> str:
    """A text, or what is in `@FILE`."""
    if given == "-":
        raise click.UsageError(f"{name} cannot be read from standard input; name a file as @FILE.")
    return read_text(f"@{folder / given[1:]}" if given.startswith("@") else given, name)
