"""What the commands that erase say: what is left, and what no program can erase."""

from __future__ import annotations

from collections.abc import Sequence

import click

from persist_cache.store.erase import CANNOT

CANNOT_BE_ERASED = f"Erased from the folder. What cannot be erased from here: {CANNOT}."


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
