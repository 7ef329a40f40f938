"""`docs/macos.md` says what is so."""

from __future__ import annotations

import plistlib
import re
from pathlib import Path

from persist_cache.selftest import CHECKS
from persist_cache.server.launch import DEFAULT_GRACE_S
from persist_cache.server.run import CLOSE_S, LEAST_SAVE_S
from persist_cache_cli.main import cli

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "macos.md").read_text()


def test_launchd_waits_longer_than_a_server_takes_to_end() -> None:
    (text,) = re.findall(r"```xml\n(.*?)```", TEXT, re.DOTALL)

    job = plistlib.loads(text.encode())

    arguments = job["ProgramArguments"]
    grace_s = float(arguments[arguments.index("--grace") + 1])
    assert arguments[1] in cli.commands or arguments[1] == "serve"
    for least in (grace_s, DEFAULT_GRACE_S):
        assert job["ExitTimeOut"] >= least + LEAST_SAVE_S + 2 * CLOSE_S


def test_every_check_is_described() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", TEXT, re.MULTILINE)

    assert rows == [check.name for check in CHECKS]


def test_the_tests_that_are_named_exist() -> None:
    for name in re.findall(r"`(?:tests/)?((?:darwin/)?\w+\.py)`", TEXT):
        assert (ROOT / "tests" / name).exists(), name
