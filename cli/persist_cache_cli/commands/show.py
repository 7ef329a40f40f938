"""`persist-cache show`: everything about one entry."""

from __future__ import annotations

import time
from collections.abc import Mapping

import click
from msgspec import UNSET

from persist_cache.queries.as_json import details_json, groups_said
from persist_cache.queries.details import Details, details_of, tokens_of
from persist_cache.queries.ids import short_id
from persist_cache_cli.output import (
    Column,
    Painter,
    format_age,
    format_bytes,
    format_duration,
    format_time,
    keeping,
    painter,
    pairs,
    plural,
    print_json,
    printable,
    printable_lines,
    shorten,
    table,
    terminal_width,
)
from persist_cache_cli.parse import ENTRY_ID
from persist_cache_cli.store_access import NothingFound, common_options, reading, resolve

_CHILDREN_SHOWN = 6


@click.command("show")
@click.argument("entry_id", metavar="ID", type=ENTRY_ID)
@click.option("--text", is_flag=True, help="Decode the prompt; needs the model's tokenizer.")
@common_options(quiet="Print nothing, or the text only with --text.")
@click.pass_obj
def command(store: str | None, *, entry_id: str, text: bool, as_json: bool, quiet: bool) -> None:
    """Show everything about one entry.

    Its numbers, the blobs that hold its rows, and what identifies its model.

    \b
    Examples:
      persist-cache show 3fa2b1
      persist-cache show 3fa2b1 --text -q
    """
    with reading(store) as opened:
        (full,) = resolve(opened, [entry_id])
        assert opened is not None, "without a store there are no ids"
        details = details_of(opened, full)
        if details is None:
            raise NothingFound(f"Entry {full} was evicted just now.")
        tokens = tokens_of(opened, full) if text else []
        named = [full, details.entry.parent or full, *details.children[:_CHILDREN_SHOWN]]
        short = {one: short_id(opened, one) for one in named}
    decoded = None
    if text:
        from persist_cache.queries.decoder import Decoder

        decoded = Decoder(details.model).text(tokens)
    if as_json:
        print_json(details_json(details, short[full], text=decoded if text else UNSET))
        return
    if not quiet:
        click.echo("\n".join(_lines(details, short, painter())))
    if decoded is not None:
        click.echo(decoded if quiet else "\n" + printable_lines(decoded))


def _lines(details: Details, short: dict[str, str], paint: Painter) -> list[str]:
    entry, model, now = details.entry, details.model, time.time()
    children = [short[one] for one in details.children[:_CHILDREN_SHOWN]]
    if len(details.children) > _CHILDREN_SHOWN:
        children.append(f"… ({len(details.children):,} in all)")
    width = terminal_width()
    lines = pairs(
        [
            ("entry", entry.id),
            ("label", printable(entry.label)),
            ("group", printable(groups_said(entry.groups))),
            ("model", printable(model.name)),
            ("tier", entry.tier.label),
            ("tokens", f"{entry.num_tokens:,}"),
            ("own", f"{format_bytes(entry.own_bytes)}, needed by nothing else"),
            ("shared", f"{format_bytes(entry.shared_bytes)}, with other entries"),
            ("hits", f"{entry.hits:,}"),
            ("saved", format_duration(entry.saved_s) + " of prefill" if entry.saved_s else ""),
            ("prefill", format_duration(entry.prefill_s) if entry.prefill_s else ""),
            ("created", f"{format_time(entry.created)} ({format_age(now - entry.created)} ago)"),
            ("used", f"{format_time(entry.last_use)} ({format_age(now - entry.last_use)} ago)"),
            ("expires", format_time(entry.expires) if entry.expires else ""),
            ("kept", keeping(entry.pinned, entry.expires, now)),
            ("asked for", f"{format_duration(entry.keep_s)} after each use" * bool(entry.keep_s)),
            ("continues", short[entry.parent] if entry.parent else ""),
            ("continued by", ", ".join(children)),
        ],
        paint=paint,
    )
    lines += ["", paint(f"Runs ({plural(len(details.runs), 'blob')})", "heading")]
    lines += _run_table(details, width, paint)
    lines += ["", paint("Fingerprint", "heading") + f"  {model.fingerprint}"]
    lines += _fields(model.fields, width)
    if model.info:
        lines += ["", paint("Recorded with it", "heading"), *_fields(model.info, width)]
    return lines


def _fields(fields: Mapping[str, str], width: int | None) -> list[str]:
    """Names and values, indented; long digests are shortened on a terminal, paths never."""
    return [
        "  " + (line if width is None or "/" in line else shorten(line, width - 2))
        for line in pairs((name, printable(value)) for name, value in fields.items())
    ]


def _run_table(details: Details, width: int | None, paint: Painter) -> list[str]:
    columns = [
        Column("blob", least=12),
        Column("from", right=True),
        Column("tokens", right=True),
        Column("of", right=True, drop=1),
        Column("file", right=True),
        Column("used by", right=True),
        Column("", drop=2),
    ]
    runs = [(run, "") for run in details.runs]
    if details.checkpoint is not None:
        runs.append((details.checkpoint, "checkpoint"))
    rows = [
        (
            run.blob,
            f"{run.start:,}",
            "" if kind else f"{run.num_tokens:,}",
            "" if kind else f"{run.blob_tokens:,}",
            format_bytes(run.nbytes),
            plural(run.entries, "entry", "entries"),
            kind,
        )
        for run, kind in runs
    ]
    return table(columns, rows, width=width, paint=paint)
