"""A server and its users for half an hour: conversations, retries, restarts, two models.

`scripts/soak` runs it. The server is a process of its own, and everything is seen from outside, as
users and administrators see it: answers, what they say was cached, seconds, threads, descriptors,
memory, blocks on disk. Each answer is held against its model, run without a cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fakes import disk_usage
from tests.server_process import ServerProcess
from tests.torture.users import HUNG_S, Asked, Gate, Message, Report, User, ask

_SIZES: dict[str, dict[str, int]] = {
    "plain": {"max_position_embeddings": 8192},
    "sliding": {"max_position_embeddings": 8192},
}
_DISK_BYTES = 48_000_000
_MEMORY_BYTES = 32_000_000
_FLAGS = ("--prompt-cache-size", "40", "--prompt-cache-bytes", str(_MEMORY_BYTES), "--log-level")
_RENAMED = {"<think>": "w100", "</think>": "w101"}
_LIFE_S = (100.0, 300.0)
_CALM_EVERY_S = 30.0
_TIMES_ALONE = 10.0


@dataclass
class Seen:
    """A server process, while nothing was asked of it."""

    threads: int
    descriptors: int
    memory: int

    @classmethod
    def of(cls, pid: int) -> Seen:
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        return cls(
            threads=int(status["Threads"]),
            descriptors=len(os.listdir(f"/proc/{pid}/fd")),
            memory=int(status["VmRSS"].split()[0]) * 1024,
        )


# ---- the reference -------------------------------------------------------------------------------


def judge(asked: Sequence[Asked], models: dict[str, Path], report: Report) -> None:
    """Hold replies against their models without a cache."""
    import mlx.core as mx
    from mlx_lm.utils import load

    from tests.torture.tiny import KINDS, VOCABULARY

    numbers = {_RENAMED.get(word, word): number for number, word in enumerate(VOCABULARY)}
    for name, path in models.items():
        model, tolerance = load(str(path))[0], KINDS[name].tolerance
        said = sorted(
            ((*_whole(one, numbers), one) for one in asked if one.model == name),
            key=lambda said: said[1],
            reverse=True,
        )
        whole: list[int] = []
        for start, tokens, one in said:
            if start != one.prompt_tokens:
                report.find(f"{start} tokens were asked, usage says {one.prompt_tokens}")
                continue
            if whole[: len(tokens)] != tokens:  # a conversation's last request has the others
                whole = tokens
                logits = model(mx.array([whole]))[0]
                mx.eval(logits)
            reply = mx.array(tokens[start:])
            rows = logits[start - 1 : len(tokens) - 1]
            gaps = rows.max(axis=-1) - rows[mx.arange(reply.size), reply]
            wrong = int((gaps > tolerance).sum())
            report.count("tokens", reply.size)
            report.count("wrong", wrong)
            if wrong:
                report.find(
                    f"{wrong} of {reply.size} tokens are wrong, {one.cached} of {start} "
                    f"from {one.source}, model {name}: by up to {float(gaps.max()):.2g}"
                )


def _whole(one: Asked, numbers: dict[str, int]) -> tuple[int, list[int]]:
    """Length of the prompt, and its tokens with those of the reply."""
    prompt = tokens_of(one.messages, numbers)
    reply = [numbers[word] for word in one.text.split()]
    return len(prompt), [*prompt, *reply, *[numbers["<|end|>"]][: one.ended]]


def tokens_of(messages: Sequence[Message], numbers: dict[str, int]) -> list[int]:
    """The tokens of a chat by the template of the tiny models."""
    words = [
        word
        for one in messages
        for word in ("<|start|>", one["role"], *one["content"].split(), "<|end|>")
    ]
    return [numbers[word] for word in (*words, "<|start|>", "assistant")]


# ---- time alone ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alone:
    """What a request takes that has a server to itself.

    Attributes:
        base: Seconds of any request.
        computed: Seconds more for each token of its prompt that is computed.
        token: Seconds more for each token of its reply.
        swap: Seconds more if another model has to be loaded.
    """

    base: dict[str, float]
    computed: dict[str, float]
    token: dict[str, float]
    swap: float

    @classmethod
    def measured(cls, port: int, models: dict[str, Path]) -> Alone:
        dice = random.Random(0)

        def took(name: str, prompt: int, reply: int) -> float:
            text = " ".join(f"w{dice.randrange(80)}" for _ in range(prompt))
            chat = [{"role": "user", "content": text}]
            started = time.monotonic()
            said = ask(port, models[name], chat, max_tokens=reply, stream=True)
            seconds = time.monotonic() - started
            done = len(said["text"].split()) + said["ended"]
            replies.append((done, seconds))
            return seconds

        base, computed, token = {}, {}, {}
        replies: list[tuple[int, float]] = []
        for name in models:
            took(name, 10, 1)
            short = statistics.median(took(name, 20, 1) for _ in range(9))
            long = statistics.median(took(name, 1500, 1) for _ in range(5))
            replies = []
            for _ in range(9):
                took(name, 20, 48)
            base[name] = short
            computed[name] = (long - short) / 1480
            token[name] = statistics.median(
                (seconds - short) / max(1, done - 1) for done, seconds in replies
            )
        first, second = models
        swaps = [took(name, 20, 1) - base[name] for name in (first, second) * 3]
        return cls(base, computed, token, max(0.0, statistics.median(swaps)))

    def of(self, one: Asked) -> float:
        """Seconds that an answer would have taken alone."""
        name = one.model
        return (
            self.base[name]
            + self.computed[name] * (one.prompt_tokens - one.cached)
            + self.token[name] * max(0, len(one.text.split()) - 1)
            + self.swap * one.swapped
        )


def _without_thoughts(model: Path) -> Path:
    """Have it say nothing that a server would answer in another field than the reply's text."""
    path = model / "tokenizer.json"
    text = path.read_text()
    for word, other in _RENAMED.items():
        text = text.replace(json.dumps(word), json.dumps(other))
    path.write_text(text)
    return model


# ---- the run -------------------------------------------------------------------------------------


class Soak:
    """The users, and the servers that they talk to, one after the other."""

    def __init__(self, folder: Path, seed: int, users: int) -> None:
        from tests.torture.tiny import KINDS, write_model

        self._folder = folder
        self._dice = random.Random(seed)
        self.report = Report()
        self.calm: list[list[Seen]] = []
        self.most_disk = 0
        self.most_memory = 0
        self.models = {
            name: _without_thoughts(write_model(folder / name, KINDS[name], 0, **sizes))
            for name, sizes in _SIZES.items()
        }
        self._server: ServerProcess | None = None
        self._users = [User(number, seed, self.models, self._port) for number in range(users)]

    def _port(self) -> int:
        return self._server.port if self._server is not None else 1

    def _new(self, store: str) -> ServerProcess:
        return ServerProcess(
            self.models["plain"],
            self._folder / store,
            self._folder / "logs",
            flags=(*_FLAGS, "WARNING"),
            disk_bytes=_DISK_BYTES,
            min_free_bytes=0,
        )

    def run(self, seconds: float) -> Alone:
        """Let them talk for so long."""
        with self._new("alone") as server:
            alone = Alone.measured(server.port, self.models)
        gate, done = Gate(), threading.Event()
        threads = [
            threading.Thread(target=user.run, args=(gate, self.report, done))
            for user in self._users
        ]
        end = time.monotonic() + seconds
        for thread in threads:
            thread.start()
        try:
            for life in itertools.count():
                self._life(gate, min(end, time.monotonic() + self._dice.uniform(*_LIFE_S)), life)
                if time.monotonic() > end:
                    break
        finally:
            done.set()
            gate.open()
            for thread in threads:
                thread.join()
        judge(self.report.asked, self.models, self.report)
        return alone

    def _life(self, gate: Gate, end: float, life: int) -> None:
        server = self._new("store")
        server.start()
        self._server = server
        assert server.process is not None
        self.calm.append([])
        self.report.started("plain")
        gate.open()
        while time.monotonic() < end:
            calm = min(end, time.monotonic() + _CALM_EVERY_S)
            while time.monotonic() < calm:
                self._look_at_disk()
                time.sleep(0.2)
            if time.monotonic() < end:
                self._look_calmly(server, gate)
        if server.process.poll() is not None:
            self.report.find(f"server {life} ended by itself: {server.log.read_text()[-300:]}")
        elif self._dice.random() < 0.5:
            self.report.count("stopped")
            status = server.stop()
            if status not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):
                self.report.find(f"server {life} ended with {status}")
        else:
            self.report.count("killed")
            server.kill()

    def _look_at_disk(self) -> None:
        used = disk_usage(self._folder / "store")
        self.most_disk = max(self.most_disk, used)
        if used > _DISK_BYTES:
            self.report.find(f"{used:,} bytes on disk")

    def _look_calmly(self, server: ServerProcess, gate: Gate) -> None:
        """Look at an idle process, and at what it holds in memory."""
        assert server.process is not None
        if not gate.shut(HUNG_S):
            self.report.find("requests did not end")
        # A prefill whose client is gone goes on for its patience; what is to be saved is saved.
        time.sleep(12)
        self.calm[-1].append(Seen.of(server.process.pid))
        stats = server.get("/v1/cache/stats")
        held = sum(tier["bytes"] for tier in stats["server"]["memory"]["tiers"])
        self.most_memory = max(self.most_memory, held)
        if held > _MEMORY_BYTES:
            self.report.find(f"{held:,} bytes in memory")
        gate.open()


def growth(lives: Sequence[Sequence[Seen]]) -> list[str]:
    """What grew in a process between its first calm minute and its last one, in sentences.

    Threads and descriptors are held against the most of the first two; memory against the second,
    when caches are full, with as much again as caches may take.
    """
    found = []
    for number, life in enumerate(lives):
        if len(life) < 4:
            continue
        first, last = life[:2], life[-1]
        for name in ("threads", "descriptors"):
            before, after = max(getattr(one, name) for one in first), getattr(last, name)
            if after > before + 2:
                found.append(f"server {number}: {before} {name}, then {after}")
        if last.memory > first[1].memory + _MEMORY_BYTES:
            found.append(f"server {number}: {first[1].memory:,} bytes, then {last.memory:,}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 when every answer was right, in time, and nothing grew."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--folder", help="where stores are made; default: memory, if there is any")
    options = parser.parse_args(arguments)
    if options.folder is None and os.access("/dev/shm", os.W_OK):
        options.folder = "/dev/shm"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    folder = Path(tempfile.mkdtemp(prefix="persist-cache-soak-", dir=options.folder))
    os.environ["PERSIST_CACHE_HOME"] = str(folder / "home")
    try:
        soak = Soak(folder, options.seed, options.users)
        alone = soak.run(60 * options.minutes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report = soak.report
    report.findings += growth(soak.calm)
    ratios = sorted((one.seconds / alone.of(one), one) for one in report.asked)
    slow = [(ratio, one) for ratio, one in ratios if ratio > _TIMES_ALONE]
    report.findings += [
        f"{one.seconds:.2f} s, {ratio:.1f} times its time alone: {one.model}, "
        f"{one.prompt_tokens - one.cached} of {one.prompt_tokens} tokens computed, "
        f"{len(one.text.split())} generated, {'a' if one.swapped else 'no'} change of the model"
        for ratio, one in slow
    ]
    _print(options, soak, alone, [ratio for ratio, _ in ratios])
    return 1 if report.findings or not report.counts["tokens"] else 0


def _print(options: argparse.Namespace, soak: Soak, alone: Alone, ratios: Sequence[float]) -> None:
    machine = f"{os.cpu_count()}-core {platform.machine()}, {platform.system()}"
    print(
        f"{machine}; {options.minutes:g} min, {options.users} conversations at a time, "
        f"seed {options.seed}; Python {platform.python_version()}"
    )
    report = soak.report
    asked = report.asked
    lives = [life for life in soak.calm if len(life) > 1]
    rows: list[tuple[str, str]] = [
        ("requests answered", f"{len(asked):,}"),
        ("  a beginning from memory", f"{sum(one.source == 'memory' for one in asked):,}"),
        ("  a beginning from disk", f"{sum(one.source == 'disk' for one in asked):,}"),
        ("prompt tokens", f"{sum(one.prompt_tokens for one in asked):,}"),
        ("  not computed", f"{sum(one.cached for one in asked):,}"),
        ("given up by the client", f"{report.counts['given up']:,}"),
        ("cut by a restart", f"{report.counts['cut by a restart']:,}"),
        ("servers stopped, killed", f"{report.counts['stopped']}, {report.counts['killed']}"),
        ("requests that a model was loaded for", f"{sum(one.swapped for one in asked):,}"),
        ("tokens compared", f"{report.counts['tokens']:,}"),
        ("  wrong", f"{report.counts['wrong']:,}"),
        ("most bytes on disk, of the budget", f"{soak.most_disk / _DISK_BYTES:.1%}"),
        ("most bytes in memory, of the limit", f"{soak.most_memory / _MEMORY_BYTES:.1%}"),
        (
            "threads, first and last of each server",
            " ".join(f"{one[0].threads}-{one[-1].threads}" for one in lives),
        ),
        (
            "descriptors",
            " ".join(f"{one[0].descriptors}-{one[-1].descriptors}" for one in lives),
        ),
        (
            "MB resident",
            " ".join(f"{one[0].memory / 1e6:.0f}-{one[-1].memory / 1e6:.0f}" for one in lives),
        ),
    ]
    if ratios:
        places = [statistics.median(ratios), ratios[int(len(ratios) * 0.99)], ratios[-1]]
        rows.append(
            ("seconds, of those alone: median, 99 %, worst", " ".join(f"{r:.1f}" for r in places))
        )
    for title, value in rows:
        print(f"  {title:<48}{value}")
    for name in _SIZES:
        computed, token = 1e6 * alone.computed[name], 1e3 * alone.token[name]
        print(
            f"  alone, {name}: {1e3 * alone.base[name]:.0f} ms, {computed:.0f} µs for a token "
            f"computed, {token:.1f} ms for one generated"
        )
    print(f"  alone, another model: {1e3 * alone.swap:.0f} ms more")
    print(f"\nfindings: {len(report.findings)}")
    for finding in report.findings[:20]:
        print(f"- {finding}")


if __name__ == "__main__":
    sys.exit(main())
