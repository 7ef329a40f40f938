"""A model's files are replaced under a running server, which must not notice too late.

Weights, adapter, draft model or configuration are exchanged, by rename or in place: between two
requests, while the model is loaded again, or between the reading of its files and their being
identified. Then the server is made to load: by the name of another model, or by one that does not
exist. Every answer is held against the very model that gave it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.torture import broken
from tests.torture.journal import Journal, read

VERSIONS = (1, 2)
_LIFE_S = 2.5
_HUNG_S = 60.0
_ALWAYS_AGAIN = 5
"""Changes in a row that a load suffers at most; one that goes on for ever is not waited for."""


@dataclass(frozen=True, slots=True)
class World:
    """What is served, and what of it is replaced.

    Attributes:
        kind: Name of a kind of `tiny.KINDS`.
        parts: Names of folders whose files are replaced.
        flags: Further flags of the server; a part's name in braces is its folder.
    """

    kind: str
    parts: tuple[str, ...]
    flags: tuple[str, ...] = ()


WORLDS = {
    "weights": World("plain", ("model",)),
    "adapter": World("plain", ("model", "adapter"), ("--adapter-path", "{adapter}")),
    "state": World("states", ("model",)),
    "draft": World("draft", ("model", "draft"), ("--draft-model", "{draft}")),
}
WAYS = ("rename", "rewrite", "rewrite with its old date")
MOMENTS = ("between requests", "before it is loaded", "after it was loaded")
RELOADS = ("another model", "a bad name")


@dataclass
class Seen:
    """Sums over all servers."""

    servers: int = 0
    kills: int = 0
    answers: int = 0
    tokens: int = 0
    ties: int = 0
    reused: Counter[str] = field(default_factory=Counter)
    replaced: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


# ---- files ---------------------------------------------------------------------------------------


def write_stock(folder: Path, world: World) -> None:
    """Write all versions of all parts; those of a model differ in configuration, too."""
    import mlx.core as mx

    from tests.torture import tiny

    mx.disable_compile()
    kind = tiny.KINDS[world.kind]
    for part in world.parts:
        for version in VERSIONS:
            target = folder / "stock" / f"{part}-{version}"
            if part == "adapter":
                tiny.write_adapter(target, kind, version)
            else:
                seed = version + 10 * (part == "draft")
                tiny.write_model(target, kind, seed, rope_theta=10.0**version)
        shutil.copytree(folder / "stock" / f"{part}-1", folder / part)
    tiny.write_model(folder / "another", kind, 77)


def replace(folder: Path, part: str, version: int, way: str, pattern: str = "*") -> None:
    """Exchange the files of a part for those of a version, while anybody may have them open."""
    for new in sorted((folder / "stock" / f"{part}-{version}").glob(pattern)):
        old = folder / part / new.name
        if way == "rename":
            beside = folder / f"{new.name}.new"
            shutil.copyfile(new, beside)
            os.replace(beside, old)
            continue
        dates = old.stat()
        with old.open("r+b") as file:
            file.write(new.read_bytes())
            file.truncate()
        if way != "rewrite":
            os.utime(old, ns=(dates.st_atime_ns, dates.st_mtime_ns))


# ---- one server ----------------------------------------------------------------------------------


class Life:
    """A server's clients, who replace its model; runs in the server's process."""

    def __init__(
        self, folder: Path, world: World, seed: int, journal: Journal, seconds: float
    ) -> None:
        self._folder = folder
        self._world = world
        self._dice = random.Random(seed)
        self._journal = journal
        self._seconds = seconds
        self._moment = ""
        self._again = 0
        self._versions = dict.fromkeys(world.parts, 1)
        self._last = "nothing was replaced"

    def drive(self, session: Any) -> None:
        """Replace, have it load again, ask, judge; for so long."""
        from mlx_lm import server as upstream

        load = upstream.load

        def watched(*args: Any, **options: Any) -> Any:
            self._reached("before it is loaded")
            loaded = load(*args, **options)
            self._reached("after it was loaded")
            return loaded

        upstream.load = watched
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            self._step(session)

    def _step(self, session: Any) -> None:
        """Ask before and after a change, and once more when all has been loaded again."""
        chats = [self._chat() for _ in range(self._dice.choice((1, 1, 2)))]
        if self._dice.random() < 0.2:
            self._ask(session, chats)
        self._moment = self._dice.choice(MOMENTS)
        self._again = self._dice.choice((1, 1, 1, 2, _ALWAYS_AGAIN))
        self._reached("between requests")
        if self._moment != "between requests" or self._dice.random() < 0.85:
            self._reload(session)
        self._ask(session, chats)
        if self._moment != "between requests":
            self._reload(session)
            self._ask(session, chats)

    def _reload(self, session: Any) -> None:
        """Make the next request load the model again."""
        from tests.torture.serving import Ask

        other = self._dice.choice(RELOADS)
        name = str(self._folder / ("another" if other == "another model" else "no such model"))
        # Only the load of the model that is asked for next is disturbed.
        moment, self._moment = self._moment, ""
        session.ask(Ask([{"role": "user", "content": "w1"}], model=name, max_tokens=1))
        self._moment = moment
        self._last = f"{self._last.partition(', then')[0]}, then {other}"

    def _ask(self, session: Any, chats: Sequence[Sequence[dict[str, str]]]) -> None:
        """Send requests at once, and judge the answers."""
        from tests.torture.serving import Ask, judge
        from tests.torture.tiny import KINDS

        for answer in session.ask_all([Ask(chat, max_tokens=3) for chat in chats]):
            if answer.error:
                self._journal.note("refused", error=f"{self._last}: {answer.error}")
                continue
            judged = judge(answer, KINDS[self._world.kind].tolerance)
            self._journal.note(
                "answer",
                tokens=judged.tokens,
                ties=judged.ties,
                source=answer.source,
                reused=answer.reused,
                wrong=f"{self._last}: {judged.said}" if judged.wrong else "",
            )

    def _reached(self, moment: str) -> None:
        """Replace something if it is to be done now."""
        if moment != self._moment or self._again == 0:
            return
        self._again = 0 if moment == MOMENTS[0] else self._again - 1
        part, way = self._dice.choice(self._world.parts), self._dice.choice(WAYS)
        version = self._versions[part] = VERSIONS[self._versions[part] % len(VERSIONS)]
        pattern = self._dice.choice(("*", "*", "*.safetensors", "*config.json"))
        replace(self._folder, part, version, way, pattern)
        self._last = f"{pattern} of {part} {version}, by {way} {moment}"
        self._journal.note("replaced", part=part, way=way, moment=moment)

    def _chat(self) -> list[dict[str, str]]:
        """One of a few chats that share beginnings, so that what is stored is found again."""
        talk = random.Random(self._dice.randrange(2))
        words = [f"w{talk.randrange(80)}" for _ in range(90)]
        said = [
            {"role": "system", "content": " ".join(words[:50])},
            {"role": "user", "content": " ".join(words[50:70])},
            {"role": "assistant", "content": " ".join(words[70:75])},
            {"role": "user", "content": " ".join(words[75:])},
        ]
        return said[: self._dice.choice((2, 4))]


# ---- all of them ---------------------------------------------------------------------------------


def run(folder: Path, seed: int, seconds: float, breaks: str = "") -> Seen:
    """Servers one after the other, each on the store of the one before; every other is killed."""
    from tests.torture import serving

    folder.mkdir(exist_ok=True)
    dice = random.Random(seed)
    seen = Seen()
    end = time.monotonic() + seconds
    names = list(WORLDS)
    each = min(4 * _LIFE_S, seconds / len(WORLDS))
    number = 0
    while time.monotonic() < end and not (breaks and seen.findings) and len(seen.findings) < 20:
        name = names[number % len(names)]
        number += 1
        home = folder / f"world-{number}"
        home.mkdir()
        serving.prepare_process(home / "home")
        _world(home, name, dice, min(end, time.monotonic() + each), seen, breaks)
        shutil.rmtree(home)
    return seen


def _world(home: Path, name: str, dice: random.Random, end: float, seen: Seen, breaks: str) -> None:
    """A few servers on one store."""
    world = WORLDS[name]
    forked(partial(write_stock, home, world), _HUNG_S)
    (home / "journals").mkdir()
    life = 0
    while time.monotonic() < end and not (breaks and seen.findings):
        life += 1
        journal = home / "journals" / f"{life:03}.jsonl"
        kill = dice.random() < 0.4
        seconds = max(0.5, min(_LIFE_S, end - time.monotonic()))
        code = forked(
            partial(_live, home, world, dice.getrandbits(48), journal, seconds, breaks),
            seconds + _HUNG_S,
            kill_after=dice.uniform(0.3, 1.0) * seconds if kill else None,
        )
        seen.servers += 1
        where = f"model replaced ({name}), server {life}"
        if code == -signal.SIGKILL and kill:
            seen.kills += 1
        elif code != 0:
            seen.findings.append(f"{where}: it ended with {code}")
        _add_up(journal, where, seen)


def _add_up(journal: Path, where: str, seen: Seen) -> None:
    """Take over what one server's clients noted; of many wrong answers the first ones are told."""
    wrong = []
    for note in read(journal):
        if note["what"] == "replaced":
            seen.replaced.update([note["part"], note["way"], note["moment"]])
        elif note["what"] == "answer":
            seen.answers += 1
            seen.tokens += note["tokens"]
            seen.ties += note["ties"]
            seen.reused[note["source"]] += note["reused"]
            if note["wrong"]:
                wrong.append(f"{where}: {note['wrong']}")
        elif note["what"] == "refused":
            wrong.append(f"{where}: {note['error']}")
    seen.findings += wrong[:3]


def _live(home: Path, world: World, seed: int, journal: Path, seconds: float, breaks: str) -> None:
    from persist_cache.server.launch import ServeOptions
    from tests.torture import serving, tiny

    broken.install(breaks)
    folders = {part: str(home / part) for part in world.parts}
    flags = [flag.format(**folders) for flag in world.flags]
    life = Life(home, world, seed, Journal(journal), seconds)
    serving.serve(
        ["--model", folders["model"], *tiny.KINDS[world.kind].flags, *flags],
        ServeOptions(store=str(home / "store"), min_free_bytes=0),
        life.drive,
    )


def forked(
    function: Callable[[], object], timeout_s: float, *, kill_after: float | None = None
) -> int:
    """Run `function` in a forked child, which may be killed after some seconds.

    Returns:
        Its exit status; minus the signal that ended it.
    """
    child = os.fork()
    if child == 0:
        code = 3
        try:
            function()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(code)
    started = time.monotonic()
    limit = timeout_s if kill_after is None else kill_after
    while time.monotonic() - started < limit:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    if kill_after is None:
        # What hung says where.
        os.kill(child, signal.SIGABRT)
        time.sleep(0.2)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
