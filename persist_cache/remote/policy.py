"""Which entries are published by themselves, and the thread that does so.

A hit costs its request a look at a counter; all else happens behind it. What does not fit into the
queue is forgotten: the next hit tells of it again.

Thread safety: `Policy` may be shared between threads; `_changed` guards counts and queue.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from persist_cache.entry import PARTIAL_LABEL
from persist_cache.errors import PersistCacheError
from persist_cache.remote.breaker import Breaker
from persist_cache.remote.cutting import StoredEntry
from persist_cache.remote.keys import MIN_TOKENS
from persist_cache.remote.publishing import Publisher
from persist_cache.remote.settings import RemoteSettings
from persist_cache.remote.told import PublishOutcome
from persist_cache.store.store import Store

log = logging.getLogger(__name__)
_MAX_QUEUED = 64
_REMEMBERED = 4096
_PUBLISHED_S = 86_400.0
"""What was published is asked for again after so long: a lifecycle rule may have removed it."""


class Policy:
    """Counts hits, and publishes what is due in the background."""

    def __init__(
        self,
        store: Store,
        settings: RemoteSettings,
        publisher: Publisher,
        breaker: Breaker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._settings = settings
        self._publisher = publisher
        self._breaker = breaker
        self._is_on = not publisher.why_not()
        self._changed = threading.Condition()
        self._hits: OrderedDict[str, int] = OrderedDict()
        self._clock = clock
        self._done: OrderedDict[str, float] = OrderedDict()
        self._queue: OrderedDict[str, None] = OrderedDict()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    def queued(self) -> int:
        with self._changed:
            return len(self._queue)

    def note_hit(self, entry: str) -> None:
        """See `Remote.note_hit`."""
        if not self._is_on:
            return
        with self._changed:
            done_at = self._done.get(entry, -math.inf)
            if self._is_closed or self._clock() - done_at < _PUBLISHED_S:
                return
            hits = self._hits[entry] = self._hits.pop(entry, 0) + 1
            _bound(self._hits)
            if entry in self._queue or len(self._queue) >= _MAX_QUEUED:
                return
            # What earlier processes counted is in the index, which is not read on this thread.
            if hits == 1 or hits >= self._settings.publish_after:
                self._queue[entry] = None
                self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="persist-cache-publish", daemon=True
                )
                self._thread.start()

    def close(self, timeout_s: float) -> bool:
        """Forget what is queued. Returns whether the thread has ended within that time."""
        with self._changed:
            self._is_closed = True
            self._queue.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if self._is_closed:
                    return
                entry, _ = self._queue.popitem(last=False)
                hits = self._hits.get(entry, 0)
            try:
                self._consider(entry, hits)
            except Exception:
                # A thread that ends would publish nothing any more, without a word.
                log.exception("an entry could not be published")

    def _consider(self, entry: str, hits: int) -> None:
        if not self._breaker.allows() or not self._is_due(entry, hits):
            return
        try:
            done = self._publisher.publish(entry)
        except PersistCacheError as error:
            log.debug("entry %s was not published: %s", entry, error)
            self._breaker.note(str(error))
            return
        if done.outcome != PublishOutcome.CLAIMED:
            with self._changed:
                self._done[entry] = self._clock()
                _bound(self._done)

    def _is_due(self, entry: str, hits: int) -> bool:
        try:
            found = StoredEntry.of(self._store, entry)
        except (KeyError, PersistCacheError):
            return False
        tiers = self._settings.tiers
        is_wanted = found.tier.label in tiers or ("pinned" in tiers and found.pinned)
        # A hit of the index may be one of those that were told here.
        return (
            is_wanted
            and max(found.hits, hits) >= self._settings.publish_after
            and found.label != PARTIAL_LABEL
            and found.num_tokens >= MIN_TOKENS
            and found.fingerprint.may_publish
        )


def _bound(names: OrderedDict[str, int] | OrderedDict[str, float]) -> None:
    while len(names) > _REMEMBERED:
        names.popitem(last=False)
