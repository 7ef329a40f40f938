"""Erasing: nothing of what was evicted is in any byte of a store's folder."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from persist_cache import Store, fs
from persist_cache.errors import StoreFullError
from persist_cache.index.environment import Index
from tests.fakes import fetched, put
from tests.searched import in_folder

_MARK = 0x35C2E7A1D3
SECRET = [(_MARK << 24) + 12345 + n * 7919 % 1_000_003 for n in range(2_500)]
"""Token ids that all have five bytes in common, and with nothing else: each single one is found."""
MARKED = [_MARK.to_bytes(5, "little"), b"secret label"]
SHARED = list(range(1_000, 1_300))


def fill(store: Store) -> tuple[list[str], list[list[int]]]:
    """Prompts to be erased of all lengths, beside prompts that stay; ids of the former."""
    gone, kept = [], []
    for number in range(12):
        kept.append([*SHARED, *range(5_000 + 100 * number, 5_060 + 100 * number)])
        put(store, kept[-1])
    for number, length in enumerate((1, 5, 60, 260, 700, 1_400)):
        tail = SECRET[number * 11 : number * 11 + length]
        gone.append(put(store, [*SHARED, *tail], label="secret label"))
        gone.append(put(store, tail, complete=False))
        # Its rows are in one file with some that stay.
        joint = [*range(9_000 + 400 * number, 9_300 + 400 * number), *SECRET[:length]]
        gone.append(put(store, joint))
        kept.append(joint[:290])
        put(store, kept[-1])
    return gone, kept


def opened(path: Path) -> Store:
    return Store.open(path, min_free_bytes=0)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[list[int]]]:
    """A store with prompts that are to be erased."""
    path = tmp_path_factory.mktemp("erase") / "store"
    with opened(path) as store:
        gone, kept = fill(store)
    return path, gone, kept


def assert_erased(path: Path, kept: Sequence[Sequence[int]]) -> None:
    assert in_folder(path, MARKED) == []
    with opened(path) as store:
        assert store.check(read_data=True) == []
        assert not store.is_erasing
        for tokens in kept:
            assert fetched(store, tokens) == len(tokens)


def test_eviction_alone_leaves_tokens_behind(
    template: tuple[Path, list[str], list[list[int]]], tmp_path: Path
) -> None:
    """Else the tests below would prove nothing."""
    path, gone, _ = template
    shutil.copytree(path, tmp_path / "store")
    with opened(tmp_path / "store") as store:
        store.evict(gone)

    assert "data.mdb" in in_folder(tmp_path / "store", MARKED)
    assert len(in_folder(tmp_path / "store", MARKED)) > 1


def test_nothing_of_what_is_erased_is_in_any_file(
    template: tuple[Path, list[str], list[list[int]]], tmp_path: Path
) -> None:
    path, gone, kept = template
    shutil.copytree(path, tmp_path / "store")

    with opened(tmp_path / "store") as store:
        done = store.erase(gone)

    assert done.is_complete
    assert_erased(tmp_path / "store", kept)


def test_what_was_evicted_before_is_erased_as_well(
    template: tuple[Path, list[str], list[list[int]]], tmp_path: Path
) -> None:
    path, gone, kept = template
    shutil.copytree(path, tmp_path / "store")
    with opened(tmp_path / "store") as store:
        for one in gone:
            store.evict([one])
        put(store, [1, 2, 3])
        assert store.erase().is_complete

    assert_erased(tmp_path / "store", kept)


def test_erasing_often_hardly_makes_the_index_larger(
    template: tuple[Path, list[str], list[list[int]]], tmp_path: Path
) -> None:
    path, gone, _ = template
    shutil.copytree(path, tmp_path / "store")
    sizes = []
    with opened(tmp_path / "store") as store:
        store.erase(gone)
        for _ in range(6):
            store.erase()
            sizes.append((tmp_path / "store" / "data.mdb").stat().st_size)

    assert sizes[-1] - sizes[0] < 5 * 40 * mmap.PAGESIZE


def test_files_of_dead_writers_are_overwritten_as_well(
    tmp_path: Path,
) -> None:
    store = opened(tmp_path / "store")
    put(store, [1, 2, 3])
    folder = tmp_path / "store"
    names = [f"tmp/{'a' * 32}.safetensors", f"blobs/bb/{'b' * 32}.safetensors"]
    names.append(f"quarantine/{'c' * 32}.safetensors")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"secret label")
    held = [os.open(folder / name, os.O_RDONLY) for name in names]
    try:
        store.erase()

        assert not any((folder / name).exists() for name in names)
        assert [os.pread(fd, 100, 0) for fd in held] == [bytes(12)] * 3
    finally:
        for fd in held:
            os.close(fd)
        store.close()


def test_another_process_that_wrote_it_writes_nothing_of_it_again(tmp_path: Path) -> None:
    """LMDB keeps pages that it wrote in memory, and writes parts of them again."""
    path = tmp_path / "store"
    to_child, from_parent = os.pipe()
    to_parent, from_child = os.pipe()
    if (pid := os.fork()) == 0:
        status = 1
        try:
            with opened(path) as store:
                fill(store)
                os.write(from_child, b".")
                os.read(to_child, 1)
                for number in range(40):
                    put(store, [number, *range(20_000, 20_003)])
                status = 0
        finally:
            os._exit(status)
    os.read(to_parent, 1)
    try:
        with opened(path) as store:
            gone = [one.id for one in store.entries()]
            assert store.erase(gone).is_complete
        found = in_folder(path, MARKED)
    finally:
        os.write(from_parent, b".")
        status = os.waitpid(pid, 0)[1]

    assert status == 0
    assert found == in_folder(path, MARKED) == []


class Killer:
    """Ends the process at one of the steps that change something on the disk."""

    def __init__(self, at: int) -> None:
        self.left = at

    def before(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                os._exit(9)
            return step(*args, **options)

        return stepping


def killed_at(path: Path, gone: Sequence[str], at: int) -> bool:
    """Erase in a process that dies before its step of that number; whether it came so far."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            with opened(path) as store:
                killer = Killer(at)
                for name in ("unlink", "rename", "overwrite", "sync", "write_all"):
                    setattr(fs, name, killer.before(getattr(fs, name)))
                Index.update = killer.before(Index.update)  # type: ignore[method-assign]
                store.erase(gone)
                status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9)
    return status == 9


def steps() -> Iterator[int]:
    yield from range(0, 40, 8)
    yield from range(40, 10_000, 61)


def test_killed_at_any_step_the_store_opens_and_the_next_run_ends_it(
    template: tuple[Path, list[str], list[list[int]]], tmp_path: Path
) -> None:
    path, gone, kept = template
    for at in steps():
        copy = tmp_path / str(at)
        shutil.copytree(path, copy)
        if not killed_at(copy, gone, at):
            break
        with opened(copy) as store:
            assert store.check() == []
            assert store.erase(gone).is_complete
        assert_erased(copy, kept)
        shutil.rmtree(copy)
    assert at > 40


def test_what_cannot_be_erased_is_told(
    template: tuple[Path, list[str], list[list[int]]], tmp_path: Path
) -> None:
    path, gone, kept = template
    shutil.copytree(path, tmp_path / "store")
    with (
        Store.open(tmp_path / "store", max_bytes=1, min_free_bytes=0) as store,
        pytest.raises(StoreFullError, match="Not everything was erased"),
    ):
        store.erase(gone[2::3])

    with Store.open(tmp_path / "store", max_bytes=1 << 30, min_free_bytes=0) as store:
        assert store.is_erasing
        assert store.erase(gone).is_complete
    assert_erased(tmp_path / "store", kept)
