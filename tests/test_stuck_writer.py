"""A process that is stopped, or was forked, and holds a lock: waits end, and name it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persist_cache import PromptCache, Store, fs
from persist_cache.errors import StoreBusyError
from persist_cache.index import holders, writer_lock
from tests import forge
from tests.cli import runner
from tests.fakes import Clock, fetched, fingerprint, put
from tests.live_fakes import FakeCodec
from tests.test_cache import insert
from tests.test_server_disk import ask, said, serve
from tests.tiny_models import build_model_dir
from tests.torture.storm import in_child
from tests.waiting import until

_HOLD = """
import fcntl, os, sys
file = open(sys.argv[1], "r+b", buffering=0)
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(path: Path, *, stopped: bool = True) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the lock of a file, and was stopped."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        if stopped:
            holder.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)
        yield holder
    finally:
        holder.kill()
        holder.communicate()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_lock, "PATIENCE_S", 0.3)


def test_options_of_the_process_are_not_told(tmp_path: Path) -> None:
    """`/health` tells it to everybody, and one of them may be a secret."""
    lock, program = tmp_path / "lock", tmp_path / "hold"
    lock.touch()
    program.write_text(_HOLD)
    with subprocess.Popen(
        ["python", "hold", "lock", "--admin-token", "s3cret"],
        executable=sys.executable,
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        found = holders.holders(lock, holder.pid)
        holder.communicate("")

    assert [one.pid for one in found] == [holder.pid]
    assert "s3cret" not in holders.sentence(lock, found, 1)


def test_tidying_up_waits_once(
    store: Store, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    wait = fs.lock

    def counted(fd: int, patience_s: float) -> bool:
        waits.append(patience_s)
        return wait(fd, patience_s)

    monkeypatch.setattr(fs, "lock", counted)
    with held(store.root / "writer.lock"), pytest.raises(StoreBusyError):
        store.gc()

    assert len(waits) == 1


def test_counts_that_wait_to_be_written_are_told(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush has taken them from where they are buffered, and cannot commit them yet."""
    waits = threading.Event()
    wait = fs.lock

    def noted(fd: int, patience_s: float) -> bool:
        waits.set()
        return wait(fd, patience_s)

    store.count("seen", 2)
    with held(store.root / "writer.lock") as holder:
        monkeypatch.setattr(fs, "lock", noted)
        writer = threading.Thread(target=store.flush)
        writer.start()
        assert waits.wait(30)
        store.count("seen")
        meanwhile = store.stats().counters["seen"]
        holder.kill()
    writer.join()

    assert meanwhile == 3
    assert store.stats().counters["seen"] == 3


def test_change_that_waits_in_vain_names_the_process(store: Store, impatient: None) -> None:
    put(store, [1, 2, 3])
    with held(store.root / "writer.lock") as holder:
        with pytest.raises(StoreBusyError) as caught:
            put(store, [4, 5, 6])
        assert fetched(store, [1, 2, 3]) == 3, "looking up waits for nobody"

    said = str(caught.value)
    assert f"process {holder.pid}" in said.casefold()
    if sys.platform == "linux":
        assert f"is stopped and holds {store.root / 'writer.lock'}" in said
        assert f"kill -CONT {holder.pid}" in said
    put(store, [4, 5, 6])
    assert store.check() == []


def test_process_that_works_on_is_told_from_one_that_is_stopped(
    store: Store, impatient: None
) -> None:
    with (
        held(store.root / "writer.lock", stopped=False) as holder,
        pytest.raises(StoreBusyError, match=r"has held .* wait for it, or end it") as caught,
    ):
        put(store, [4, 5, 6])

    assert f"kill {holder.pid}" in str(caught.value)


def test_holder_is_named_where_the_system_lists_no_locks(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, [1, 2, 3])
    path = store.root / "writer.lock"
    assert int.from_bytes(path.read_bytes()[8:16], "little") == os.getpid()
    monkeypatch.setattr(sys, "platform", "elsewhere")
    with held(path) as other:
        assert [one.pid for one in holders.holders(path, other.pid)] == [other.pid]
    assert holders.holders(path, 0) == []


def test_opening_waits_for_no_stopped_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store.open(tmp_path / "store", min_free_bytes=0).close()
    monkeypatch.setattr("persist_cache.store.opening.PATIENCE_S", 0.3)
    with (
        held(tmp_path / "store" / "store.lock") as holder,
        pytest.raises(StoreBusyError, match=str(holder.pid)),
    ):
        Store.open(tmp_path / "store")


@pytest.mark.parametrize("command", ["gc", "evict --all --yes", "check --rebuild-index"])
def test_command_says_what_it_waits_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], impatient: None, command: str
) -> None:
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        put(store, [1, 2, 3])
    run = runner(tmp_path / "store", capfd)
    with held(tmp_path / "store" / "writer.lock") as holder:
        done = run(*command.split())

    assert done.status == 1
    assert str(holder.pid) in done.sentence


@contextlib.contextmanager
def cache_over(store: Store | Path, **options: Any) -> Iterator[PromptCache]:
    with PromptCache(
        store=store, identify=lambda model: fingerprint(), codec=FakeCodec(), **options
    ) as cache:
        yield cache


def test_cache_says_that_it_waits_and_saves_when_it_may(store: Store, impatient: None) -> None:
    with cache_over(store, idle_s=0.1) as cache:
        with held(store.root / "writer.lock") as holder:
            insert(cache, [1, 2, 3], "user")
            until(lambda: str(holder.pid) in cache.disk_off)
            assert cache.stats().disk_error == "StoreBusyError"
        until(lambda: cache.disk_off == "" and cache.stats().saves == 1)

    assert fetched(store, [1, 2, 3]) == 3


def test_waiting_is_told_before_it_ends(store: Store) -> None:
    with held(store.root / "writer.lock") as holder:
        waiting = threading.Thread(target=store.gc)
        waiting.start()
        until(lambda: str(holder.pid) in store.waits_for)
    waiting.join()
    assert store.waits_for == ""


def test_close_and_flush_keep_their_time(tmp_path: Path) -> None:
    """The change under way would wait for ten seconds."""
    with cache_over(tmp_path / "store", idle_s=60) as cache:
        insert(cache, [9, 9], "user")
        assert cache.flush()
        with held(tmp_path / "store" / "writer.lock"):
            for number in range(5):
                insert(cache, [number, 1, 2], "user")
            started = time.monotonic()
            assert not cache.flush(0.3)
            cache.close(0.5)
            took = time.monotonic() - started

    assert took < writer_lock.PATIENCE_S / 2


def test_close_in_a_forked_child_returns(tmp_path: Path) -> None:
    with cache_over(tmp_path / "store", idle_s=60) as cache:
        insert(cache, [1, 2, 3], "user")
        insert(cache, [4, 5, 6], "assistant")

        def close() -> tuple[bool, str]:
            flushed = cache.flush()
            cache.close()
            cache.close()
            return flushed, "returned"

        assert in_child(close) == (False, "returned")
        assert cache.flush()
        assert cache.stats().saves == 2


def test_child_of_a_killed_writer_holds_nothing_up(tmp_path: Path, clock: Clock) -> None:
    """It shares the open file, and so the lock, with the parent that died in its transaction."""
    root = tmp_path / "store"
    Store.open(root, min_free_bytes=0).close()
    reading, writing = os.pipe()

    def die() -> None:
        store = Store.open(root, min_free_bytes=0)

        def fork_and_die(txn: object) -> None:
            child = os.fork()
            if child == 0:
                os.write(writing, str(os.getpid()).encode())
                signal.pause()
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

        forge.change(store, fork_and_die)

    parent = os.fork()
    if parent == 0:
        die()
        os._exit(3)
    os.waitpid(parent, 0)
    orphan = int(os.read(reading, 20))
    try:
        with Store.open(root, min_free_bytes=0) as store:
            put(store, [1, 2, 3])
            assert fetched(store, [1, 2, 3]) == 3
    finally:
        os.kill(orphan, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


# ---- a server ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("models") / "llama")


def test_server_beside_a_stopped_process_says_so_and_ends_in_time(
    model: Path, tmp_path: Path
) -> None:
    grace_s = 4.0
    store = tmp_path / "store"
    with serve(model, store, tmp_path, grace_s=grace_s) as running:
        ask(running, "Ada", source="miss")
        assert running.request("POST", "/v1/cache/flush").status_code == 200
        with held(store / "writer.lock") as holder:
            ask(running, "Grace", source="miss")
            until(lambda: str(holder.pid) in said(running)["health"])
            assert str(holder.pid) in said(running)["stats"]
            ask(running, "Grace", source="memory")
            ask(running, "Ada", source="memory")
            assert running.process is not None
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(grace_s + 8) == 0
            assert str(holder.pid) in running.log.read_text()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_server_saves_what_waits_when_it_is_told_to_end(
    model: Path,
    tmp_path: Path,
    ending: signal.Signals,
) -> None:
    store = tmp_path / "store"
    with serve(model, store, tmp_path) as running:
        ask(running, "Ada", source="miss")
        assert running.process is not None
        running.process.send_signal(ending)
        assert running.process.wait(60) == 0

    with Store.open(store) as opened:
        assert {entry.tier.label for entry in opened.entries()} >= {"system", "assistant"}
        assert opened.check(read_data=True) == []


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGHUP, signal.SIGTERM), (signal.SIGTERM, signal.SIGHUP)]
)
def test_sigterm_after_a_terminal_was_closed_is_the_first_one(
    model: Path, tmp_path: Path, first: signal.Signals, second: signal.Signals
) -> None:
    """As at a logout: both say the same, and what waits is saved."""
    store = tmp_path / "store"
    with serve(model, store, tmp_path) as running:
        assert running.process is not None
        with held(store / "writer.lock", stopped=False):
            ask(running, "Ada", source="miss")
            running.process.send_signal(first)
            until(lambda: "stopping" in running.log.read_text())
            running.process.send_signal(second)
        assert running.process.wait(60) == 0

    with Store.open(store) as opened:
        assert {entry.tier.label for entry in opened.entries()} >= {"system", "assistant"}
