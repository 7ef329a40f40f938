"""Users of a chat server: conversations of clients that think, give up, come again.

They speak HTTP as any client does; what they saw of each answer is theirs to report.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LONGEST = 3000
"""Tokens at which a conversation ends and its user begins another one."""
HUNG_S = 60.0

Message = dict[str, str]


@dataclass(frozen=True)
class Asked:
    """A request that was answered.

    Attributes:
        model: Of which model.
        messages: The chat.
        text: The reply.
        ended: Whether the model ended it, rather than the limit.
        prompt_tokens: Length of the prompt, by the usage.
        cached: Tokens of it that were not computed, by the usage.
        source: Where they came from, by the header.
        seconds: From sending it to the last byte.
        swapped: Whether its model had to be loaded for it, because the server had turned to another
            one before it was sent, or did so before it was answered.
    """

    model: str
    messages: tuple[Message, ...]
    text: str
    ended: bool
    prompt_tokens: int
    cached: int
    source: str
    seconds: float
    swapped: bool


@dataclass
class Report:
    """What was done and found; filled by several threads."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: list[tuple[str, int, bool]] = field(default_factory=list)

    def count(self, what: str, amount: int = 1) -> None:
        with self._lock:
            self.counts[what] += amount

    def find(self, sentence: str) -> None:
        with self._lock:
            self.findings.append(sentence)

    def answered(self, asked: Asked) -> None:
        with self._lock:
            self.asked.append(asked)

    def begun(self) -> int:
        """A place in the order of requests, which `ended` and `has_swapped` take."""
        with self._lock:
            return len(self._ended)

    def started(self, model: str) -> None:
        """Note that there is a new server, with a model."""
        self.ended(model, 0, answered=True)

    def ended(self, model: str, begun: int, *, answered: bool) -> None:
        """Note that a request to a model is over that was sent at that place."""
        with self._lock:
            self._ended.append((model, begun, answered))

    def has_swapped(self, model: str, begun: int) -> bool:
        """Whether the server has turned to another model for a request, or just before it.

        That is seen from the last answer before it on. A request that was given up counts only if
        it was sent before this one: else it may have waited for it.
        """
        with self._lock:
            ended = list(self._ended)
        answers = (at for at in reversed(range(begun)) if ended[at][2])
        return any(
            other != model and (answered or place <= begun)
            for other, place, answered in ended[next(answers, 0) :]
        )


# ---- a request -----------------------------------------------------------------------------------


class Gone(Exception):
    """The client left, or the server did."""


def ask(
    port: int,
    model: Path,
    messages: Sequence[Message],
    *,
    max_tokens: int,
    stream: bool,
    leave_s: float | None = None,
) -> dict[str, Any]:
    """Send a chat request and read its answer.

    Returns:
        `text`, `ended`, `prompt_tokens`, `cached`, `source`; or `status` and `said` of a refusal.

    Raises:
        Gone: `leave_s` seconds were over, or the connection broke.
    """
    body = {
        "model": str(model),
        "messages": list(messages),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": stream,
        "stream_options": {"include_usage": True},
    }
    end = time.monotonic() + (HUNG_S if leave_s is None else leave_s)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_left(end))
    try:
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(
                {key: value for key, value in body.items() if stream or "stream" not in key}
            ),
            {"Content-Type": "application/json"},
        )
        sock = connection.sock
        answer = connection.getresponse()
        data = b""
        sock.settimeout(_left(end))
        while piece := answer.read1(1 << 16):
            data += piece
            sock.settimeout(_left(end))
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, TimeoutError) and leave_s is None:
            raise
        raise Gone from error
    finally:
        connection.close()
    if answer.status != 200:
        return {"status": answer.status, "said": data.decode()[:300]}
    return _read(data, answer.getheader("x-persist-cache") or "", stream)


def _left(end: float) -> float:
    return max(0.001, end - time.monotonic())


def _read(data: bytes, header: str, stream: bool) -> dict[str, Any]:
    lines = data.decode().splitlines()
    if stream:
        if "data: [DONE]" not in lines:
            raise Gone("it broke off")
        comments = [line for line in lines if line.startswith(": x-persist-cache: ")]
        header = header or (comments[0].split(": ", 2)[2] if comments else "")
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    else:
        events = [json.loads(data)]
    usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
    choices = [choice for event in events for choice in event["choices"]]
    texts = [(one.get("delta") or one.get("message") or {}).get("content") for one in choices]
    return {
        "text": "".join(text or "" for text in texts),
        "ended": any(one.get("finish_reason") == "stop" for one in choices),
        "prompt_tokens": usage["prompt_tokens"],
        "cached": (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        "source": header.split(";")[0] or "miss",
    }


# ---- users ---------------------------------------------------------------------------------------


@dataclass
class Gate:
    """Holds all users back now and then, so that a server can be looked at while it is idle."""

    _open: threading.Event = field(default_factory=threading.Event)
    _inside: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def enter(self) -> bool:
        """Go in, if it is open; returns whether it was. `leave` has to follow."""
        with self._changed:
            self._inside += self._open.is_set()
            return self._open.is_set()

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until it is open."""
        self._open.wait()

    def open(self) -> None:
        self._open.set()

    def shut(self, patience_s: float) -> bool:
        """Let nobody in, and wait until all are out; returns whether they are."""
        with self._changed:
            self._open.clear()
            return self._changed.wait_for(lambda: not self._inside, patience_s)


class User:
    """One conversation after the other with one model, until `done`."""

    def __init__(
        self, number: int, seed: int, models: dict[str, Path], port: Callable[[], int]
    ) -> None:
        self._dice = random.Random(seed * 1000 + number)
        self._name = "sliding" if number % 5 == 4 else "plain"
        self._model = models[self._name]
        self._think_s = (10.0, 30.0) if self._name == "plain" else (20.0, 50.0)
        self._port = port
        self._number = number

    def run(self, gate: Gate, report: Report, done: threading.Event) -> None:
        messages = self._opening()
        while not done.wait(self._dice.uniform(*self._think_s)):
            messages.append(self._said("user", self._dice.randrange(20, 200)))
            reply = self._insist(messages, gate, report, done)
            if reply is None:
                return
            messages.append({"role": "assistant", "content": reply})
            if sum(len(one["content"].split()) for one in messages) > _LONGEST:
                messages = self._opening()
                report.count("conversations")

    def _insist(
        self, messages: list[Message], gate: Gate, report: Report, done: threading.Event
    ) -> str | None:
        """Ask until there is an answer; some tries are given up on the way."""
        max_tokens = self._dice.randrange(48, 160)
        while not done.is_set():
            leave_s = self._dice.uniform(0.0, 1.0) if self._dice.random() < 0.15 else None
            while not gate.enter():
                gate.wait()
                done.wait(self._dice.uniform(0.0, self._think_s[1]))  # not all of them at once
            try:
                started, begun = time.monotonic(), report.begun()
                said: dict[str, Any] = {}
                try:
                    said = ask(
                        self._port(),
                        self._model,
                        messages,
                        max_tokens=max_tokens,
                        stream=self._dice.random() < 0.5,
                        leave_s=leave_s,
                    )
                except TimeoutError:
                    report.find(f"user {self._number}: no answer within {HUNG_S:.0f} s")
                    continue
                except Gone:
                    report.count("given up" if leave_s is not None else "cut by a restart")
                seconds = time.monotonic() - started
                swapped = report.has_swapped(self._name, begun)
            finally:
                report.ended(self._name, begun, answered="text" in said)
                gate.leave()
            if "text" in said:
                one = Asked(self._name, tuple(messages), seconds=seconds, swapped=swapped, **said)
                report.answered(one)
                return one.text
            if said.get("status") == 503:
                report.count("asked to come again")
            elif said:
                report.find(f"user {self._number}: {said}")
            done.wait(self._dice.uniform(0.1, 1.0))
        return None

    def _opening(self) -> list[Message]:
        shared = random.Random(self._number % 4)
        text = " ".join(f"w{shared.randrange(60)}" for _ in range(1200))
        own = self._said("system", 40)["content"]
        return [{"role": "system", "content": f"{text} {own}"}]

    def _said(self, role: str, count: int) -> Message:
        return {
            "role": role,
            "content": " ".join(f"w{self._dice.randrange(80)}" for _ in range(count)),
        }
