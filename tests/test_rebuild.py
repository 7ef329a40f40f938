"""A new index made from the blobs alone finds what the old one found."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from persist_cache.blobs.header import EntryMark
from persist_cache.blobs.reader import BlobReader
from persist_cache.blobs.rows import whole
from persist_cache.blobs.writer import BlobWriter
from persist_cache.store.store import Store
from tests import forge
from tests.fakes import blob_files, fetched, fingerprint, put

SYSTEM = list(range(1, 20))
PLAIN = [
    SYSTEM,
    [*SYSTEM, 50, 51],
    [*SYSTEM, 50, 51, 60, 61],
    [*SYSTEM, 50, 77],
    [*SYSTEM[:5], 9, 9],
    [-(1 << 59), 3],
]
STATEFUL = [SYSTEM, [*SYSTEM, 50], [*SYSTEM[:7], 8], [5]]


def open_store(root: Path) -> Store:
    return Store.open(root, min_free_bytes=0, run_tokens=8)


def forget_index(root: Path) -> None:
    (root / "data.mdb").unlink()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two models, splits, states; one blob with a dead tail that came back to life."""
    with open_store(tmp_path / "store") as store:
        for prompt in PLAIN:
            put(store, prompt, tier="system" if prompt == SYSTEM else "user")
        for prompt in STATEFUL:
            put(store, prompt, complete=False, model="w1")
        long = put(store, [7, 7, 7, 1, 2, 3])
        put(store, [7, 7, 7], tier="user")
        store.evict([long])
        put(store, [7, 7, 7, 1, 2, 9])
    return tmp_path / "store"


def everything(store: Store) -> list[object]:
    found: list[object] = []
    for model in ("w0", "w1"):
        for prompt in [*PLAIN, *STATEFUL, [7, 7, 7, 1, 2, 9]]:
            for longer in (prompt, [*prompt, 1234], prompt[:-1]):
                match = store.match(fingerprint(weights=model), longer)
                assert fetched(store, longer, model=model) == match.num_tokens
                found.append((model, longer, match.num_tokens, match.common_tokens, match.runs))
    return found


def test_rebuilt_index_gives_the_same_matches_and_bytes(root: Path) -> None:
    with open_store(root) as store:
        before = everything(store)
        entries = {(entry.id, entry.tier, entry.created) for entry in store.entries()}
    forget_index(root)

    with open_store(root) as store:
        assert everything(store) == before
        # An entry that ends within a file comes back with its tier only if it had a file too.
        rebuilt = {(entry.id, entry.tier, entry.created) for entry in store.entries()}
        assert len(entries - rebuilt) == 1
        assert store.check(read_data=True) == []


def test_rebuild_twice_is_rebuild_once(root: Path) -> None:
    with open_store(root) as store:
        before = everything(store)
        for _ in range(2):
            store.rebuild_index()
        assert everything(store) == before
        assert store.check(read_data=True) == []


def test_blob_of_a_dead_writer_does_not_take_the_place_of_one_that_others_hang_on(
    tmp_path: Path,
) -> None:
    """Neither now nor, once its file is swept, at the rebuild after that."""
    shared = list(range(1, 9))
    conversations = ([*shared, 50, 60], [*shared, 70])
    with Store.open(tmp_path / "dead", min_free_bytes=0) as store:
        put(store, [*shared, 50])
    (left,) = blob_files(tmp_path / "dead")
    root = tmp_path / "store"
    with Store.open(root, min_free_bytes=0) as store:
        for prompt in (shared, *conversations):
            put(store, prompt)
    (root / "blobs" / left.parent.name).mkdir(mode=0o700, exist_ok=True)
    shutil.copy2(left, root / "blobs" / left.parent.name)

    for _ in range(2):
        forget_index(root)
        with Store.open(root, min_free_bytes=0) as store:
            store.gc()
            assert [fetched(store, prompt) for prompt in conversations] == [10, 9]
            assert store.check(read_data=True) == []


def test_blob_without_its_parent_is_left_out_and_its_bytes_are_freed(root: Path) -> None:
    with open_store(root) as store:
        first = store.match(fingerprint(weights="w0"), SYSTEM).runs[0].blob
        store.blob_path(first).unlink()
    forget_index(root)

    with open_store(root) as store:
        assert fetched(store, SYSTEM) == 0
        assert fetched(store, [-(1 << 59), 3]) == 2
        store.check(repair=True)
        assert store.check(read_data=True) == []


def test_state_that_is_lost_takes_its_rows_along(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with open_store(root) as store:
        put(store, [1, 2, 3], complete=False)
    for path in blob_files(root):
        if b'"kind":"checkpoint"' in path.read_bytes():
            path.unlink()
    forget_index(root)

    with open_store(root) as store:
        assert store.entries() == []
        assert blob_files(root) == []
        assert store.check() == []


def test_second_state_of_one_position_is_left_out(tmp_path: Path) -> None:
    """A writer that died before its commit leaves a file that says the same as another."""
    root = tmp_path / "store"
    with open_store(root) as store:
        put(store, [1, 2, 3], complete=False)
    twins = [(path, path.read_bytes()) for path in blob_files(root)]
    for path, content in twins:
        name = path.stem[::-1] + ".safetensors"
        (root / "blobs" / name[:2]).mkdir(exist_ok=True)
        (root / "blobs" / name[:2] / name).write_bytes(content)
    forget_index(root)

    with open_store(root) as store:
        assert fetched(store, [1, 2, 3]) == 3
        store.gc()
        assert store.check(read_data=True) == []
        assert len(blob_files(root)) == 2


def test_damaged_header_and_foreign_files_do_not_stop_it(root: Path) -> None:
    bad = blob_files(root)[0]
    bad.write_bytes(b"\xff" * 100)
    (root / "blobs" / "zz").mkdir()
    (root / "blobs" / "zz" / "notes.txt").write_text("mine")
    forget_index(root)

    with open_store(root) as store:
        assert len(store.entries()) > 3
        store.check(repair=True)
        assert store.check(read_data=True) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"tier": "root"},
        {"created": math.nan},
        {"created": 1e300},
        {"created": -1.0},
        {"start": 1 << 40, "end": (1 << 40) + 3},
        {"inner_entries": (EntryMark(2, "root", 1.0),)},
        {"inner_entries": (EntryMark(2, "user", math.inf),)},
        {"inner_entries": (EntryMark(0, "user", 1.0), EntryMark(99, "user", 1.0))},
        {"fingerprint": "no hex"},
        {"parent": "x"},
        {"replaces": ("x",)},
    ],
    ids=str,
)
def test_sealed_nonsense_does_not_stop_it(root: Path, changes: dict[str, Any]) -> None:
    """A seal proves that a header is whole, not that a version we know wrote it."""
    with open_store(root) as store:
        before = everything(store)
        put(store, [41, 42, 43])
        (run,) = store.match(fingerprint(), [41, 42, 43]).runs
        path = store.blob_path(run.blob)
        with BlobReader(path) as reader, BlobWriter(forge.folder(store)) as writer:
            tensors = [whole(reader, tensor) for tensor in reader.header.tensors]
            writer.write(msgspec.structs.replace(reader.header, tensors={}, **changes), tensors)
            writer.publish()
            writer.keep()
        path.unlink()
    forget_index(root)

    with open_store(root) as store:
        assert everything(store) == before
        assert store.gc().freed_bytes >= 0
        assert store.check(read_data=True) == []


def test_progress_is_told(root: Path) -> None:
    seen: list[tuple[int, int]] = []
    with open_store(root) as store:
        store.rebuild_index(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(seen), len(blob_files(root)))
