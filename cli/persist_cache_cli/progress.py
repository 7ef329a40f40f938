"""Progress bars; drawn on a terminal only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _TokenRate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} tokens/s" if task.speed else "")


@contextlib.contextmanager
def token_bar(title: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar over tokens with their rate and the time left.

    Yields:
        What to call with the tokens done so far; None when nothing is to be drawn.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, _TokenRate(), TimeRemainingColumn(), console=console) as bars:
        task = bars.add_task(title, total=total)
        yield lambda done: bars.update(task, completed=done)
