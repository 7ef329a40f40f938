"""The torture itself: a short run finds nothing, and finds each deliberate defect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.torture.replaced import MOMENTS

REPOSITORY = Path(__file__).parent.parent


def torture(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", "--json", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout, done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout)


def test_short_run_breaks_no_promise() -> None:
    code, report = torture(
        *("--storm", "kills", "--kills", "60", "--minutes", "0.5", "--seed", "3"),
    )

    assert report["findings"] == []
    assert code == 0
    assert report["kills"] >= 60
    assert report["storms"]["compared"] > 0
    assert report["storms"]["demanded"] > 0


def test_threads_on_one_prompt_cache_get_what_belongs_to_their_prompts() -> None:
    code, report = torture("--storm", "threads", "--threads-s", "4", "--seed", "3")

    assert report["findings"] == []
    assert code == 0
    # How many depends on the machine; the point is that there were some of each.
    assert report["threads"]["fetches"] > 20
    assert report["threads"]["served"]["a cache"] > 5
    assert report["threads"]["calls"]["model replaced"] > 0
    assert report["threads"]["calls"]["cache refilled by its former owner"] > 0


def test_replaced_model_is_not_answered_for_by_the_cache_of_another() -> None:
    code, report = torture("--storm", "replaced", "--replaced-s", "6", "--seed", "3")

    assert report["findings"] == []
    assert code == 0
    assert report["replaced"]["answers"] > 0
    assert report["replaced"]["reused"]["memory"] > 0
    assert set(MOMENTS) & set(report["replaced"]["replaced"])


def test_machines_that_share_a_remote_break_no_promise_when_they_are_killed() -> None:
    code, report = torture("--storm", "shared", "--shared-s", "3", "--seed", "3")

    assert report["findings"] == []
    assert code == 0
    assert report["shared"]["kills"] > 0
    assert report["shared"]["work"]["brought"] > 0
    assert report["shared"]["found"] > 0


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("checksum", ("wrong bytes were served", ": bytes of Prompt(")),
        ("order", ("its file is missing", "no record names this file", "usage says")),
        pytest.param("budget", ("bytes on disk, the budget is",), marks=pytest.mark.long),
        pytest.param("memory-by-name", ("without a cache",), marks=pytest.mark.long),
        pytest.param("identified-late", ("without a cache",), marks=pytest.mark.long),
        ("two-looks", ("are said to be in it",)),
        ("only-lengths", ("rows of another prompt were handed out",)),
    ],
)
def test_broken_store_is_found_out(name: str, found: tuple[str, ...]) -> None:
    code, report = torture("--break", name, "--minutes", "4")

    assert code == 1
    findings = report["findings"]
    assert any(one in finding for one in found for finding in findings), findings
