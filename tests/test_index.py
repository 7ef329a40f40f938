"""The LMDB environment: damage, versions, processes, threads, growth."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import lmdb
import pytest

from persist_cache.errors import (
    DamagedIndexError,
    StoreAccessError,
    StoreError,
    StoreFormatError,
    StoreFullError,
    StoreInUseError,
    StoreReadOnlyError,
)
from persist_cache.filenames import SUSPECT_FILE
from persist_cache.index.environment import Index
from persist_cache.index.records import pack_counter
from persist_cache.index.transaction import Writer
from persist_cache.store import opening, sweep
from persist_cache.store.store import Store
from tests import forge
from tests.fakes import blob_files, fetched, files_in, put

REPOSITORY = Path(__file__).parent.parent
PROMPT = list(range(30))


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A store with one entry."""
    with Store.open(tmp_path / "store", min_free_bytes=0, run_tokens=8) as store:
        put(store, PROMPT)
    return tmp_path / "store"


def test_unknown_schema_version_is_refused(closed: Path) -> None:
    with Store.open(closed, min_free_bytes=0) as store:
        forge.change(store, lambda txn: txn.set_meta("schema", pack_counter(99)))

    with pytest.raises(StoreFormatError, match="99"):
        Store.open(closed, min_free_bytes=0)
    with pytest.raises(StoreFormatError, match="99"):
        Store.open(closed, read_only=True)
    assert blob_files(closed), "nothing of it was touched"


def test_schema_version_that_is_no_number_has_the_index_rebuilt(closed: Path) -> None:
    with Store.open(closed, min_free_bytes=0) as store:
        forge.change(store, lambda txn: txn.set_meta("schema", b"\1"))

    with pytest.raises(StoreError, match="schema version"):
        Store.open(closed, read_only=True)
    with Store.open(closed, min_free_bytes=0) as store:
        assert fetched(store, PROMPT) == 30


def test_second_open_in_a_process_is_refused(closed: Path) -> None:
    with Store.open(closed, min_free_bytes=0) as store:
        with pytest.raises(StoreInUseError, match="open in this process already"):
            Store.open(closed, min_free_bytes=0)
        assert fetched(store, PROMPT) == 30


def test_forked_child_is_refused_in_one_sentence(closed: Path) -> None:
    with Store.open(closed, min_free_bytes=0) as store:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            for use in (store.entries, lambda: put(store, [1, 2]), store.close):
                try:
                    use()
                except StoreInUseError as error:
                    os.write(write_end, f"{error}\n".encode())
            os._exit(0)
        os.waitpid(child, 0)
        said = os.read(read_end, 10_000).decode().splitlines()
        assert len(said) == 2
        assert "forked" in said[0]
        put(store, [7, 7])
        assert fetched(store, [7, 7]) == 2


def test_read_only_needs_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreAccessError, match="no store"):
        Store.open(tmp_path / "nothing", read_only=True)
    assert not (tmp_path / "nothing").exists()


def test_read_only_index_refuses_changes(closed: Path) -> None:
    index = Index(closed, read_only=True)
    with pytest.raises(StoreReadOnlyError):
        index.update(lambda txn: txn.add("x", 1))
    index.close()


def test_map_grows_and_the_change_runs_again(tmp_path: Path) -> None:
    index = Index(tmp_path, read_only=False, map_bytes=1 << 18)
    runs = []

    def change(txn: Writer) -> None:
        runs.append(txn)
        for n in range(30):
            txn.put_tokens(n, bytes(100_000))

    index.update(change)

    assert len(runs) > 1
    with index.read() as txn:
        assert txn.size_of(b"tokens") == 30
    index.close()


def test_growth_waits_for_readers_of_other_threads(tmp_path: Path) -> None:
    index = Index(tmp_path, read_only=False, map_bytes=1 << 18)
    inside, go_on = threading.Event(), threading.Event()
    seen = []

    def read() -> None:
        with index.read() as txn:
            inside.set()
            go_on.wait(10)
            seen.append(txn.counter("x"))

    reader = threading.Thread(target=read)
    reader.start()
    inside.wait(10)
    writer = threading.Thread(
        target=lambda: index.update(lambda txn: txn.put_tokens(1, bytes(3_000_000)))
    )
    writer.start()
    writer.join(0.2)
    assert writer.is_alive()
    go_on.set()
    writer.join(10)
    reader.join(10)

    assert not writer.is_alive()
    assert seen == [0]
    index.close()


def test_threads_that_meet_a_grown_map_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Another process made the map larger: every thread of this one notices at once."""
    index = Index(tmp_path, read_only=False, map_bytes=1 << 18)
    grow = (
        "import sys; from pathlib import Path; from persist_cache.index.environment import Index\n"
        "index = Index(Path(sys.argv[1]), read_only=False)\n"
        "index.update(lambda txn: txn.put_tokens(1, bytes(5_000_000)))\n"
    )
    subprocess.run([sys.executable, "-c", grow, str(tmp_path)], cwd=REPOSITORY, check=True)
    start = threading.Barrier(4)
    found = []

    def read() -> None:
        start.wait()
        with index.read() as txn:
            found.append(len(txn.tokens(1, 0, 1 << 30)))

    threads = [threading.Thread(target=read, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert found == [5_000_000] * 4
    index.update(lambda txn: txn.put_tokens(2, bytes(10)))
    index.close()


def test_two_threads_both_told_that_the_map_was_resized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index(tmp_path, read_only=False)
    both = threading.Barrier(2)
    told = threading.local()

    class Environment:
        """Says once to each thread that the map was resized, when both are in."""

        def __getattr__(self, name: str) -> Any:
            return getattr(env, name)

        def begin(self, **options: Any) -> Any:
            if not hasattr(told, "once"):
                told.once = True
                if index.semaphores is None:  # else one comes after the other
                    both.wait(10)
                raise lmdb.MapResizedError("made up")
            return env.begin(**options)

    env = forge.environment(index)
    monkeypatch.setattr(index, "_env", Environment())
    done = []

    def read() -> None:
        with index.read() as txn:
            done.append(txn.counter("schema"))

    threads = [threading.Thread(target=read, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert done == [1, 1]
    monkeypatch.undo()
    index.close()


def test_change_that_raises_changes_nothing(tmp_path: Path) -> None:
    index = Index(tmp_path, read_only=False)

    def change(txn: Writer) -> None:
        txn.add("x", 5)
        raise KeyError("no")

    with pytest.raises(KeyError):
        index.update(change)
    with index.read() as txn:
        assert txn.counter("x") == 0
    index.close()


def test_errors_of_lmdb_and_the_disk_are_translated(tmp_path: Path) -> None:
    index = Index(tmp_path, read_only=False)
    cases: list[tuple[Exception, type[StoreError]]] = [
        (lmdb.DiskError("No space left on device"), StoreFullError),
        (lmdb.Error("mdb_txn_commit: No space left on device"), StoreFullError),
        (lmdb.CorruptedError("bad page"), DamagedIndexError),
        (lmdb.BadTxnError("?"), DamagedIndexError),
        (OSError(28, "No space left on device"), StoreFullError),
        (OSError(5, "Input/output error"), StoreError),
    ]
    for raised, expected in cases:

        def change(txn: Writer, raised: Exception = raised) -> None:
            raise raised

        with pytest.raises(StoreError) as caught:
            index.update(change)
        assert type(caught.value) is expected
    index.close()


@pytest.mark.parametrize("size", [1, 100, 4096, 8192, 12_288, -4096, -1])
def test_truncated_index_is_rebuilt(closed: Path, size: int) -> None:
    data = closed / "data.mdb"
    os.truncate(data, size if size > 0 else data.stat().st_size + size)

    with pytest.raises(DamagedIndexError):
        Index(closed, read_only=True)
    with Store.open(closed, min_free_bytes=0) as store:
        assert fetched(store, PROMPT) == 30
        assert store.check(read_data=True) == []


@pytest.mark.parametrize("content", [b"", b"garbage" * 5000, bytes(50_000)])
def test_garbage_index_is_rebuilt(closed: Path, content: bytes) -> None:
    (closed / "data.mdb").write_bytes(content)

    with Store.open(closed, min_free_bytes=0) as store:
        assert fetched(store, PROMPT) == 30
        assert store.check(read_data=True) == []
    assert not [path for path in files_in(closed) if "damaged" in path.name]


def test_missing_index_is_rebuilt(closed: Path) -> None:
    (closed / "data.mdb").unlink()

    with Store.open(closed, min_free_bytes=0) as store:
        assert fetched(store, PROMPT) == 30


def test_index_whose_rebuild_was_cut_short_is_rebuilt(closed: Path) -> None:
    """An empty index must never make all blobs look like orphans."""
    (closed / "data.mdb").unlink()
    Index(closed, read_only=False).close()

    with Store.open(closed, min_free_bytes=0) as store:
        store.gc()
        assert fetched(store, PROMPT) == 30


def test_damaged_index_that_another_process_uses_is_not_replaced(
    closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persist_cache.store.opening._PATIENCE_S", 0.2)
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from persist_cache.store.store import Store\n"
            "with Store.open(sys.argv[1], min_free_bytes=0):\n"
            "    print('open', flush=True); sys.stdin.readline()\n",
            str(closed),
        ],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    good = (closed / "data.mdb").read_bytes()
    (closed / "data.mdb").rename(closed / "aside")
    (closed / "data.mdb").write_bytes(b"garbage" * 5000)

    with pytest.raises(StoreInUseError, match="another process"):
        Store.open(closed, min_free_bytes=0)
    (closed / "data.mdb").write_bytes(good)
    other.communicate("\n", timeout=20)
    assert other.returncode == 0
    with Store.open(closed, min_free_bytes=0) as store:
        assert fetched(store, PROMPT) == 30


def test_many_processes_open_a_new_store_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from persist_cache.store.store import Store; from tests.fakes import put\n"
        "with Store.open(sys.argv[1], min_free_bytes=0) as s: put(s, [1, 2, int(sys.argv[2])])"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "store"), str(n)],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(4)
    ]
    for worker in workers:
        _, err = worker.communicate(timeout=60)
        assert worker.returncode == 0, err
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        assert len(store.entries()) == 4
        assert store.check(read_data=True) == []


def test_close_waits_for_transactions_of_other_threads(tmp_path: Path) -> None:
    index = Index(tmp_path, read_only=False)
    inside, go_on = threading.Event(), threading.Event()
    seen = []

    def read() -> None:
        with index.read() as txn:
            inside.set()
            go_on.wait(10)
            seen.append(txn.counter("schema"))

    reader = threading.Thread(target=read)
    reader.start()
    inside.wait(10)
    closer = threading.Thread(target=index.close)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()
    go_on.set()
    closer.join(10)
    reader.join(10)

    assert seen == [1]
    with pytest.raises(StoreError, match="closed"), index.read():
        pass


def test_index_that_is_suspect_is_made_anew(closed: Path) -> None:
    """A repair that LMDB itself refuses, its pages being damaged, leaves a mark."""
    opening.distrust(closed)

    with Store.open(closed, min_free_bytes=0) as store:
        assert fetched(store, PROMPT) == 30
    assert not (closed / SUSPECT_FILE).exists()


def test_damage_that_comes_up_while_the_store_is_opened_is_mended(
    closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_sweep = sweep.sweep

    def damaged_once(*arguments: Any) -> None:
        monkeypatch.setattr(sweep, "sweep", real_sweep)
        raise DamagedIndexError("found by LMDB")

    monkeypatch.setattr(sweep, "sweep", damaged_once)

    with Store.open(closed, min_free_bytes=0) as store:
        assert fetched(store, PROMPT) == 30


def test_repair_that_lmdb_refuses_asks_for_a_new_index(
    closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any) -> int:
        raise DamagedIndexError("a page of the wrong type")

    with Store.open(closed, min_free_bytes=0) as store:
        forge.change(store, lambda txn: txn.add("blob_bytes", 1))
        monkeypatch.setattr("persist_cache.store.rebuild.rebuild", refused)
        with pytest.raises(StoreError, match="made anew"):
            store.check(repair=True)
    monkeypatch.undo()

    with Store.open(closed, min_free_bytes=0) as store:
        assert store.check(read_data=True) == []
        assert fetched(store, PROMPT) == 30


def test_a_reader_waits_for_an_index_that_another_process_is_making(tmp_path: Path) -> None:
    """Its file is there, and empty, before LMDB fills it."""
    with Store.open(tmp_path / "made", min_free_bytes=0) as made:
        put(made, [1, 2, 3])
    whole = (tmp_path / "made" / "data.mdb").read_bytes()
    place = tmp_path / "made" / "data.mdb"
    place.write_bytes(b"")
    filling = threading.Timer(0.2, place.write_bytes, [whole])
    filling.start()

    with Store.open(tmp_path / "made", read_only=True) as read:
        assert len(read.entries()) == 1
    filling.join()


def test_an_index_that_stays_empty_cannot_be_read(tmp_path: Path) -> None:
    Store.open(tmp_path / "store", min_free_bytes=0).close()
    (tmp_path / "store" / "data.mdb").write_bytes(b"")

    with pytest.raises(DamagedIndexError, match="is empty"):
        Index(tmp_path / "store", read_only=True)
