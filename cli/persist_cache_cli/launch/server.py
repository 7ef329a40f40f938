"""The server for a client: one that runs on the store, or one that is started for it.

A server that was started for a client ends when no client needs it any more: each holds a lock on a
file in a temporary folder, where the server's log is as well. The last one removes the folder.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from persist_cache import fs
from persist_cache.fingerprint.model_files import folder_of
from persist_cache.server.discovery import Serving, running_servers
from persist_cache.server.guard import MODELS_PATH, PAGE_PATH
from persist_cache.server.lengths import context_tokens
from persist_cache.server.names import public_name
from persist_cache.server.needed import hold
from persist_cache.system import endings
from persist_cache_cli.launch.clients import KEY_VARIABLE, Served

DEFAULT_PORT = 8080
_HOST = "127.0.0.1"
_PATIENCE_S = 10.0
_ENDING_S = 60.0
"""What a server may take to end: its grace, and what it has to save."""
_FOUND_S = 2.0
"""What a server that listens may take to say so in its store's folder."""
_PAUSE_S = 0.05
_TOLD = re.compile(rf"^Page: (http://\S+?){PAGE_PATH}(?:[#\s]|$)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which server is asked for.

    Attributes:
        root: The store's folder.
        model: That it is to serve; None for any.
        port: That it is to listen on; None for any.
        api_key: What it may ask for.
    """

    root: Path
    model: str | None = None
    port: int | None = None
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class Connection:
    """A server that may be used.

    Attributes:
        served: What clients have to know of it.
        needing: Descriptor that keeps it from ending; None for one that stays by itself.
        folder: Of its log and its lock, if it was started for a client.
    """

    served: Served
    needing: int | None = None
    folder: Path | None = None


def running(wanted: Wanted) -> Connection | None:
    """A server that runs already; None if there is none.

    Raises:
        click.ClickException: It does not answer, or asks for another key.
    """
    give_up = time.monotonic() + _ENDING_S
    while True:
        is_ending = False
        for one in running_servers(wanted.root):
            if not _fits(one, wanted):
                continue
            folder = needing = None
            if one.while_locked:
                folder, needing = Path(one.while_locked).parent, hold(Path(one.while_locked))
                if needing is None:
                    is_ending = True
                    continue
            return Connection(_served(one, wanted), needing, folder)
        if not is_ending or time.monotonic() > give_up:
            return None
        time.sleep(_PAUSE_S)


def _fits(one: Serving, wanted: Wanted) -> bool:
    if wanted.port is not None and urlsplit(one.url).port != wanted.port:
        return False
    if wanted.model is None or one.model is None:
        return wanted.model != one.model
    return one.model == public_name(wanted.model) or _is_same_folder(one.model, wanted.model)


def _is_same_folder(one: str, other: str) -> bool:
    folders = folder_of(one), folder_of(str(Path(other).expanduser()))
    with contextlib.suppress(OSError):
        return None not in folders and os.path.samefile(*filter(None, folders))
    return False


def _served(one: Serving, wanted: Wanted) -> Served:
    url = one.url.removesuffix(PAGE_PATH)
    model = one.model or public_name(wanted.model or "")
    return Served(url, model, _context(url, model, wanted.api_key), wanted.api_key)


def not_running(wanted: Wanted) -> Served:
    """What clients would have to know of the server that `started` starts."""
    assert wanted.model is not None
    url = f"http://{_HOST}:{wanted.port or DEFAULT_PORT}"
    model = public_name(wanted.model)
    return Served(url, model, _configured_context(model), wanted.api_key)


# ---- starting one --------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(wanted: Wanted, tell: Callable[[str], object]) -> Iterator[Connection]:
    """A server that another launch started meanwhile, or one that is started now.

    Launches take turns until the server of one can be found by the next: two of them would load a
    model twice, or want the same port.

    Args:
        wanted: Names the model.
        tell: Told, in a sentence, what is waited for.

    Raises:
        click.ClickException: It could not be started, or used.
    """
    with contextlib.ExitStack() as turn:
        turn.enter_context(_turn())
        if (found := running(wanted)) is None:
            with started(wanted, tell, turn.close) as found:
                yield found
            return
    yield found


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    """Wait for other launches of this user that start a server; not for one that takes too long."""
    give_up = time.monotonic() + _ENDING_S
    fd = None
    with contextlib.suppress(OSError):  # where there can be no such file, nobody waits
        path = Path(tempfile.gettempdir()) / f"persist-cache-starts-{os.getuid()}"
        while fd is None and time.monotonic() < give_up:
            fd = _taken(path, give_up - time.monotonic())
    try:
        yield
    finally:
        if fd is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)
            os.close(fd)


def _taken(path: Path, patience_s: float) -> int | None:
    """The locked file at `path`, which is made; None if it was removed by who had it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):
        if fs.lock(fd, patience_s) and os.path.samestat(os.fstat(fd), os.lstat(path)):
            return fd
    os.close(fd)
    return None


@contextlib.contextmanager
def started(
    wanted: Wanted, tell: Callable[[str], object], findable: Callable[[], object]
) -> Iterator[Connection]:
    """Start a server that ends when nobody needs it, and wait until its model is loaded.

    It is ended at once where the block is left by an exception.

    Args:
        wanted: Names the model.
        tell: Told, in a sentence, what is waited for.
        findable: Called once `running` finds it, or would not find it later, either.

    Raises:
        click.ClickException: It could not be started.
    """
    assert wanted.model is not None
    folder = Path(tempfile.mkdtemp(prefix="persist-cache-launch-"))
    process = None
    try:
        lock, log = folder / "needed", folder / "server.log"
        lock.touch(mode=0o600)
        needing = hold(lock)
        assert needing is not None, "nobody else knows the file"
        with endings.deferred():
            process = _spawn(wanted, lock, log)
        tell(f"Starting a server with {wanted.model}; its log is {log}.")
        url = _wait(process, log, lambda: _told_url(log))
        _wait_until_found(process, wanted.root)
        findable()
        model = public_name(wanted.model)
        _wait_for_model(process, log, url, wanted.api_key)
        served = Served(url, model, _context(url, model, wanted.api_key), wanted.api_key)
        yield Connection(served, needing, folder)
    except BaseException:
        with endings.deferred():
            if process is not None:
                process.terminate()
                process.wait()
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _spawn(wanted: Wanted, lock: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "persist_cache_cli", "--store", str(wanted.root)]
    command += ["serve", "--model", str(wanted.model), "--host", _HOST]
    command += ["--port", str(wanted.port or _free_port()), "--while-locked", str(lock)]
    environment = dict(os.environ)
    if wanted.api_key is not None:
        environment[KEY_VARIABLE] = wanted.api_key
    with log.open("wb") as output:
        # In a session of its own: what is typed in the terminal is for the client.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )


def _free_port() -> int:
    """The default port if it is free, else 0 for any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, DEFAULT_PORT))
            probe.listen()
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            return 0
    return DEFAULT_PORT


def _told_url(log: Path) -> str:
    found = _TOLD.search(log.read_text(errors="replace"))
    return found[1] if found else ""


def _wait(process: subprocess.Popen[bytes], log: Path, ask: Callable[[], str]) -> str:
    while not (said := ask()):
        if endings.has_ended(process):
            raise click.ClickException(_last_words(log, process.returncode))
        time.sleep(_PAUSE_S)
    return said


def _wait_until_found(process: subprocess.Popen[bytes], root: Path) -> None:
    """Wait until commands can find a server that listens; some folders cannot tell of it."""
    give_up = time.monotonic() + _FOUND_S
    while not endings.has_ended(process) and time.monotonic() < give_up:
        if any(one.pid == process.pid for one in running_servers(root)):
            return
        time.sleep(_PAUSE_S)


def _wait_for_model(
    process: subprocess.Popen[bytes], log: Path, url: str, api_key: str | None
) -> None:
    """Have the server count tokens, which it can when its model is loaded."""
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
    headers = {"Content-Type": "application/json", **_authorization(api_key)}
    with contextlib.closing(_connect(url, timeout_s=None)) as connection:

        def answered() -> str:
            return "yes" if select.select([connection.sock], [], [], 0)[0] else ""

        try:
            connection.request("POST", "/v1/messages/count_tokens", body, headers)
            _wait(process, log, answered)
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            # It listened, and does no more: it ends.
            process.wait()
            raise click.ClickException(_last_words(log, process.returncode)) from None


def _last_words(log: Path, status: int) -> str:
    """Why a server ended, in its own words."""
    lines = log.read_text(errors="replace").strip().splitlines()
    said = next((one for one in reversed(lines) if one.startswith("Error: ")), "")
    if said:
        return said.removeprefix("Error: ")
    last = lines[-1] if lines else "it said nothing"
    return f"The server ended with status {status} before it could be used: {last}"


# ---- asking one ----------------------------------------------------------------------------------


def _context(url: str, model: str, api_key: str | None) -> int | None:
    """How long prompt and answer may be, by the server, or else by the model's configuration.

    Raises:
        click.ClickException: It does not answer, or asks for another key.
    """
    try:
        with contextlib.closing(_connect(url, timeout_s=_PATIENCE_S)) as connection:
            connection.request("GET", MODELS_PATH, headers=_authorization(api_key))
            answer = connection.getresponse()
            raw = answer.read()
    except (OSError, http.client.HTTPException):
        raise click.ClickException(
            f"The server at {url} does not answer; start it again, or leave it out by naming "
            "another store with --store."
        ) from None
    if answer.status == 401:
        raise click.ClickException(
            f"The server at {url} asks for its API key; give this command the same one with "
            f"--api-key or {KEY_VARIABLE}."
        )
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
        listed: list[dict[str, Any]] = json.loads(raw)["data"]
        for one in listed:
            if one["id"] == model and isinstance(one.get("max_model_len"), int):
                return int(one["max_model_len"])
    return _configured_context(model)


def _configured_context(model: str) -> int | None:
    folder = folder_of(model)
    if folder is None:
        return None
    try:
        config: Any = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return context_tokens(config) if isinstance(config, dict) else None


def _connect(url: str, timeout_s: float | None) -> http.client.HTTPConnection:
    where = urlsplit(url)
    return http.client.HTTPConnection(where.hostname or _HOST, where.port, timeout=timeout_s)


def _authorization(api_key: str | None) -> Mapping[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
