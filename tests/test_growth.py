"""What one put adds to the index is within what the budget reckons with, whatever a page has."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from persist_cache.budget import index_growth
from persist_cache.store import Store
from tests.fakes import Clock, disk_usage, put


@pytest.mark.parametrize(
    ("run_tokens", "longest", "puts"),
    [(8, 40, 60), (4096, 40, 60), (4096, 3000, 30), (4096, 60_000, 3), (1100, 20_000, 6)],
)
def test_put_grows_the_index_by_no_more_than_is_reckoned_with(
    tmp_path: Path, run_tokens: int, longest: int, puts: int
) -> None:
    dice = random.Random(longest)
    with Store.open(
        tmp_path / "store",
        max_bytes=1 << 30,
        min_free_bytes=0,
        run_tokens=run_tokens,
        clock=Clock(),
    ) as store:
        index = store._disk.index
        for _ in range(puts):
            length = dice.randint(longest // 2, longest)
            before = index.file_bytes()
            put(store, [dice.getrandbits(40) for _ in range(length)])
            grown = index.file_bytes() - before
            assert grown <= index_growth(length, index.page_bytes), (length, grown)


def test_budget_of_a_few_pages_is_never_exceeded(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with Store.open(folder, max_bytes=1 << 30, min_free_bytes=0, clock=Clock()) as store:
        budget = disk_usage(folder) + 48 * store._disk.index.page_bytes
    with Store.open(folder, max_bytes=budget, min_free_bytes=0, run_tokens=8, clock=Clock()) as one:
        for number in range(60):
            put(one, [number, *range(30)])
            assert disk_usage(folder) <= budget
        assert one.stats().entries >= 1
