"""A user's systemd of our own, where no session has one: beside it nothing is changed.

It runs in a control group below ours, and sees a `/run` of its own that says that systemd is here.
That takes the right to mount, such as root has in many containers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import until

_PROGRAM = Path("/usr/lib/systemd/systemd")
_GROUPS = Path("/sys/fs/cgroup")
_START = f"""
mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system &&
for group in "$@"; do echo $$ > "$group/cgroup.procs" || exit 1; done &&
exec {_PROGRAM} --user --unit=basic.target
"""


@contextlib.contextmanager
def user_systemd(folder: Path) -> Iterator[dict[str, str]]:
    """A manager that has started; skips the test where none can.

    Args:
        folder: For its sockets and settings.

    Yields:
        The variables by which `systemctl --user` finds it.
    """
    if not (_PROGRAM.exists() and shutil.which("systemctl") and shutil.which("unshare")):
        pytest.skip("no systemd is installed")
    runtime = folder / "runtime"
    runtime.mkdir(mode=0o700)
    variables = {
        **os.environ,
        "XDG_RUNTIME_DIR": str(runtime),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "HOME": str(folder),
    }
    variables.pop("DBUS_SESSION_BUS_ADDRESS", None)
    with contextlib.ExitStack() as made:
        groups = [made.enter_context(_group(one)) for one in _own_groups()]
        command = ["unshare", "--mount", "--propagation=private", "sh", "-c", _START, "sh"]
        with (folder / "systemd.log").open("wb") as log:
            manager = subprocess.Popen(
                [*command, *map(str, groups)], env=variables, stdout=log, stderr=log
            )
        try:
            until(lambda: _is_running(variables) or manager.poll() is not None, "it hangs")
            if manager.returncode is not None:
                said = (folder / "systemd.log").read_text().strip().splitlines() or ["no word"]
                pytest.skip(f"systemd cannot manage services of a user here: {said[-1]}")
            yield variables
        finally:
            # SIGRTMIN+24: it stops all services, and ends.
            manager.send_signal(signal.SIGRTMIN + 24)
            try:
                manager.wait(30)
            finally:
                manager.kill()


def _is_running(variables: dict[str, str]) -> bool:
    asked = ["systemctl", "--user", "is-active", "--quiet", "basic.target"]
    return subprocess.run(asked, env=variables, stderr=subprocess.DEVNULL).returncode == 0


def _own_groups() -> list[Path]:
    """Folders of the control groups of this process that systemd uses."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, name, path = line.split(":", 2)
        if name == "name=systemd":
            found.append(_GROUPS / "systemd" / path[1:])
        elif not name:
            unified = _GROUPS / "unified"
            found.append((unified if unified.is_dir() else _GROUPS) / path[1:])
    return [one for one in found if (one / "cgroup.procs").exists()]


@contextlib.contextmanager
def _group(parent: Path) -> Iterator[Path]:
    made = parent / f"persist-cache-test-{os.getpid()}"
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made in {parent} ({error.strerror})")
    try:
        yield made
    finally:
        until(lambda: not any(one.read_text() for one in made.rglob("cgroup.procs")))
        for one in sorted(made.rglob("*"), reverse=True):
            if one.is_dir():
                one.rmdir()
        made.rmdir()
