"""Processes on one store: at work at once, stopped in the midst of something, or killed in it.

Death at every single step is the business of `test_faults`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from persist_cache.store.store import Store
from tests.fakes import fetched, files_in, put

REPOSITORY = Path(__file__).parent.parent


HAMMER = """
import mmap, random, sys, time
from persist_cache.errors import StoreFullError
from persist_cache.store.store import Store
from tests.fakes import FakeSource, eager_gc, fetched, fingerprint, put

eager = eager_gc()
eager.__enter__()
folder, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
dice = random.Random(seed)
prompts = [[1, 2, 3, *range(10, 10 + n), 7 * k] for n in range(0, 12, 3) for k in range(3)]
prompts += [[4, *range(20, 20 + n)] for n in range(6)]
room = 2_000_000 + 200 * (mmap.PAGESIZE - 4096)  # the index grows by pages
begun = time.monotonic()
puts = hits = 0
counters = {}

def is_enough():
    happened = puts > 20 and hits > 20 and counters.get("compacted") and counters.get("merged")
    return time.monotonic() - begun > (seconds if happened else 50)

while not is_enough():
    with Store.open(folder, max_bytes=room, min_free_bytes=0, run_tokens=8) as store:
        for _ in range(25):
            prompt = dice.choice(prompts)
            complete = dice.random() < 0.7
            model = "w0" if complete else "w1"
            what = dice.random()
            if what < 0.45:
                put(store, prompt, complete=complete, model=model)
                puts += 1
            elif what < 0.85:
                hits += fetched(store, prompt, model=model) > 0
            elif what < 0.95:
                entries = store.entries()
                for entry in dice.sample(entries, min(2, len(entries))):
                    try:
                        store.evict([entry.id])
                    except KeyError:
                        pass  # the other process was first
            else:
                store.gc()
        assert store.stats().counters.get("quarantined", 0) == 0
        counters = store.stats().counters
print(puts, hits, counters.get("compacted", 0), counters.get("merged", 0))
"""


@pytest.mark.on_disk
def test_two_processes_share_a_store(tmp_path: Path) -> None:
    """SGLang #31926, mlx-vlm, vllm-mlx: two processes spoil one folder."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", HAMMER, str(tmp_path / "store"), str(seed), "2"],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    for worker in workers:
        out, err = worker.communicate(timeout=60)
        assert worker.returncode == 0, err[-3000:]
        puts, hits, compacted, merged = map(int, out.split())
        assert puts > 20
        assert hits > 20
        assert compacted > 0
        assert merged > 0

    with Store.open(tmp_path / "store", min_free_bytes=0, run_tokens=8) as store:
        assert store.check(read_data=True) == []
        assert store.stats().usage.pending == 0
        ids = [entry.id for entry in store.entries()]
        assert len(ids) == len(set(ids)) > 0
        store.evict(ids)
        assert files_in(store.root / "blobs") == []


def test_sweep_leaves_files_of_a_living_writer_alone(tmp_path: Path) -> None:
    """SGLang #31926: cleaning up at start deletes what a living process is writing."""
    slow = """
import sys, time
from persist_cache import fs
from persist_cache.index.environment import Index
from persist_cache.store.store import Store
from tests.fakes import put

rename = fs.rename
def wait(source, target):
    if sys.argv[2] == "after":
        rename(source, target)
    print("here", flush=True)
    sys.stdin.readline()
    if sys.argv[2] == "before":
        rename(source, target)
fs.rename = wait
with Store.open(sys.argv[1], min_free_bytes=0) as store:
    put(store, [1, 2, 3])
"""
    for when in ("before", "after"):
        folder = tmp_path / when
        writer = subprocess.Popen(
            [sys.executable, "-c", slow, str(folder), when],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "here\n"

        with Store.open(folder, min_free_bytes=0) as store:
            store.gc()
            assert store.check() == []
            writer.communicate("go on\n", timeout=30)

            assert writer.returncode == 0
            assert fetched(store, [1, 2, 3]) == 3
            assert store.check(read_data=True) == []


def test_killed_writer_blocks_nobody(tmp_path: Path) -> None:
    stuck = """
import signal, sys
from persist_cache.store.store import Store
from tests import forge
with Store.open(sys.argv[1], min_free_bytes=0) as store:
    def forever(txn):
        print("inside", flush=True)
        signal.pause()
    forge.change(store, forever)
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", stuck, str(tmp_path / "store")],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "inside\n"
    writer.kill()
    writer.wait()

    started = time.monotonic()
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        put(store, [1, 2, 3])
        assert fetched(store, [1, 2, 3]) == 3
    assert time.monotonic() - started < 30
