"""What `check` names, the command that it prints mends: for every kind of damage."""

from __future__ import annotations

import os
import random
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from persist_cache.index.records import EntryRecord, SizedRecord
from persist_cache.index.transaction import Writer
from persist_cache.index.tree import BLOB_BYTES
from persist_cache.store.store import Store
from tests import forge
from tests.cli import Done, forked, runner
from tests.fakes import blob_files, fetched, put
from tests.torture import damage

PROMPTS = [[number, *range(30)] for number in range(100, 106)]


def filled(root: Path) -> None:
    with Store.open(root, min_free_bytes=0, run_tokens=8) as store:
        for number, prompt in enumerate(PROMPTS):
            put(store, prompt, complete=number % 2 == 0, tier="user", label=f"no. {number}")


def printed(said: str) -> list[str]:
    """The command that the user is told to run, without its name."""
    found = re.findall(r"`persist-cache ([^`]+)`", said)
    assert found, f"no command is named: {said}"
    return shlex.split(found[-1])


def mended(run: Callable[..., Done]) -> None:
    """Run what is printed, until nothing is wrong; once is enough."""
    found = run("check", "--read-data")
    if found.status == 0:
        return
    command = printed(found.out + found.err)

    done = run(*command)

    assert done.status == 0, done.out + done.err
    again = run("check", "--read-data")
    assert again.status == 0, again.out + again.err


def works(root: Path) -> None:
    with Store.open(root, min_free_bytes=0, run_tokens=8) as store:
        for prompt in PROMPTS:
            put(store, prompt)
            assert fetched(store, prompt) == len(prompt)
        assert store.check(read_data=True) == []


SAFE = [
    kind for kind in damage.KINDS if kind not in damage.WHOLE or damage.WHOLE[kind][0] != "page"
]
"""A damaged page of LMDB may end the process that comes to it."""


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", SAFE)
def test_damage_to_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, seed: int
) -> None:
    root = tmp_path / "a store"
    filled(root)
    dice = random.Random(seed)
    if kind in damage.WHOLE:
        damage.WHOLE[kind][1](root, dice)
    elif kind == "two files swapped":
        one, two = blob_files(root)[:2]
        data = one.read_bytes(), two.read_bytes()
        two.write_bytes(data[0])
        one.write_bytes(data[1])
    else:
        damage.ONE_BLOB[kind](dice.choice(blob_files(root)), dice)

    # Not by `main`: what it was told comes with a store of its own.
    mended(lambda *words: runner_of(root, capfd)(*words))

    works(root)


def runner_of(root: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    run = runner(root, capfd)

    def call(*words: str) -> Done:
        if words[0] == "--store":
            assert words[1] == str(root)
            words = words[2:]
        return run(*words)

    return call


def _wrong_sum(txn: Writer) -> None:
    txn.add(BLOB_BYTES, 4096)


def _wrong_blob(txn: Writer) -> None:
    key, edge = next(iter(txn.edges()))
    txn.put_edge(key, edge._replace(blob=77))


def _lost_blob(txn: Writer) -> None:
    forge.delete(txn, b"blobs", forge.records(txn, b"blobs")[0][0])


def _short_record(txn: Writer) -> None:
    forge.put(txn, b"entries", forge.records(txn, b"entries")[0][0], b"\1\2\3")


def _wrong_length(txn: Writer) -> None:
    number, record = next(iter(txn.entries()))
    txn.put_entry(number, record._replace(num_tokens=record.num_tokens + 1))


def _lost_order(txn: Writer) -> None:
    number, record = next(iter(txn.entries()))
    forge.forget_order(txn, number)
    assert isinstance(record, EntryRecord)


def _trash_that_is_there(txn: Writer) -> None:
    txn.put_sized(b"trash", bytes(16), SizedRecord(1, 1.0))


def _quarantine_that_is_not(txn: Writer) -> None:
    txn.put_sized(b"quarantine", bytes(16), SizedRecord(10_000, 1.0, "why"))


INDEX = [
    _wrong_sum,
    _wrong_blob,
    _lost_blob,
    _short_record,
    _wrong_length,
    _lost_order,
    _trash_that_is_there,
    _quarantine_that_is_not,
]


@pytest.mark.parametrize("and_a_file", [False, True])
@pytest.mark.parametrize("harm", INDEX)
def test_damage_to_the_index(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    harm: Callable[[Writer], None],
    and_a_file: bool,
) -> None:
    root = tmp_path / "store"
    filled(root)
    with Store.open(root) as store:
        forge.change(store, harm)
    if and_a_file:
        path = blob_files(root)[-1]
        path.write_bytes(path.read_bytes()[:-1] + b"\xee")

    mended(runner_of(root, capfd))

    works(root)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", [kind for kind in damage.KINDS if kind not in SAFE])
def test_damage_to_pages_of_the_index(tmp_path: Path, kind: str, seed: int) -> None:
    root = tmp_path / "store"
    filled(root)
    damage.WHOLE[kind][1](root, random.Random(seed))

    def run(*words: str) -> Done:
        return forked(root, *(words[2:] if words[0] == "--store" else words))

    mended(run)

    assert run("list").status == 0
    assert os.path.exists(root / "data.mdb")
