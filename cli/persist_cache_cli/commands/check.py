"""`persist-cache check`: does the index agree with the blobs, and are they what was written?"""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

import click

from persist_cache import Problem, Store
from persist_cache.errors import DamagedIndexError
from persist_cache.queries import upkeep
from persist_cache.queries.totals import Quarantined, quarantined
from persist_cache.store.opening import distrust
from persist_cache_cli.output import (
    format_bytes,
    painter,
    plural,
    print_json,
    printable,
)
from persist_cache_cli.progress import bar
from persist_cache_cli.store_access import (
    changing,
    command_line,
    common_options,
    no_store,
    reading,
    store_path,
)


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
      persist-cache check --read-data --repair
    """
    silent = quiet or as_json
    try:
        _survive(store)
        found = _examine(store, read_data, repair, rebuild_index, silent)
    except DamagedIndexError as error:
        if not (repair or rebuild_index):
            how = " --read-data" * read_data
            command = command_line(store, f"check{how} --repair")
            raise click.ClickException(f"{error} `{command}` makes a new one.") from error
        # Whoever opens the store next, and alone, makes a new index.
        distrust(store_path(store))
        found = _examine(store, read_data, repair, rebuild_index, silent)
        found.problems.insert(0, Problem("index", str(error)))
    if not found.exists and not silent:
        click.echo(no_store(store), err=True)
    if as_json:
        print_json(found.as_json(read_data))
    elif not quiet and found.exists:
        _print(found, read_data, store, repair)
    if found.left:
        sys.exit(1)


@dataclass
class _Found:
    """What was seen: problems, those that are left, files in quarantine, number of blobs."""

    problems: list[Problem] = field(default_factory=list)
    left: list[Problem] = field(default_factory=list)
    aside: list[Quarantined] = field(default_factory=list)
    blobs: int = 0
    rebuilt: int | None = None
    exists: bool = True

    @property
    def repaired(self) -> bool:
        return bool(self.problems) and not self.left

    def as_json(self, read_data: bool) -> dict[str, Any]:
        return upkeep.checked_json(
            self.problems,
            self.left,
            blobs=self.blobs,
            aside=self.aside,
            read_data=read_data,
            rebuilt=self.rebuilt,
        )


def _examine(
    store: str | None, read_data: bool, repair: bool, rebuild_index: bool, silent: bool
) -> _Found:
    found = _Found()
    access = changing if repair or rebuild_index else reading
    with access(store) as opened:
        if opened is None:
            found.exists = False
            return found
        if rebuild_index:
            with bar("Reading blobs", silent=silent) as progress:
                found.rebuilt = opened.rebuild_index(progress)
        found.problems, found.left = _check(opened, read_data, repair, silent)
        found.aside = quarantined(opened)
        found.blobs = upkeep.count_blobs(opened)
    return found


def _survive(store: str | None) -> None:
    """Have a child of this process read the index first: a damaged page may end who comes to it.

    Raises:
        DamagedIndexError: It ended.
    """
    if threading.active_count() > 1:
        return  # a forked child might wait for a lock that no thread of its own gives back
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with reading(store) as opened:
                if opened is not None:
                    opened.check()
        finally:
            os._exit(0)  # what is wrong is said by the parent
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        name = signal.Signals(-code).name
        raise DamagedIndexError(f"Its index is damaged: who reads it is ended by {name}.")


def _check(
    store: Store, read_data: bool, repair: bool, silent: bool
) -> tuple[list[Problem], list[Problem]]:
    """What was wrong, and what is wrong still."""
    with bar("Verifying", silent=silent or not read_data, unit="bytes") as progress:
        return upkeep.check(store, read_data=read_data, repair=repair, progress=progress)


def _print(found: _Found, read_data: bool, store: str | None, repaired: bool) -> None:
    paint = painter()
    if found.rebuilt is not None:
        click.echo(f"The index was made anew from {plural(found.rebuilt, 'blob')}.")
    for one in found.problems:
        where = f" {one.blob}" if one.blob else ""
        click.echo(paint(one.kind, "bad") + f"{where}: {printable(one.message)}")
    for old in found.aside:
        size = format_bytes(old.nbytes)
        click.echo(paint("quarantine", "faint") + f" {old.blob}: {printable(old.reason)} ({size})")
    checked = f"{plural(found.blobs, 'blob')} checked{', every byte' if read_data else ''}"
    count = plural(len(found.problems), "problem")
    if not found.problems:
        click.echo(f"{checked}: {paint('no problems', 'good')}.")
    elif found.repaired:
        click.echo(f"{checked}: {count}, {paint('mended', 'good')}.")
    elif repaired:
        click.echo(f"{checked}: {paint(count, 'bad')}, not all of which could be mended.")
    else:
        # What only reading every byte finds is found by no other repair.
        command = command_line(store, f"check{' --read-data' * read_data} --repair")
        click.echo(f"{checked}: {paint(count, 'bad')}; `{command}` mends them.")
