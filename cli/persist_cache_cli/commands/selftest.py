"""`persist-cache selftest`: does all that a store needs work on this machine?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from persist_cache.selftest import CHECKS, Check, Outcome, as_json, meaning, run, verdict
from persist_cache_cli.output import hanging, painter, printable, terminal_width
from persist_cache_cli.store_access import store_path

_COLOURS = {"ok": "good", "FAILED": "bad", "not applicable": "heading"}


@click.command("selftest")
@click.option(
    "--json",
    "report",
    metavar="FILE",
    help="Also write all that was found to FILE, `-` for standard output.",
)
@click.option(
    "--dir",
    "place",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    metavar="PATH",
    help="Work in a temporary folder in PATH.  [default: beside the store]",
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([check.name for check in CHECKS]),
    metavar="NAME",
    help="Run this check only; may be given several times.",
)
@click.option("--quick", is_flag=True, help="A twentieth of everything, with smaller files.")
@click.option("-q", "--quiet", is_flag=True, help="Print what failed only.")
@click.pass_obj
def command(
    store: str | None,
    *,
    report: str | None,
    place: Path | None,
    only: tuple[str, ...],
    quick: bool,
    quiet: bool,
) -> None:
    """Check that disk, index, locks, device and server do here what a store needs.

    Takes some minutes, up to 3 GiB of the disk and 1 GiB of memory for a moment, and leaves
    nothing behind. The store itself is not touched. FILE holds no prompt, no path and no name, so
    it can be attached to a report.

    Exit status 1 says that a check failed.

    \b
    Examples:
      persist-cache selftest
      persist-cache selftest --json selftest.json
      persist-cache selftest --dir /Volumes/External --only sync --only space
    """
    paint = painter()
    checks = [check for check in CHECKS if not only or check.name in only]
    # What goes to standard output beside a report for programs would spoil it.
    to_stderr = report == "-"
    if report is not None and not to_stderr:
        Path(report).write_text("")  # not to find out after some minutes that it cannot be
    width = max(len(check.name) for check in checks)
    columns = None if to_stderr else terminal_width()

    def begin(check: Check) -> None:
        if not quiet and sys.stderr.isatty():
            click.echo(f"{check.name} …\r", nl=False, err=True)

    def end(outcome: Outcome) -> None:
        if quiet and outcome.verdict != "FAILED":
            return
        if not quiet and sys.stderr.isatty():
            click.echo(" " * (width + 2) + "\r", nl=False, err=True)
        said = f"{outcome.verdict}: {printable(' '.join(outcome.line.split()))}"
        line = hanging(f"{outcome.name:<{width}}  ", said, columns)
        painted = paint(outcome.verdict, _COLOURS[outcome.verdict])
        click.echo(line.replace(outcome.verdict, painted, 1), err=to_stderr)
        if why := meaning(outcome):
            click.echo(hanging(f"{'':{width}}  ", why, columns), err=to_stderr)

    place = place or _beside(store_path(store))
    outcomes = run(place, checks, quick=quick, on_begin=begin, on_end=end)
    if report is not None:
        text = json.dumps(as_json(outcomes, quick=quick, place=place), indent=2)
        if to_stderr:
            click.echo(text)
        else:
            Path(report).write_text(text + "\n")
    failed = any(one.verdict == "FAILED" for one in outcomes)
    if not quiet:
        said = verdict(outcomes, quick=quick, left_out=len(CHECKS) - len(outcomes))
        end_line = hanging("", said, columns)
        click.echo(end_line if failed else paint(end_line, "good"), err=to_stderr)
    if failed:
        sys.exit(1)


def _beside(path: Path) -> Path:
    """The nearest folder above a store that is there: it is on the same file system."""
    place = path.absolute().parent
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return place
