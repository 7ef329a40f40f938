"""A signal that asks a command to end is never lost, wherever what it raises is swallowed."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from persist_cache.system import endings
from tests.cli import SCRIPT, script
from tests.tiny_models import build_model_dir
from tests.waiting import until

SWALLOWED = """
import os, signal, socketserver, subprocess, sys, weakref

_, when, how, number, *words = sys.argv


class Ends:
    def __del__(self):
        if how == "__del__":
            send()


def send(*_):
    os.kill(os.getpid(), int(number))
    for _ in range(1000):
        pass


def swallow():
    if how == "weak reference":
        thing = type("Thing", (), {})()
        watching = weakref.ref(thing, send)
        del thing
    elif how == "__del__":
        Ends()
    else:
        try:
            send()
        except BaseException:
            if how == "turned into another error":
                raise ImportError("it cannot be imported") from None


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == when:
            sys.meta_path.remove(self)
            swallow()


class Server(socketserver.BaseServer):
    def service_actions(self):
        if when == "serving":
            socketserver.BaseServer.service_actions = lambda self: None
            swallow()


socketserver.BaseServer.service_actions = Server.service_actions
sys.meta_path.insert(0, Finder())
sys.argv[:] = ["persist-cache", *words]
from persist_cache_cli.main import main

main()
"""
OTHERS = (signal.SIGHUP, signal.SIGINT)
SWALLOWERS = [
    *(("caught", ending) for ending in OTHERS),
    *((how, signal.SIGTERM) for how in ("__del__", "weak reference", "caught")),
]
TURNED = [("turned into another error", ending) for ending in (signal.SIGTERM, *OTHERS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("models") / "llama")


def run(
    program: str, folder: Path, *words: object, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


@pytest.mark.parametrize(("how", "ending"), [*SWALLOWERS, *TURNED])
def test_signal_that_is_swallowed_ends_a_command_all_the_same(
    model: Path, tmp_path: Path, how: str, ending: signal.Signals
) -> None:
    words = ("--store", tmp_path / "store", "warm", "--model", model, "--system", "Be kind. " * 40)

    done = run(SWALLOWED, tmp_path, "mlx_lm.utils", how, int(ending), *words)

    assert done.returncode == 128 + ending, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "when"),
    [
        pytest.param(["serve", "--port", "0", "--model"], "mlx_lm.server", marks=pytest.mark.long),
        (["demo", "--model"], "rich.table"),
        pytest.param(["doctor", "--model"], "mlx_lm.models.cache", marks=pytest.mark.long),
        (["check", "--read-data"], "persist_cache_cli.commands.check"),
        (["list", "--json"], "persist_cache_cli.commands.list"),
        (["stats", "--watch", "--json"], "persist_cache_cli.commands.stats"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_signal_that_is_swallowed_ends_every_command(
    model: Path, tmp_path: Path, words: list[str], when: str
) -> None:
    words = [*words, str(model)] if words[-1] == "--model" else words

    done = run(SWALLOWED, tmp_path, when, "caught", int(signal.SIGTERM), *words)

    assert done.returncode == 128 + signal.SIGTERM, (done.stdout, done.stderr)
    assert list(tmp_path.glob("persist-cache-demo-*")) == []


@pytest.mark.parametrize(
    ("how", "ending"),
    [
        ("caught", signal.SIGINT),
        ("weak reference", signal.SIGTERM),
        *(
            pytest.param(how, ending, marks=pytest.mark.long)
            for how, ending in SWALLOWERS
            if (how, ending) not in (("caught", signal.SIGINT), ("weak reference", signal.SIGTERM))
        ),
    ],
)
def test_signal_that_is_swallowed_ends_a_server_in_order(
    model: Path, tmp_path: Path, how: str, ending: signal.Signals
) -> None:
    words = ("serve", "--store", tmp_path / "store", "--model", model, "--port", 0)

    done = run(SWALLOWED, tmp_path, "serving", how, int(ending), *words)

    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "stopping" in done.stderr
    assert "Traceback" not in done.stderr


def test_model_that_cannot_be_loaded_ends_a_server_that_ignores_ctrl_c(tmp_path: Path) -> None:
    """As one does that a script starts in the background."""
    done = script(
        tmp_path / "store",
        *("serve", "--model", tmp_path / "none", "--port", 0),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        timeout=60,
    )

    assert done.status == 1, done.err
    assert str(tmp_path / "none") in done.err.splitlines()[-1]


AT_THE_START = """
import os, signal, subprocess, sys

_, note, *words = sys.argv


class Popen(subprocess.Popen):
    def __init__(self, command, *more, **options):
        super().__init__(command, *more, **options)
        if "persist_cache_cli.demo.worker" in command:
            with open(note, "w") as file:
                file.write(str(self.pid))
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                pass


subprocess.Popen = Popen
sys.argv[:] = ["persist-cache", *words]
from persist_cache_cli.main import main

main()
"""


def is_running(pid: int) -> bool:
    """Whether a process is neither gone nor waits to be buried."""
    done = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


def test_demo_that_is_told_to_end_ends_after_its_worker(model: Path, tmp_path: Path) -> None:
    """In the worst moment: the worker has just been started."""
    note = tmp_path / "pid"

    done = run(AT_THE_START, tmp_path, note, "demo", "--model", model)

    assert not is_running(int(note.read_text()))
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert list(tmp_path.glob("persist-cache-demo-*")) == []


WHILE_IMPORTED = """
import os, runpy, signal, sys

_, module, *words = sys.argv


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)


sys.meta_path.insert(0, Finder())
sys.argv[:] = words
if words[0] == "-m":
    runpy.run_module("persist_cache_cli", run_name="__main__")
else:
    runpy.run_path(words[0], run_name="__main__")
"""


@pytest.mark.parametrize("program", [str(SCRIPT), "-m"])
@pytest.mark.parametrize("module", ["click", "persist_cache", "persist_cache.system.endings"])
def test_ctrl_c_while_the_command_is_imported_ends_it_without_a_word(
    tmp_path: Path, program: str, module: str
) -> None:
    done = run(WHILE_IMPORTED, tmp_path, module, program, "--version")

    assert done.returncode == -signal.SIGINT
    assert (done.stdout, done.stderr) == ("", "")


TWO_AT_ONCE = """
import contextlib, json, os, signal, sys

_, first, second, *words = sys.argv
loads, leave = json.loads, contextlib._GeneratorContextManager.__exit__


def send(number):
    os.kill(os.getpid(), int(number))
    for _ in range(1000):
        pass


def read(text, *more, **options):
    if isinstance(text, str) and '"event"' in text:
        send(first)
    return loads(text, *more, **options)


def leave_later(manager, kind, *more):
    if kind is not None and manager.gen.__name__ == "_worker":
        send(second)
    return leave(manager, kind, *more)


json.loads, contextlib._GeneratorContextManager.__exit__ = read, leave_later
sys.argv[:] = ["persist-cache", *words]
from persist_cache_cli.main import main

main()
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGINT, signal.SIGTERM),
        pytest.param(signal.SIGINT, signal.SIGINT, marks=pytest.mark.long),
    ],
)
def test_two_signals_at_once_end_the_demo_after_its_worker(
    model: Path, tmp_path: Path, first: signal.Signals, second: signal.Signals
) -> None:
    """The second one must not keep it from ending what it started."""
    done = run(TWO_AT_ONCE, tmp_path, int(first), int(second), "demo", "--model", model)

    assert done.returncode == 128 + first, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("persist-cache-demo-*")) == []


CLOSED_TERMINAL = """
import json, os, signal, sys, tempfile

_, *words = sys.argv
loads, cleanup = json.loads, tempfile.TemporaryDirectory.cleanup


def hang_up():
    os.kill(os.getpid(), signal.SIGHUP)
    for _ in range(1000):
        pass


def read(text, *more, **options):
    if isinstance(text, str) and '"event"' in text:
        hang_up()
    return loads(text, *more, **options)


def clean(folder):
    hang_up()
    cleanup(folder)


json.loads, tempfile.TemporaryDirectory.cleanup = read, clean
sys.argv[:] = ["persist-cache", *words]
from persist_cache_cli.main import main

main()
"""


def test_terminal_that_says_twice_that_it_is_closed_leaves_nothing(
    model: Path, tmp_path: Path
) -> None:
    """The shell says so, and the system says so."""
    done = run(CLOSED_TERMINAL, tmp_path, "demo", "--model", model)

    assert done.returncode == 128 + signal.SIGHUP, done.stderr
    assert list(tmp_path.glob("persist-cache-demo-*")) == []


def test_worker_of_the_demo_ends_when_the_demo_is_killed(model: Path, tmp_path: Path) -> None:
    job = '{"model": "none"'  # not even all of it was sent
    worker = subprocess.Popen(
        [sys.executable, "-m", "persist_cache_cli.demo.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, errors = worker.communicate(job, timeout=60)

    assert worker.returncode == 1
    assert "mlx" not in errors

    holder = subprocess.Popen(
        [sys.executable, "-m", "persist_cache_cli", "demo", "--model", str(model)],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children = until(lambda: workers_of(holder.pid), "it did not begin")
    holder.kill()
    holder.wait()

    until(lambda: not any(map(is_running, children)), "it outlived the demo")


def workers_of(demo: int) -> list[int]:
    """Process ids of the workers of a running demo."""
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(demo)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in found.stdout.splitlines() if "demo.worker" in line]
    return [int(line.split()[0]) for line in lines]


@pytest.fixture
def alarms() -> Iterator[Callable[[int], None]]:
    """Waits until so many alarms have come, by which a signal is raised again."""
    ours, systems = os.pipe()
    os.set_blocking(systems, False)
    signal.set_wakeup_fd(systems, warn_on_full_buffer=False)

    def wait(number: int) -> None:
        deadline = time.monotonic() + 30
        while number:
            ready, _, _ = select.select([ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "no alarm came"
            number -= os.read(ours, 1) == bytes([signal.SIGALRM])

    yield wait
    signal.set_wakeup_fd(-1)
    os.close(ours)
    os.close(systems)


def test_signal_is_raised_at_the_end_of_what_is_not_to_be_cut_short(
    alarms: Callable[[int], None],
) -> None:
    done: list[str] = []

    def work() -> None:
        with endings.deferred():
            os.kill(os.getpid(), signal.SIGUSR1)
            with endings.deferred():
                done.append("inner")
            alarms(2)
            done.append("outer")
        done.append("never")

    before = signal.signal(signal.SIGUSR1, lambda *_: endings.insist(KeyboardInterrupt))
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        endings.arrived()
        signal.signal(signal.SIGUSR1, before)

    assert done == ["inner", "outer"]


def test_signal_is_not_raised_again_while_its_first_is_cleaned_up_after(
    alarms: Callable[[int], None],
) -> None:
    done: list[str] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: endings.insist(KeyboardInterrupt))
    try:
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            alarms(1)  # at the latest
        finally:
            try:
                raise ValueError
            except ValueError:
                alarms(2)
                done.append("cleaned up")
    except KeyboardInterrupt:
        endings.arrived()
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0), "it would be raised again"
        done.append("ended")
    finally:
        endings.arrived()
        signal.signal(signal.SIGUSR1, before)

    assert done == ["cleaned up", "ended"]


def test_other_signal_that_comes_at_once_does_not_cut_the_cleaning_short(
    alarms: Callable[[int], None],
) -> None:
    done: list[str] = []

    def other(*_: object) -> None:
        endings.insist(SystemExit, 1)

    before = [
        signal.signal(signal.SIGUSR1, lambda *_: endings.insist(KeyboardInterrupt)),
        signal.signal(signal.SIGUSR2, other),
    ]
    try:
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            alarms(1)
        finally:
            os.kill(os.getpid(), signal.SIGUSR2)
            alarms(1)
            done.append("cleaned up")
    except KeyboardInterrupt:
        done.append("ended")
    finally:
        endings.arrived()
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGUSR2, before[1])

    assert done == ["cleaned up", "ended"]
