"""`gc` and `check` as JSON: what was done to a store, the same for commands and admin API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from persist_cache.queries.as_json import quarantine_json
from persist_cache.queries.totals import Quarantined
from persist_cache.store.store import Store

if TYPE_CHECKING:
    from persist_cache.store.check import Problem


def collected_json(store: Store, *, erase: bool = False) -> dict[str, Any]:
    """Run `Store.gc`, and `Store.erase` if that is asked for, and say what that did.

    What is left that could be erased is in `left` then, in sentences.

    Args:
        store: The store.
        erase: Overwrite what goes, and erase what is left of it.

    Raises:
        StoreError: The disk failed; what was done until then stays done.
    """
    before = store.stats().entries
    done = store.gc(overwrites=erase)
    freed, left = erased(store) if erase else (0, [])
    after = store.stats()
    return {
        **({"left": left} if erase else {}),
        "freed_bytes": done.freed_bytes + freed,
        "evicted": max(0, before - after.entries),
        "merged_blobs": done.merged,
        "compacted_blobs": done.compacted,
        "skipped_blobs": done.without_room,
        "entries": after.entries,
        "bytes": after.usage.total,
    }


def erased(store: Store, ids: Sequence[str] = ()) -> tuple[int, list[str]]:
    """Erase entries and what was left of others; returns bytes freed, and what is left."""
    before = store.stats().usage.total
    done = store.erase(ids)
    freed = max(0, before - store.stats().usage.total)
    left = []
    if done.without_room:
        left.append(
            f"{done.without_room} files with rows of evicted prompts could not be written anew "
            "without them: the budget or the disk has no room for a copy"
        )
    if done.in_trash:
        left.append(
            f"{done.in_trash} files could not be removed; look at the permissions of the store's "
            "folders"
        )
    if done.is_read:
        left.append("another process reads an older state of the index")
    return freed, left


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
