"""A store that could not be opened: tried again now and then, until it can be.

Whatever kept it from being opened may pass: a disk that is not mounted yet or is full, another
process that mends the index, a path that something else is in the way of.

Thread safety: `claim` and `attempt` may be called from any thread; `_lock` guards the schedule.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from persist_cache import fs
from persist_cache.errors import StoreError
from persist_cache.store.store import Store

log = logging.getLogger(__name__)


class LateStore:
    """How to open a store, why that failed last, and when to try again."""

    def __init__(self, open_store: Callable[[], Store], reason: str, pause_s: float) -> None:
        """Note that it could not be opened.

        Args:
            open_store: Opens it.
            reason: Why it is not open.
            pause_s: How long to wait between the end of an attempt and the next one.
        """
        self._open_store = open_store
        self._pause_s = pause_s
        self._lock = threading.Lock()
        self._due = 0.0
        self.reason = reason
        """Why the latest attempt failed, in a sentence."""

    def claim(self) -> bool:
        """Whether it is time for an attempt, which the caller then makes: nobody else is told."""
        with self._lock:
            if time.monotonic() < self._due:
                return False
            self._due = float("inf")
            return True

    def attempt(self) -> Store | None:
        """Try to open it; None, and another `reason`, if that fails again."""
        try:
            return self._open_store()
        except StoreError as error:
            self._failed(str(error))
        except OSError as error:
            self._failed(str(fs.translated(error, "while the store was opened")))
        finally:
            with self._lock:
                self._due = time.monotonic() + self._pause_s
        return None

    def _failed(self, reason: str) -> None:
        if reason != self.reason:
            log.warning("the store still cannot be opened: %s", reason)
        self.reason = reason
