"""`pin`, `unpin`, `ttl` and `label`: what a user says about entries."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import click

from persist_cache import Store
from persist_cache.queries.ids import short_entry_ids, short_id
from persist_cache.queries.schema import MarkJson
from persist_cache.queries.select import Filters, split_shared
from persist_cache.queries.totals import Survey
from persist_cache_cli.output import format_duration, plural, print_json
from persist_cache_cli.parse import LABEL, LIFETIME
from persist_cache_cli.store_access import (
    NothingFound,
    changing,
    common_options,
    ids_or_group,
    no_store,
    refuse_both,
    resolve,
)

_CHOSEN = ids_or_group("What only requests with this `prompt_cache_key` use.")


@click.command("pin")
@_CHOSEN
@common_options()
@click.pass_obj
def pin(
    store: str | None, *, ids: Sequence[str], group: str | None, as_json: bool, quiet: bool
) -> None:
    """Exempt entries from eviction, until `unpin`.

    \b
    Example:
      persist-cache pin 3fa2b1 9ac001
    """
    changed = _change(store, ids, group, lambda opened, one: opened.pin(one))
    _report(changed, "pinned", {"pinned": True}, as_json=as_json, quiet=quiet)


@click.command("unpin")
@_CHOSEN
@common_options()
@click.pass_obj
def unpin(
    store: str | None, *, ids: Sequence[str], group: str | None, as_json: bool, quiet: bool
) -> None:
    """Let pinned entries be evicted again.

    \b
    Example:
      persist-cache unpin 3fa2b1
    """
    changed = _change(store, ids, group, lambda opened, one: opened.pin(one, False))
    _report(changed, "unpinned", {"pinned": False}, as_json=as_json, quiet=quiet)


@click.command("ttl")
@_CHOSEN
@click.argument("lifetime", metavar="DURATION|none", type=LIFETIME)
@common_options()
@click.pass_obj
def ttl(
    store: str | None,
    *,
    ids: Sequence[str],
    lifetime: float,
    group: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Let entries expire some time from now, or never.

    What has expired goes first when room is needed, and with the next `gc`.

    \b
    Examples:
      persist-cache ttl 3fa2b1 7d
      persist-cache ttl 3fa2b1 9ac001 none
      persist-cache ttl --group support-agent 12h
    """
    when: float | None = None

    def expire(opened: Store, one: str) -> None:
        nonlocal when
        if math.isfinite(lifetime):
            when = opened.clock() + lifetime
        opened.expire_at(one, when)

    changed = _change(store, ids, group, expire)
    done = (
        "set to never expire" if when is None else f"set to expire in {format_duration(lifetime)}"
    )
    _report(changed, done, {"expires": when}, as_json=as_json, quiet=quiet)


@click.command("label")
@_CHOSEN
@click.argument("name", type=LABEL)
@common_options()
@click.pass_obj
def label(
    store: str | None,
    *,
    ids: Sequence[str],
    name: str,
    group: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Name entries; an empty name takes the label away.

    \b
    Example:
      persist-cache label 3fa2b1 "support agent"
    """
    changed = _change(store, ids, group, lambda opened, one: opened.set_label(one, name))
    _report(changed, "labelled" if name else "unlabelled", {"label": name}, as_json, quiet)


def _change(
    store: str | None,
    prefixes: Sequence[str],
    group: str | None,
    change: Callable[[Store, str], None],
) -> list[tuple[str, str]]:
    """Change the entries named; nothing if one of them is unknown. Returns ids, long and short."""
    refuse_both(prefixes, group)
    with changing(store) as opened:
        if group is not None:
            if opened is None:
                raise NothingFound(no_store(store))
            return _change_group(opened, group, change)
        ids = resolve(opened, prefixes)
        assert opened is not None, "without a store there are no ids"
        for one in ids:
            try:
                change(opened, one)
            except KeyError:
                raise NothingFound(f"Entry {one} was evicted just now.") from None
        return [(one, short_id(opened, one)) for one in ids]


def _change_group(
    store: Store, group: str, change: Callable[[Store, str], None]
) -> list[tuple[str, str]]:
    """Change what only one group uses; what goes meanwhile is passed over."""
    survey = Survey(store)
    rows = Filters(group=group).rows(survey, store.clock())
    alone, shared = split_shared(survey, rows, group)
    if not alone:
        others = " All that it has is used by others, too." if shared else ""
        raise NothingFound(
            f"No entry is of the group {group!r} alone; nothing was changed.{others}"
        )
    short = short_entry_ids(survey)
    done = []
    for row in alone:
        with contextlib.suppress(KeyError):
            change(store, survey.ids[row])
            done.append((survey.ids[row], short[survey.ids[row]]))
    return done


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
