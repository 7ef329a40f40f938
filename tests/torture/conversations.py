"""Random conversations with a real server and every kind of cache, against answers without one.

`scripts/conversations` runs it. A *world* is a tiny model of one kind, its other versions, and a
store; servers live in it one after the other, in processes that end or are killed. What each
answers is held against the model that gave it, run without any cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.fakes import eager_gc
from tests.torture.journal import Journal, read
from tests.torture.replaced import VERSIONS, World, forked, replace, write_stock

_WORLD_S = 25.0
_LIFE_S = (1.0, 10.0)
_HUNG_S = 120.0
_WITH_ADAPTERS = ("plain", "thinking", "sliding")
"""Not what is quantized: adapters this coarse would make a mountain of each rounded row."""


@dataclass
class Sums:
    """What was tried and found, of one kind or of all."""

    counts: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    findings: list[str] = field(default_factory=list)

    def add(self, other: Sums) -> None:
        self.counts += other.counts
        self.worst = max(self.worst, other.worst)
        self.findings += other.findings


# ---- one server ----------------------------------------------------------------------------------


@dataclass
class Life:
    """The clients of one server, in its process."""

    home: Path
    world: World
    seed: int
    journal: Journal
    seconds: float
    talks: Any
    alone: float = 0.0
    swaps: float = 0.08

    def drive(self, session: Any) -> None:
        """Ask, judge, keep what was said; now and then replace what is served."""
        dice = random.Random(self.seed)
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            if dice.random() < self.swaps:
                self._swap(session, dice)
            asks = self.talks.asks(dice, self._models(dice))
            if dice.random() < self.alone:
                from dataclasses import replace as changed

                asks = [(number, changed(ask, seed=7)) for number, ask in asks]
            beside = partial(self._tidy, session, dice.random(), dice.getrandbits(32))
            answers = session.ask_all([ask for _, ask in asks], beside)
            for (number, _), answer in zip(asks, answers, strict=True):
                self._judge(number, answer)
        problems = session.generator.cache.stats().problems
        self.journal.note("end", problems=dict(problems))

    def _models(self, dice: random.Random) -> list[dict[str, Any]]:
        """What requests of one moment may name: mostly what the server was started with."""
        if dice.random() > 0.15:
            return [{}]
        named = [{}, {"model": str(self.home / "another")}]
        if "adapter" in self.world.parts:
            main = str(self.home / "model")
            named += [{"model": main, "adapter": str(self.home / "adapter")}, {"model": main}]
        return named

    def _tidy(self, session: Any, which: float, seed: int) -> None:
        """What may be done to memory and disk while requests are answered, sometimes."""
        dice = random.Random(seed)
        cache, store = session.generator.cache, session.store
        if which < 0.03:
            cache.trim_to(n_sequences=dice.randrange(3))
        elif which < 0.06:
            cache.flush(5.0)
        elif which < 0.09 and store is not None:
            ids = [entry.id for entry in store.entries()]
            with contextlib.suppress(KeyError):  # it has gone by itself
                store.evict(dice.sample(ids, min(2, len(ids))))
        elif which < 0.1 and store is not None:
            store.gc()

    def _swap(self, session: Any, dice: random.Random) -> None:
        from tests.torture.serving import Ask

        part = dice.choice(self.world.parts)
        way = dice.choice(("rename", "rewrite"))
        replace(self.home, part, dice.choice(VERSIONS), way)
        self.journal.note("swap")
        if dice.random() < 0.8:
            name = self.home / dice.choice(("another", "no such model"))
            chat = [{"role": "user", "content": "w1"}]
            session.ask(Ask(chat, model=str(name), max_tokens=1))

    def _judge(self, number: int, answer: Any) -> None:
        from tests.torture.serving import judge
        from tests.torture.tiny import KINDS

        kind = KINDS[self.world.kind]
        if answer.error:
            self.journal.note("refused", error=answer.error[:300])
            return
        judged = judge(answer, kind.tolerance)
        self.talks.answered(number, answer)
        self.journal.note(
            "answer",
            talk=number,
            messages=self.talks.known.get(number, []),
            opened=len(answer.ask.messages) <= 2,
            left=answer.ask.leave_after is not None,
            tokens=judged.tokens,
            ties=judged.ties,
            wrong=judged.wrong,
            worst=judged.worst,
            said=judged.said,
            source=answer.source,
            reused=answer.reused,
        )


# ---- worlds --------------------------------------------------------------------------------------


def run(
    folder: Path, seed: int, seconds: float, kinds: Sequence[str], *, swaps: bool = True
) -> dict[str, Sums]:
    """One world after the other, of every kind in turn, for so long; sums by kind.

    A short run may take longer: it visits every kind once.
    """
    from tests.torture import serving

    dice = random.Random(seed)
    end = time.monotonic() + seconds
    sums: dict[str, Sums] = {}
    each = min(_WORLD_S, seconds / len(kinds))
    number = 0
    while number < len(kinds) or time.monotonic() < end:
        if number % len(kinds) == 0:
            order = dice.sample(kinds, len(kinds))
        name = order[number % len(kinds)]
        number += 1
        home = folder / f"world-{number}"
        home.mkdir(parents=True)
        serving.prepare_process(home / "home")
        where = f"world {number} ({name})"
        stop = time.monotonic() + each
        sums.setdefault(name, Sums()).add(
            _world(home, name, dice.getrandbits(48), stop, where, swaps)
        )
        shutil.rmtree(home)
    return sums


def _world(home: Path, name: str, seed: int, end: float, where: str, swaps: bool) -> Sums:
    """The servers of one store."""
    from tests.torture.talks import Talks
    from tests.torture.tiny import KINDS

    dice = random.Random(seed)
    parts = ["model"]
    if KINDS[name].draft:
        parts.append("draft")
    if name in _WITH_ADAPTERS:
        parts.append("adapter")
    world = World(name, tuple(parts), ("--draft-model", "{draft}") if KINDS[name].draft else ())
    code = forked(partial(write_stock, home, world), _HUNG_S)
    sums = Sums(Counter(worlds=1))
    if code != 0:
        sums.findings.append(f"{where}: its model could not be written")
        return sums
    (home / "journals").mkdir()
    talks = Talks.begun(seed)
    alone = 1.0 if KINDS[name].alone else dice.choice((0.0, 0.0, 0.2, 1.0))
    life = 0
    while life == 0 or time.monotonic() < end:
        life += 1
        journal = home / "journals" / f"{life:04}.jsonl"
        seconds = min(dice.uniform(*_LIFE_S), max(0.5, end - time.monotonic()))
        # The time to start and load comes before the first request.
        kill = dice.uniform(0.2, seconds + 0.3) if dice.random() < 0.5 else None
        flags = _flags(dice)
        code = forked(
            partial(
                _live,
                home,
                world,
                dice.getrandbits(48),
                journal,
                seconds,
                talks,
                alone,
                swaps,
                flags,
            ),
            seconds + _HUNG_S,
            kill_after=kill,
        )
        what = f"{where}, server {life} {' '.join(flags)}"
        if kill is not None and code == -signal.SIGKILL:
            sums.counts["killed"] += 1
        elif code == 0:
            sums.counts["ended"] += 1
        else:
            sums.findings.append(f"{what}: it ended with {code}")
        _collect(journal, talks, sums, what)
    return sums


def _flags(dice: random.Random) -> list[str]:
    flags = ["--prompt-cache-size", str(dice.choice((1, 3, 10, 30)))]
    flags += ["--prefill-step-size", str(dice.choice((16, 50, 2048)))]
    flags += ["--decode-concurrency", str(dice.choice((1, 2, 32)))]
    if dice.random() < 0.2:
        flags += ["--prompt-cache-bytes", str(dice.choice((0, 200_000)))]
    return flags


def _live(
    home: Path,
    world: World,
    seed: int,
    journal: Path,
    seconds: float,
    talks: Any,
    alone: float,
    swaps: bool,
    flags: list[str],
) -> None:
    from persist_cache.server.launch import ServeOptions
    from tests.torture import serving, tiny

    dice = random.Random(seed)
    life = Life(home, world, seed, Journal(journal), seconds, talks, alone, 0.08 * swaps)
    own = [flag.format(draft=str(home / "draft")) for flag in world.flags]
    roomy, tight = 1 << 30, 1_500_000
    options = ServeOptions(
        store=str(home / "store"),
        min_free_bytes=0,
        disk_bytes=dice.choice((roomy, roomy, roomy, tight)),
        memory_bytes=dice.choice((None, None, None, 0)),
    )
    # A server that is soon idle saves and merges often; it merges whatever it may.
    with eager_gc() if dice.random() < 0.5 else contextlib.nullcontext():
        serving.serve(
            ["--model", str(home / "model"), *tiny.KINDS[world.kind].flags, *own, *flags],
            options,
            life.drive,
            idle_s=dice.choice((0.02, 2.0)),
        )


def _collect(journal: Path, talks: Any, sums: Sums, where: str) -> None:
    """Add up what a server's clients noted, and know what was said when it died."""
    for note in read(journal):
        if note["what"] == "answer":
            sums.counts.update(
                {
                    "requests": 1,
                    "tokens": note["tokens"],
                    "ties": note["ties"],
                    "wrong": note["wrong"],
                    "conversations": int(note["opened"]),
                    "aborts": int(note["left"]),
                    f"from {note['source']}": note["reused"],
                    f"requests from {note['source']}": 1,
                }
            )
            sums.worst = max(sums.worst, note["worst"])
            if note["messages"]:
                talks.known[note["talk"]] = note["messages"]
            if note["wrong"]:
                sums.findings.append(f"{where}: {note['said']}")
        elif note["what"] == "refused":
            sums.findings.append(f"{where}: a request was refused: {note['error']}")
        elif note["what"] == "swap":
            sums.counts["swaps"] += 1
        elif note["what"] == "end":
            for problem, count in note["problems"].items():
                sums.counts[f"problem: {problem}"] += count
                if problem.startswith(("fetch_failed", "insert_failed", "look_up_failed")):
                    sums.findings.append(f"{where}: {problem}")


# ---- the command line ----------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Talk for some minutes; returns 0 when every answer was right."""
    from tests.torture.tiny import KINDS

    parser = argparse.ArgumentParser(prog="scripts/conversations", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1, help="decides all but the scheduling")
    parser.add_argument("--kind", action="append", help="of cache; default: all", choices=KINDS)
    parser.add_argument("--folder", help="where stores are made; default: memory, if there is any")
    parser.add_argument("--no-swaps", action="store_true", help="leave models as they are")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.folder is None and os.access("/dev/shm", os.W_OK):
        options.folder = "/dev/shm"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    logging.disable(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp(prefix="persist-cache-conversations-", dir=options.folder))
    started = time.monotonic()
    try:
        sums = run(
            folder,
            options.seed,
            60 * options.minutes,
            options.kind or sorted(KINDS),
            swaps=not options.no_swaps,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - started
    total = Sums()
    for one in sums.values():
        total.add(one)
    if options.json:
        said = {"seed": options.seed, "seconds": round(seconds, 1), "worst": total.worst}
        kinds = {name: one.counts for name, one in sorted(sums.items())}
        print(json.dumps({**said, "all": total.counts, "kinds": kinds, "findings": total.findings}))
    else:
        _print(options.seed, seconds, sums, total)
    return 1 if total.findings or not total.counts["tokens"] else 0


_ROWS = (
    ("conversations begun", "conversations"),
    ("requests answered", "requests"),
    ("  reusing a beginning from memory", "requests from memory"),
    ("  reusing a beginning from disk", "requests from disk"),
    ("prompt tokens reused from memory", "from memory"),
    ("prompt tokens reused from disk", "from disk"),
    ("servers that ended", "ended"),
    ("servers killed", "killed"),
    ("clients gone in the middle", "aborts"),
    ("models or adapters replaced", "swaps"),
    ("tokens compared", "tokens"),
    ("  ties passed over", "ties"),
    ("  wrong", "wrong"),
)


def _print(seed: int, seconds: float, sums: dict[str, Sums], total: Sums) -> None:
    machine = f"{os.cpu_count()}-core {platform.machine()}, {platform.system()}"
    print(f"{machine}; {seconds:.0f} s; seed {seed}; Python {platform.python_version()}")
    for title, name in _ROWS:
        print(f"  {title:<48}{total.counts[name]:>12,}")
    print(
        f"\n  {'kind':<22}{'requests':>10}{'tokens':>10}{'disk':>10}{'ties':>7}{'wrong':>7}  worst"
    )
    for name, one in sorted(sums.items()):
        values = [one.counts[key] for key in ("requests", "tokens", "from disk", "ties", "wrong")]
        line = "".join(
            f"{value:>{width},}" for value, width in zip(values, (10, 10, 10, 7, 7), strict=True)
        )
        print(f"  {name:<22}{line}  {one.worst:.1e}")
    others = {name: n for name, n in total.counts.items() if name.startswith("problem: ")}
    for name, count in sorted(others.items()):
        print(f"  {name}: {count:,}")
    print(f"\nfindings: {len(total.findings)}")
    for finding in total.findings[:10]:
        print(f"- {finding}")


if __name__ == "__main__":
    sys.exit(main())
