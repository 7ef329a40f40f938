"""`selftest` as on a Mac: green, and red where the repair of semaphores is broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from persist_cache.selftest import Outcome, run
from persist_cache.selftest.checks import Check, find

CHECKS = ("sync", "index", "kills", "semaphores", "opens", "growth", "locks", "sigterm")

BROKEN = {
    "nobody gives a semaphore back": (
        "semaphores",
        """
from persist_cache.index import semaphores
semaphores._Semaphore.mend = lambda self, prepare=None: False
""",
    ),
    "a killed writer keeps the semaphore": (
        "semaphores",
        """
from persist_cache.index.semaphores import Semaphores
Semaphores.mend_writer = lambda self: False
""",
    ),
    "the number of the commit is not restored": (
        "semaphores",
        """
from persist_cache.index.semaphores import Semaphores
commits = Semaphores.commits
Semaphores.commits = lambda self: (commits(self)[0] - 1, commits(self)[1])
""",
    ),
    "the volume has no F_FULLFSYNC": (
        "sync",
        "from persist_cache import fs; fs.syncs_fully = lambda fd: False",
    ),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.fixture
def break_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have every Python that is started from now on run some code first."""

    def install(code: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return install


def outcome(name: str, place: Path, limit_s: float) -> Outcome:
    check = find(name)
    (found,) = run(place, [Check(name, check.area, check.function, limit_s)], quick=True)
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_is_green_as_on_a_mac(name: str, place: Path) -> None:
    found = outcome(name, place, 120)

    assert found.verdict == "ok", found


@pytest.mark.parametrize("what", BROKEN)
def test_a_check_goes_red(what: str, place: Path, break_it: Callable[[str], None]) -> None:
    name, code = BROKEN[what]
    break_it(code)

    assert outcome(name, place, 20).verdict == "FAILED"
