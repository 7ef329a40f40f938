"""Several processes and one remote: publishers at once, and death in the midst of something."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from persist_cache.remote import Why
from tests.fakes import fingerprint, restore
from tests.remotes import LONG, bring, folder_settings, machine, objects

REPOSITORY = Path(__file__).parent.parent

PUBLISHER = """
import json, sys
from pathlib import Path
import msgspec
from persist_cache.remote import RemoteSettings
from persist_cache.store.store import Store
from tests.fakes import FakeSource, fingerprint
from tests.remotes import LONG, opened

folder, number, raw = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
settings = msgspec.json.decode(raw, type=RemoteSettings)
path = folder / f"store{number}"
with Store.open(path, max_bytes=1 << 30, min_free_bytes=0) as store:
    with opened(store, settings) as remote:
        # What each computed differs, as the last bits of different machines do.
        computed = FakeSource([LONG[0] + number, *LONG[1:]], real=True)
        entry = store.put(fingerprint(), LONG, computed).entry
        print("ready", flush=True)
        sys.stdin.readline()
        done = remote.publish(entry)
        print(json.dumps([done.outcome.value, done.requests, done.blobs]))
"""


def publish_at_once(folder: Path, count: int) -> list[tuple[str, int, int]]:
    """Publish one prompt from so many processes at once; what each said."""
    import msgspec

    settings = msgspec.json.encode(folder_settings(folder)).decode()
    command = [sys.executable, "-c", PUBLISHER, str(folder)]
    workers = [
        subprocess.Popen(
            [*command, str(number), settings],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n", worker.communicate()[1][-3000:]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    said = []
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err[-3000:]
        said.append(tuple(json.loads(out)))
    return said


# Marked `long`: twenty processes start.
@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.long)])
def test_processes_that_publish_one_prompt_at_once_make_one_set_of_objects(
    tmp_path: Path, count: int
) -> None:
    said = publish_at_once(tmp_path, count)

    assert Counter(outcome for outcome, _, _ in said)["sent"] == 1
    assert sum(blobs for _, _, blobs in said) == 3
    kinds = Counter(name[4] for name in objects(tmp_path))
    assert kinds == {"a": 6, "b": 3, "c": 1}
    most = max(requests for _, requests, _ in said)
    assert most == 16
    with machine(tmp_path, "reader", folder_settings(tmp_path)) as (store, remote):
        assert bring(remote, LONG).why == Why.BROUGHT
        found = store.fetch(fingerprint(), LONG, restore)
        assert found is not None
        # All of it is of one of them.
        assert [found[0].equals([LONG[0] + one, *LONG[1:]]) for one in range(count)].count(
            True
        ) == 1


# The library's thread wakes the loop and is slow to leave Python then.
READER = """
import asyncio.selector_events as events
import sys, threading, time
import msgspec
from persist_cache.remote import RemoteSettings
from persist_cache.remote.transport import Transport

def wake(loop, wake=events.BaseSelectorEventLoop._write_to_self):
    wake(loop)
    if not isinstance(threading.current_thread(), threading._MainThread):
        for _ in range(100):
            time.sleep(0.002)

settings = msgspec.json.decode(sys.argv[1], type=RemoteSettings)
transport = Transport(settings, lambda *_: None)
events.BaseSelectorEventLoop._write_to_self = wake
transport.call(transport.read("pc1/a/00/" + "0" * 64, 1))
print(transport.close(5.0))
"""


def test_process_that_ends_right_after_a_request_ends_well(tmp_path: Path) -> None:
    """No thread of the library is in Python any more: up to CPython 3.13 that aborts a process."""
    import msgspec

    settings = msgspec.json.encode(folder_settings(tmp_path)).decode()
    done = subprocess.run(
        [sys.executable, "-c", READER, settings],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-3000:]


# Marked `long`: a process dies at each single step.
@pytest.mark.parametrize("kind", ["pull", "publish"])
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.long)])
def test_death_in_the_midst_leaves_nothing_behind(tmp_path: Path, kind: str, every: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.remote_kills", kind, str(tmp_path), str(every)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr[-5000:]
    assert int(done.stdout) > 1
