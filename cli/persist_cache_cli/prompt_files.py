"""TOML files with a `[[prompt]]` for each prompt: reading one, and saying what is wrong with it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import click
import msgspec

from persist_cache_cli.wording import as_sentence, nearest, shown

T = TypeVar("T", bound=msgspec.Struct)

_TEXT, _FILE = "the text, or @FILE", "the name of a file"
_NEVER_EMPTY = {
    "system": _TEXT,
    "prompt": _TEXT,
    "request": _FILE,
    "messages": _FILE,
    "tools": _FILE,
    "model": "a folder, or a name in the hub",
    "ttl": "a time such as 7d",
}
_WANTED = {"str": "a text", "bool": "true or false", "int": "a whole number", "object": "a table"}
_TYPE = re.compile(r"Expected `(\w+)")
_FIELD = re.compile(r" - at `\$\.(\w+)`")


def read_tables(path: Path, option: str) -> list[dict[str, Any]]:
    """The tables of a file.

    Args:
        path: The file.
        option: What it was given with.

    Raises:
        click.UsageError: It cannot be read or understood, or has anything else.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.UsageError(f"{option}: {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise click.UsageError(f"{option}: {path} is not UTF-8 text.") from None
    except tomllib.TOMLDecodeError as error:
        raise click.UsageError(f"{option} {path} cannot be understood: {error}.") from None
    for name in values:
        if name != "prompt":
            raise click.UsageError(
                f"{option} {path} cannot be understood: there is no {name} here; each prompt "
                "begins with a line [[prompt]]."
            )
    tables = values.get("prompt")
    if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
        raise click.UsageError(
            f"{option} {path} cannot be understood: each prompt begins with a line [[prompt]]."
        )
    return tables


def understood(raw: Mapping[str, Any], kind: type[T], where: str) -> T:
    """One table as `kind` has it.

    Args:
        raw: The table.
        kind: Its fields.
        where: What a complaint begins with.

    Raises:
        click.UsageError: It has another key, lacks one, or a value is none of its key's.
    """
    fields = {one.name: one for one in msgspec.structs.fields(kind)}
    for name, value in raw.items():
        if name not in fields:
            near = nearest(name, fields, "_")
            raise click.UsageError(as_sentence(f"{where}: there is no {name}{near}"))
        if value == "" and name in _NEVER_EMPTY:
            raise click.UsageError(f"{where}: {name} is empty; give {_NEVER_EMPTY[name]}.")
        if value == "@" and _NEVER_EMPTY.get(name) == _TEXT:
            raise click.UsageError(f"{where}: {name}: @ needs the name of a file behind it.")
    for name, one in fields.items():
        if one.required and name not in raw:
            raise click.UsageError(f"{where}: {name} is missing; give {_NEVER_EMPTY[name]}.")
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise click.UsageError(f"{where}: {_in_words(str(error), raw, kind)}.") from None


def _in_words(said: str, raw: Mapping[str, Any], kind: type[msgspec.Struct]) -> str:
    """What msgspec says of a value, without its types and paths."""
    field, expected = _FIELD.search(said), _TYPE.match(said)
    if field is None or field[1] not in raw:
        return said
    name, value = field[1], shown(raw[field[1]])
    if expected is not None and expected[1] in _WANTED:
        return f"{name}: {_WANTED[expected[1]]} is wanted, not {value}"
    choices = [one for part in get_args(get_type_hints(kind)[name]) for one in get_args(part)]
    return f"{name}: {value} is none of {', '.join(choices)}" if choices else f"{name}: {said}"
