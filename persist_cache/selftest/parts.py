"""Further processes of a check: other writers, those that are killed, those that restore."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from persist_cache.selftest.checks import Failed
from persist_cache.selftest.runner import environment


def start(part: str, folder: Path, **arguments: Any) -> subprocess.Popen[str]:
    """Start `MODULE:FUNCTION` of this package in a process of its own, in our process group.

    Args:
        part: What to call.
        folder: Its first argument.
        arguments: Its others.
    """
    command = [sys.executable, "-m", "persist_cache.selftest.child", "part", str(folder)]
    return subprocess.Popen(
        [*command, "--part", part, "--with", json.dumps(arguments)],
        cwd=folder,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def ended(process: subprocess.Popen[str], what: str, limit_s: float = 120.0) -> str:
    """Wait for a part; returns what it printed.

    Raises:
        Failed: It failed, or does not end.
    """
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Failed(f"{what} did not end within {limit_s:.0f} s") from None
    if process.returncode:
        last = err.strip().splitlines()
        raise Failed(f"{what} ended with status {process.returncode}: {last[-1] if last else '-'}")
    return out
