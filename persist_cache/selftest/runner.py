"""Run checks, each in a process group of its own, and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import persist_cache
from persist_cache.index import semaphores
from persist_cache.selftest.checks import Check, Outcome

PREFIX = "persist-cache-selftest."
DISK = "disk"
"""What a check calls the folder that it has a disk of its own at."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(
    place: Path,
    checks: Sequence[Check],
    *,
    quick: bool = False,
    on_begin: Callable[[Check], None] = lambda check: None,
    on_end: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run `checks` one after the other, in a temporary folder in `place`.

    Args:
        place: A folder on the file system that is to be checked.
        checks: What to run.
        quick: As `Setting.quick`.
        on_begin: Called before each.
        on_end: Called after each.

    Raises:
        OSError: No folder can be made there.
    """
    outcomes = []
    with _scratch(place) as folder:
        for check in checks:
            on_begin(check)
            own = folder / check.name
            own.mkdir(mode=0o700)
            outcome = _run_one(check, own, quick)
            _remove(own)
            on_end(outcome)
            outcomes.append(outcome)
    return outcomes


def environment() -> dict[str, str]:
    """For processes of checks: they find this package where this process found it."""
    ours = str(Path(persist_cache.__file__).parent.parent)
    paths = [ours, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    # Nothing of the user's, and nothing from the network, is to be looked at.
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _run_one(check: Check, folder: Path, quick: bool) -> Outcome:
    started = time.monotonic()
    command = [sys.executable, "-m", "persist_cache.selftest.child", check.name, str(folder)]
    process = subprocess.Popen(
        [*command, *(["--quick"] if quick else [])],
        cwd=folder,
        env=environment(),
        stdin=subprocess.PIPE,  # its end tells the child that we are gone
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = _output(process, check.limit_s)
    except subprocess.TimeoutExpired:
        return Outcome(
            check.name,
            "FAILED",
            f"it did not end within {check.limit_s:.0f} s, so something hangs",
            seconds=time.monotonic() - started,
        )
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    seconds = time.monotonic() - started
    try:
        said = json.loads(out.splitlines()[-1])
        return Outcome(check.name, said["verdict"], said["line"], said["numbers"], seconds)
    except (IndexError, ValueError, KeyError, TypeError):
        return Outcome(check.name, "FAILED", _ending(process.returncode, err), seconds=seconds)


def _output(process: subprocess.Popen[str], limit_s: float) -> tuple[str, str]:
    """What a check prints until it ends; its standard input stays open meanwhile."""
    assert process.stdin is not None
    stdin, process.stdin = process.stdin, None  # else `communicate` would close it
    try:
        return process.communicate(timeout=limit_s)
    finally:
        process.stdin = stdin


def _ending(status: int, err: str) -> str:
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    last = err.strip().splitlines()
    return f"its process ended with status {status}" + (f": {last[-1]}" if last else "")


@contextlib.contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place.resolve()))
    try:
        yield folder
    finally:
        # A second Ctrl-C must not keep the folder.
        before = {one: signal.signal(one, signal.SIG_IGN) for one in _SIGNALS}
        try:
            _remove(folder)
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


def _remove(folder: Path) -> None:
    if sys.platform == "darwin":
        # A check that was killed leaves its disk behind.
        for disk in filter(Path.is_mount, folder.rglob(DISK)):
            subprocess.run(["hdiutil", "detach", "-quiet", "-force", str(disk)], check=False)
    for table in folder.rglob("lock.mdb"):
        semaphores.unlink(table.parent)
    shutil.rmtree(folder, ignore_errors=True)
