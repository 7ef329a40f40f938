"""A progress bar for work that is counted in bytes or tokens; rich is loaded only to draw one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(
    title: str, *, silent: bool, in_bytes: bool = True
) -> Iterator[Callable[[int, int], None] | None]:
    """Draw a bar on standard error if that is a terminal.

    Args:
        title: What is being done.
        silent: Draw nothing.
        in_bytes: What is counted are bytes.

    Yields:
        What to call with what is done and the total; None when nothing is drawn.
    """
    if silent or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    amount = DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
