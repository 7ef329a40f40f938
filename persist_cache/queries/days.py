"""What a store wrote on each of the last days."""

from __future__ import annotations

import time

from msgspec import Struct

from persist_cache.store.budget import written_today
from persist_cache.store.store import Store

DAY_S = 86_400


class WrittenDay(Struct, frozen=True):
    """Bytes that were written on a UTC day, such as `2026-03-01`."""

    day: str
    bytes: int


def written_days(store: Store, number: int) -> list[WrittenDay]:
    """What was written on each of so many days, oldest first; the last one is today."""
    now = store.clock()
    with store.read() as txn:
        return [
            WrittenDay(
                time.strftime("%Y-%m-%d", time.gmtime(now - ago * DAY_S)),
                txn.counter(written_today(now - ago * DAY_S)),
            )
            for ago in reversed(range(number))
        ]
