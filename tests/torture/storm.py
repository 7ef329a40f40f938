"""Rounds: processes on one store, killed at random moments; then a judge, sometimes after damage.

The runner freezes all of them before it counts the bytes on disk, so that every sample is a
moment and not a walk through a changing folder.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from tests.fakes import disk_usage
from tests.torture import broken, damage, work
from tests.torture.journal import Journal, Tally
from tests.torture.judge import ROOMY, Judge, Verdict

TIGHT = 1_500_000
_ROUNDS_PER_STORE = 6
_SMALL_DISK = 3_000_000
T = TypeVar("T")


@dataclass
class Report:
    """Sums over a run."""

    kills: int = 0
    rounds: int = 0
    samples: int = 0
    compared: int = 0
    demanded: int = 0
    highest_share: float = 0.0
    soak_bytes: int = 0
    soak_written: int = 0
    index_deaths: int = 0
    damages: Counter[str] = field(default_factory=Counter)
    scenarios: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    excused: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    work: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)

    def add(self, verdict: Verdict, where: str) -> None:
        self.compared += verdict.compared
        self.demanded += verdict.demanded
        self.excused.update(verdict.excused)
        self.repaired.update(verdict.repaired)
        self.findings += [f"{where}: {sentence}" for sentence in verdict.findings]


class ChildDied(Exception):
    """A child that was not killed by us ended without an answer."""

    def __init__(self, number: int) -> None:
        super().__init__(f"the process ended with {number}")
        self.number = number


def in_child(function: Callable[[], T]) -> T:
    """Run `function` in a forked child and return what it returned.

    Raises:
        ChildDied: The child was taken down, or raised; its traceback is on standard error.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            answer = pickle.dumps(function())
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(answer)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(3)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        raise ChildDied(code)
    value: T = pickle.loads(answer)
    return value


@contextlib.contextmanager
def stopped(children: Sequence[int]) -> Iterator[None]:
    """Stop the children during the block: they would replace what is being counted.

    Whoever has ended can still be waited for.
    """
    try:
        for child in children:
            os.kill(child, signal.SIGSTOP)
            os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        yield
    finally:
        for child in children:
            os.kill(child, signal.SIGCONT)


class Storm:
    """The rounds of one run."""

    def __init__(self, folder: Path, seed: int, report: Report, breaks: str = "") -> None:
        self._folder = folder
        self._dice = random.Random(seed)
        self._report = report
        self._breaks = breaks
        self._tally = Tally(work.TALLIED)
        self._stores = 0
        self._mounted: Path | None = None

    def run(self, go_on: Callable[[], bool]) -> None:
        """Rounds until `go_on` says no."""
        try:
            while go_on():
                self._one_store(go_on)
        finally:
            totals = self._tally.totals()
            self._report.work = Counter(
                {name: n for name, n in totals.items() if not name.startswith("fault: ")}
            )
            for name, n in totals.items():
                if name.startswith("fault: "):
                    self._report.faults[name.removeprefix("fault: ")] += n

    # ---- one store ---------------------------------------------------------------------------

    def _one_store(self, go_on: Callable[[], bool]) -> None:
        """The life of a store: some rounds under one scenario, then it is thrown away."""
        scenarios = ("plain", "tight", "faults", "tight faults", "descriptors", "clock jumps")
        order = (*scenarios, "full disk")
        scenario = order[self._stores % len(order)]
        if self._breaks == "budget":
            scenario = "tight"
        self._stores += 1
        home = self._folder / f"store-{self._stores}"
        home.mkdir()
        try:
            with self._disk_for(home, scenario) as root:
                if root is None:
                    self._report.skipped.add("full disk: no file system could be mounted")
                    return
                (home / "journals").mkdir()
                setting = work.Setting(
                    root=root,
                    journals=home / "journals",
                    max_bytes=TIGHT if "tight" in scenario else ROOMY,
                    faults=0.01 if "faults" in scenario else 0.0,
                    jumps=scenario == "clock jumps",
                    descriptors=self._dice.randrange(8, 26) if scenario == "descriptors" else None,
                    breaks=self._breaks,
                )
                self._live(setting, scenario, go_on)
        finally:
            shutil.rmtree(home, ignore_errors=True)

    def _live(self, setting: work.Setting, scenario: str, go_on: Callable[[], bool]) -> None:
        index_lost = page_damaged = False
        for number in range(_ROUNDS_PER_STORE):
            if not go_on():
                return
            where = f"store {self._stores} ({scenario}), round {number}"
            self._storm(setting)
            self._report.rounds += 1
            self._report.scenarios[scenario] += 1
            done = None
            hurt: frozenset[str] | None = frozenset()
            # A full disk is judged as it is; the judge could not mend it there.
            harmed = self._dice.random() < 0.6 and scenario != "full disk"
            if harmed and self._breaks in ("", "checksum"):
                kind = self._dice.choice(damage.KINDS)
                before = "page" if page_damaged else ""
                if "index" in kind and not self._judge(
                    setting, before, hurt, index_lost, False, where
                ):
                    return  # why an entry has left is forgotten with the index: ask before
                if self._breaks == "checksum":
                    kind = "flipped bit"
                seed = self._dice.getrandbits(64)
                harm = partial(damage.damage, setting, kind, random.Random(seed))
                done = in_child(harm)
                self._report.damages[kind] += 1
                hurt = done.hurt
                where += f", {kind}"
                if done.harms in ("index", "page"):
                    index_lost = True
                elif self._dice.random() < 0.4:
                    self._storm(setting)
                    hurt = None
            harms = "" if done is None else done.harms
            # LMDB trusts its pages: what it did not notice so far may come up at any time.
            page_damaged = page_damaged or harms == "page"
            harms = "page" if page_damaged else harms
            foreign = done is not None and done.kind == "foreign files"
            if not self._judge(setting, harms, hurt, index_lost, foreign, where):
                return

    def _judge(
        self,
        setting: work.Setting,
        harms: str,
        hurt: frozenset[str] | None,
        index_lost: bool,
        foreign: bool,
        where: str,
    ) -> bool:
        """Judge in a child; returns whether the store can be used on."""
        serve_first = self._dice.random() < 0.5 or self._breaks == "checksum"

        def judge() -> Verdict:
            # The verdict on a broken build is passed by a whole one, except on what it serves.
            if self._breaks == "checksum":
                broken.install("checksum")
            return Judge(
                setting, damaged=harms, hurt=hurt, index_lost=index_lost, foreign=foreign
            ).judge(serve_first=serve_first)

        for _ in range(2):
            try:
                self._report.add(in_child(judge), where)
                return True
            except ChildDied as error:
                if harms != "page":
                    self._report.findings.append(f"{where}: judging it failed: {error}")
                    return False
                # LMDB trusts its pages. What the documentation then says to do:
                self._report.index_deaths += 1
                for name in ("data.mdb", "lock.mdb"):
                    (setting.root / name).unlink(missing_ok=True)
        self._report.findings.append(f"{where}: a new index did not help")
        return False

    # ---- processes ---------------------------------------------------------------------------

    def _storm(self, setting: work.Setting) -> None:
        """Start processes, kill each at a random moment, start some again; in the end all."""
        now = time.monotonic()
        end = now + self._dice.uniform(0.25, 0.6)
        living: dict[int, tuple[int, float]] = {}
        for row, role in enumerate(("server", "server", "warmer", "evictor", "reader")):
            if row == 0 or self._dice.random() < 0.7:
                self._start(setting, role, row, living, end)
        sample_at = now
        while living:
            now = time.monotonic()
            for child, (row, doomed) in list(living.items()):
                if now >= doomed:
                    self._kill(child)
                    del living[child]
                    if now < end - 0.1:
                        self._start(setting, self._dice.choice(work.ROLES), row, living, end)
            if now >= sample_at and living:
                self._sample(setting, list(living))
                sample_at = now + 0.02
            time.sleep(0.002)
        Journal(setting.journals / "runner.jsonl").note("all dead")

    def _start(
        self,
        setting: work.Setting,
        role: str,
        row: int,
        living: dict[int, tuple[int, float]],
        end: float,
    ) -> None:
        seed = self._dice.getrandbits(48)
        child = os.fork()
        if child == 0:
            self._tally.row = row
            work.main(setting, role, seed, self._tally, 60.0)
        now = time.monotonic()
        living[child] = row, now + self._dice.uniform(0.0, max(0.05, end - now))

    def _kill(self, child: int) -> None:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            self._report.kills += 1
        else:
            self._report.findings.append(f"a worker ended by itself with {code}")

    def _sample(self, setting: work.Setting, living: list[int]) -> None:
        """Count all bytes while nobody moves."""
        with stopped(living):
            taken = disk_usage(setting.root)
        self._report.samples += 1
        share = taken / setting.max_bytes
        if setting.max_bytes < ROOMY:
            self._report.highest_share = max(self._report.highest_share, share)
        if share > 1:
            self._report.findings.append(
                f"store {self._stores}: {taken} bytes on disk, the budget is {setting.max_bytes}"
            )

    # ---- a small disk ------------------------------------------------------------------------

    @contextlib.contextmanager
    def _disk_for(self, home: Path, scenario: str) -> Iterator[Path | None]:
        """A folder for the store; for a full disk on a file system of its own, if one may be."""
        if scenario != "full disk":
            yield home / "store"
            return
        point = home / "disk"
        point.mkdir()
        if not mount(point, _SMALL_DISK):
            yield None
            return
        try:
            yield point / "store"
        finally:
            subprocess.run(["umount", str(point)], check=False)


def mount(point: Path, nbytes: int) -> bool:
    """Mount an empty file system of `nbytes` in memory; False where that is not permitted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes},mode=700", "tmpfs", str(point)]
    with contextlib.suppress(OSError):
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    return False
