"""The admin API's history: what requests saved, and what the disk took, over the last day."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from persist_cache.errors import StoreError
from persist_cache.queries.days import WrittenDay, written_days
from persist_cache.queries.totals import quarantined
from persist_cache.server.answers import Response, json_response
from persist_cache.server.guard import Request
from persist_cache.server.history.disk import DiskHistory, DiskSample
from persist_cache.server.history.requests import DAY_S, HOUR_S, RequestHistory, Sums
from persist_cache.server.parameters import query_of
from persist_cache.server.recent.ring import Ring
from persist_cache.server.validation import RefusedError
from persist_cache.server.view import Views

_DAYS = 14
_POINTS = 240
_MOST_ADDED_UP = 20_000
"""Entries beyond which tiers are not added up each minute, only when somebody looks."""


class WindowJson(Struct, frozen=True, kw_only=True):
    """What the requests of some time came to.

    Attributes:
        window: `hour`, `day`, or `start`: since the server was started.
        since: Since when the figures hold, which may be later than the window's beginning.
        requests: That are over.
        failed: Of these, that failed.
        left: Of these, whose clients left.
        tokens_asked: Of all prompts.
        tokens_reused: Of these, that were not computed, by where they came from.
        saved_s: Seconds of prefill that this saved, less what reading took.
        unmeasured: Requests with reused tokens whose worth nobody knows; `saved_s` is without them.
    """

    window: str
    since: float
    requests: int
    failed: int
    left: int
    tokens_asked: int
    tokens_reused: dict[str, int]
    saved_s: float
    unmeasured: int


class PointJson(Struct, frozen=True, kw_only=True):
    """What the store took on disk at one time; `total` is null while it was off.

    `tiers` is null where they were not added up.
    """

    at: float
    total: int | None
    tiers: dict[str, int] | None


class HistoryJson(Struct, frozen=True, kw_only=True):
    """What the server and its store did lately.

    Attributes:
        time: Of the server.
        started: When it began to count.
        windows: The last hour, the last day, and since the start.
        written: Bytes written on each of the last UTC days, the last one today; kept by the store.
        daily_write_bytes: What it may write a day, or null.
        disk: What it took on disk over the last day, as long as the server runs.
        max_bytes: Its budget.
        reclaimable: Bytes that would come free, by why they may: `expired`, `left_behind`,
            `not_pinned` (all that is not pinned), `quarantine`.
    """

    time: float
    started: float
    windows: Sequence[WindowJson]
    written: Sequence[WrittenDay]
    daily_write_bytes: int | None
    disk: Sequence[PointJson]
    max_bytes: int | None
    reclaimable: dict[str, int]


class History:
    """Answers about the last day. Thread safety: may be asked by many threads at once."""

    def __init__(self, views: Views, generator: Any) -> None:
        """Look at these.

        Args:
            views: The store.
            generator: The server's, which counts requests; None where nothing runs.
        """
        self._views = views
        self._generator = generator
        self._nothing = RequestHistory()
        self.disk = DiskHistory(self._sample)

    def show(self, request: Request) -> Response:
        """All of it."""
        query_of(request, set())
        requests = self._requests()
        windows: list[tuple[str, float | None]] = [
            ("hour", HOUR_S),
            ("day", DAY_S),
            ("start", None),
        ]
        return json_response(
            HistoryJson(
                time=time.time(),
                started=requests.started,
                windows=[_window(name, requests.over(seconds)) for name, seconds in windows],
                disk=[
                    PointJson(
                        at=one.at,
                        total=one.total,
                        tiers=dict(one.tiers) if one.tiers else None,
                    )
                    for one in self.disk.samples(_POINTS)
                ],
                **self._of_store(),
            )
        )

    def _of_store(self) -> dict[str, Any]:
        try:
            store = self._views.store()
            limits = store.limits
            return {
                "written": written_days(store, _DAYS),
                "daily_write_bytes": limits.daily_write_bytes,
                "max_bytes": limits.max_bytes,
                "reclaimable": {
                    **self._views.lately().reclaimable,
                    "quarantine": sum(one.nbytes for one in quarantined(store)),
                },
            }
        except (RefusedError, StoreError):  # it is off
            return {"written": [], "daily_write_bytes": None, "max_bytes": None, "reclaimable": {}}

    def _requests(self) -> RequestHistory:
        ring: Ring | None = getattr(self._generator, "recent", None)
        return self._nothing if ring is None else ring.history

    def _sample(self, at: float) -> DiskSample:
        try:
            stats = self._views.store().stats()
            tiers: tuple[tuple[str, int], ...] = ()
            if stats.entries <= _MOST_ADDED_UP:
                by_tier = self._views.lately().survey.by_tier
                tiers = tuple((tier.label, amount.nbytes) for tier, amount in by_tier.items())
        except (RefusedError, StoreError):
            return DiskSample(at, None)
        return DiskSample(at, stats.usage.total, tiers)


def _window(name: str, sums: Sums) -> WindowJson:
    return WindowJson(
        window=name,
        since=sums.since,
        requests=sums.requests,
        failed=sums.failed,
        left=sums.left,
        tokens_asked=sums.asked_tokens,
        tokens_reused=dict(sums.reused_tokens),
        saved_s=sums.saved_s,
        unmeasured=sums.unmeasured,
    )
