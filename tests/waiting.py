"""Waiting for what comes true in its own time: the one place of the tests that sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_PAUSE_S = 0.01


def until(
    condition: Callable[[], T], what: str = "it did not come true in time", timeout_s: float = 60
) -> T:
    """Wait until `condition` holds, and return what it said.

    Args:
        condition: Asked every few milliseconds; what it raises is raised.
        what: The failure, in a sentence.
        timeout_s: After which it is one.
    """
    deadline = time.monotonic() + timeout_s
    while not (said := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(_PAUSE_S)
    return said
