"""Fixtures of every test: a home for the store, a clock, an open store."""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from persist_cache.store.store import Store
from tests import examples, memory
from tests.fakes import Clock

pytest_plugins = ["tests.real_model"]

# A shell makes what it runs in the background ignore it, and the commands under test inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one


def pytest_configure(config: pytest.Config) -> None:
    memory.use_for_temporary_folders()
    examples.decide(config.option.markexpr)
    # The same examples each time, for a verdict that does not change from one run to the next;
    # without `--hypothesis-profile=ci` others are tried each time. A slow machine is no fault in
    # either.
    untimed: dict[str, Any] = {
        "deadline": None,
        "max_examples": examples.examples(30, 100),
        "suppress_health_check": [hypothesis.HealthCheck.too_slow],
    }
    hypothesis.settings.register_profile("ci", derandomize=True, print_blob=True, **untimed)
    hypothesis.settings.register_profile("untimed", **untimed)
    hypothesis.settings.load_profile("untimed")


def pytest_collection(session: pytest.Session) -> None:
    """Have each of several processes compile other tests first, and find the rest compiled.

    They take a quarter of a minute each for all of them, where nothing is compiled yet.
    """
    folder = Path(__file__).parent
    asked = [Path(session.config.invocation_params.dir, one) for one in session.config.args]
    if "PYTEST_XDIST_WORKER" not in os.environ or asked != [folder]:
        return
    names = sorted(path.stem for path in folder.glob("test_*.py"))
    place = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    first = place * len(names) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    for name in names[first:] + names[:first]:
        # What one of them raises, or skips, is told when it is collected.
        with contextlib.suppress(Exception, pytest.skip.Exception):
            importlib.import_module(f"tests.{name}")


def pytest_collection_finish() -> None:
    # Libraries and six thousand tests: whoever frees objects would look through all of it again.
    gc.freeze()


def pytest_report_header() -> str:
    return f"temporary folders: {tempfile.gettempdir()}"


@pytest.fixture(scope="session")
def _homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Names of folders for one test each; a `mktemp` each would look at all those before it."""
    folder = tmp_path_factory.mktemp("homes")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _home(_homes: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may touch the user's own store."""
    home = next(_homes)
    home.mkdir()
    monkeypatch.setenv("PERSIST_CACHE_HOME", str(home / "store"))
    monkeypatch.setenv("PERSIST_CACHE_CONFIG", "")


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is room; on a disk for a test marked `on_disk`."""
    if request.node.get_closest_marker("on_disk") is None:
        yield tmp_path
        return
    with memory.disk_folder() as folder:
        if folder is None:
            pytest.skip("NOT TESTED HERE: no folder whose files are on a disk")
        yield folder


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    """An empty store with short runs, and time under control."""
    with Store.open(
        tmp_path / "store", max_bytes=1 << 30, min_free_bytes=0, run_tokens=8, clock=clock
    ) as opened:
        yield opened
