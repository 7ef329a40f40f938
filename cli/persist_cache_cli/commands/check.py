"""`persist-cache check`: does the index agree with the blobs, and are they what was written?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from persist_cache import Problem, Store
from persist_cache.rebuild import rebuild
from persist_cache.survey import Quarantined, quarantined
from persist_cache_cli.output import (
    format_bytes,
    painter,
    plural,
    print_json,
    printable,
)
from persist_cache_cli.store_access import changing, common_options, no_store, reading


@click.command("check")
@click.option("--read-data", is_flag=True, help="Read every byte and verify its checksum.")
@click.option("--repair", is_flag=True, help="Mend what is found.")
@click.option("--rebuild-index", is_flag=True, help="Make the index anew from the blobs.")
@common_options()
@click.pass_obj
def command(
    store: str | None,
    *,
    read_data: bool,
    repair: bool,
    rebuild_index: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare the index with the blobs, both ways.

    Exit status 1 says that problems were found, and are still there. --repair puts damaged blobs
    into quarantine and removes what nothing refers to. --rebuild-index also helps when the index
    is lost; labels, pins and uses come along if the old index can still be read.

    \b
    Examples:
      persist-cache check --read-data
      persist-cache check --repair
    """
    result: dict[str, Any] = {"rebuilt_blobs": None, "repaired": False}
    access = changing if repair or rebuild_index else reading
    with access(store) as opened:
        if opened is None:
            if not (as_json or quiet):
                click.echo(no_store(store), err=True)
            problems: list[Problem] = []
            aside: list[Quarantined] = []
            blobs = 0
        else:
            if rebuild_index:
                with _bar("Reading blobs", quiet or as_json) as progress:
                    disk = opened._disk
                    result["rebuilt_blobs"] = rebuild(disk.index, disk.folder, progress)
            problems, left = _check(opened, read_data, repair, quiet or as_json)
            result["repaired"] = bool(problems) and not left
            aside = quarantined(opened)
            blobs = _count_blobs(opened)
    bad = bool(problems) and not result["repaired"]
    if as_json:
        print_json(_as_json(result, problems, aside, blobs, read_data))
    elif not quiet and opened is not None:
        _print(result, problems, aside, blobs, read_data)
    if bad:
        sys.exit(1)


def _check(
    store: Store, read_data: bool, repair: bool, silent: bool
) -> tuple[list[Problem], list[Problem]]:
    """What was wrong, and what is wrong still."""
    with _bar("Verifying", silent or not read_data, in_bytes=True) as progress:
        problems = store.check(read_data=read_data, repair=repair, progress=progress)
    if not problems or not repair:
        return problems, problems
    return problems, store.check()


def _count_blobs(store: Store) -> int:
    with store._disk.index.read() as txn:
        return txn.size_of(b"blobs")


def _as_json(
    result: dict[str, Any],
    problems: list[Problem],
    aside: list[Quarantined],
    blobs: int,
    read_data: bool,
) -> dict[str, Any]:
    from persist_cache.describe import quarantine_json

    return {
        "blobs": blobs,
        "read_data": read_data,
        "problems": [
            {"kind": one.kind, "message": one.message, "blob": one.blob} for one in problems
        ],
        **result,
        "quarantine": quarantine_json(aside),
    }


def _print(
    result: dict[str, Any],
    problems: list[Problem],
    aside: list[Quarantined],
    blobs: int,
    read_data: bool,
) -> None:
    paint = painter()
    if result["rebuilt_blobs"] is not None:
        click.echo(f"The index was made anew from {plural(result['rebuilt_blobs'], 'blob')}.")
    for one in problems:
        where = f" {one.blob}" if one.blob else ""
        click.echo(paint(one.kind, "bad") + f"{where}: {printable(one.message)}")
    for old in aside:
        size = format_bytes(old.nbytes)
        click.echo(paint("quarantine", "faint") + f" {old.blob}: {printable(old.reason)} ({size})")
    checked = f"{plural(blobs, 'blob')} checked{', every byte' if read_data else ''}"
    if not problems:
        click.echo(f"{checked}: {paint('no problems', 'good')}.")
        return
    found = plural(len(problems), "problem")
    if result["repaired"]:
        click.echo(f"{checked}: {found}, {paint('mended', 'good')}.")
        return
    how = "--rebuild-index" if any(one.kind == "index" for one in problems) else "--repair"
    click.echo(f"{checked}: {paint(found, 'bad')}; `persist-cache check {how}` mends them.")


@contextmanager
def _bar(
    title: str, silent: bool, *, in_bytes: bool = False
) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on the terminal's standard error; yields what reports progress, or None."""
    if silent or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    amount = DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
