"""Real file systems, filled by another program: nobody dies, nothing is lost, room can be made."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from persist_cache import fs
from persist_cache.bundle import export
from persist_cache.doctor import facts
from persist_cache.errors import StoreAccessError, StoreError, StoreFullError
from persist_cache.index import lock_table
from persist_cache.index.ballast import wanted_bytes
from persist_cache.index.environment import Index
from persist_cache.store.store import Store
from tests import disks
from tests.cli import forked, script
from tests.disks import MIB
from tests.fakes import Clock, disk_usage, fetched, put
from tests.memory import fast_folder
from tests.test_server_disk import ask, said, serve
from tests.tiny_models import build_model_dir
from tests.torture.storm import ChildDied, in_child
from tests.waiting import until

BUDGET = 64 * MIB
PROMPTS = [[number, *range(40)] for number in range(100, 130)]


@pytest.fixture
def folder() -> Iterator[Path]:
    with fast_folder() as made:
        yield made


@pytest.fixture(params=disks.KINDS)
def disk(request: pytest.FixtureRequest, folder: Path) -> Iterator[Path]:
    """A file system of each kind, of its own."""
    with disk_of(request.param, 32 * MIB, folder) as place:
        yield place


@contextlib.contextmanager
def disk_of(
    kind: str, nbytes: int, folder: Path, files: int | None = None, make: Sequence[str] = ()
) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(disks.mounted(kind, nbytes, folder, files=files, make=make))
        except disks.NoDisk as error:
            pytest.skip(f"NOT TESTED HERE: {kind} on an image of its own: {error}")
        yield place


def opened(place: Path, max_bytes: int = BUDGET) -> Store:
    return Store.open(place / "store", max_bytes=max_bytes, min_free_bytes=0, run_tokens=8)


def look_up_by_many(store: Store) -> bool:
    """A hundred readers at once, each of which needs a slot of the table of readers."""
    inside = threading.Barrier(100)

    def look() -> None:
        with store.read() as txn:
            txn.counts()
            inside.wait(60)

    threads = [threading.Thread(target=look) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return not inside.broken


# ---- a full disk ---------------------------------------------------------------------------------


def test_look_ups_on_a_full_disk_kill_nobody(disk: Path) -> None:
    def serve() -> tuple[bool, int]:
        with opened(disk) as store:
            for prompt in PROMPTS:
                put(store, prompt)
            disks.fill(disk)
            return look_up_by_many(store), sum(fetched(store, one) for one in PROMPTS)

    def look_again() -> tuple[bool, int]:
        with opened(disk) as store:
            return look_up_by_many(store), sum(fetched(store, one) for one in PROMPTS)

    everything = (True, len(PROMPTS) * len(PROMPTS[0]))
    assert in_child(serve) == everything
    assert in_child(look_again) == everything


def test_old_table_of_readers_is_mended_before_the_disk_fills(disk: Path) -> None:
    """Earlier versions left it sparse, and on btrfs to be copied at each write."""

    def make() -> None:
        with opened(disk) as store:
            put(store, PROMPTS[0])
        table = disk / "store" / lock_table.FILE
        table.unlink()
        with table.open("wb") as file:
            file.truncate(511 * 64 + 192)
        fs.sync_file_system(disk)

    def serve() -> tuple[bool, int]:
        with opened(disk) as store:
            disks.fill(disk)
            return look_up_by_many(store), fetched(store, PROMPTS[0])

    in_child(make)

    assert in_child(serve) == (True, len(PROMPTS[0]))


def test_table_of_readers_is_never_opened_while_it_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing any descriptor of it would drop the locks by which LMDB knows its readers."""
    touched: list[Path] = []
    for name in ("open_shared", "open_read", "create"):
        original = getattr(fs, name)

        def watched(path: Path, original: object = original) -> int:
            touched.append(path)
            return original(path)  # type: ignore[operator,no-any-return]

        monkeypatch.setattr(fs, name, watched)
    with opened(tmp_path) as store:
        touched.clear()
        put(store, PROMPTS[0])
        with pytest.raises(Exception, match="open in this process already"):
            Index(store.root, read_only=False)
        store.check(read_data=True, repair=True)
        store.gc()

        assert touched, "files were opened"
        assert lock_table.FILE not in {path.name for path in touched}


def test_table_of_readers_is_there_in_full(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        status = (store.root / lock_table.FILE).stat()

    assert status.st_blocks * 512 >= status.st_size >= 512 * 64


def test_table_of_readers_made_anew_is_there_in_full(tmp_path: Path) -> None:
    """LMDB lengthens one that is shorter than what it needs, without room for the rest."""
    opened(tmp_path).close()
    (tmp_path / "store" / lock_table.FILE).unlink()

    with opened(tmp_path) as store:
        status = (store.root / lock_table.FILE).stat()

    assert status.st_blocks * 512 >= status.st_size >= 512 * 64


def sparse_table(disk: Path, made_by: str) -> None:
    """Leave the table as an earlier version did (head written, rest sparse), or lose it."""
    with opened(disk) as store:
        for prompt in PROMPTS:
            put(store, prompt)
    table = disk / "store" / lock_table.FILE
    table.unlink()
    if made_by == "earlier version":
        with table.open("wb") as file:
            fs.write_in_place(file.fileno())
            file.write(b"x" * 4096)
            file.truncate(511 * 64 + 192)
    fs.sync_file_system(disk)


@pytest.mark.parametrize("made_by", ["earlier version", "nobody"])
def test_full_disk_with_no_table_of_readers_is_relieved_by_eviction(
    disk: Path, made_by: str
) -> None:
    in_child(lambda: sparse_table(disk, made_by))
    disks.fill(disk)

    for command in (["list"], ["stats"], ["check"]):
        done = forked(disk / "store", *command)
        assert done.status == 0, (command, done.err)
    done = forked(disk / "store", "evict", "--all", "--yes")

    assert done.status == 0, done.err
    assert forked(disk / "store", "list", "--json").json == []


def test_sparse_table_is_read_by_many_on_a_full_disk_without_a_ballast(disk: Path) -> None:
    """What there is of the table has slots for some readers; the others are told so."""
    in_child(lambda: sparse_table(disk, "earlier version"))
    (disk / "store" / "ballast").unlink()
    disks.fill(disk)

    def look() -> tuple[int, int]:
        with Store.open(disk / "store", read_only=True) as store:
            table = (store.root / lock_table.FILE).stat()
            assert table.st_blocks * 512 >= table.st_size
            inside = threading.Barrier(100)
            ended: list[str] = []

            def one() -> None:
                try:
                    with store.read() as txn:
                        txn.counts()
                        inside.wait(5)
                except threading.BrokenBarrierError:
                    ended.append("read")
                except StoreError:
                    inside.abort()
                    ended.append("refused")

            threads = [threading.Thread(target=one) for _ in range(100)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return len(ended), len(store.entries())

    assert in_child(look) == (100, len(PROMPTS))

    def go_on() -> int:
        disks.unfill(disk)
        with opened(disk) as store:
            status = (store.root / lock_table.FILE).stat()
            assert status.st_blocks * 512 >= status.st_size >= 512 * 64
            return fetched(store, PROMPTS[0])

    assert in_child(go_on) == len(PROMPTS[0])


def copied_table(place: Path) -> None:
    """Leave a store whose table was restored by a program that knows nothing of btrfs."""
    with opened(place) as store:
        for prompt in PROMPTS:
            put(store, prompt)
    table = place / "store" / lock_table.FILE
    content = table.read_bytes()
    table.unlink()
    table.write_bytes(content)
    fs.sync_file_system(place)


def test_restored_table_is_refused_to_readers_on_a_full_disk_and_evict_mends_it(
    folder: Path,
) -> None:
    with disk_of("btrfs", 32 * MIB, folder) as place:
        in_child(lambda: copied_table(place))
        disks.fill(place)

        for command in (["list"], ["stats"], ["check"]):
            done = forked(place / "store", *command)
            assert done.status == 1, (command, done.status, done.err)
            assert "persist-cache evict" in done.sentence
        done = forked(place / "store", "evict", "--all", "--yes")

        assert done.status == 0, done.err
        assert forked(place / "store", "list", "--json").json == []


def test_reader_mends_a_restored_table_while_there_is_room(folder: Path) -> None:
    with disk_of("btrfs", 32 * MIB, folder) as place:
        in_child(lambda: copied_table(place))

        def look() -> int:
            with Store.open(place / "store", read_only=True) as store:
                disks.fill(place)
                return len(store.entries())

        assert in_child(look) == len(PROMPTS)
        assert forked(place / "store", "list").status == 0


@pytest.mark.parametrize("how", ["by size", "all", "one"])
def test_full_disk_is_relieved_by_eviction(disk: Path, how: str) -> None:
    def act() -> tuple[int, int, int]:
        with opened(disk) as store:
            ids = [put(store, prompt) for prompt in PROMPTS]
            before = disk_usage(store.root)
            disks.fill(disk)
            if how == "by size":
                store.evict_to(before - 400_000)
            else:
                store.evict(ids if how == "all" else ids[:8])
            left = len(store.entries())
            assert store.check(read_data=True) == []
            usage = store.stats().usage
            assert usage.total == disk_usage(store.root)
            return before - usage.total, left, usage.ballast

    freed, left, ballast = in_child(act)

    assert freed > 200_000 or how == "one"
    assert left == 0 if how == "all" else 0 < left < len(PROMPTS)
    assert ballast in (0, wanted_bytes(BUDGET))

    def go_on() -> tuple[int, int]:
        disks.unfill(disk)
        with opened(disk) as store:
            put(store, PROMPTS[0])
            return fetched(store, PROMPTS[0]), store.stats().usage.ballast

    assert in_child(go_on) == (len(PROMPTS[0]), wanted_bytes(BUDGET))


def test_freed_room_that_another_program_takes_is_told(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act() -> tuple[str, int, list[str]]:
        with opened(disk) as store:
            ids = [put(store, prompt) for prompt in PROMPTS]
            disks.fill(disk)
            unlink = fs.unlink

            def and_take(path: Path) -> None:
                unlink(path)
                fs.sync_file_system(disk)
                disks.fill(disk)

            monkeypatch.setattr(fs, "unlink", and_take)
            sentence = ""
            try:
                store.evict(ids)
            except StoreFullError as error:
                sentence = str(error)
            monkeypatch.undo()
            return sentence, len(store.entries()), [one.message for one in store.check()]

    sentence, left, problems = in_child(act)

    assert "something else took them" in sentence
    assert left == len(PROMPTS)
    assert problems == []


def test_refused_put_on_a_full_disk_leaves_a_store_that_works_on(disk: Path) -> None:
    def act() -> tuple[int, int]:
        with opened(disk) as store:
            put(store, PROMPTS[0])
            disks.fill(disk)
            for prompt in PROMPTS[1:4]:
                with pytest.raises(StoreFullError):
                    put(store, [*prompt, *range(10_000)])
            found = fetched(store, PROMPTS[0])
            disks.unfill(disk)
            put(store, PROMPTS[1])
            assert store.check(read_data=True) == []
            return found, fetched(store, PROMPTS[1])

    assert in_child(act) == (len(PROMPTS[0]), len(PROMPTS[1]))


@pytest.mark.long
def test_server_outlives_a_disk_that_fills_and_eviction_relieves_it(
    disk: Path, tmp_path: Path
) -> None:
    model = build_model_dir(tmp_path / "llama")
    store = disk / "store"
    with serve(model, store, tmp_path, disk_bytes=BUDGET) as running:
        ask(running, "Ada", source="miss")
        ask(running, "Linus", source="miss")
        assert running.request("POST", "/v1/cache/flush").status_code == 200
        disks.fill(disk)
        for who in ("Grace", "Katherine", "Edsger"):
            ask(running, who, source="miss")
        until(lambda: "full" in said(running)["health"])
        with ThreadPoolExecutor(80) as pool:
            answers = list(pool.map(lambda _: said(running)["stats"], range(80)))
        assert all("full" in one for one in answers)

        before = disk_usage(store)
        done = script(store, "evict", "--to", before - 100_000, "--yes")

        assert done.status == 0, done.err
        assert disk_usage(store) <= before - 100_000
        ask(running, "Grace", source="memory")
        disks.unfill(disk)
        until(lambda: set(said(running).values()) == {""})
        assert running.request("POST", "/v1/cache/flush").status_code == 200
        assert running.stop() == 0

    with Store.open(store) as opened_again:
        assert opened_again.check(read_data=True) == []


# ---- the ballast ---------------------------------------------------------------------------------


@pytest.mark.on_disk
def test_ballast_is_allocated_counted_and_as_large_as_the_budget_says(tmp_path: Path) -> None:
    for max_bytes, wanted in ((1 << 30, 4 * MIB), (64 * MIB, MIB), (100_000, 0), (0, 0)):
        with opened(tmp_path, max_bytes) as store:
            usage = store.stats().usage

            assert usage.ballast == wanted
            assert fs.disk_bytes(store.root / "ballast") == wanted
            assert usage.total == disk_usage(store.root)


def test_store_of_an_earlier_version_gains_its_ballast(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        put(store, PROMPTS[0])
        (store.root / "ballast").unlink()

    with opened(tmp_path) as store:
        assert store.stats().usage.ballast == MIB
        assert fetched(store, PROMPTS[0]) == len(PROMPTS[0])


@pytest.mark.parametrize("kind", ["hard link", "symbolic link", "pipe"])
@pytest.mark.parametrize("max_bytes", [BUDGET, 100_000])
def test_ballast_that_is_no_file_of_its_own_is_made_anew_and_the_other_file_kept(
    tmp_path: Path, kind: str, max_bytes: int
) -> None:
    opened(tmp_path).close()
    other = tmp_path / "other"
    content = b"mine" * 600_000
    other.write_bytes(content)
    place = tmp_path / "store" / "ballast"
    place.unlink()
    if kind == "hard link":
        place.hardlink_to(other)
    elif kind == "symbolic link":
        place.symlink_to(other)
    else:
        os.mkfifo(place)

    with opened(tmp_path, max_bytes) as store:
        assert store.stats().usage.ballast == wanted_bytes(max_bytes)

    assert other.read_bytes() == content
    assert other.stat().st_nlink == 1
    assert place.is_file() == (wanted_bytes(max_bytes) > 0)
    assert not place.is_symlink()


def test_ballast_never_exceeds_the_budget_or_the_floor(tmp_path: Path, clock: Clock) -> None:
    with opened(tmp_path, 64 * MIB) as store:
        put(store, PROMPTS[0])
        (store.root / "ballast").unlink()
        used = store.stats().usage.total
    with opened(tmp_path, used + 4096) as store:
        assert store.stats().usage.total <= used + 4096
    free = fs.free_bytes(tmp_path)
    with Store.open(tmp_path / "other", max_bytes=BUDGET, min_free_bytes=free) as other:
        assert other.stats().usage.ballast == 0


def test_eviction_to_less_than_the_ballast_gives_it_up(tmp_path: Path) -> None:
    with opened(tmp_path, 1 << 30) as store:
        for prompt in PROMPTS:
            put(store, prompt)

        left = store.evict_to(1_000_000)

        assert left == store.stats().usage.total == disk_usage(store.root) <= 1_000_000
        assert store.entries(), "what had room stayed"


# ---- files of killed commands --------------------------------------------------------------------


def test_probes_of_a_killed_doctor_are_counted_and_swept(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        put(store, PROMPTS[0])
    left = [store.root / "doctor.0123456789abcdef", store.root / f".weights.json.{'5' * 16}.tmp"]
    for path in left:
        path.write_bytes(b"x" * 100_000)
        os.utime(path, (1e9, 1e9))
    with Store.open(store.root, read_only=True) as reader:
        assert reader.stats().usage.total == disk_usage(store.root)

    with opened(tmp_path) as store:
        assert not any(path.exists() for path in left)
        assert store.stats().usage.total == disk_usage(store.root)


def test_doctor_that_is_killed_leaves_no_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as store:
        root = store.root
    before = disk_usage(root)

    def die(fd: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(fs, "sync", die)
    with pytest.raises(ChildDied):
        in_child(lambda: facts.measure_disk(root))

    assert disk_usage(root) == before


def test_export_that_is_killed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as store:
        put(store, PROMPTS[0])
    place = tmp_path / "bundles"
    place.mkdir()

    def act() -> None:
        with opened(tmp_path) as again:
            ids = [entry.id for entry in again.entries()]
            written = fs.write_all

            def die(fd: int, buffers: list[memoryview]) -> int:
                if len(list(place.iterdir())) or os.fstat(fd).st_size > 2000:
                    os.kill(os.getpid(), signal.SIGKILL)
                return written(fd, buffers)

            monkeypatch.setattr(fs, "write_all", die)
            export(again, ids, place / "entries.pcb")

    with pytest.raises(ChildDied):
        in_child(act)

    if sys.platform == "linux":
        assert list(place.iterdir()) == []
    export_all(tmp_path, place / "entries.pcb")
    assert [path.name for path in place.iterdir()] == ["entries.pcb"]


def test_export_removes_what_killed_ones_left_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as store:
        put(store, PROMPTS[0])
    place = tmp_path / "bundles"
    place.mkdir()
    export_all(tmp_path, place / "whole.pcb")
    content = (place / "whole.pcb").read_bytes()
    dead, living, foreign = (place / f".x.pcb.{one * 16}.part" for one in "012")
    for path, text in ((dead, content[:3000]), (living, content[:3000]), (foreign, b"mine")):
        path.write_bytes(text)
        os.utime(path, (1e9, 1e9))

    with living.open() as held:
        assert fs.try_lock(held.fileno())
        export_all(tmp_path, place / "more.pcb")

    assert {path.name for path in place.iterdir()} == {
        "whole.pcb", "more.pcb", living.name, foreign.name
    }  # fmt: skip

    def no_such_files(folder: Path) -> int:
        raise OSError(errno.EOPNOTSUPP, "as on macOS")

    monkeypatch.setattr(fs, "create_nameless", no_such_files)
    export_all(tmp_path, place / "third.pcb")
    assert (place / "third.pcb").stat().st_size == len(content)
    assert not dead.exists()
    assert not living.exists()


def test_export_into_the_store_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        entry = put(store, PROMPTS[0])

        with pytest.raises(StoreAccessError, match="elsewhere"):
            export(store, [entry], store.root / "blobs" / "entries.pcb")


def export_all(place: Path, file: Path) -> None:
    with opened(place) as store:
        export(store, [entry.id for entry in store.entries()], file)


# ---- the budget ----------------------------------------------------------------------------------


def after_every_step(monkeypatch: pytest.MonkeyPatch, look: Callable[[], None]) -> None:
    """Call `look` whenever the store has written, moved or removed something."""

    def watched(name: str) -> None:
        original = getattr(fs, name)

        def call(*arguments: object) -> object:
            value = original(*arguments)
            look()
            return value

        monkeypatch.setattr(fs, name, call)

    for name in ("write_all", "sync", "rename", "unlink", "bytes_behind", "unlock"):
        watched(name)


@pytest.mark.parametrize(
    ("most_tokens", "run_tokens", "limit", "prompts"),
    [
        (15_000, 2_200, 4_000_000, 30),
        (250_000, 250_000, 48_000_000, 15),
        pytest.param(60_000, 9_000, 24_000_000, 60, marks=pytest.mark.long),
    ],
    ids=["many files", "large files", "more files"],
)
@pytest.mark.parametrize("kind", disks.KINDS)
def test_du_never_exceeds_the_budget_on_any_file_system(
    kind: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    most_tokens: int,
    run_tokens: int,
    limit: int,
    prompts: int,
) -> None:
    """XFS takes more behind a large file that grows, and gives it back when that is closed."""
    dice = random.Random(3)
    worst = 0

    def look() -> None:
        nonlocal worst
        worst = max(worst, disk_usage(root))

    with disk_of(kind, 96 * MIB, folder) as disk:
        root = disk / "store"
        after_every_step(monkeypatch, look)
        with Store.open(root, max_bytes=limit, min_free_bytes=0, run_tokens=run_tokens) as store:
            for number in range(prompts):
                length = dice.randrange(1, most_tokens)
                put(store, [number, *dice.choices(range(50_000), k=length)])
                assert store.stats().usage.total == disk_usage(root)
            assert store.stats().counters["evicted"] > 5
            assert store.check() == []

    assert 0.8 * limit < worst <= limit


def test_index_of_an_earlier_version_gives_back_what_was_taken_ahead_for_it(folder: Path) -> None:
    """It cannot be told any more to grow by exactly what is written."""
    with disk_of("xfs", 96 * MIB, folder) as place:
        opened(place).close()
        data = place / "store" / "data.mdb"
        content = data.read_bytes()
        data.unlink()
        data.write_bytes(content)
        data.chmod(0o600)
        with Store.open(place / "store", max_bytes=1 << 30, min_free_bytes=0) as store:
            for number in range(6):
                put(store, [number, *range(60_000)])
                status = data.stat()
                assert status.st_blocks * 512 < status.st_size + 65_536
            assert status.st_size > 3 * MIB
            assert store.check() == []


@pytest.mark.parametrize(
    ("most_tokens", "run_tokens", "room", "prompts"),
    [
        (300, 64, 4 * MIB, 90),
        (40_000, 9_000, 10 * MIB, 40),
        pytest.param(300, 64, 10 * MIB, 220, marks=pytest.mark.long),
        pytest.param(6_000, 2_000, 10 * MIB, 70, marks=pytest.mark.long),
    ],
    ids=["small", "large", "many small", "middling"],
)
@pytest.mark.parametrize("kind", [*disks.KINDS, "btrfs --mixed"])
def test_free_space_floor_holds_on_any_file_system(
    kind: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    most_tokens: int,
    run_tokens: int,
    room: int,
    prompts: int,
) -> None:
    """A file system also writes records of its own; a mixed btrfs has them among the files."""
    dice = random.Random(1)
    least = 1 << 60

    def look() -> None:
        nonlocal least
        least = min(least, fs.free_bytes(place))

    kind, *make = kind.split()
    with disk_of(kind, 64 * MIB, folder, make=make) as place:
        floor = fs.free_bytes(place) - room
        after_every_step(monkeypatch, look)
        with Store.open(
            place / "store", max_bytes=BUDGET, min_free_bytes=floor, run_tokens=run_tokens
        ) as store:
            for number in range(prompts):
                length = dice.randrange(1, most_tokens)
                put(store, [number, *dice.choices(range(50_000), k=length)])
                if number % 3 == 0:
                    fs.sync_file_system(place)
                    look()
            assert store.stats().counters["evicted"] > 5
            assert store.stats().usage.total > 0.4 * room, "no more went than was needed"

    assert least >= floor


@pytest.mark.parametrize("kind", [*disks.KINDS, "btrfs --mixed"])
def test_free_space_floor_is_kept_by_two_that_write_at_once(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one begins when the first has its room, and has not written anything yet."""
    prompts = [[number, *range(40_000)] for number in range(2)]
    kind, *make = kind.split()
    with disk_of(kind, 64 * MIB, folder, make=make) as disk:
        floor = fs.free_bytes(disk) - 5 * MIB
        store = Store.open(
            disk / "store", max_bytes=BUDGET, min_free_bytes=floor, run_tokens=50_000
        )
        allocate = fs.allocate
        refused: list[str] = []

        def and_another(fd: int, nbytes: int) -> None:
            monkeypatch.setattr(fs, "allocate", allocate)
            try:
                put(store, prompts[1])
            except StoreFullError as error:
                refused.append(str(error))
            allocate(fd, nbytes)

        monkeypatch.setattr(fs, "allocate", and_another)
        with store:
            put(store, prompts[0])
            fs.sync_file_system(disk)
            least = fs.free_bytes(disk)
            assert fetched(store, prompts[0]) == len(prompts[0])

    assert least >= floor
    assert len(refused) == 1


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_running_out_of_files_evicts(kind: str, folder: Path) -> None:
    with disk_of(kind, 32 * MIB, folder, files=160) as place, opened(place) as store:
        for number in range(200):
            put(store, [number, *range(20)])

        assert store.stats().counters["evicted"] > 50
        assert fetched(store, [199, *range(20)]) == 21
        assert store.check() == []


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_running_out_of_files_with_nothing_to_evict_says_so(kind: str, folder: Path) -> None:
    with disk_of(kind, 32 * MIB, folder, files=160) as place, opened(place) as store:
        number = 0

        def go_on() -> None:
            nonlocal number
            while number < 200:
                number += 1
                put(store, [number, *range(20)], pinned=True)

        with pytest.raises(StoreFullError, match="another file"):
            go_on()

        assert store.entries()
        assert store.check() == []
