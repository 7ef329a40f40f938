"""`scripts/_venv`: what it sets up is found wherever the checkout lies."""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMPORTED = """
. scripts/_venv runtime
. scripts/_venv runtime  # again: links are there already
cd /
"$venv_python" -c '
import persist_cache, persist_cache_cli
print(persist_cache.__file__)
print(persist_cache_cli.__file__)'
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose .venv has no .pth file of ours: a hidden one is as good as none."""
    root = tmp_path / "Documents" / "persist cache"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "_venv", root / "scripts")
    shutil.copy(ROOT / "pyproject.toml", root)
    for name in ("persist_cache", "cli/persist_cache_cli"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(root / ".venv", symlinks=True)
    stamp = subprocess.run(
        'echo "$PWD $(cksum <pyproject.toml)"', shell=True, cwd=root, capture_output=True, text=True
    ).stdout
    (root / ".venv" / ".stamp-runtime").write_text(stamp)
    return root


def imported(checkout: Path, system: str) -> subprocess.CompletedProcess[str]:
    """Set up the environment on a system of that name, and import our packages elsewhere."""
    tools = checkout / "tools"
    tools.mkdir()
    (tools / "uname").write_text(f"#!/bin/sh\necho {system}\n")
    (tools / "uname").chmod(0o755)
    return subprocess.run(
        ["bash", "-euc", IMPORTED],
        cwd=checkout,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )


def test_on_a_mac_our_packages_are_found_though_the_pth_file_is_hidden(checkout: Path) -> None:
    done = imported(checkout, "Darwin")

    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert Path(line).resolve().is_relative_to(checkout.resolve())


def test_elsewhere_nothing_is_linked(checkout: Path) -> None:
    """There the .pth file does it, so this checkout, which has none, must fail."""
    done = imported(checkout, "Linux")

    assert "No module named 'persist_cache'" in done.stderr
