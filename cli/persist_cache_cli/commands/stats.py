"""`persist-cache stats`: totals, budget, and what the store has been good for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from persist_cache import Store, StoreStats
from persist_cache.fs import free_bytes
from persist_cache.queries.as_json import store_json
from persist_cache.queries.ids import short_model_names
from persist_cache.queries.schema import ModelJson, StoreJson, TierJson
from persist_cache.queries.totals import Quarantined, Survey, quarantined
from persist_cache.store.budget import DEFAULT_MAX_BYTES, DEFAULT_MIN_FREE_BYTES, Usage
from persist_cache_cli import left_behind
from persist_cache_cli.output import (
    Column,
    Painter,
    format_bytes,
    format_duration,
    is_terminal,
    painter,
    pairs,
    plural,
    print_json,
    printable,
    table,
    terminal_width,
)
from persist_cache_cli.parse import DURATION
from persist_cache_cli.remote_words import counted_line
from persist_cache_cli.store_access import common_options, reading, store_path

_BAR_CELLS = 30


@click.command("stats")
@click.option("--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@click.option(
    "--interval", type=DURATION, default="2s", show_default=True, help="How often, with --watch."
)
@common_options(quiet="Print nothing; the exit status says whether the store can be read.")
@click.pass_obj
def command(store: str | None, *, watch: bool, interval: float, as_json: bool, quiet: bool) -> None:
    """Show totals: bytes and entries, budget, hits and misses, what was saved and written.

    \b
    Examples:
      persist-cache stats
      persist-cache stats --watch --interval 5s
    """
    if not watch:
        with reading(store) as opened:
            report = _Report(store, opened)
        _print(report, as_json=as_json, quiet=quiet)
        return
    with _screen(plainly=as_json or quiet or not is_terminal()) as show:
        while True:
            with reading(store) as opened:
                report = _Report(store, opened)
            if show is None:
                _print(report, as_json=as_json, quiet=quiet)
            else:
                show("\n".join(report.lines(painter(), terminal_width())))
            time.sleep(max(interval, 0.1))


def _print(report: _Report, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(report.as_json())
    elif not quiet:
        click.echo("\n".join(report.lines(painter(), terminal_width())))


@contextmanager
def _screen(*, plainly: bool) -> Iterator[Any]:
    """Something that replaces what it showed before; None where there is no terminal."""
    if plainly:
        yield None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), auto_refresh=False, screen=True) as live:
        yield lambda text: live.update(Text.from_ansi(text), refresh=True)


class _Report:
    """All numbers, as of one moment; zeros when there is no store."""

    def __init__(self, given: str | None, store: Store | None) -> None:
        self.given = given
        if store is None:
            self.exists = False
            self.survey: Survey | None = None
            self.quarantined: list[Quarantined] = []
            self.stats = _nothing(store_path(given))
            self.disk_off = ""
            return
        self.exists = True
        self.survey = Survey(store)
        self.quarantined = quarantined(store)
        self.stats = store.stats()
        self.disk_off = _why_off(self.stats)

    def as_json(self) -> StoreJson:
        return store_json(
            self.stats,
            self.survey,
            self.quarantined,
            disk_off=self.disk_off,
            exists=self.exists,
        )

    def lines(self, paint: Painter, width: int | None) -> list[str]:
        stats = self.stats
        usage = stats.usage
        said = self.as_json()
        asked = sum(said.hits.values()) + said.misses
        if not self.exists:
            return [f"There is no store at {stats.path} yet."]
        lines = pairs(
            [
                ("store", stats.path),
                ("entries", f"{stats.entries:,} in {plural(stats.blobs, 'blob')}"),
                ("on disk", f"{format_bytes(usage.total)} of {format_bytes(stats.max_bytes)}"),
                ("", _bar(usage.total, stats.max_bytes)),
                (
                    "free",
                    f"{format_bytes(stats.free_bytes)} on the file system, "
                    f"{format_bytes(stats.min_free_bytes)} are left alone",
                ),
                ("disk", paint(f"off: {self.disk_off}", "bad") if self.disk_off else "on"),
                *(
                    [("eviction", paint(f"paused: {stats.eviction_paused}", "bad"))]
                    if stats.eviction_paused
                    else []
                ),
                *self._quotas(paint),
                ("writing", f"{format_bytes(usage.pending)} under way" if usage.pending else ""),
                (
                    "written",
                    f"{format_bytes(stats.written_today)} today{self._daily()}, "
                    f"{format_bytes(stats.written_bytes)} in all",
                ),
                (
                    "hits",
                    f"{asked - said.misses:,} of {plural(asked, 'request')}"
                    f" ({said.hits['memory']:,} from memory,"
                    f" {said.hits['disk']:,} from disk"
                    + (
                        f", {said.hits['remote']:,} from the remote)"
                        if said.hits["remote"]
                        else ")"
                    ),
                ),
                ("reused", _reused(said.tokens_reused, said.tokens_asked) if asked else ""),
                (
                    "saved",
                    f"{said.tokens_saved:,} tokens"
                    + (f", {format_duration(said.saved_s)}" if said.saved_s else ""),
                ),
                ("remote", counted_line(said.counters)),
            ],
            paint=paint,
        )
        lines += self._reason_lines("misses", said.miss_reasons, width, paint)
        lines += self._reason_lines("partial", said.partial_reasons, width, paint)
        lines += self._tables(said, width, paint)
        if self.survey is not None:
            for sentence in left_behind.sentences(self.survey, self.given):
                lines.append(paint("left behind", "heading") + f"  {printable(sentence)}")
        for one in self.quarantined:
            lines.append(paint("quarantine", "bad") + f"  {one.blob}: {printable(one.reason)}")
        return lines

    def _quotas(self, paint: Painter) -> list[tuple[str, str]]:
        """How much of each quota is used, the fullest first."""
        lines = []
        for one in self.stats.quotas:
            name = one.name if one.kind == "model" else f"salt {one.name[:8]}"
            said = (
                f"{format_bytes(one.nbytes)} of {format_bytes(one.max_bytes)} for {printable(name)}"
            )
            lines.append(
                ("quota", paint(f"{said}, nearly used up", "bad") if one.is_near else said)
            )
        return lines

    def _tables(self, said: StoreJson, width: int | None, paint: Painter) -> list[str]:
        def cells(row: TierJson | ModelJson) -> tuple[str, ...]:
            saved = format_duration(row.saved_s) if row.saved_s else "–"
            return f"{row.entries:,}", format_bytes(row.bytes), f"{row.hits:,}", saved

        numbers = [Column(title, right=True) for title in ("entries", "bytes", "hits", "saved")]
        names = short_model_names(self.survey.models if self.survey else {})
        tiers = [(row.tier, *cells(row)) for row in said.tiers]
        models = [(printable(names[row.fingerprint]), *cells(row)) for row in said.models]
        lines = ["", *table([Column("tier"), *numbers], tiers, width=width, paint=paint)]
        if models:
            columns = [Column("model", least=16), *numbers]
            lines += ["", *table(columns, models, width=width, paint=paint)]
        return lines

    def _reason_lines(
        self, title: str, reasons: dict[str, int], width: int | None, paint: Painter
    ) -> list[str]:
        if not reasons:
            return []
        columns = [Column(title, right=True), Column("why", least=20, cut="end")]
        rows = [
            (f"{count:,}", printable(reason))
            for reason, count in sorted(reasons.items(), key=lambda item: -item[1])
        ]
        return ["", *table(columns, rows, width=width, paint=paint)]

    def _daily(self) -> str:
        daily = self.stats.daily_write_bytes
        return "" if daily is None else f" of {format_bytes(daily)}"


def _reused(reused: int, asked: int) -> str:
    """What the hits are worth: a request that reuses three tokens is one, too."""
    if not asked:
        return "not counted yet; an older version served these requests"
    return f"{reused:,} of {plural(asked, 'prompt token')} ({reused / asked:.1%})"


def _bar(part: int, whole: int) -> str:
    """How full something is, as a bar with a figure."""
    share = part / whole if whole else 1.0
    filled = max(0, min(_BAR_CELLS, round(share * _BAR_CELLS)))  # a damaged counter may say less
    return "█" * filled + "░" * (_BAR_CELLS - filled) + f" {share:.0%}"


def _why_off(stats: StoreStats) -> str:
    """Why nothing can be written now; "" when it can. A server's own reasons are in its log."""
    if not os.access(stats.path, os.W_OK):
        return "the folder cannot be written"
    if stats.free_bytes < stats.min_free_bytes and stats.usage.blobs == 0:
        return "less is free on the file system than is to be left alone"
    daily = stats.daily_write_bytes
    if daily is not None and stats.written_today >= daily:
        return "today's write budget is spent"
    return ""


def _nothing(root: Path) -> StoreStats:
    place = root
    while not place.exists() and place != place.parent:
        place = place.parent
    return StoreStats(
        path=str(root),
        entries=0,
        blobs=0,
        usage=Usage(0, 0, 0, 0, 0, 0),
        max_bytes=DEFAULT_MAX_BYTES,
        min_free_bytes=DEFAULT_MIN_FREE_BYTES,
        free_bytes=free_bytes(place),
        daily_write_bytes=None,
        written_today=0,
        written_bytes=0,
    )
