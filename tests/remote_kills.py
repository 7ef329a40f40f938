"""Death at the steps of a pull and of a publication; run as a program by `test_remote_processes`.

It uses the remote only in children of its own, so that each begins without threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from persist_cache.remote import PublishOutcome, RemoteSettings, Why, publishing
from persist_cache.remote.transport import Transport
from persist_cache.store.store import Store
from tests.fakes import fetched
from tests.remotes import LONG, bring, folder_settings, objects, opened, put_real
from tests.torture.seam import Seam, at_step

KILLED = -signal.SIGKILL


def in_child(act: Callable[[], object]) -> int:
    """Run `act` in a child; returns how it ended, as `subprocess` does."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def store_at(folder: Path) -> Store:
    return Store.open(folder, max_bytes=1 << 30, min_free_bytes=0, run_tokens=400)


def publish(folder: Path, settings: RemoteSettings) -> None:
    with store_at(folder) as store, opened(store, settings) as remote:
        entry = put_real(store, LONG, complete=False)
        assert remote.publish(entry).outcome == PublishOutcome.SENT


def pull(folder: Path, settings: RemoteSettings) -> None:
    with store_at(folder) as store, opened(store, settings) as remote:
        brought = bring(remote, LONG)
        assert brought.why == Why.BROUGHT, brought
        assert fetched(store, LONG) == len(LONG)


def check_is_sound(folder: Path) -> None:
    """Nothing is left of what was killed, and what is there is whole."""
    with store_at(folder) as store:
        assert store.check(read_data=True) == []
        assert list((folder / "tmp").iterdir()) == []
        with store.read() as txn:
            assert txn.sized(b"pending") == {}
        usage = store.stats().usage
        assert usage.pending == usage.trash == usage.quarantine == 0
        entries = store.entries()
        assert fetched(store, LONG) == (len(LONG) if entries else 0)
        store.evict([one.id for one in entries])


def kill_pulls(folder: Path, every: int) -> int:
    """Kill a pull at every so-many-th step; returns how many were killed."""
    settings = folder_settings(folder)
    assert in_child(lambda: publish(folder / "first", settings)) == 0
    told = folder / "steps"

    def count() -> None:
        with Seam(lambda step, name: None).installed() as seam:
            pull(folder / "counted", settings)
        told.write_text(json.dumps(seam.names))

    assert in_child(count) == 0
    names = json.loads(told.read_text())
    first = names.index("write_at") - 12
    steps = range(max(first, 1), len(names) + 1, every)
    killed = 0
    for step in steps:

        def act(step: int = step) -> None:
            with Seam(at_step(step, "killed")).installed():
                pull(folder / "second", settings)

        ended = in_child(act)
        assert ended in (0, KILLED), (step, ended)
        killed += ended == KILLED
        check_is_sound(folder / "second")
    assert in_child(lambda: pull(folder / "second", settings)) == 0
    return killed


def kill_publications(folder: Path, every: int) -> int:
    """Kill a publisher at every so-many-th object, before or after it was created."""
    deaths = [(number, after) for number in range(1, 12, every) for after in (False, True)]
    return sum(_kill_publication(folder / f"{one}{after}", one, after) for one, after in deaths)


def _kill_publication(place: Path, number: int, is_after: bool) -> bool:
    place.mkdir()
    settings = folder_settings(place)

    def die() -> None:
        with _killed_at(number, is_after):
            publish(place / "first", settings)

    def go_on() -> None:
        with (
            mock.patch.object(publishing, "CLAIM_S", 0.0),
            store_at(place / "third") as store,
            opened(store, settings) as remote,
        ):
            done = remote.publish(put_real(store, LONG, complete=False))
            assert done.outcome != PublishOutcome.CLAIMED

    ended = in_child(die)
    assert ended in (0, KILLED), (number, ended)
    if any(name.startswith("pc1/a/") for name in objects(place)):
        # An anchor is there only when all of its blobs are.
        assert in_child(lambda: pull(place / "reader", settings)) == 0
    assert in_child(go_on) == 0
    assert in_child(lambda: pull(place / "second", settings)) == 0
    return ended == KILLED


@contextlib.contextmanager
def _killed_at(number: int, is_after: bool) -> Any:
    create = Transport.create
    count = [0]

    async def dying(self: Transport, name: str, content: Any) -> bool:
        count[0] += 1
        if count[0] == number and not is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        done = await create(self, name, content)
        if count[0] == number and is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    with mock.patch.object(Transport, "create", dying):
        yield


if __name__ == "__main__":
    kind, place, stride = sys.argv[1:]
    work = {"pull": kill_pulls, "publish": kill_publications}[kind]
    print(work(Path(place), int(stride)))
