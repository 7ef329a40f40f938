"""Clocks that are wrong: nothing breaks, and no entry outlives all others for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from persist_cache.store.store import Store
from tests.fakes import Clock, fetched, fingerprint, put

WRONG = [-1e9, -0.5, 0.0, 4e9, 1e11, 1e15, 1e300, float("inf"), float("nan")]


@pytest.mark.parametrize("shown", WRONG)
def test_store_works_whatever_the_clock_shows(store: Store, clock: Clock, shown: float) -> None:
    right = clock.now
    put(store, [1, 2, 3])
    clock.now = shown

    put(store, [4, 5, 6])
    assert fetched(store, [4, 5, 6]) == 3
    store.touch(store.match(fingerprint(), [1, 2, 3]))
    assert store.flush()
    put(store, [7, 8, 9])
    assert store.gc().freed_bytes is not None
    assert store.check(read_data=True) == []
    clock.now = right

    put(store, [10, 11])
    assert store.check(read_data=True) == []
    assert fetched(store, [7, 8, 9]) == 3


@pytest.mark.parametrize("shown", [-1e9, 1e300, float("nan")])
def test_buffered_use_under_a_wrong_clock_blocks_no_put(
    store: Store, clock: Clock, shown: float
) -> None:
    put(store, [1, 2, 3])
    right, clock.now = clock.now, shown
    store.touch(store.match(fingerprint(), [1, 2, 3]))
    clock.now = right

    put(store, [4, 5, 6])

    assert [entry.hits for entry in store.entries() if entry.num_tokens == 3 and entry.hits] == [1]


@pytest.mark.parametrize("noticed", ["at open", "when room is made"])
def test_entry_of_a_clock_that_ran_ahead_goes_in_its_turn(
    tmp_path: Path, clock: Clock, noticed: str
) -> None:
    def opened() -> Store:
        return Store.open(tmp_path / "s", max_bytes=1 << 30, min_free_bytes=0, clock=clock)

    right = clock.now
    store = opened()
    first = put(store, [7] * 2000)
    clock.now = right + 10 * 365 * 86_400
    ahead = put(store, [1] * 2000)
    clock.now = right + 1
    if noticed == "at open":
        store.close()
        store = opened()
    else:
        store.evict_to(store.stats().usage.total - 1)
        assert [entry.id for entry in store.entries()] == [ahead]
    assert store.get(ahead).last_use == right + 1
    clock.advance(10)
    younger = put(store, [4] * 2000)
    clock.advance(10)

    while len(store.entries()) > 1:
        store.evict_to(store.stats().usage.total - 1)

    assert [entry.id for entry in store.entries()] == [younger] != [first]
    store.close()
