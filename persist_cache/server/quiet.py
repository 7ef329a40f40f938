"""Keeps what private requests say out of the log, whatever its level is.

Upstream logs bodies, answers and broken tool calls, and a traceback may quote a prompt.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

_here = threading.local()


class _Filter(logging.Filter):
    """Drops what is detailed, or upstream's, of threads that are at work on a private request."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not getattr(_here, "depth", 0):
            return True
        if record.levelno <= logging.DEBUG or record.name == logging.getLogger().name:
            return False
        record.exc_info = record.exc_text = None
        return True


_FILTER = _Filter()


def install() -> None:
    """Have all handlers of the root logger, as they are now, heed it."""
    for handler in logging.getLogger().handlers:
        if _FILTER not in handler.filters:
            handler.addFilter(_FILTER)


@contextlib.contextmanager
def quiet(is_private: bool = True) -> Iterator[None]:
    """Log nothing in the block, by the calling thread, that may quote a prompt."""
    if not is_private:
        yield
        return
    begin()
    try:
        yield
    finally:
        end()


def begin() -> None:
    """Be quiet from here on; each call needs an `end`."""
    _here.depth = getattr(_here, "depth", 0) + 1


def end() -> None:
    """Be as quiet as before."""
    _here.depth = max(0, getattr(_here, "depth", 0) - 1)
