"""Steps of every operation are cut, by death and by a failing, short or slow call.

`scripts/torture` tries every fault at every step of every operation. With all tests (`--all`) each
step gets a death and one fault here, else of long operations only every so many do: many of their
steps are those of others, met at another place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from persist_cache import fs
from persist_cache.errors import StoreError, StoreFullError
from persist_cache.store.store import Store
from tests.examples import examples
from tests.fakes import Clock, blob_files, disk_usage, fetched, put
from tests.memory import fast_folder
from tests.torture import steps
from tests.torture.seam import ERRORS, Seam, at_step

ALONE = "PERSIST_CACHE_TEST_ALONE"
KINDS = (*ERRORS, "short", "slow")
STRIDES = {
    "put": 6,
    "put with a state": 8,
    "put into a full store": 9,
    "evict all": 3,
    "make room": 22,
    "load": 3,
    "gc": 12,
    "compact": 15,
    "merge": 22,
    "load what is damaged": 6,
    "check and repair": 6,
    "rebuild": 12,
    "open without index": 4,
    "import": 25,
    "pull": 19,
    "quarantine": 2,
    "open": 2,
}
"""Operations of some fifteen steps or more, and to which of them something happens.

None is a multiple of the number of `KINDS`, so that every kind has its turn.
"""
EACH_STEP = [
    *((one, STRIDES.get(one, 1)) for one in steps.OPERATIONS),
    *(pytest.param(one, 1, marks=pytest.mark.long) for one in STRIDES),
]


@pytest.fixture
def bed() -> Iterator[steps.Bed]:
    with fast_folder() as folder:
        bed = steps.Bed(folder, random.Random(7))
        yield bed
        bed.close()


def is_alone(request: pytest.FixtureRequest, operation: str) -> bool:
    """Whether this is the process to run a test in; if not, it has been run in another one.

    What reads from a remote has threads that no fork inherits, so nothing may have read from one
    here before a test that forks.
    """
    if operation != "pull" or os.environ.get(ALONE):
        return True
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", request.node.nodeid],
        cwd=request.config.rootpath,
        env=os.environ | {ALONE: "1"},
        capture_output=True,
        text=True,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    return False


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize(("operation", "stride"), EACH_STEP)
def test_any_step_may_fail(
    bed: steps.Bed, operation: str, stride: int, lasting: bool, request: pytest.FixtureRequest
) -> None:
    if not is_alone(request, operation):
        return
    number = 1
    while True:
        kind = KINDS[(number + 3 * lasting) % len(KINDS)]
        seam = steps.fail_at(bed, operation, kind, number, lasting=lasting)
        if len(seam.names) < number:
            break
        number += stride * (4 if lasting else 1)
    assert number > 3, "there were steps to fail at"


@pytest.mark.parametrize(("operation", "stride"), EACH_STEP)
def test_killed_at_every_step_it_recovers(
    bed: steps.Bed, operation: str, stride: int, request: pytest.FixtureRequest
) -> None:
    """vllm-mlx 0.6.0: a crash in mid-save serves 900 tokens as 512."""
    if not is_alone(request, operation):
        return
    died = list(steps.deaths(bed, operation, stride))

    assert len(died) > 3, "there were steps to die at"


@pytest.mark.parametrize("error", ["no space", "I/O error"])
@pytest.mark.parametrize("operation", ["put", "put with a state"])
def test_put_on_a_failing_disk_changes_nothing(bed: steps.Bed, operation: str, error: str) -> None:
    expected = StoreFullError if error == "no space" else StoreError
    prepare, act = steps.OPERATIONS[operation]
    stride = examples(2, 1)  # by default each error takes the steps that the other one leaves
    number = 1 - stride if error == "no space" else 0
    while True:
        number += stride
        bed.make_good()
        prepare(bed)
        store = bed.store
        before, files = {entry.id for entry in store.entries()}, blob_files(bed.root)
        with contextlib.suppress(expected), Seam(at_step(number, error)).installed() as seam:
            act(bed)
        if not seam.injected:
            break
        after = {entry.id for entry in store.entries()}
        where = f"step {number}: {seam.names[-1]}"
        if after == before:
            store.gc()
            assert blob_files(bed.root) == files, where
        assert before <= after, where
        assert store.check(read_data=True) == [], where
        assert store.stats().usage.pending == 0, where
        assert list((bed.root / "tmp").iterdir()) == [], where
        for model, tokens in steps.BASE:
            assert fetched(store, tokens, model=model) == len(tokens), where
    assert number > 10


def test_full_disk_still_lets_entries_be_evicted(bed: steps.Bed) -> None:
    """Tanguille #4636: cleaning up cannot run on a full disk."""
    bed.make_good()
    store = bed.store
    for number in range(1, 40):
        with (
            contextlib.suppress(StoreFullError),
            Seam(at_step(number, "no space")).installed(),
        ):
            put(store, [*steps.SYSTEM[:12], *range(70, 90)])
    assert store.check() == []

    freed = store.evict([entry.id for entry in store.entries()])

    assert freed > 0
    assert store.check() == []


def test_passing_trouble_costs_nothing(store: Store) -> None:
    """Out of descriptors is no damage: neither `check` nor a rebuild gives a sound file up."""
    put(store, list(range(20)))
    files = blob_files(store.root)

    for step in range(1, 6):
        with Seam(at_step(step, "no descriptors")).installed():
            fetched(store, list(range(20)))
    with (
        Seam(at_step(1, "no descriptors")).installed(),
        pytest.raises(StoreError, match="Too many open files"),
    ):
        store.check(read_data=True, repair=True)

    assert blob_files(store.root) == files
    assert fetched(store, list(range(20))) == 20


def test_rebuild_that_runs_out_of_descriptors_starts_over(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", min_free_bytes=0, run_tokens=8) as store:
        put(store, list(range(20)))
    (tmp_path / "store" / "data.mdb").unlink()
    opens = fs.open_read
    left = [2]

    def few(path: Path) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EMFILE, "Too many open files")
        return opens(path)

    fs.open_read = few
    try:
        with pytest.raises(StoreError, match="Too many open files"):
            Store.open(tmp_path / "store", min_free_bytes=0)
    finally:
        fs.open_read = opens

    with Store.open(tmp_path / "store", min_free_bytes=0, run_tokens=8) as store:
        assert fetched(store, list(range(20))) == 20
        assert store.gc().freed_bytes >= 0
        assert fetched(store, list(range(20))) == 20


def test_folder_in_the_place_of_a_blob_goes_when_it_is_empty(store: Store) -> None:
    put(store, [1, 2, 3])
    (path,) = blob_files(store.root)
    path.unlink()
    path.mkdir()

    assert fetched(store, [1, 2, 3]) == 0
    store.evict_to(0)
    store.gc()

    assert store.check() == []
    assert not list(store.root.rglob(path.name))


def test_gc_removes_empty_folders_even_while_others_write(store: Store) -> None:
    put(store, [1, 2, 3])
    (fan,) = {path.parent for path in blob_files(store.root)}
    store.evict_to(0)
    store.gc()
    assert not fan.exists()

    # Between the making of a folder and the rename into it, as the worst moment.
    rename = fs.rename
    emptied: list[Path] = []

    def emptied_before(source: Path, target: Path) -> None:
        if not emptied:
            emptied.append(target.parent)
            target.parent.rmdir()
        rename(source, target)

    fs.rename = emptied_before
    try:
        put(store, [4, 5, 6])
    finally:
        fs.rename = rename
    assert emptied
    assert fetched(store, [4, 5, 6]) == 3


def test_quarantine_can_be_purged(store: Store) -> None:
    """Damaged files hold prompts, too."""
    put(store, [1, 2, 3])
    (path,) = blob_files(store.root)
    path.write_bytes(path.read_bytes()[:-1])
    assert fetched(store, [1, 2, 3]) == 0
    assert len(list((store.root / "quarantine").iterdir())) == 1

    assert store.purge_quarantine() > 0

    assert list((store.root / "quarantine").iterdir()) == []
    assert store.stats().usage.quarantine == 0


def test_size_that_could_not_be_told_is_told_later(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torn file is smaller than its record says, and asking for its size may fail, too."""
    put(store, list(range(2000)))
    path = max(blob_files(store.root), key=lambda file: file.stat().st_size)
    os.truncate(path, 4096)
    asked = fs.disk_bytes

    def disk_bytes(file: Path) -> int:
        if file == path:
            raise OSError(errno.EIO, "made up", str(file))
        return asked(file)

    with monkeypatch.context() as patch:
        patch.setattr(fs, "disk_bytes", disk_bytes)
        assert fetched(store, list(range(2000))) < 2000
    store.close()

    with Store.open(store.root, min_free_bytes=0, run_tokens=8, clock=clock) as again:
        assert again.check(repair=True) is not None
        assert len(list((store.root / "quarantine").iterdir())) == 1
        assert again.stats().usage.total == disk_usage(store.root)


def test_larger_file_in_quarantine_is_counted_as_it_is(store: Store) -> None:
    put(store, [1, 2, 3])
    (path,) = blob_files(store.root)
    with path.open("ab") as file:
        file.write(b"x" * 500_000)

    assert fetched(store, [1, 2, 3]) == 0

    assert store.stats().usage.quarantine >= 500_000


def test_symbolic_link_in_the_place_of_an_orphan_goes_and_its_target_stays(
    store: Store, tmp_path: Path
) -> None:
    target = tmp_path / "mine"
    target.write_text("mine")
    link = store.root / "blobs" / "ab" / ("ab" * 16 + ".safetensors")
    link.parent.mkdir()
    link.symlink_to(target)
    assert [problem.kind for problem in store.check()] == ["orphan"]

    store.gc()

    assert store.check() == []
    assert not link.is_symlink()
    assert target.read_text() == "mine"


@pytest.mark.parametrize("part", ["is_erasing", "set_rules"])
def test_an_open_that_fails_at_its_end_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """On a Mac the first look into the index takes a lock, which a disk may refuse."""

    def failing(*arguments: object, **rules: object) -> bool:
        raise StoreFullError("The disk is full.")

    with monkeypatch.context() as patched:
        patched.setattr(Store, part, property(failing) if part == "is_erasing" else failing)
        with pytest.raises(StoreFullError):
            Store.open(tmp_path / "store", min_free_bytes=0)

    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        assert store.entries() == []
