"""`pin`, `unpin`, `ttl` and `label`: what a user says about entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import click

from persist_cache import Store
from persist_cache.queries.ids import short_id
from persist_cache.queries.schema import MarkJson
from persist_cache_cli.output import format_duration, plural, print_json
from persist_cache_cli.parse import ENTRY_ID, LABEL, LIFETIME
from persist_cache_cli.store_access import NothingFound, changing, common_options, resolve

_IDS = click.argument("ids", metavar="ID...", type=ENTRY_ID, nargs=-1, required=True)


@click.command("pin")
@_IDS
@common_options()
@click.pass_obj
def pin(store: str | None, *, ids: Sequence[str], as_json: bool, quiet: bool) -> None:
    """Exempt entries from eviction, until `unpin`.

    \b
    Example:
      persist-cache pin 3fa2b1 9ac001
    """
    changed = _change(store, ids, lambda opened, one: opened.pin(one))
    _report(changed, "pinned", {"pinned": True}, as_json=as_json, quiet=quiet)


@click.command("unpin")
@_IDS
@common_options()
@click.pass_obj
def unpin(store: str | None, *, ids: Sequence[str], as_json: bool, quiet: bool) -> None:
    """Let pinned entries be evicted again.

    \b
    Example:
      persist-cache unpin 3fa2b1
    """
    changed = _change(store, ids, lambda opened, one: opened.pin(one, False))
    _report(changed, "unpinned", {"pinned": False}, as_json=as_json, quiet=quiet)


@click.command("ttl")
@_IDS
@click.argument("lifetime", metavar="DURATION|none", type=LIFETIME)
@common_options()
@click.pass_obj
def ttl(
    store: str | None, *, ids: Sequence[str], lifetime: float, as_json: bool, quiet: bool
) -> None:
    """Let entries expire some time from now, or never.

    What has expired goes first when room is needed, and with the next `gc`.

    \b
    Examples:
      persist-cache ttl 3fa2b1 7d
      persist-cache ttl 3fa2b1 9ac001 none
    """
    when: float | None = None

    def expire(opened: Store, one: str) -> None:
        nonlocal when
        if math.isfinite(lifetime):
            when = opened.clock() + lifetime
        opened.expire_at(one, when)

    changed = _change(store, ids, expire)
    done = (
        "set to never expire" if when is None else f"set to expire in {format_duration(lifetime)}"
    )
    _report(changed, done, {"expires": when}, as_json=as_json, quiet=quiet)


@click.command("label")
@click.argument("ids", metavar="ID", type=ENTRY_ID)
@click.argument("name", type=LABEL)
@common_options()
@click.pass_obj
def label(store: str | None, *, ids: str, name: str, as_json: bool, quiet: bool) -> None:
    """Name an entry; an empty name takes the label away.

    \b
    Example:
      persist-cache label 3fa2b1 "support agent"
    """
    changed = _change(store, [ids], lambda opened, one: opened.set_label(one, name))
    _report(changed, "labelled" if name else "unlabelled", {"label": name}, as_json, quiet)


def _change(
    store: str | None, prefixes: Sequence[str], change: Callable[[Store, str], None]
) -> list[tuple[str, str]]:
    """Change the entries named; nothing if one of them is unknown. Returns ids, long and short."""
    with changing(store) as opened:
        ids = resolve(opened, prefixes)
        assert opened is not None, "without a store there are no ids"
        for one in ids:
            try:
                change(opened, one)
            except KeyError:
                raise NothingFound(f"Entry {one} was evicted just now.") from None
        return [(one, short_id(opened, one)) for one in ids]


def _report(
    changed: Sequence[tuple[str, str]],
    done: str,
    fields: dict[str, Any],
    as_json: bool,
    quiet: bool,
) -> None:
    if as_json:
        print_json([MarkJson(id=one, short_id=short, **fields) for one, short in changed])
    elif not quiet:
        names = ", ".join(short for _, short in changed)
        click.echo(f"{plural(len(changed), 'entry', 'entries')} {done}: {names}")
