"""`persist-cache list`: what is stored, as a table or as a tree."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from math import floor
from operator import sub
from typing import Any

import click
import msgspec

from persist_cache.entry import Entry
from persist_cache.errors import PersistCacheError
from persist_cache.queries.as_json import entry_json, groups_said
from persist_cache.queries.ids import short_entry_ids, short_model_names
from persist_cache.queries.models import Model
from persist_cache.queries.schema import EntryJson
from persist_cache.queries.select import SORT_KEYS, Filters, order
from persist_cache.queries.totals import Survey
from persist_cache.store.store import Store
from persist_cache_cli.output import (
    Column,
    format_age,
    format_bytes,
    format_duration,
    keeping,
    painter,
    plural,
    print_json,
    printable,
    table,
    table_of_columns,
    terminal_width,
)
from persist_cache_cli.parse import GROUP, TIER
from persist_cache_cli.store_access import NothingFound, common_options, no_store, reading

_ROWS_ON_A_TERMINAL = 100
_SHOWN_FIELDS = [field for field in Entry.__struct_fields__ if field not in ("prefill_s", "parent")]


@click.command("list")
@click.option("--tier", type=TIER, multiple=True, help="Only entries of this tier.")
@click.option(
    "--model", metavar="TEXT", multiple=True, help="Only models with this in their name or path."
)
@click.option("--label", metavar="PATTERN", help="Only labels like this; * stands for anything.")
@click.option("--group", type=GROUP, help="Only what requests with this `prompt_cache_key` use.")
@click.option(
    "--sort",
    type=click.Choice(SORT_KEYS),
    default="used",
    show_default=True,
    help="What comes first: the most, or the latest.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    help="Show at most so many entries, 0 for all.  [default: 100 on a terminal, else all]",
)
@click.option("--tree", is_flag=True, help="Show which entry continues which.")
@click.option(
    "--text/--no-text",
    default=False,
    show_default=True,
    help="Show how each prompt begins; needs the model's tokenizer.",
)
@common_options(quiet="Print ids only, one a line.")
@click.pass_obj
def command(
    store: str | None,
    *,
    tier: tuple[str, ...],
    model: tuple[str, ...],
    label: str | None,
    group: str | None,
    sort: str,
    limit: int | None,
    tree: bool,
    text: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """List what is stored.

    "own" are bytes that only this entry needs, "shared" those that it has in common with others.
    In the tree, what is indented continues the entry above it; so does an entry right below
    another, where nothing branches. "new" and "adds" are tokens and bytes beyond that entry.

    \b
    Examples:
      persist-cache list --tier system --sort size
      persist-cache list --tree
      persist-cache list --text
    """
    with reading(store) as opened:
        if opened is None:
            if as_json:
                print_json([])
            elif not quiet:
                click.echo(no_store(store), err=True)
            return
        survey = Survey(opened)
        filters = Filters(tiers=tier, models=model, label=label, group=group)
        names = short_model_names(survey.models)
        rows = order(survey, filters.rows(survey, time.time()), sort, names)
        if limit is None and not as_json and not quiet and terminal_width() is not None:
            limit = _ROWS_ON_A_TERMINAL
        shown = _first(survey, rows, limit, tree)
        begin = _titles(opened, [survey.ids[row] for row in shown]) if text else None
    nothing_matches = not rows and survey.num_entries
    if quiet and not as_json:
        if shown:
            click.echo("\n".join(map(survey.ids.__getitem__, shown)))
    elif not shown and not as_json and not nothing_matches:
        click.echo("The store is empty.", err=True)
    elif shown or as_json:
        _show(survey, shown, len(rows) - len(shown), names, begin, tree=tree, as_json=as_json)
    if nothing_matches:
        raise NothingFound("Nothing matches; `persist-cache list` shows what is stored.")


def _show(
    survey: Survey,
    shown: list[int],
    left_out: int,
    names: Mapping[str, str],
    begin: Mapping[str, str | None] | None,
    *,
    tree: bool,
    as_json: bool,
) -> None:
    """Print entries, with how they begin if that was asked for, and how many others there are."""
    short = short_entry_ids(survey)
    if as_json:
        entries = survey.entries_at(shown)
        flat = [entry_json(entry, survey.model_of(entry), short[entry.id]) for entry in entries]
        if begin is not None:
            flat = [msgspec.structs.replace(one, text=begin.get(one.id)) for one in flat]
        print_json(_nested(flat, _shown_parents(survey, entries)) if tree else flat)
        return
    if tree:
        lines = _tree(survey, survey.entries_at(shown), short, begin or {})
    else:
        lines = _table(survey, shown, names, short, begin or {})
    click.echo("\n".join(lines))
    if left_out:
        click.echo(f"… and {left_out:,} more; --limit 0 shows all.", err=True)


def _titles(store: Store, ids: Sequence[str]) -> dict[str, str | None]:
    """How these prompts begin; says once for each model why its tokenizer is not there."""
    from persist_cache.queries.beginnings import beginnings, titles
    from persist_cache.queries.decoder import Decoder

    decoders: dict[str, Decoder | None] = {}

    def decode(model: Model, tokens: list[int]) -> str | None:
        if model.fingerprint not in decoders:
            try:
                decoders[model.fingerprint] = Decoder(model)
            except PersistCacheError as error:
                decoders[model.fingerprint] = None
                click.echo(f"No text: {error}", err=True)
        decoder = decoders[model.fingerprint]
        return None if decoder is None else decoder.text(tokens, plain=True)

    return titles(store, beginnings(store, ids), decode)


def _first(survey: Survey, rows: list[int], limit: int | None, tree: bool) -> list[int]:
    """The first `limit` rows; in a tree, each together with those of what it continues."""
    if not limit or len(rows) <= limit:
        return rows
    if not tree:
        return rows[:limit]
    places = {entry.id: row for row, entry in enumerate(survey.entries)}
    above = [places[entry.parent] if entry.parent else None for entry in survey.entries]
    listed = set(rows)
    picked: set[int] = set()
    for row in rows:
        chain: set[int] = set()
        here: int | None = row
        while here is not None and here not in picked:
            if here in listed:
                chain.add(here)
            here = above[here]
        if picked and len(picked) + len(chain) > limit:
            break
        picked |= chain
    return [row for row in rows if row in picked]


def _table(
    survey: Survey,
    rows: Sequence[int],
    names: Mapping[str, str],
    short: Mapping[str, str],
    begin: Mapping[str, str | None],
) -> list[str]:
    now = time.time()
    # In the order of memory all is read faster; the finished lines are put in order.
    everything = range(survey.num_entries)
    places = everything if len(rows) == len(everything) else sorted(rows)
    columns = survey.columns(places, _SHOWN_FIELDS)

    def model(fingerprint: str) -> str:
        return printable(names.get(fingerprint, "?"))

    def saved(seconds: float) -> str:
        return format_duration(seconds) if seconds else "–"

    pinned, expires = columns["pinned"], columns["expires"]
    kept = [""] * len(places)
    if any(pinned) or any(expires):
        kept = list(map(keeping, pinned, expires, repeat(now)))
    texts = {
        Column("id", style="id"): list(map(short.__getitem__, columns["id"])),
        Column("tier"): _each(columns["tier"], lambda tier: tier.label),
        Column("model", least=12): _each(columns["fingerprint"], model),
        Column("tokens", right=True): _each(columns["num_tokens"], "{:,}".format),
        Column("own", right=True): _each(columns["own_bytes"], format_bytes),
        Column("shared", right=True, drop=4): _each(columns["shared_bytes"], format_bytes),
        Column("hits", right=True, drop=3): _each(columns["hits"], "{:,}".format),
        Column("saved", right=True, drop=5): _each(columns["saved_s"], saved),
        Column("used", right=True): _ages(columns["last_use"], now),
        Column("age", right=True, drop=7): _ages(columns["created"], now),
        Column("kept", style="good", drop=2): kept,
        Column("label", least=10, cut="end", drop=1): _each(columns["label"], printable),
    }
    if any(columns["groups"]):
        texts[Column("group", least=10, cut="end", drop=6)] = _each(columns["groups"], _groups)
    if begin:
        texts[Column("text", least=24, cut="end")] = [
            printable(begin.get(one) or "") for one in columns["id"]
        ]
    heading, *lines = table_of_columns(
        list(texts), list(texts.values()), width=terminal_width(), paint=painter()
    )
    return [heading, *map(dict(zip(places, lines, strict=True)).__getitem__, rows)]


def _groups(groups: Sequence[str]) -> str:
    return printable(groups_said(groups))


def _each(values: Sequence[Any], show: Callable[[Any], str]) -> list[str]:
    """Every value as text; each is worked out once, because most come again."""
    shown = {value: show(value) for value in set(values)}
    return list(map(shown.__getitem__, values))


def _ages(times: Sequence[float], now: float) -> list[str]:
    """How long ago each of these times was."""
    # Whole seconds come again; what is less than one of them ago is "now".
    return _each(list(map(floor, map(sub, repeat(now), times))), format_age)


def _shown_parents(survey: Survey, shown: Sequence[Entry]) -> dict[str, str | None]:
    """Per entry the nearest one that it continues and that is shown, too."""
    above = {entry.id: entry.parent for entry in survey.entries}
    visible = {entry.id for entry in shown}
    parents: dict[str, str | None] = {}
    for entry in shown:
        parent = entry.parent
        while parent is not None and parent not in visible:
            parent = above[parent]
        parents[entry.id] = parent
    return parents


def _nested(flat: list[EntryJson], parents: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """The entries that nothing shown precedes, each with its `children`."""
    by_id = {entry.id: {**msgspec.to_builtins(entry), "children": []} for entry in flat}
    roots: list[dict[str, Any]] = []
    for entry in by_id.values():
        parent = parents[entry["id"]]
        (roots if parent is None else by_id[parent]["children"]).append(entry)
    return roots


def _tree(
    survey: Survey,
    shown: Sequence[Entry],
    short: Mapping[str, str],
    begin: Mapping[str, str | None],
) -> list[str]:
    now = time.time()
    names = short_model_names(survey.models)
    parents = _shown_parents(survey, shown)
    children: dict[str | None, list[Entry]] = {}
    for entry in shown:
        children.setdefault(parents[entry.id], []).append(entry)
    tokens = {entry.id: entry.num_tokens for entry in survey.entries}
    columns = [
        Column("entry"),
        Column("tokens", right=True),
        Column("new", right=True, drop=5),
        Column("adds", right=True, drop=4),
        Column("hits", right=True, drop=3),
        Column("used", right=True),
        Column("kept", style="good", drop=2),
        Column("label", least=10, cut="end", drop=1),
        *([Column("text", least=24, cut="end")] if begin else []),
    ]
    rows: list[tuple[str, ...] | str] = []
    for fingerprint, roots in _by_model(children.get(None, [])).items():
        rows.append(printable(names.get(fingerprint, "?")))
        for guide, entry in _walk(roots, children):
            before = tokens.get(entry.parent or "", 0)
            rows.append(
                (
                    f"{guide}{short[entry.id]} {entry.tier.label}",
                    f"{entry.num_tokens:,}",
                    f"+{entry.num_tokens - before:,}",
                    format_bytes(survey.added_bytes(entry)),
                    f"{entry.hits:,}",
                    format_age(now - entry.last_use),
                    keeping(entry.pinned, entry.expires, now),
                    printable(entry.label),
                    *([printable(begin.get(entry.id) or "")] if begin else []),
                )
            )
    lines = table(columns, rows, width=terminal_width(), paint=painter())
    return [*lines, "", f"{plural(len(shown), 'entry', 'entries')}."]


def _by_model(roots: Sequence[Entry]) -> dict[str, list[Entry]]:
    grouped: dict[str, list[Entry]] = {}
    for entry in roots:
        grouped.setdefault(entry.fingerprint, []).append(entry)
    return grouped


def _walk(
    roots: Sequence[Entry], children: Mapping[str | None, Sequence[Entry]]
) -> Iterator[tuple[str, Entry]]:
    """Entries below each other, each with the lines of the tree before it.

    A conversation is a long chain, so an only child is put right below its parent, not deeper.
    """
    # Not by recursion: a chain may be longer than Python's stack.
    pending = [("", entry, place == len(roots) - 1) for place, entry in enumerate(roots)][::-1]
    while pending:
        before, entry, is_last = pending.pop()
        yield before + ("└─ " if is_last else "├─ "), entry
        inside = before + ("   " if is_last else "│  ")
        below = children.get(entry.id, ())
        while len(below) == 1:
            yield inside, below[0]
            below = children.get(below[0].id, ())
        last = len(below) - 1
        pending += [(inside, one, place == last) for place, one in enumerate(below)][::-1]
