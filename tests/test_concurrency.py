"""Two processes, or two threads, at the worst moment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from persist_cache import fs
from persist_cache.store.store import Store
from tests import forge
from tests.fakes import blob_files, fetched, fingerprint, put, restore

REPOSITORY = Path(__file__).parent.parent
PROMPT = list(range(20))


def run(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], text: str = "go on") -> None:
    assert process.stdin is not None
    process.stdin.write(text + "\n")
    process.stdin.flush()


def test_same_prompt_put_by_two_processes_at_once_is_stored_once(tmp_path: Path) -> None:
    """Both have written and published their files before either commits."""
    script = """
import sys
from persist_cache.store.put import Insertion
from persist_cache.store.store import Store
from tests.fakes import put
write = Insertion._write
def wait(self, *arguments):
    done = write(self, *arguments)
    print("written", flush=True)
    sys.stdin.readline()
    return done
Insertion._write = wait
with Store.open(sys.argv[1], min_free_bytes=0, run_tokens=8) as store:
    print(put(store, list(range(20)), complete=False), flush=True)
"""
    both = [run(script, str(tmp_path / "store")) for _ in range(2)]
    assert [told(one) for one in both] == ["written", "written"]
    assert len(blob_files(tmp_path / "store")) == 8

    ids = []
    for one in both:
        tell(one)
        ids.append(told(one))
        assert one.wait(30) == 0

    assert ids[0] == ids[1]
    assert len(blob_files(tmp_path / "store")) == 4, "three runs and a state"
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        assert fetched(store, PROMPT) == 20
        assert store.check(read_data=True) == []
        assert store.stats().counters["puts"] == 1


def test_prefix_evicted_while_its_extension_is_written_is_written_again(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", min_free_bytes=0, run_tokens=8) as store:
        stem = put(store, PROMPT)
        rename = fs.rename
        evicted: list[int] = []

        def evict_first(source: Path, target: Path) -> None:
            rename(source, target)
            if not evicted:
                evicted.append(store.evict([stem]))

        fs.rename = evict_first
        try:
            put(store, [*PROMPT, 99])
        finally:
            fs.rename = rename

        assert evicted
        assert fetched(store, [*PROMPT, 99]) == 21
        assert store.check(read_data=True) == []


def test_what_another_process_evicts_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    """An open file outlives its name: a reader needs no lease."""
    script = """
import sys
from persist_cache.store.store import Store
with Store.open(sys.argv[1], min_free_bytes=0) as store:
    store.evict_to(0)
    print(len(store.entries()), flush=True)
"""
    with Store.open(tmp_path / "store", min_free_bytes=0, run_tokens=8) as store:
        put(store, PROMPT)

        def slowly(runs, checkpoint, num_tokens):  # type: ignore[no-untyped-def]
            evictor = run(script, str(store.root))
            assert told(evictor) == "0"
            assert evictor.wait(30) == 0
            assert blob_files(store.root) == []
            return restore(runs, checkpoint, num_tokens)

        found = store.fetch(fingerprint(), PROMPT, slowly)

        assert found is not None
        assert found[0].equals(PROMPT)
        assert store.fetch(fingerprint(), PROMPT, restore) is None
        assert store.check() == []


def test_writer_killed_in_its_transaction_has_changed_nothing(tmp_path: Path) -> None:
    script = """
import sys
from persist_cache.index.records import SizedRecord
from persist_cache.store.store import Store
from tests import forge
with Store.open(sys.argv[1], min_free_bytes=0) as store:
    def half(txn):
        for number, record in list(txn.entries()):
            txn.delete_entry(number)
        print("inside", flush=True)
        sys.stdin.readline()
    forge.change(store, half)
"""
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        put(store, PROMPT)
        writer = run(script, str(store.root))
        assert told(writer) == "inside"
        assert fetched(store, PROMPT) == 20, "a reader does not wait for a writer"
        blocked = threading.Thread(target=lambda: put(store, [7, 8, 9]))
        blocked.start()
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        blocked.join(30)

        assert not blocked.is_alive()
        assert fetched(store, [7, 8, 9]) == 3
        assert fetched(store, PROMPT) == 20
        assert store.check(read_data=True) == []


def test_slot_of_a_dead_reader_does_not_keep_old_pages(tmp_path: Path) -> None:
    """A slot holds every page since its reader's day: left there, the index grows for ever."""
    script = """
import sys
from persist_cache.store.store import Store
store = Store.open(sys.argv[1], min_free_bytes=0)
with store.read() as txn:
    print(txn.size_of(b"entries"), flush=True)
    sys.stdin.readline()
"""
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        put(store, PROMPT)
        reader = run(script, str(store.root))
        assert told(reader) == "1"
        reader.kill()
        reader.wait()
        size = forge.index(store).file_bytes()

        for n in range(150):
            store.set_label(store.entries()[0].id, f"label {n}")

        assert forge.index(store).file_bytes() <= size + 64 * 1024


@pytest.mark.parametrize("threads", [8])
def test_threads_that_put_and_evict_the_same_prompts_agree(tmp_path: Path, threads: int) -> None:
    with Store.open(tmp_path / "store", min_free_bytes=0, run_tokens=8) as store:
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                for n in range(6):
                    prompt = [*PROMPT[: 4 + (seed + n) % 9], 100 + n % 3]
                    entry = put(store, prompt)
                    fetched(store, prompt)
                    if n % 3 == 2:
                        with contextlib.suppress(KeyError):
                            store.evict([entry])
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

        assert failures == []
        assert store.check(read_data=True) == []
        assert store.stats().usage.pending == 0


@pytest.mark.parametrize("before", ["chmod", "rename"])
def test_folder_that_another_process_finds_empty_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """`gc` removes folders in which nothing is; a put makes its own right before it needs it."""
    original = getattr(os, before)
    removed: list[str] = []

    def beaten(source: Any, *rest: Any) -> None:
        if not isinstance(source, int):  # an open file
            folder = Path(source) if before == "chmod" else Path(rest[0]).parent
            if len(removed) < 5 and folder.parent.name == "blobs":
                folder.rmdir()
                removed.append(folder.name)
        original(source, *rest)

    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        monkeypatch.setattr(os, before, beaten)
        put(store, [1, 2, 3])
        assert len(removed) == 5
        assert fetched(store, [1, 2, 3]) == 3
        assert store.check(read_data=True) == []
