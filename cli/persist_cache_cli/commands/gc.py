"""`persist-cache gc`: tidy up now instead of when room is needed."""

from __future__ import annotations

import click

from persist_cache_cli.output import format_bytes, plural, print_json
from persist_cache_cli.store_access import changing, common_options, no_store


@click.command("gc")
@common_options()
@click.pass_obj
def command(store: str | None, *, as_json: bool, quiet: bool) -> None:
    """Remove what has expired, what dead processes left behind, and what exceeds the budget.

    A store looks after itself while it is used; this does it at once.

    \b
    Example:
      persist-cache gc
    """
    with changing(store) as opened:
        if opened is None:
            if as_json:
                print_json({"freed_bytes": 0, "evicted": 0, "entries": 0, "bytes": 0})
            elif not quiet:
                click.echo(no_store(store), err=True)
            return
        before = opened.stats().entries
        freed = opened.gc()
        after = opened.stats()
    evicted = max(0, before - after.entries)
    if as_json:
        print_json(
            {
                "freed_bytes": freed,
                "evicted": evicted,
                "entries": after.entries,
                "bytes": after.usage.total,
            }
        )
    elif not quiet:
        gone = plural(evicted, "entry", "entries")
        click.echo(
            f"{format_bytes(max(0, freed))} freed, {gone} gone; {after.entries:,} left, "
            f"{format_bytes(after.usage.total)} on disk."
        )
