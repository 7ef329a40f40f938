"""Overwriting what removed records left in the index.

LMDB frees pages and leaves what is in them, and in a page that is still used it leaves what was
moved. So everything is written anew, and then zeros are put into every page that is free. These are
ordinary commits: the process may die between any two, and others may use the index meanwhile.
"""

from __future__ import annotations

import time

from msgspec import Struct

from persist_cache.index.environment import Index
from persist_cache.index.transaction import (
    ADDED,
    BLANK,
    DATABASES,
    ERASED,
    LATER,
    Writer,
)

_REWRITTEN = tuple(table for table in (*DATABASES, *ADDED, *LATER) if table != BLANK)
"""All: a table without a token in it may have pages that once held some."""
_PAGES_AT_ONCE = 8192
_RUNS_AT_ONCE = 4096
_FEW_PAGES = 64
_LAST_PAGES = 8
"""Taken at once where each commit may be the first one that finds none."""
_POINTED_TO = 64
"""Fewer than the zeros that one page of their table points to."""
_ROUNDS = 2
"""What a commit frees can be used by the next but one."""
_PATIENCE_S = 10.0
"""How long to wait for somebody who reads an older state: its pages cannot be written."""


class Scrubbed(Struct, frozen=True):
    """What was overwritten.

    Attributes:
        pages: Free pages that are zeros now.
        is_read: Somebody reads an older state, whose pages stay as they are.
    """

    pages: int
    is_read: bool


def growth_pages(index: Index) -> int:
    """By how many pages the file grows at most: one table at a time is there twice."""
    with index.read() as txn:
        tables = [name for name in _REWRITTEN if name != b"tokens"]
        largest = max(txn.pages_of(name) for name in tables)
        at_once = min(txn.size_of(b"tokens"), _RUNS_AT_ONCE) + txn.pages_of(b"tokens", leaves=True)
        free = index.last_page + 1 - txn.used_pages()
    return max(largest, at_once) + _FEW_PAGES * 2 - min(free, max(largest, at_once)) // 2


def scrub(index: Index) -> Scrubbed:
    """Overwrite what removed records left.

    Raises:
        StoreError: The index cannot be written; what is left is done by the next call.
    """
    index.update(Writer.unfill)
    # From here on no process writes pages anew that it wrote before.
    index.update(lambda txn: txn.add(ERASED, 1))
    for database in _REWRITTEN:
        if database != b"tokens":
            index.update(_step)
            index.update(_step)  # so that it takes the pages of the one before
            index.update(lambda txn, table=database: txn.rewrite(table))  # type: ignore[misc]
    after, is_more = b"", True
    while is_more:
        after = index.update(
            lambda txn, at=after: txn.rewrite_tokens(at, _RUNS_AT_ONCE, index.page_bytes)  # type: ignore[misc]
        )
        is_more = bool(after)
    pages, is_read = 0, False
    for left in reversed(range(_ROUNDS)):
        for _ in range(2):
            last = index.update(_step)
        is_read = not _is_passed(index, last)
        pages = _overwrite(index, until_it_grows=not left)
    return Scrubbed(pages, is_read)


def _step(txn: Writer) -> int:
    """Commit something, so that what earlier commits freed can be used; returns its number."""
    txn.set_meta(ERASED, txn.meta(ERASED) or b"")
    return txn.commit_id


def _is_passed(index: Index, commit: int) -> bool:
    """Wait until nobody reads a state before a commit; False when that takes too long."""
    give_up = time.monotonic() + _PATIENCE_S
    while True:
        index.reader_check()
        oldest = index.oldest_reader()
        if oldest is None or oldest >= commit:
            return True
        if time.monotonic() > give_up:
            return False
        time.sleep(0.02)


def _overwrite(index: Index, *, until_it_grows: bool) -> int:
    """Put zeros into the free pages, and free them again; returns how many there were.

    That none is left is seen by the file's growth. What it grows by is free the next time, so it
    has to be little: the last pages are taken few at a time, and only if `until_it_grows`.
    """
    with index.read() as txn:
        free = index.last_page + 1 - txn.used_pages()
    # The table of the zeros has pages that point to them, and each commit takes some.
    surely = free - free // _POINTED_TO - _FEW_PAGES
    filled = 0
    while filled < surely or until_it_grows:
        before = index.last_page
        at_once = min(max(surely - filled, _LAST_PAGES), _PAGES_AT_ONCE)
        index.update(
            lambda txn, first=filled, count=at_once: txn.fill(first, count, index.page_bytes)  # type: ignore[misc]
        )
        filled += at_once
        if index.last_page - before >= min(at_once, _FEW_PAGES) // 2:
            break  # the file grows: no page was free any more
    index.update(Writer.unfill)
    return filled
