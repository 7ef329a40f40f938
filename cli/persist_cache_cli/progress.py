"""Progress bars, drawn on standard error if that is a terminal; rich is loaded only to draw one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@contextmanager
def bar(
    title: str,
    *,
    silent: bool,
    unit: Literal["bytes", "things", "tokens"] = "things",
    total: int | None = None,
) -> Iterator[Callable[[int, int], None] | None]:
    """Draw one bar; that of tokens says how many a second, and stays when it is full.

    Args:
        title: What is being done.
        silent: Draw nothing.
        unit: What is counted.
        total: How many there are, if that is known at the beginning.

    Yields:
        What to call with what is done and the total; None when nothing is drawn.
    """
    if silent or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with bars(Console(stderr=True), unit=unit, transient=unit != "tokens") as drawn:
        task = drawn.add_task(title, total=total)
        yield lambda done, total: drawn.update(task, completed=done, total=total)


def bars(
    console: Console,
    *,
    unit: Literal["bytes", "things", "tokens", "share"] = "share",
    transient: bool = False,
) -> Progress:
    """Bars that are drawn on `console`, with what is done of each and the time that is left."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class TokenRate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f} tokens/s" if task.speed else "")

    amounts: dict[str, list[ProgressColumn]] = {
        "bytes": [DownloadColumn(binary_units=True)],
        "things": [MofNCompleteColumn()],
        "tokens": [MofNCompleteColumn(), TokenRate()],
        "share": [TaskProgressColumn()],
    }
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *amounts[unit],
        TimeRemainingColumn(),
        console=console,
        transient=transient,
    )
