"""Erasing for the commands: what was done, what is left, and what no program can do."""

from __future__ import annotations

from collections.abc import Sequence

import click

from persist_cache import Store
from persist_cache.store.erase import CANNOT, Erased
from persist_cache_cli.output import plural

CANNOT_BE_ERASED = f"Erased from the folder. What cannot be erased from here: {CANNOT}."


def erased(store: Store, ids: Sequence[str] = ()) -> tuple[int, list[str]]:
    """Erase entries and what was left of others; returns bytes freed, and what is left."""
    before = store.stats().usage.total
    done = store.erase(ids)
    return max(0, before - store.stats().usage.total), _left(done)


def _left(done: Erased) -> list[str]:
    """What is left that could be erased, in sentences."""
    left = []
    if done.without_room:
        left.append(
            f"{plural(done.without_room, 'file')} with rows of evicted prompts could not be "
            "written anew without them: the budget or the disk has no room for a copy"
        )
    if done.in_trash:
        left.append(
            f"{plural(done.in_trash, 'file')} could not be removed; look at the permissions of "
            "the store's folders"
        )
    if done.is_read:
        left.append("another process reads an older state of the index")
    return left


def refuse_incomplete(left: Sequence[str]) -> None:
    """Say that not all was erased.

    Raises:
        click.ClickException: Something is left.
    """
    if left:
        raise click.ClickException(
            f"Not everything was erased: {'; '.join(left)}. Mend that and run "
            "`persist-cache gc --erase`."
        )
