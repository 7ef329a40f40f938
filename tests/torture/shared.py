"""Machines that share a remote, while publishers and pullers are killed.

Each machine has a store of its own; the remote is a folder. The judge asks of every store that it
is sound, within its budget, and has what was stored on that machine; and of the remote that a new
machine is given nothing but the right bytes by it.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from persist_cache.errors import RemoteError, StoreError
from persist_cache.remote import PublishOutcome, Remote, RemoteSettings, make_secret
from persist_cache.store.store import Store
from tests import weed
from tests.fakes import disk_usage, fetched, fingerprint, put
from tests.torture.journal import Journal, Tally, read
from tests.torture.storm import Report, in_child

_MACHINES = 3
_BUDGETS = (1 << 28, 1 << 28, 2_500_000)
"""The last one's is tight: what it fetches has to make room."""
_FAMILIES = 24
_QUESTIONS = 4
PROMPTS = _FAMILIES * _QUESTIONS
_SYSTEM = 400
_TALLIED = ("put", "published", "brought", "bytes brought", "missed", "refused")


@dataclass
class Seen:
    """What a run did."""

    work: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    rounds: int = 0
    samples: int = 0
    found: int = 0
    findings: list[str] = field(default_factory=list)


def tokens_of(family: int, question: int) -> list[int]:
    """A system prompt of its family, and a question; 0 for none."""
    system = [(family * 977 + place * 31) % 50_000 for place in range(_SYSTEM)]
    return system + [60_000 + question * 100 + place for place in range(40 if question else 0)]


def model_of(family: int) -> str:
    """Some models keep all of their rows, others a state."""
    return f"w{family % 2}"


def run(folder: Path, seed: int, seconds: float, url: str = "") -> Seen:
    """Rounds for so long; the remote is a folder unless there is a `url`."""
    return _Run(folder, random.Random(seed), url).run(seconds)


class _Run:
    def __init__(self, folder: Path, dice: random.Random, url: str) -> None:
        self._folder = folder
        self._dice = dice
        self._seen = Seen()
        self._tally = Tally(_TALLIED)
        self._settings = RemoteSettings(
            url=url or (folder / "remote").as_uri(),
            secret_file=str(folder / "secret"),
            publish_plain=True,
            publish_after=1,
        )
        make_secret(folder / "secret")
        (folder / "remote").mkdir()
        for number in range(_MACHINES):
            (folder / f"machine-{number}" / "journals").mkdir(parents=True)

    def run(self, seconds: float) -> Seen:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._seen.findings:
            self._storm()
            for number in range(_MACHINES):
                self._seen.findings += in_child(partial(self._judge, number))
            self._seen.rounds += 1
        found, wrong = in_child(self._new_machine)
        self._seen.found = found
        self._seen.findings += wrong
        self._seen.work = self._tally.totals()
        return self._seen

    def _home(self, machine: int) -> Path:
        return self._folder / f"machine-{machine}"

    @contextlib.contextmanager
    def _opened(self, root: Path, max_bytes: int) -> Iterator[tuple[Store, Remote]]:
        with Store.open(root, max_bytes=max_bytes, min_free_bytes=0, run_tokens=64) as store:
            remote = Remote.open(store, self._settings)
            try:
                yield store, remote
            finally:
                remote.close()

    # ---- processes ---------------------------------------------------------------------------

    def _storm(self) -> None:
        """Two processes on each machine, killed at random moments."""
        living: dict[int, float] = {}
        for row in range(2 * _MACHINES):
            seed = self._dice.getrandbits(48)
            child = os.fork()
            if child == 0:
                self._tally.row = row
                self._main(row % _MACHINES, seed)
            living[child] = time.monotonic() + self._dice.uniform(0.1, 1.2)
        while living:
            for child, doomed in list(living.items()):
                if time.monotonic() < doomed:
                    continue
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                self._seen.kills += 1
                del living[child]
                if (code := os.waitstatus_to_exitcode(status)) != -signal.SIGKILL:
                    self._seen.findings.append(f"a machine's process ended by itself with {code}")
            self._sample(list(living))
            time.sleep(0.02)

    def _sample(self, living: list[int]) -> None:
        """Count the bytes of each store while nobody moves."""
        stopped = []
        for child in living:
            os.kill(child, signal.SIGSTOP)
            _, status = os.waitpid(child, os.WUNTRACED)
            if os.WIFSTOPPED(status):
                stopped.append(child)
        try:
            taken = [disk_usage(self._home(number) / "store") for number in range(_MACHINES)]
        finally:
            for child in stopped:
                os.kill(child, signal.SIGCONT)
        self._seen.samples += 1
        for number, (nbytes, budget) in enumerate(zip(taken, _BUDGETS, strict=True)):
            if nbytes > budget:
                self._seen.findings.append(
                    f"machine {number}: {nbytes} bytes on disk, the budget is {budget}"
                )

    def _main(self, machine: int, seed: int) -> None:
        """The whole life of a process."""
        status = 3
        try:
            dice = random.Random(seed)
            home = self._home(machine)
            journal = Journal(home / "journals" / f"{os.getpid()}-{seed}.jsonl")
            with self._opened(home / "store", _BUDGETS[machine]) as (store, remote):
                give_up = time.monotonic() + 60
                while time.monotonic() < give_up:
                    try:
                        self._turn(store, remote, dice, journal)
                    except (StoreError, RemoteError):
                        self._tally.add("refused")
        finally:
            os._exit(status)

    def _turn(self, store: Store, remote: Remote, dice: random.Random, journal: Journal) -> None:
        """A request: look here, look there, compute, store, publish."""
        family, question = dice.randrange(_FAMILIES), dice.randrange(_QUESTIONS)
        model, tokens = model_of(family), tokens_of(family, question)
        known = store.match(fingerprint(weights=model), tokens)
        found = remote.bring(
            fingerprint(weights=model),
            tokens,
            known=known.num_tokens,
            limit=len(tokens),
            ends=[_SYSTEM, len(tokens)],
        )
        self._tally.add("brought" if found.is_hit else "missed")
        self._tally.add("bytes brought", found.nbytes)
        try:
            have = fetched(store, tokens, model=model)
        except AssertionError:
            journal.note("wrong", family=family, question=question)
            return
        if have < len(tokens) or dice.random() < 0.2:
            entry = put(
                store,
                tokens,
                model=model,
                complete=model == "w0",
                tier="user" if question else "system",
                real=True,
            )
            journal.note("put", family=family, question=question)
            self._tally.add("put")
            is_shared = dice.random() < 0.5
            if is_shared and remote.publish(entry).outcome is PublishOutcome.SENT:
                self._tally.add("published")
        for one in known.entries:
            remote.note_hit(one)

    # ---- afterwards --------------------------------------------------------------------------

    def _judge(self, machine: int) -> list[str]:
        """What is wrong with the store of a machine."""
        home, where = self._home(machine), f"machine {machine}"
        findings = []
        lines = list(read(home / "journals"))
        wrong = [one for one in lines if one["what"] == "wrong"]
        findings += [f"{where}: wrong bytes were served for {one}" for one in wrong]
        with Store.open(home / "store", max_bytes=_BUDGETS[machine], min_free_bytes=0) as store:
            store.gc()
            if problems := store.check(read_data=True):
                findings.append(f"{where}: {problems}")
            usage, taken = store.stats().usage, disk_usage(home / "store")
            if usage.pending or usage.trash or list((home / "store" / "tmp").iterdir()):
                findings.append(f"{where}: something was left behind: {usage}")
            if usage.total != taken:
                findings.append(f"{where}: usage says {usage.total}, du says {taken}")
            if _BUDGETS[machine] == max(_BUDGETS):
                for family, question in {
                    (one["family"], one["question"]) for one in lines if one["what"] == "put"
                }:
                    tokens = tokens_of(family, question)
                    if fetched(store, tokens, model=model_of(family)) != len(tokens):
                        findings.append(f"{where}: a prompt that was stored is lost")
        return findings

    def _new_machine(self) -> tuple[int, list[str]]:
        """What a machine that has nothing is given of all prompts, and what is wrong with it."""
        found, wrong = 0, []
        with self._opened(self._folder / "new", 1 << 28) as (store, remote):
            for family in range(_FAMILIES):
                for question in range(_QUESTIONS):
                    model, tokens = model_of(family), tokens_of(family, question)
                    remote.bring(
                        fingerprint(weights=model),
                        tokens,
                        known=0,
                        limit=len(tokens),
                        ends=[_SYSTEM, len(tokens)],
                    )
                    try:
                        found += fetched(store, tokens, model=model) > 0
                    except AssertionError:
                        wrong.append(f"the remote gave wrong bytes for {family}, {question}")
            if problems := store.check(read_data=True):
                wrong.append(f"a new machine's store: {problems}")
            if remote.status().last_error:
                wrong.append(f"what lies on the remote: {remote.status().last_error}")
        return found, wrong


def storm(
    folder: Path, report: Report, seed: int, seconds: float, *, real_s3: bool = False
) -> Seen:
    """A run, added to a report; with SeaweedFS as the remote if it is to be a real one."""
    if real_s3:
        with weed.running(folder) as server:
            os.environ.update(weed.access(server))
            url = f"s3://{weed.BUCKET}/torture"
            seen = in_child(partial(run, folder, seed, seconds, url))
    else:
        seen = in_child(partial(run, folder, seed, seconds))
    report.kills += seen.kills
    report.samples += seen.samples
    report.findings += [f"shared: {one}" for one in seen.findings]
    if not seen.findings and not (seen.work["brought"] and seen.found):
        report.findings.append("shared: nothing was fetched from the remote, so nothing was tried")
    return seen
