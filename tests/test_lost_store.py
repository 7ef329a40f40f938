"""A store whose folder is removed, or replaced by another one, while it is open."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from persist_cache.store.budget import DEFAULT_MAX_BYTES
from persist_cache.store.store import Store
from tests.fakes import put


def limits(root: Path) -> tuple[int, int]:
    """What a command that opens the store next goes by."""
    with Store.open(root, read_only=True) as store:
        return store.limits.max_bytes, store.limits.min_free_bytes


def test_store_in_the_place_of_a_lost_one_keeps_its_own_limits(tmp_path: Path) -> None:
    """Nobody asked for others: what the lost one had was its own, or a default."""
    root, other = tmp_path / "store", tmp_path / "other"
    Store.open(other, max_bytes=5_000_000, min_free_bytes=1000).close()
    with Store.open(root) as store:
        root.rename(tmp_path / "away")
        other.rename(root)
        assert store.is_lost

        store.reopen()

        assert (store.limits.max_bytes, store.limits.min_free_bytes) == (5_000_000, 1000)
        assert store.stats().max_bytes == 5_000_000
    assert limits(root) == (5_000_000, 1000)


def test_limits_that_were_asked_for_outlast_the_store(tmp_path: Path) -> None:
    root, other = tmp_path / "store", tmp_path / "other"
    Store.open(other, max_bytes=5_000_000, min_free_bytes=1000).close()
    with Store.open(root, max_bytes=7_000_000) as store:
        root.rename(tmp_path / "away")
        other.rename(root)

        store.reopen()

        assert (store.limits.max_bytes, store.limits.min_free_bytes) == (7_000_000, 1000)
    assert limits(root) == (7_000_000, 1000)


@pytest.mark.parametrize("max_bytes", [5_000_000, DEFAULT_MAX_BYTES])
def test_store_that_is_begun_anew_has_the_limits_of_the_lost_one(
    tmp_path: Path, max_bytes: int
) -> None:
    """Also those that were set by an earlier process."""
    root = tmp_path / "store"
    Store.open(root, max_bytes=max_bytes, min_free_bytes=0).close()
    with Store.open(root) as store:
        shutil.rmtree(root)

        store.reopen()

        assert (store.limits.max_bytes, store.limits.min_free_bytes) == (max_bytes, 0)
        put(store, range(50))
    assert limits(root) == (max_bytes, 0)
