"""`persist-cache export`: write entries into a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from persist_cache import bundle
from persist_cache.queries.select import Filters
from persist_cache.queries.totals import Survey
from persist_cache_cli.output import format_bytes, plural, print_json, printable
from persist_cache_cli.progress import bar
from persist_cache_cli.store_access import (
    NothingFound,
    common_options,
    ids_or_group,
    no_store,
    reading,
    refuse_both,
    resolve,
)


@click.command("export")
@ids_or_group("What requests with this `prompt_cache_key` use.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@common_options()
@click.pass_obj
def command(
    store: str | None,
    *,
    ids: Sequence[str],
    file: Path,
    force: bool,
    group: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write entries into one FILE, from which `import` adds them to another store.

    FILE holds their tokens and KV, and nothing of other entries: whoever can read it can read
    these prompts. Only models with the same fingerprint can use it.

    \b
    Example:
      persist-cache export 3fa2b1 9ac001 agent.tar
    """
    refuse_both(ids, group)
    with reading(store) as opened:
        if opened is None and group is not None:
            raise NothingFound(no_store(store))
        full = resolve(opened, ids)
        assert opened is not None, "without a store there are no ids"
        if group is not None:
            survey = Survey(opened)
            rows = Filters(group=group).rows(survey, opened.clock())
            full = [survey.ids[row] for row in rows]
            if not full:
                raise NothingFound(f"No entry is of the group {group!r}; nothing was written.")
        try:
            with bar("Exporting", silent=quiet or as_json, unit="bytes") as progress:
                done = bundle.export(opened, full, file, force=force, progress=progress)
        except FileExistsError:
            raise click.ClickException(f"{file} exists already; --force replaces it.") from None
        except KeyError as error:
            raise NothingFound(f"Entry {error.args[0]} was evicted just now.") from None
    if as_json:
        print_json(
            {
                "file": str(done.path),
                "file_bytes": done.nbytes,
                "ids": list(done.entries),
                "blobs": done.blobs,
                "num_tokens": done.num_tokens,
            }
        )
    elif not quiet:
        count = plural(len(done.entries), "entry", "entries")
        click.echo(
            f"{count} ({done.num_tokens:,} tokens, {format_bytes(done.nbytes)}) "
            f"written to {printable(str(done.path))}."
        )
