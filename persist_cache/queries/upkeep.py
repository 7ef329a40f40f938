"""`gc` and `check` as JSON: what was done to a store, the same for commands and admin API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from persist_cache.queries.as_json import quarantine_json
from persist_cache.queries.totals import Quarantined
from persist_cache.store.store import Store

if TYPE_CHECKING:
    from persist_cache.store.check import Problem


def collected_json(store: Store, *, overwrites: bool = False) -> dict[str, Any]:
    """Run `Store.gc`, and say what that did.

    Args:
        store: The store.
        overwrites: As for `Store.gc`.

    Raises:
        StoreError: The disk failed; what was done until then stays done.
    """
    before = store.stats().entries
    done = store.gc(overwrites=overwrites)
    after = store.stats()
    return {
        "freed_bytes": done.freed_bytes,
        "evicted": max(0, before - after.entries),
        "merged_blobs": done.merged,
        "compacted_blobs": done.compacted,
        "skipped_blobs": done.without_room,
        "entries": after.entries,
        "bytes": after.usage.total,
    }


def check(
    store: Store,
    *,
    read_data: bool,
    repair: bool,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Problem], list[Problem]]:
    """Run `Store.check`: what was wrong, and what is wrong still."""
    problems = store.check(read_data=read_data, repair=repair, progress=progress)
    if not problems or not repair:
        return problems, list(problems)
    # Of data that was read, what was bad is in quarantine now.
    return problems, store.check()


def count_blobs(store: Store) -> int:
    """How many blobs a store has."""
    with store.read() as txn:
        return txn.size_of(b"blobs")


def checked_json(
    problems: Sequence[Problem],
    left: Sequence[Problem],
    *,
    blobs: int,
    aside: Sequence[Quarantined],
    read_data: bool,
    rebuilt: int | None = None,
) -> dict[str, Any]:
    """What `check` found.

    Args:
        problems: What was wrong.
        left: What is wrong still.
        blobs: Number of blobs.
        aside: Files in quarantine.
        read_data: Every byte was read.
        rebuilt: Blobs that found their place in a new index, if it was made anew.
    """
    return {
        "blobs": blobs,
        "read_data": read_data,
        "problems": [
            {"kind": one.kind, "message": one.message, "blob": one.blob} for one in problems
        ],
        "rebuilt_blobs": rebuilt,
        "repaired": bool(problems) and not left,
        "quarantine": quarantine_json(aside),
    }
