"""What an eviction says it frees is what it frees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from persist_cache import fs
from persist_cache.queries.totals import Survey
from persist_cache.store.store import Store
from tests.cli import runner
from tests.fakes import disk_usage, put

LONG = list(range(100, 1300))
HEAD = LONG[:1000]


@pytest.fixture
def roomy(tmp_path: Path) -> Store:
    """A store whose runs are long, so that two entries share a file."""
    return Store.open(tmp_path / "store", min_free_bytes=0, run_tokens=4096)


def stuck(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let no file of the store be unlinked; returns what ends that."""
    unlink = fs.unlink

    def refuse(path: Path) -> None:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path)

    monkeypatch.setattr(fs, "unlink", refuse)
    return lambda: monkeypatch.setattr(fs, "unlink", unlink)


def test_rows_in_a_shared_file_are_said_to_die_not_to_be_freed(roomy: Store) -> None:
    with roomy as store:
        long, head = put(store, LONG), put(store, HEAD)
        own = store.get(long).own_bytes
        plan = Survey(store).removal([long])
        assert plan.freed_bytes == 0
        assert plan.dead_bytes == own > 10_000
        before = disk_usage(store.root / "blobs")

        freed = store.evict([long])

        assert freed == before - disk_usage(store.root / "blobs") == 0
        again = Survey(store).removal([head])
        assert (again.dead_bytes, store.evict([head])) == (0, again.freed_bytes)
        assert again.freed_bytes >= before - 4096 * 2


def test_own_bytes_of_an_entry_are_freed_or_dead(store: Store) -> None:
    ids = [
        put(store, LONG[:30]),
        put(store, LONG[:21], tier="system"),
        put(store, [*LONG[:13], 7, 8, 9]),
        put(store, [5, 6, 7, 8], complete=False),
    ]
    for one in ids:
        plan = Survey(store).removal([one])
        assert store.get(one).own_bytes == plan.freed_bytes + plan.dead_bytes


def test_what_cannot_be_unlinked_is_not_said_to_be_freed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = put(store, LONG[:30])
    before = disk_usage(store.root)
    free = stuck(monkeypatch)

    assert store.evict([entry]) == 0
    assert store.stats().usage.trash > 0
    assert disk_usage(store.root) >= before
    free()
    store.gc()
    assert store.stats().usage.trash == 0


def test_quarantined_files_that_stay_are_not_said_to_be_freed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, LONG[:8])
    path = next((store.root / "blobs").glob("*/*"))
    path.write_bytes(path.read_bytes()[:-1])
    store.check(repair=True)
    free = stuck(monkeypatch)

    assert store.purge_quarantine() == 0
    free()
    assert store.gc().freed_bytes > 0


def test_evict_says_what_it_could_not_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "store"
    with Store.open(root, min_free_bytes=0) as store:
        long = put(store, LONG)
        put(store, HEAD)
        other = put(store, [5, 6, 7])
    run = runner(root, capfd)
    dry: Any = run("evict", long, "--dry-run", "--json").json
    stuck(monkeypatch)

    shared = run("evict", long, "--yes")
    said = run("evict", other, "--yes", "--json").json

    assert (dry["freed_bytes"], dry["unremoved_bytes"]) == (0, 0)
    assert dry["dead_bytes"] == dry["entries"][0]["own_bytes"] > 0
    assert "0 B freed" in shared.out
    assert "gc" in shared.out
    assert said["freed_bytes"] == 0
    assert said["unremoved_bytes"] == said["entries"][0]["own_bytes"] > 0


def test_evict_says_that_it_could_not_remove_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "store"
    with Store.open(root, min_free_bytes=0) as store:
        entry = put(store, LONG)
    stuck(monkeypatch)

    assert "could not be removed" in runner(root, capfd)("evict", entry, "--yes").out
