"""How commands and servers end: with a sentence, in time, and without anything left behind."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from persist_cache import Store
from tests.cli import SCRIPT, prepared_script, script
from tests.fakes import put
from tests.tiny_models import build_model_dir
from tests.waiting import until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("models") / "llama")


def test_busy_port_is_one_sentence_and_status_1(model: Path, tmp_path: Path) -> None:
    """Told before anything is begun: threads of MLX that are cut short abort the process."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = prepared_script(tmp_path / "store", "serve", "--model", model, "--port", port)

    assert done.status == 1, done.err
    assert [line for line in done.err.splitlines() if line.startswith("Error: ")] == [
        f"Error: Cannot listen on 127.0.0.1:{port} (Address already in use); choose another --port."
    ]
    assert "terminate called" not in done.err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("port", ["80921", "65536", "99999999999"])
@pytest.mark.parametrize("form", ["--port {}", "--port={}"])
def test_port_that_there_is_not_is_refused(tmp_path: Path, port: str, form: str) -> None:
    done = prepared_script(tmp_path / "store", "serve", *form.format(port).split())

    assert done.status == 2
    assert "from 0 to 65535" in done.sentence
    assert not (tmp_path / "store").exists()


def test_host_that_there_is_not_is_refused(model: Path, tmp_path: Path) -> None:
    words = ("--model", model, "--host", "no such host", "--port", 0)
    done = prepared_script(tmp_path / "store", "serve", *words)

    assert done.status == 1, done.err
    assert "choose another --host" in done.err


def test_host_of_another_machine_is_refused(model: Path, tmp_path: Path) -> None:
    words = ("--model", model, "--host", "192.0.2.1", "--port", 0)
    done = prepared_script(tmp_path / "store", "serve", *words)

    assert done.status == 1, done.err
    assert "choose another --host" in done.err


@pytest.mark.parametrize("name", ["PERSIST_CACHE_API_KEY", "PERSIST_CACHE_ADMIN_TOKEN"])
def test_secret_of_the_environment_that_is_empty_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Such as of a file that was not there: a server without any would be open to all."""
    monkeypatch.setenv(name, "")

    done = prepared_script(tmp_path / "store", "serve", "--model", str(tmp_path / "none"))

    assert done.status in (1, 2)
    assert f"{name} is empty" in done.err


@pytest.mark.parametrize("place", ["file/store", "x" * 300, "/proc/no/store"])
def test_server_refuses_a_path_that_can_be_no_store(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "file").chmod(0o644)

    done = prepared_script(tmp_path / place, "serve", "--port", "0")

    assert done.status == 1
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644, "a file of others"
    assert "There is no store" not in done.err
    assert "Error: " in done.err


@pytest.mark.parametrize(
    "ending", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.long)]
)
def test_demo_that_is_told_to_end_leaves_no_store(
    model: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    running = subprocess.Popen(
        [str(SCRIPT), "demo", "--model", str(model)],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    until(
        lambda: (
            list(tmp_path.glob("persist-cache-demo-*/store/data.mdb")) or running.poll() is not None
        )
    )
    assert running.poll() is None, running.communicate()

    running.send_signal(ending)

    _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + ending
    assert b"Traceback" not in errors
    assert list(tmp_path.glob("persist-cache-demo-*")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED HERE: no limit of address space")
def test_little_address_space_is_enough_or_told(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with Store.open(root, min_free_bytes=0) as store:
        put(store, [1, 2, 3])

    def limited(nbytes: int) -> object:
        return lambda: resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))

    for gib in (4, 1):
        done = script(root, "list", preexec_fn=limited(gib << 30))
        assert (done.status, done.err) == (0, "")
        assert script(root, "gc", preexec_fn=limited(gib << 30)).status == 0
    # Whatever was preloaded for speed takes room, and has words of its own.
    little = script(root, "list", preexec_fn=limited(100 << 20), env={"LD_PRELOAD": ""})
    assert little.status == 0 or "ulimit -v" in little.err or "MemoryError" in little.err


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED HERE: no limit of address space")
def test_index_that_cannot_grow_refuses_and_works_on(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from persist_cache.errors import StoreFullError
from persist_cache.index.environment import Index
index = Index(Path(sys.argv[1]), read_only=False, map_bytes=2 << 20)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 20), used + (3 << 20)))
refused = ""
for number in range(400):
    try:
        index.update(lambda txn: txn.set_meta(f"n{number}", b"x" * 20_000))
    except StoreFullError as error:
        refused = str(error)
        break
assert "ulimit -v" in refused, refused
with index.read() as txn:
    assert txn.meta("n0") == b"x" * 20_000
index.update(lambda txn: txn.set_meta("n0", b"y"))
index.close()
"""
    (tmp_path / "store").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert done.returncode == 0, done.stderr


SIGNAL_WHILE_A_CHILD_IS_LOOKED_AT = """
import os, signal, subprocess, sys
from persist_cache.system import endings

class Ended(BaseException):
    pass

class Interrupted:
    def __init__(self, lock):
        self.lock, self.release = lock, lock.release
    def acquire(self, blocking):
        taken = self.lock.acquire(blocking)
        os.kill(os.getpid(), signal.SIGTERM)
        return taken

signal.signal(signal.SIGTERM, lambda *_: endings.insist(Ended))
child = subprocess.Popen([sys.executable, "-c", ""])
lock = child._waitpid_lock
child._waitpid_lock = Interrupted(lock)
try:
    endings.has_ended(child)
except Ended:
    endings.arrived()
print(lock.locked())
"""


def test_a_signal_while_a_child_is_looked_at_leaves_it_to_be_waited_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNAL_WHILE_A_CHILD_IS_LOOKED_AT], capture_output=True, text=True
    )

    assert (done.stdout, done.stderr) == ("False\n", "")
