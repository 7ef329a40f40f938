"""What an upgrade left behind, in a sentence with the command that removes it."""

from __future__ import annotations

from persist_cache.queries.totals import LeftBehind, Survey
from persist_cache_cli.output import format_bytes, plural
from persist_cache_cli.store_access import command_line


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
    if one.pinned:
        said += f". {one.pinned:,} of them pinned: `{command_line(given, 'unpin ID')}` first"
    evict = command_line(given, "evict --stale")
    return f"{said}. `{evict}` removes {'it' if one.entries == 1 else 'them'}."
