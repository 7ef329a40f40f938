"""Programs that find mlx-lm imported: children of a process that has done that and nothing else.

Importing it takes two seconds of a processor, most of what a server with a tiny model costs, and
the tests start a hundred of them. A child has its own memory, threads, locks and end, as a program
has that was started in the usual way; `persist-cache` itself is started so by `tests.cli.script`.

Also run as `python -m tests.prepared`, which is the process that waits: its standard input brings a
socket for each program, with the program's description.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
IMPORTED = ("persist_cache.server.run", "mlx_lm.server")
AT_THE_START = ("PYTHON", "LD_", "HF_", "TRANSFORMERS_", "MLX_")
"""Variables that are looked at while Python starts, or a package is imported, begin so."""


class Program:
    """A running program, with what tests use of `subprocess.Popen`.

    Attributes:
        pid: Its process id.
        returncode: As `Popen` has it; None while it is not known to have ended.
    """

    def __init__(self, connection: socket.socket) -> None:
        """Wait until it runs; `connection` tells its number, and then how it ended."""
        self._told = connection.makefile("r")
        self._connection = connection
        self.pid = int(self._told.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: It has not ended in time.
        """
        if self.returncode is None:
            if timeout is not None and not _readable(self._connection, timeout):
                raise subprocess.TimeoutExpired(["prepared program"], timeout)
            self.returncode = int(self._told.readline())
            self._told.close()
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """How it ended, or None."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start(
    module: str,
    arguments: Sequence[str],
    log: Path,
    *,
    errors: Path | None = None,
    stdin: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Program | subprocess.Popen[bytes]:
    """Run `python -m module arguments` in this checkout.

    Args:
        module: What is run as `__main__`.
        arguments: Its `sys.argv[1:]`.
        log: Gets all that it prints, at its end.
        errors: Gets what it prints on standard error, if that is to be told apart.
        stdin: What it reads from standard input; nothing without.
        variables: Of its environment, beside those of this process.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(variables or {})}
    files = (stdin or Path(os.devnull), log, errors or log)
    if sys.platform != "linux":  # a Mac's frameworks may not be used behind a fork
        with files[0].open() as given, log.open("ab") as output, files[2].open("ab") as complaints:
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env=env,
                stdin=given,
                stdout=output,
                stderr=complaints,
            )
    early = {name: value for name, value in env.items() if name.startswith(AT_THE_START)}
    ours, theirs = socket.socketpair()
    with theirs:
        waiting = _waiting(tuple(sorted(early.items())))
        socket.send_fds(waiting, [b"one"], [theirs.fileno()])
    job = {
        "module": module,
        "arguments": list(arguments),
        "files": list(map(str, files)),
        "env": env,
    }
    ours.sendall(json.dumps(job).encode() + b"\n")
    return Program(ours)


@functools.cache
def _waiting(early: tuple[tuple[str, str], ...]) -> socket.socket:
    """A process that was started with these variables; it ends when this one does."""
    ours, theirs = socket.socketpair()
    with theirs:
        # It is nobody's to wait for: the end of its standard input ends it.
        subprocess.Popen(
            [sys.executable, "-m", "tests.prepared"],
            cwd=ROOT,
            env={**os.environ, **dict(early)},
            stdin=theirs.fileno(),
        )
    return ours


def _readable(connection: socket.socket, timeout_s: float) -> bool:
    return bool(select.select([connection], [], [], max(0.0, timeout_s))[0])


# ---- the process that waits ----------------------------------------------------------------------


def _next_program() -> dict[str, Any]:
    """Wait for descriptions of programs; returns in a child, with the one it is to be."""
    asked = socket.socket(fileno=os.dup(0))
    while True:
        _, received, _, _ = socket.recv_fds(asked, 16, 1)
        if not received:
            os._exit(0)
        connection = socket.socket(fileno=received[0])
        if os.fork() == 0:
            asked.close()
            return _keep(connection)
        connection.close()


def _keep(connection: socket.socket) -> dict[str, Any]:
    """Fork again, and tell how that child ends; returns in it alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with connection.makefile("r") as described:
        job: dict[str, Any] = json.loads(described.readline())
    child = os.fork()
    if child == 0:
        connection.close()
        return job
    with contextlib.suppress(OSError):
        connection.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(job: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(job["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, place in enumerate(job["files"]):
        source = os.open(place, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(source, target)
        os.close(source)
    sys.argv[1:] = job["arguments"]


def main() -> None:
    for name in IMPORTED:
        __import__(name)
    gc.freeze()
    # Whoever keeps a program is told of its end; nobody waits for the keepers.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = _next_program()
    _become(job)
    runpy.run_module(job["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
