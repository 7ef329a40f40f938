"""Erasing and quotas while processes are killed: what is to be nowhere, and what is never exceeded.

The judge reads files and nothing else: bytes that only erased prompts have, and what the headers of
blobs say of whose they are.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from persist_cache.errors import StoreError, StoreFullError
from persist_cache.fingerprint.value import Fingerprint, salt_digest
from persist_cache.store.store import Store
from tests.fakes import FakeSource, fetched, put
from tests.searched import in_folder
from tests.torture.storm import Report, in_child, stopped

_MARK = 0x2B91D7C3E5
_MARKED = [_MARK.to_bytes(5, "little")]
_SALTS = ("", "x", "y")
_QUOTAS = {"model:m0": 400_000, "salt": 300_000}
_TTL_S = 2


def storms(folder: Path, report: Report, seed: int, seconds: float) -> None:
    """Both, for so long each."""
    for name, storm in (("erase", _erase), ("quotas", _quotas)):
        place = folder / name
        place.mkdir()
        findings, kills, samples = in_child(partial(storm, place, random.Random(seed), seconds))
        report.scenarios[name] += 1
        report.findings += [f"{name}: {one}" for one in findings]
        report.kills += kills
        report.samples += samples


def _spawn(act: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        status = 3
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return child


def _secret(number: int) -> list[int]:
    return [(_MARK << 24) + number * 977 % (1 << 24) + step for step in range(1 + number % 90)]


def _work(root: Path, seed: int, erasing: bool) -> None:
    """Store prompts, some of which are to be erased; and erase them, over and over."""
    dice = random.Random(seed)
    with Store.open(root, min_free_bytes=0) as store:
        for number in range(10_000):
            head = [1, 2, 3, dice.randrange(4)]
            try:
                put(store, [*head, *_secret(dice.randrange(1 << 20))])
                put(store, [*head, dice.randrange(50), dice.randrange(50)])
                if erasing and number % 5 == 4:
                    store.erase(_marked(store))
            except StoreError:
                continue


def _marked(store: Store) -> list[str]:
    from persist_cache.queries.details import tokens_of

    found = []
    for entry in store.entries():
        try:
            if any(token >> 24 == _MARK for token in tokens_of(store, entry.id)):
                found.append(entry.id)
        except KeyError:
            continue  # it was erased meanwhile
    return found


def _erase(folder: Path, dice: random.Random, seconds: float) -> tuple[list[str], int, int]:
    root, kills, rounds = folder / "store", 0, 0
    findings: list[str] = []
    give_up = time.monotonic() + seconds
    kept = [[7, 8, 9, number] for number in range(20)]

    def keep() -> None:
        with Store.open(root, min_free_bytes=0) as store:
            for tokens in kept:
                put(store, tokens, pinned=True)

    in_child(keep)
    while time.monotonic() < give_up:
        rounds += 1
        children = [
            _spawn(partial(_work, root, dice.randrange(1 << 30), at < 2)) for at in range(3)
        ]
        time.sleep(dice.uniform(0.05, 0.6))
        for child in children:
            os.kill(child, signal.SIGKILL)
        kills += sum(os.waitpid(child, 0)[1] != 0 for child in children)
        findings += in_child(partial(_judge_erased, root, kept))
        if found := in_folder(root, _MARKED):
            findings.append(f"erased tokens are in {found}")
        if findings:
            break
    return findings, kills, rounds


def _judge_erased(root: Path, kept: Sequence[list[int]]) -> list[str]:
    findings = []
    with Store.open(root, min_free_bytes=0) as store:
        if problems := store.check():
            findings.append(f"after a kill: {problems}")
        if not store.erase(_marked(store)).is_complete:
            findings.append("an erasure did not come to its end")
        findings += [f"{one} is lost" for one in kept if fetched(store, one) != len(one)]
        if problems := store.check(read_data=True):
            findings.append(f"after an erasure: {problems}")
    return findings


def _fill(root: Path, seed: int) -> None:
    """Store prompts of models and salts, with quotas and a lifetime."""
    dice = random.Random(seed)
    with Store.open(root, min_free_bytes=0) as store:
        for _ in range(10_000):
            fields = {"weights": f"w{(model := dice.randrange(3))}"}
            fingerprint = Fingerprint.from_fields(fields, {"name": f"m{model}"})
            fingerprint = fingerprint.salted(salt_digest(dice.choice(_SALTS)))
            tokens = [dice.randrange(5), *(dice.randrange(99) for _ in range(dice.randrange(200)))]
            source = FakeSource(tokens, complete=dice.random() < 0.7, has_state=True, real=False)
            try:
                store.put(fingerprint, tokens, source)
            except StoreFullError:
                continue
            except StoreError:
                continue


def _quotas(folder: Path, dice: random.Random, seconds: float) -> tuple[list[str], int, int]:
    root, kills, samples = folder / "store", 0, 0
    findings: list[str] = []
    rules = partial(Store.open, root, min_free_bytes=0, quotas=_QUOTAS, ttl={"assistant": _TTL_S})
    in_child(lambda: rules().close())
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up and not findings:
        children = [_spawn(partial(_fill, root, dice.randrange(1 << 30))) for _ in range(3)]
        end = time.monotonic() + dice.uniform(0.3, 1.5)
        while time.monotonic() < end:
            samples += 1
            with stopped(children):
                findings += _exceeded(root)
            time.sleep(0.01)  # or they would hardly move between two samples
        for child in children:
            os.kill(child, signal.SIGKILL)
        kills += sum(os.waitpid(child, 0)[1] != 0 for child in children)
        findings += in_child(partial(_judge_sound, root))
    time.sleep(_TTL_S)
    return findings + in_child(partial(_judge_expired, root)), kills, samples


def _exceeded(root: Path) -> list[str]:
    """Which quota is exceeded, by the files as they are at this moment."""
    taken: Counter[str] = Counter()
    for path in (*root.glob("blobs/*/*.safetensors"), *root.glob("tmp/*.safetensors")):
        try:
            nbytes = path.stat().st_blocks * 512
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                said = json.loads(json.loads(file.read(size))["__metadata__"]["identity"])
        except (OSError, ValueError, KeyError, struct.error):
            continue  # it is being written, or went
        taken[said["info"]["name"]] += nbytes
        if salt := said["fields"].get("cache_salt"):
            taken[salt] += nbytes
    limits = {"m0": _QUOTAS["model:m0"]}
    limits |= {salt_digest(salt): _QUOTAS["salt"] for salt in _SALTS if salt}
    return [
        f"{name} takes {taken[name]} of {limit} bytes"
        for name, limit in limits.items()
        if taken[name] > limit
    ]


def _judge_sound(root: Path) -> list[str]:
    with Store.open(root, min_free_bytes=0) as store:
        problems = store.check()
        over = [one for one in store.stats().quotas if one.nbytes > one.max_bytes]
        return [f"after a kill: {problems} {over}"] if problems or over else []


def _judge_expired(root: Path) -> list[str]:
    with Store.open(root, min_free_bytes=0) as store:
        store.tidy()
        left = len(store.entries())
        return [f"{left} entries outlive their time"] if left else []
