"""Counters of the remote: in this process, and in the store for `stats`.

Thread safety: `Counters` may be shared between threads; `_lock` guards the counts.
"""

from __future__ import annotations

import threading
from collections import Counter

from persist_cache.store.store import Store


class Counters:
    """Counts what happens, by the names of `told.COUNTERS`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1) -> None:
        """Count something, here and in the store, where the name begins with `remote_`."""
        if amount <= 0:
            return
        with self._lock:
            self._counts[name] += amount
        if not self._store.read_only:
            self._store.count(f"remote_{name}", amount)

    def now(self) -> dict[str, int]:
        """All counts of this process."""
        with self._lock:
            return dict(self._counts)
