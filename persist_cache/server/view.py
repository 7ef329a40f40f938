"""The store as the admin API shows it: as of one commit, and loaded anew as seldom as may be."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.cache.stats import PromptCacheStats
from persist_cache.entry import SOURCES, Entry, Tier
from persist_cache.queries.as_json import entry_json
from persist_cache.queries.conversations import Branches
from persist_cache.queries.ids import short_entry_ids, short_model_names
from persist_cache.queries.schema import EntryJson
from persist_cache.queries.totals import Survey
from persist_cache.server.answers import Response
from persist_cache.server.guard import Request
from persist_cache.server.validation import RefusedError
from persist_cache.store.store import Store


def server_json(stats: PromptCacheStats, *, max_size: int, max_bytes: int) -> dict[str, Any]:
    """What a server's cache did since it was started.

    Args:
        stats: Its counters.
        max_size: Caches that memory may hold.
        max_bytes: Bytes that memory may hold.
    """
    return {
        "memory": {
            "tiers": [
                {
                    "tier": tier.label,
                    "entries": stats.memory.get(tier.label, {}).get("n_sequences", 0),
                    "bytes": stats.memory.get(tier.label, {}).get("n_bytes", 0),
                }
                for tier in reversed(Tier)
            ],
            "max_entries": max_size,
            # A limit nobody set is larger than any memory, and than what JavaScript can count.
            "max_bytes": max_bytes if max_bytes < 1 << 53 else None,
        },
        "hits": {source: stats.hits.get(source, 0) for source in SOURCES},
        "misses": sum(stats.misses.values()),
        "miss_reasons": dict(stats.misses),
        "partial_reasons": dict(stats.partial),
        "tokens_saved": {source: stats.tokens.get(source, 0) for source in SOURCES},
        "tokens_asked": stats.asked,
        "restore_s": stats.restore_s,
        "restored_bytes": stats.restored_bytes,
        "read_ahead_bytes": stats.read_ahead_bytes,
        "saves": stats.saves,
        "written_bytes": stats.written_bytes,
        "queued_jobs": stats.queued_jobs,
        "queued_bytes": stats.queued_bytes,
        "repaired": dict(stats.repaired),
        "shared": {"requests": stats.shared, "tokens": stats.shared_tokens},
        "problems": dict(stats.problems),
        "disk_off": stats.disk_off,
    }


_SESSION = secrets.token_hex(4)
_LOADING_RARELY = 20
"""Statistics may be as old as this many times what loading the index took."""


class View:
    """The store as of one commit, and what is worked out from it when somebody asks."""

    def __init__(self, version: int, store: Store) -> None:
        started = time.monotonic()
        self.version = version
        self.survey = Survey(store)
        self.short = short_entry_ids(self.survey)
        self.names = short_model_names(self.survey.models)
        ended = time.monotonic()
        self.good_until = ended + _LOADING_RARELY * (ended - started)
        # Another store may be behind the same address tomorrow.
        self.tag = f'"{_SESSION}-{version}"'
        self._branches: Branches | None = None

    def entry_json(self, entry: Entry) -> EntryJson:
        return entry_json(entry, self.survey.model_of(entry), self.short[entry.id])

    @property
    def branches(self) -> Branches:
        if self._branches is None:
            self._branches = Branches(self.survey)
        return self._branches

    @cached_property
    def turns(self) -> Mapping[str, int]:
        """Per entry the user turns up to its end, as far as they are entries."""
        turns: dict[str, int] = {}
        for entry in sorted(self.survey.entries, key=lambda one: one.num_tokens):
            turns[entry.id] = turns.get(entry.parent or "", 0) + (entry.tier == Tier.USER)
        return turns

    @cached_property
    def reclaimable(self) -> dict[str, int]:
        """Bytes that would come free, by why they may."""
        table, ids = self.survey.catalog.table, self.survey.ids
        now = time.time()
        expired = [id for id, when in zip(ids, table.expires, strict=True) if 0 < when < now]
        loose = [id for id, pinned in zip(ids, table.pinned, strict=True) if not pinned]
        return {
            "expired": self.survey.removal(expired).freed_bytes,
            "left_behind": sum(one.nbytes for one in self.survey.left_behind),
            "not_pinned": self.survey.removal(loose).freed_bytes,
        }

    def unchanged(self, request: Request) -> Response | None:
        """The answer to a client that has seen this version already."""
        if request.headers.get("If-None-Match") == self.tag:
            return Response(304, b"", headers={"ETag": self.tag})
        return None


class Views:
    """The latest view of the store behind a cache.

    Thread safety: what is kept is replaced as a whole, never changed.
    """

    def __init__(self, cache: PromptCache) -> None:
        self._cache = cache
        self._view: View | None = None

    def store(self) -> Store:
        """The store.

        Raises:
            RefusedError: There is none, or it is off.
        """
        store = self._cache.store
        if store is None:
            raise RefusedError(503, f"There is no store: {self._cache.disk_off or 'it is off'}.")
        return store

    def now(self) -> View:
        """The store as of now; loaded anew only when something was committed since."""
        store = self.store()
        version = store.commit_id()
        view = self._view
        if view is None or view.version != version:
            view = self._view = View(version, store)
        return view

    def lately(self) -> View:
        """The store as of now or a little earlier: a large one must not be loaded all the time.

        The page asks for statistics every few seconds, beside a decode loop that commits.
        """
        view = self._view
        return view if view is not None and time.monotonic() < view.good_until else self.now()
