"""The torture itself: a short run finds nothing, and finds each deliberate defect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent


def torture(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "torture", "--json", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout, done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout)


def test_short_run_breaks_no_promise() -> None:
    code, report = torture("--kills", "60", "--storms-only", "--minutes", "0.5", "--seed", "3")

    assert report["findings"] == []
    assert code == 0
    assert report["kills"] >= 60
    assert report["storms"]["compared"] > 0
    assert report["storms"]["demanded"] > 0


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("checksum", ("wrong bytes were served",)),
        ("order", ("its file is missing", "no record names this file", "usage says")),
        ("budget", ("bytes on disk, the budget is",)),
    ],
)
def test_broken_store_is_found_out(name: str, found: tuple[str, ...]) -> None:
    code, report = torture("--break", name, "--minutes", "2")

    assert code == 1
    findings = report["findings"]
    assert any(one in finding for one in found for finding in findings), findings
