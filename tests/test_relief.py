"""A store without a ballast on a full disk: what goes first, and what is said if nothing can."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from persist_cache import fs
from persist_cache.errors import StoreFullError
from persist_cache.index import lock_table
from tests import disks
from tests.cli import forked
from tests.disks import MIB
from tests.fakes import disk_usage, fetched, put
from tests.memory import fast_folder
from tests.test_file_systems import PROMPTS, disk_of, opened, sparse_table
from tests.torture.storm import ChildDied, in_child


@pytest.fixture
def folder() -> Iterator[Path]:
    with fast_folder() as made:
        yield made


@pytest.fixture(params=disks.KINDS)
def disk(request: pytest.FixtureRequest, folder: Path) -> Iterator[Path]:
    """A file system of each kind, of its own."""
    with disk_of(request.param, 32 * MIB, folder) as place:
        yield place


def former_store(disk: Path) -> list[str]:
    """A store as an earlier version left it, on a disk without a free block; its entries' ids."""
    in_child(lambda: sparse_table(disk, "earlier version"))
    (disk / "store" / "ballast").unlink()
    disks.fill(disk)
    return [str(one["id"]) for one in forked(disk / "store", "list", "--json").json]


def sound(disk: Path) -> int:
    """Tokens found of all prompts, once there is room again; the store is sound."""
    disks.unfill(disk)
    with opened(disk) as store:
        assert store.check(read_data=True) == []
        found = [fetched(store, prompt) for prompt in PROMPTS]
    assert set(found) <= {0, len(PROMPTS[0])}
    return sum(found)


@pytest.mark.parametrize(
    ("disk", "how"),
    [
        *((kind, "one") for kind in disks.KINDS),
        *(("btrfs", how) for how in ("by size", "all")),
        *(
            pytest.param(kind, how, marks=pytest.mark.long)
            for kind in disks.KINDS
            for how in ("by size", "all")
            if kind != "btrfs"
        ),
    ],
    indirect=["disk"],
)
def test_full_disk_of_a_store_without_a_ballast_is_relieved_by_eviction(
    disk: Path, how: str
) -> None:
    ids = former_store(disk)
    before = disk_usage(disk / "store")
    words = {"one": ids[0], "by size": f"--to={before - 400_000}", "all": "--all"}

    done = forked(disk / "store", "evict", words[how], "--yes")

    assert done.status == 0, done.err
    listed = forked(disk / "store", "list", "--json").json
    left = in_child(lambda: sound(disk)) // len(PROMPTS[0])
    assert left == len(listed)
    assert {"one": left == len(PROMPTS) - 1, "all": left == 0}.get(how, 0 < left < len(PROMPTS))


def test_damaged_files_go_before_those_of_entries(disk: Path) -> None:
    def damage() -> None:
        with opened(disk) as store:
            put(store, PROMPTS[0])
            for blob in store.root.glob("blobs/??/*"):
                with blob.open("r+b") as file:
                    file.seek(-1, 2)
                    file.write(b"?")
            assert fetched(store, PROMPTS[0]) == 0
            for prompt in PROMPTS[1:]:
                put(store, prompt)

    in_child(damage)
    (disk / "store" / "ballast").unlink()
    disks.fill(disk)
    assert list(disk.glob("store/quarantine/*"))

    def evict() -> list[str]:
        with opened(disk) as store:
            unlinked: list[str] = []
            unlink = fs.unlink

            def watched(path: Path) -> None:
                unlink(path)
                unlinked.append(path.relative_to(store.root).parts[0])

            fs.unlink = watched
            store.evict([entry.id for entry in store.entries()][:10])
            fs.unlink = unlink
            return unlinked

    unlinked = in_child(evict)

    assert unlinked.count("blobs") >= 10
    assert "blobs" not in unlinked[: unlinked.index("quarantine")]
    assert in_child(lambda: sound(disk)) == (len(PROMPTS) - 11) * len(PROMPTS[0])


def test_eviction_that_is_killed_before_its_commit_loses_nothing_else_and_is_mended(
    disk: Path,
) -> None:
    ids = former_store(disk)

    def die() -> None:
        with opened(disk) as store:
            unlink = fs.unlink

            def last(path: Path) -> None:
                unlink(path)
                if "blobs" in path.parts:
                    os.kill(os.getpid(), signal.SIGKILL)

            fs.unlink = last
            store.evict(ids[:3])

    with pytest.raises(ChildDied):
        in_child(die)
    disks.unfill(disk)

    def look() -> tuple[int, set[str]]:
        with opened(disk) as store:
            kinds = {problem.kind for problem in store.check(read_data=True)}
            return sum(fetched(store, prompt) for prompt in PROMPTS), kinds

    found, kinds = in_child(look)

    assert found == (len(PROMPTS) - 1) * len(PROMPTS[0])
    assert kinds == {"missing"}
    assert forked(disk / "store", "check", "--repair").status == 0
    assert in_child(lambda: sound(disk)) == found


def test_room_of_evicted_files_that_is_taken_at_once_is_told(disk: Path) -> None:
    ids = former_store(disk)

    def evict() -> str:
        with opened(disk) as store:
            unlink = fs.unlink

            def and_take(path: Path) -> None:
                unlink(path)
                fs.sync_file_system(disk)
                disks.fill(disk)

            fs.unlink = and_take
            try:
                store.evict(ids[:2])
            except StoreFullError as error:
                return str(error)
            finally:
                fs.unlink = unlink
            return ""

    said = in_child(evict)

    assert "something else took" in said
    assert "check --repair" in said
    assert "Nothing was changed" not in said
    disks.unfill(disk)
    assert forked(disk / "store", "evict", *ids[:2], "--yes").status == 0
    assert in_child(lambda: sound(disk)) == (len(PROMPTS) - 2) * len(PROMPTS[0])


def test_disk_that_has_no_room_for_the_table_of_readers_says_what_helps(disk: Path) -> None:
    in_child(lambda: sparse_table(disk, "nobody"))
    (disk / "store" / "ballast").unlink()
    disks.fill(disk)

    refused = forked(disk / "store", "evict", "--all", "--yes")
    assert refused.status == 1
    assert "free some space" in refused.sentence
    assert "persist-cache evict" not in refused.sentence

    # What is damaged can be told from what is wanted without the index.
    disks.unfill(disk)
    aside = disk / "store" / "quarantine" / f"{'a' * 32}.safetensors"
    aside.write_bytes(b"x" * 200_000)
    aside.chmod(0o600)
    disks.fill(disk)
    done = forked(disk / "store", "evict", "--all", "--yes")

    assert done.status == 0, done.err
    assert not aside.exists()


HOLD = """
import lmdb, sys
env = lmdb.open(sys.argv[1], lib_version=0, max_dbs=16, max_readers=512, map_size=1 << 30)
with env.begin() as txn:
    txn.stat(env.open_db(b"entries", txn=txn, create=False))
print("open", flush=True)
sys.stdin.read()
with env.begin() as txn:
    print(txn.stat(env.open_db(b"entries", txn=txn, create=False))["entries"], flush=True)
"""


@pytest.mark.parametrize("has_ballast", [True, False])
def test_table_of_readers_that_another_process_has_mapped_on_a_full_disk(
    disk: Path, has_ballast: bool
) -> None:
    """It cannot be cut to what there is of it, so what helps is said, and helps."""
    in_child(lambda: sparse_table(disk, "earlier version"))
    root = disk / "store"
    if not has_ballast:
        (root / "ballast").unlink()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "open\n"
            table = (root / lock_table.FILE).stat()
            assert table.st_blocks * 512 < table.st_size, "the rest of it has no room yet"
            disks.fill(disk)

            refused = {word: forked(root, word) for word in ("list", "stats", "check")}
            evicted = forked(root, "evict", "--all", "--yes")
            holder.stdin.close()
            assert holder.stdout.readline() == f"{0 if has_ballast else len(PROMPTS)}\n"
        finally:
            holder.kill()

    for word, done in refused.items():
        assert done.status == 1, (word, done.out, done.err)
        assert ("persist-cache evict" in done.sentence) == has_ballast, done.sentence
        assert ("end the other processes" in done.sentence) != has_ballast
    if has_ballast:
        assert evicted.status == 0, evicted.err
    else:
        assert "end the other processes" in evicted.sentence
        assert forked(root, "list").status == 0, "as it said"
        assert forked(root, "evict", "--all", "--yes").status == 0
    assert forked(root, "list", "--json").json == []
