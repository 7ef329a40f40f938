"""`persist-cache gc`: tidy up now instead of when room is needed."""

from __future__ import annotations

import click

from persist_cache_cli.output import format_bytes, plural, print_json
from persist_cache_cli.store_access import changing, common_options, no_store

_NOTHING = {
    "freed_bytes": 0,
    "evicted": 0,
    "merged_blobs": 0,
    "compacted_blobs": 0,
    "skipped_blobs": 0,
    "entries": 0,
    "bytes": 0,
}


@click.command("gc")
@common_options()
@click.pass_obj
def command(store: str | None, *, as_json: bool, quiet: bool) -> None:
    """Remove what has expired, what dead processes left behind, and what exceeds the budget.

    A store looks after itself while it is used; this does it at once. Blobs of which more than
    half is rows of evicted prompts are written anew without them, and those of long chains of
    short runs as few, if there is room for the copies.

    \b
    Example:
      persist-cache gc
    """
    with changing(store) as opened:
        if opened is None:
            if as_json:
                print_json(_NOTHING)
            elif not quiet:
                click.echo(no_store(store), err=True)
            return
        before = opened.stats().entries
        done = opened.gc()
        after = opened.stats()
    evicted = max(0, before - after.entries)
    if as_json:
        print_json(
            {
                "freed_bytes": done.freed_bytes,
                "evicted": evicted,
                "merged_blobs": done.merged,
                "compacted_blobs": done.compacted,
                "skipped_blobs": done.without_room,
                "entries": after.entries,
                "bytes": after.usage.total,
            }
        )
    elif not quiet:
        gone = plural(evicted, "entry", "entries")
        click.echo(
            f"{format_bytes(done.freed_bytes)} freed, {gone} gone; {after.entries:,} left, "
            f"{format_bytes(after.usage.total)} on disk."
        )
        if done.merged:
            click.echo(f"{plural(done.merged, 'blob')} of short runs merged into few.")
        if done.compacted:
            click.echo(f"{plural(done.compacted, 'blob')} of mostly dead rows written anew.")
        if done.without_room:
            blobs = plural(done.without_room, "blob")
            verb = "stays" if done.without_room == 1 else "stay"
            click.echo(f"{blobs} of mostly dead rows {verb}: the budget has no room for a copy.")
