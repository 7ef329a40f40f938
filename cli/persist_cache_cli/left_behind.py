"""What an upgrade left behind, in a sentence with the command that removes it."""

from __future__ import annotations

import shlex

from persist_cache.queries.totals import LeftBehind, Survey
from persist_cache.store.store import default_store_path
from persist_cache_cli.output import format_bytes, plural
from persist_cache_cli.store_access import store_path


def sentences(survey: Survey, given: str | None) -> list[str]:
    """One sentence for each reason.

    Args:
        survey: The store.
        given: `--store`, if it was given.
    """
    return [_sentence(one, given) for one in survey.left_behind]


def _sentence(one: LeftBehind, given: str | None) -> str:
    count = plural(one.entries, "entry", "entries")
    verb = "is" if one.entries == 1 else "are"
    said = f"{count}, {format_bytes(one.nbytes)}, {verb} of no use any more: {one.reason}"
    command = _command(given)
    if one.pinned:
        said += f". {one.pinned:,} of them pinned: `{command} unpin ID` first"
    return f"{said}. `{command} evict --stale` removes {'it' if one.entries == 1 else 'them'}."


def _command(given: str | None) -> str:
    path = store_path(given)
    where = [] if path == default_store_path() else ["--store", str(path)]
    return shlex.join(["persist-cache", *where])
