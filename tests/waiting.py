"""Waiting for what comes true in its own time: the one place of the tests that sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_PAUSES_S = (0.005, 0.1)
"""The shortest and the longest; between them they are a tenth of what was waited already."""


def until(
    condition: Callable[[], T], what: str = "it did not come true in time", timeout_s: float = 60
) -> T:
    """Wait until `condition` holds, and return what it said.

    Args:
        condition: Asked every few milliseconds, later less often; what it raises is raised.
        what: The failure, in a sentence.
        timeout_s: After which it is one.
    """
    started = time.monotonic()
    while not (said := condition()):
        waited = time.monotonic() - started
        assert waited < timeout_s, what
        time.sleep(min(max(waited / 10, _PAUSES_S[0]), _PAUSES_S[1]))
    return said
