"""`persist-cache gc`: tidy up now instead of when room is needed."""

from __future__ import annotations

import click

from persist_cache.queries.upkeep import collected_json
from persist_cache_cli.erasing import CANNOT_BE_ERASED, refuse_incomplete
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
@click.option("--erase", is_flag=True, help="Erase what evicted prompts left in files and index.")
@common_options()
@click.pass_obj
def command(store: str | None, *, erase: bool, as_json: bool, quiet: bool) -> None:
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
        done = collected_json(opened, erase=erase)
        left: list[str] = done.get("left", [])
    if as_json:
        print_json(done)
    elif not quiet:
        gone = plural(done["evicted"], "entry", "entries")
        click.echo(
            f"{format_bytes(done['freed_bytes'])} freed, {gone} gone; {done['entries']:,} left, "
            f"{format_bytes(done['bytes'])} on disk."
        )
        if done["merged_blobs"]:
            click.echo(f"{plural(done['merged_blobs'], 'blob')} of short runs merged into few.")
        if done["compacted_blobs"]:
            click.echo(
                f"{plural(done['compacted_blobs'], 'blob')} of mostly dead rows written anew."
            )
        if done["skipped_blobs"]:
            blobs = plural(done["skipped_blobs"], "blob")
            verb = "stays" if done["skipped_blobs"] == 1 else "stay"
            click.echo(f"{blobs} of mostly dead rows {verb}: the budget has no room for a copy.")
        if erase and not left:
            click.echo(CANNOT_BE_ERASED)
    refuse_incomplete(left)
