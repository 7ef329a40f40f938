"""Clients from npm and PyPI, each in a folder of its own; nothing is installed elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_PATIENCE_S = 900


class NotInstalledError(Exception):
    """A client cannot be had here, with the reason."""


def install(folder: Path, registry: str, packages: Sequence[str]) -> Path:
    """Install packages, unless that was done before.

    Args:
        folder: Of the environment.
        registry: `npm` or `pypi`.
        packages: As the registry's own client takes them.

    Returns:
        The folder with their programs.

    Raises:
        NotInstalledError: They could not be installed.
    """
    stamp, wanted = folder / ".stamp", " ".join(packages)
    programs = folder / ("node_modules/.bin" if registry == "npm" else "bin")
    if stamp.exists() and stamp.read_text() == wanted:
        return programs
    folder.mkdir(parents=True, exist_ok=True)
    if registry == "npm":
        if shutil.which("npm") is None:
            raise NotInstalledError("npm is not installed")
        _run(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *packages])
    else:
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(programs / "python"), "-m", "pip", "install", "--quiet", *packages])
    stamp.write_text(wanted)
    return programs


def _run(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalledError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise NotInstalledError(said[-1] if said else f"{command[0]} failed")
