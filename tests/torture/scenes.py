"""What needs a stage of its own: disks that turn read-only or fill, a soak at 200 MB."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from persist_cache.codec import Payload, Tensor
from persist_cache.errors import StoreError, StoreFormatError, StoreFullError
from persist_cache.index.records import pack_counter
from persist_cache.store.store import Store
from tests import disks, forge
from tests.fakes import disk_usage, fetched, fingerprint, put
from tests.torture import broken
from tests.torture.storm import ChildDied, Report, in_child, mount

SOAK_BYTES = 200_000_000


def read_only_disk(folder: Path, report: Report) -> None:
    """A file system remounted read-only serves on, takes nothing, and takes again afterwards."""
    point = folder / "read-only"
    point.mkdir()
    if not mount(point, 8_000_000):
        report.skipped.add("read-only disk: no file system could be mounted")
        return
    root = point / "store"

    def writes(token: int) -> bool:
        try:
            with Store.open(root, min_free_bytes=0) as store:
                put(store, [token] * 20)
                return fetched(store, [token] * 20) == 20
        except StoreError:
            return False

    def reads() -> bool:
        with Store.open(root, read_only=True) as store:
            return fetched(store, [1] * 20) == 20 and store.check(read_data=True) == []

    try:
        steps = [in_child(lambda: writes(1))]
        subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)
        steps += [in_child(reads), not in_child(lambda: writes(2))]
        subprocess.run(["mount", "-o", "remount,rw", str(point)], check=True)
        steps += [in_child(reads), in_child(lambda: writes(3))]
        report.scenarios["read-only disk"] += 1
        if not all(steps):
            report.findings.append(f"read-only disk: {steps}")
    finally:
        subprocess.run(["umount", str(point)], check=False)


def unknown_schema(folder: Path, report: Report) -> None:
    """An index of another version is refused, and not touched."""
    root = folder / "schema"

    def act() -> bool:
        with Store.open(root, min_free_bytes=0) as store:
            put(store, [1, 2, 3])
            forge.change(store, lambda txn: txn.set_meta("schema", pack_counter(99)))
        before = (root / "data.mdb").read_bytes()
        try:
            Store.open(root, min_free_bytes=0).close()
        except StoreFormatError:
            return (root / "data.mdb").read_bytes() == before
        return False

    report.scenarios["unknown schema"] += 1
    if not in_child(act):
        report.findings.append("an index of an unknown version was not refused")


def full_disks(folder: Path, report: Report) -> None:
    """On each file system, filled by another program: look-ups go on, and eviction makes room."""
    for kind in disks.KINDS:
        place = folder / f"full-{kind}"
        place.mkdir()
        try:
            with disks.mounted(kind, 32 << 20, place) as disk:
                said = in_child(partial(_use_full_disk, disk))
        except disks.NoDisk as error:
            report.skipped.add(f"full disk, {kind}: {error}")
            continue
        except ChildDied as error:
            said = str(error)
        report.scenarios[f"full disk, {kind}"] += 1
        if said:
            report.findings.append(f"full disk, {kind}: {said}")


def _use_full_disk(disk: Path) -> str:
    """What went wrong on a disk that fills, or ""."""
    budget = 16 << 20
    prompts = [[number, *range(60)] for number in range(200, 240)]
    with Store.open(disk / "store", max_bytes=budget, min_free_bytes=0, run_tokens=16) as store:
        for prompt in prompts:
            put(store, prompt)
        before = disk_usage(store.root)
        disks.fill(disk)
        readers = [threading.Thread(target=_look, args=(store, prompts)) for _ in range(80)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        if any(fetched(store, prompt) != len(prompt) for prompt in prompts):
            return "a stored prompt was not served"
        store.evict_to(before - 500_000)
        after = disk_usage(store.root)
        if after > before - 500_000 or after != store.stats().usage.total:
            return f"{after} of {before} bytes are left, usage says {store.stats().usage}"
        disks.unfill(disk)
        for prompt in prompts:
            put(store, prompt)
        problems = store.check(read_data=True)
        if problems or disk_usage(store.root) > budget:
            return f"{problems}, {disk_usage(store.root)} bytes"
    return ""


def _look(store: Store, prompts: Sequence[list[int]]) -> None:
    for prompt in prompts[::8]:
        fetched(store, prompt)


@dataclass
class _Bulk:
    """Rows by the megabyte: what they hold is checked elsewhere."""

    num_tokens: int
    layout: str = '{"bulk":1}'
    complete: bool = True

    def rows(self, start: int, end: int) -> Payload:
        rows = np.full((1, 2, end - start, 1024), start, dtype=np.int64)
        return Payload([Tensor("layers.0.keys", "I64", rows.shape, [rows.data.cast("B")])])

    def checkpoint(self) -> Payload | None:
        return None


def soak(folder: Path, report: Report, seconds: float, breaks: str = "") -> None:
    """Two processes write without pause into 200 MB; the bytes on disk are counted all the time."""
    root = folder / "soak"
    children = [_forked(partial(_write_bulk, root, seed, breaks)) for seed in range(2)]
    end = time.monotonic() + seconds
    worst = 0
    try:
        while time.monotonic() < end:
            taken = _frozen(children, lambda: disk_usage(root))
            worst = max(worst, taken)
            report.samples += 1
            if taken > SOAK_BYTES:
                report.findings.append(f"soak: {taken} bytes on disk, the budget is {SOAK_BYTES}")
                break
            time.sleep(0.01)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    report.kills += len(children)
    report.soak_bytes = worst
    report.scenarios["soak at 200 MB"] += 1
    report.soak_written = in_child(lambda: _written(root))


def _written(root: Path) -> int:
    with Store.open(root, max_bytes=SOAK_BYTES, min_free_bytes=0) as store:
        return store.stats().written_bytes


def _write_bulk(root: Path, seed: int, breaks: str) -> None:
    broken.install(breaks)
    model = fingerprint()
    number = 0
    while True:
        with Store.open(root, max_bytes=SOAK_BYTES, min_free_bytes=0) as store:
            for _ in range(50):
                number += 1
                tokens = [seed, number, *range(30 + 97 * number % 400)]
                try:
                    store.put(model, tokens, _Bulk(len(tokens)))
                except StoreFullError as error:
                    if "in use" not in str(error):
                        raise


def _forked(function: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(3)
    return child


def _frozen(children: Sequence[int], look: Callable[[], int]) -> int:
    """Look while all `children` are stopped."""
    for child in children:
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
    try:
        return look()
    finally:
        for child in children:
            os.kill(child, signal.SIGCONT)
