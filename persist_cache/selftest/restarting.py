"""The installed command: a server that is killed, or whose model leaves memory, goes on."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from persist_cache.entry import Tier
from persist_cache.errors import PersistCacheError
from persist_cache.selftest.checks import Failed, Result, Setting
from persist_cache.selftest.runner import environment
from persist_cache.selftest.serving import ask, drain, free_port, request, wait_for, write_model
from persist_cache.store.store import Store

_SAVE_LIMIT_S = 30.0


def killed_server_goes_on(setting: Setting) -> Result:
    """Serve by the installed command, ask, SIGKILL it, serve again, and ask the same."""
    write_model(setting.folder / "model")
    with serving(setting.folder) as (server, port):
        first = ask(port)
        _wait_until(lambda: Tier.USER in _tiers(setting.folder), "the question was not saved")
        server.kill()
        server.wait()
    started = time.monotonic()
    with serving(setting.folder) as (_, port):
        up_s = time.monotonic() - started
        second = ask(port)
    if first.cached_tokens:
        raise Failed(f"a new store had {first.cached_tokens} tokens")
    if not second.cached_tokens or not second.found.startswith("disk"):
        raise Failed(f"after SIGKILL nothing was restored ({second.found or 'no header'})")
    if second.text != first.text:
        raise Failed("after SIGKILL the same question was answered differently")
    with Store.open(setting.folder / "store", min_free_bytes=0) as store:
        problems = store.check(read_data=True)
    if problems:
        raise Failed(f"check found {len(problems)} problems: {problems[0].message}")
    return Result(
        f"killed, up again after {up_s:.1f} s, {second.cached_tokens} tokens restored, the same "
        "answer",
        {"up_s": up_s, "restored_tokens": second.cached_tokens},
    )


def idle_server_lets_go(setting: Setting) -> Result:
    """Serve, ask, wait until the model has left memory, and ask the same again."""
    write_model(setting.folder / "model")
    with serving(setting.folder, "--unload-after", "1s") as (_, port):
        first = ask(port)
        _wait_until(lambda: _weights(port) == "unloaded", "the model did not leave memory")
        started = time.monotonic()
        second = ask(port)
        back_s = time.monotonic() - started
        if _weights(port) not in ("loaded", "unloaded"):
            raise Failed("after an answer the model is neither loaded nor unloaded")
    if not second.found.startswith("disk"):
        raise Failed(f"after an unload nothing was restored ({second.found or 'no header'})")
    if second.text != first.text:
        raise Failed("after an unload the same question was answered differently")
    return Result(
        f"the model left memory when nobody asked, and answered {back_s:.2f} s after the next "
        f"request, with {second.cached_tokens} tokens restored",
        {"back_s": back_s, "restored_tokens": second.cached_tokens},
    )


def _weights(port: int) -> str:
    said: str = json.loads(request(port, "GET", "/health")[1]).get("weights", "")
    return said


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The installed command's server of the tiny model, with its port; it ends with the block.

    Args:
        folder: With the model, and for the store.
        flags: Further ones.

    Raises:
        Failed: There is no such command, or it does not come up.
    """
    program = Path(sys.executable).with_name("persist-cache")
    if not program.exists():
        raise Failed("the command persist-cache is not beside the Python that runs this")
    port = free_port()
    words = ["--store", str(folder / "store"), "serve", "--model", str(folder / "model")]
    server = subprocess.Popen(
        [str(program), *words, "--host", "127.0.0.1", "--port", str(port), *flags],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    drains = [drain(server.stdout), drain(server.stderr)]
    try:
        wait_for(server, port)
        yield server, port
    finally:
        server.kill()
        server.wait()
        for thread in drains:
            thread.join(5)


def _tiers(folder: Path) -> set[Tier]:
    with (
        contextlib.suppress(PersistCacheError),
        Store.open(folder / "store", read_only=True) as store,
    ):
        return {entry.tier for entry in store.entries()}
    return set()


def _wait_until(holds: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + _SAVE_LIMIT_S
    while not holds():
        if time.monotonic() > give_up:
            raise Failed(f"{what} within {_SAVE_LIMIT_S:.0f} s")
        time.sleep(0.05)
