"""Killed processes leave no semaphore taken, and lose nothing that they had stored."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "kills", [500, pytest.param(1000, marks=pytest.mark.long)], ids=lambda kills: f"{kills}-each"
)
def test_keeper_goes_on_while_writers_and_openers_are_killed(tmp_path: Path, kills: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.darwin.storm", str(tmp_path), str(kills), str(kills)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["kills"] == 2 * kills
