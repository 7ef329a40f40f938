"""An index of another machine's page size is used as it is: the size is in its meta pages."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from persist_cache.store.store import Store
from tests import forge
from tests.darwin import processes
from tests.fakes import Clock, fetched, put

OURS, OTHERS = 16384, 4096
_ELSEWHERE = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
_MAKE = """
import mmap
assert mmap.PAGESIZE == 4096
with opened(folder) as store:
    for number in range(30):
        put(store, [number, 2, 3])
    assert forge.index(store).page_bytes == int(arguments[0])
"""
_CHECK = """
import mmap
assert mmap.PAGESIZE == 4096
with opened(folder) as store:
    assert forge.index(store).page_bytes == int(arguments[0])
    for number in range(60):
        assert fetched(store, [number, 2, 3]) == 3
    assert store.check(read_data=True) == []
    put(store, [1000, 2, 3])
"""


def open_store(folder: Path) -> Store:
    return Store.open(folder, max_bytes=1 << 30, min_free_bytes=0, run_tokens=8, clock=Clock())


def test_index_of_small_pages_is_used_where_they_are_large(tmp_path: Path) -> None:
    assert mmap.PAGESIZE == OURS
    folder = tmp_path / "store"
    processes.run(_MAKE, folder, str(OTHERS), env=_ELSEWHERE)

    with open_store(folder) as store:
        assert forge.index(store).page_bytes == OTHERS
        for number in range(30, 60):
            put(store, [number, 2, 3])
        # Both at once: the table of readers, too, is as it was made.
        processes.run(_CHECK, folder, str(OTHERS), env=_ELSEWHERE)
        assert fetched(store, [1000, 2, 3]) == 3
        assert store.check(read_data=True) == []


def test_index_of_large_pages_is_used_where_they_are_small(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with open_store(folder) as store:
        assert forge.index(store).page_bytes == OURS
        for number in range(60):
            put(store, [number, 2, 3])
        processes.run(_CHECK, folder, str(OURS), env=_ELSEWHERE)
    processes.run(_CHECK.replace("60", "0"), folder, str(OURS), env=_ELSEWHERE)

    with open_store(folder) as store:
        assert fetched(store, [1000, 2, 3]) == 3
        assert store.check(read_data=True) == []


def test_semaphores_are_mended_whatever_the_page_size(tmp_path: Path) -> None:
    """The newest meta page is the second one, whose place depends on it."""
    for name, env in (("small", _ELSEWHERE), ("large", None)):
        folder = tmp_path / name
        processes.use(folder, [1, 2, 3], env=env)
        processes.use(folder, [4, 5, 6], env=env)
        with processes.kept(folder):
            processes.abandon(processes.names(folder)[1])
            processes.use(folder, [7, 8, 9])
            processes.use(folder, [1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12])
