"""What one put adds to the index is within what the budget reckons with, whatever a page has."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path

import pytest

from persist_cache.errors import StoreFullError
from persist_cache.store.budget import index_growth
from persist_cache.store.store import Store
from tests import forge
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
        index = forge.index(store)
        for _ in range(puts):
            length = dice.randint(longest // 2, longest)
            before = index.file_bytes()
            put(store, [dice.getrandbits(40) for _ in range(length)])
            grown = index.file_bytes() - before
            assert grown <= index_growth(length, index.page_bytes), (length, grown)


def test_first_put_is_within_the_budget_or_refused(tmp_path: Path) -> None:
    """It grows the index the most, since no page of it is free to be used again."""
    template = tmp_path / "template"
    Store.open(template, max_bytes=1 << 30, min_free_bytes=0, clock=Clock()).close()
    empty = disk_usage(template)
    stored = 0
    for more in range(0, 1 << 20, 4096):
        folder = tmp_path / "store"
        shutil.copytree(template, folder)
        with Store.open(
            folder, max_bytes=empty + more, min_free_bytes=0, run_tokens=8, clock=Clock()
        ) as store:
            with contextlib.suppress(StoreFullError):
                put(store, list(range(30)))
            assert disk_usage(folder) <= empty + more
            stored += len(store.entries())
        shutil.rmtree(folder)
        if stored > 3:
            break

    assert stored > 3
