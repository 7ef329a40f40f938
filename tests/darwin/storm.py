"""Kills processes that write to a store and that open it, while another one keeps it open.

The keeper stores a prompt after each kill, and must be done within `PATIENCE_S`. What a killed
process said that it had stored must be there in the end.

    python -m tests.darwin.storm FOLDER WRITERS OPENERS
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from persist_cache.store.store import Store
from tests.fakes import Clock, fetched, put

PATIENCE_S = 30.0
LONGEST_LIFE_S = {"writer": 0.04, "opener": 0.012}
_NUMBER = struct.Struct("=Q")


def open_store(folder: Path) -> Store:
    return Store.open(
        folder / "store", max_bytes=1 << 30, min_free_bytes=0, run_tokens=8, clock=Clock()
    )


def prompt(number: int) -> list[int]:
    return [1, 2, 3, number, number + 1, 5]


def in_child(act: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(1)
    return child


def write(folder: Path, first: int, said: int) -> NoReturn:
    """Store one prompt after another, and say so."""
    with open_store(folder) as store:
        os.write(said, _NUMBER.pack(0))
        number = first
        while True:
            put(store, prompt(number))
            os.write(said, _NUMBER.pack(number))
            number += 1


def open_and_close(folder: Path, said: int) -> NoReturn:
    os.write(said, _NUMBER.pack(0))
    while True:
        open_store(folder).close()


def keep(folder: Path, asked: int, said: int, not_ours: int) -> None:
    """Keep the store open, and store what is asked for."""
    os.close(not_ours)  # else there would be no end of it
    with open_store(folder) as store:
        while raw := os.read(asked, _NUMBER.size):
            number = _NUMBER.unpack(raw)[0]
            put(store, prompt(number))
            assert fetched(store, prompt(number)) == len(prompt(number))
            os.write(said, raw)
    os._exit(0)


def heard(fd: int, timeout_s: float) -> int | None:
    """The next number, or None if none came."""
    if not select.select([fd], [], [], timeout_s)[0]:
        return None
    raw = os.read(fd, _NUMBER.size)
    return _NUMBER.unpack(raw)[0] if raw else None


def storm(folder: Path, writers: int, openers: int, seed: int = 1) -> dict[str, int]:
    """Kill so many; returns what was counted.

    Raises:
        AssertionError: The keeper hung, or something was lost or damaged.
    """
    dice = random.Random(seed)
    open_store(folder).close()
    asked, ask = os.pipe()
    answers, answer = os.pipe()
    keeper = in_child(lambda: keep(folder, asked, answer, ask))
    stored: list[int] = []
    kinds = ["writer"] * writers + ["opener"] * openers
    dice.shuffle(kinds)
    try:
        for count, kind in enumerate(kinds):
            stored += killed(folder, kind, (count + 2) << 20, dice)
            own = 100 + 2 * count
            os.write(ask, _NUMBER.pack(own))
            assert heard(answers, PATIENCE_S) == own, f"the keeper hangs after {count + 1} kills"
            stored.append(own)
        os.close(ask)
        assert os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1]) == 0
    except BaseException:
        os.kill(keeper, signal.SIGKILL)
        raise
    with open_store(folder) as store:
        lost = [one for one in stored if fetched(store, prompt(one)) != len(prompt(one))]
        assert not lost, f"{len(lost)} of {len(stored)} commits are lost"
        problems = store.check(read_data=True)
        assert problems == [], problems
    return {"kills": len(kinds), "stored": len(stored)}


def killed(folder: Path, kind: str, first: int, dice: random.Random) -> list[int]:
    """Start a process and kill it after a while; returns what it had stored."""
    hear, say = os.pipe()
    act = {
        "writer": lambda: write(folder, first, say),
        "opener": lambda: open_and_close(folder, say),
    }[kind]
    child = in_child(act)
    os.close(say)
    # Half of the writers live to see the store open; the others are openers, too.
    if kind == "opener" or dice.random() < 0.5:
        assert heard(hear, PATIENCE_S) == 0, f"a {kind} hangs"
    select.select([], [], [], dice.random() * LONGEST_LIFE_S[kind])
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    stored = []
    while (number := heard(hear, PATIENCE_S)) is not None:
        stored.append(number)
    os.close(hear)
    return [one for one in stored if one]


if __name__ == "__main__":
    print(json.dumps(storm(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
