"""Single flight: what is being computed for one request is not computed for another beside it.

The model is held at a call while requests arrive, so that they arrive during a prefill. What it
computed is counted at its calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persist_cache.tokens import common_prefix_tokens, pack_tokens
from tests.computed import Call, count_calls
from tests.loops import Answered, Loop, words, write_thinking_model
from tests.torture.tiny import KINDS, write_model
from tests.waiting import until

TIMEOUT_S = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of tiny models by the name of their kind; the same for the same name."""
    folder = tmp_path_factory.mktemp("models")

    def made(name: str, seed: int = 0, *, thinks: bool = False) -> Path:
        path = folder / f"{name}-{seed}-{thinks}"
        if not path.exists():
            config = {**KINDS[name].config, "max_position_embeddings": 4096}
            kind = replace(KINDS[name], config=config)
            (write_thinking_model if thinks else write_model)(path, kind, seed)
        return path

    return made


class Held:
    """A loop whose model waits before a prefill while it is told to, and requests to it."""

    def __init__(self, loop: Loop) -> None:
        loop.ask(text="w1 w2")
        loop.count()
        self.loop = loop
        self.line = loop.generator.line
        self._go = threading.Event()
        self._go.set()
        self._reached = threading.Event()
        self._threads = ThreadPoolExecutor(64)
        count_calls(loop.provider.model, "held", self._call)
        loop.prefilled()

    def _call(self, call: Call) -> None:
        if not call.sampling:
            self._reached.set()
            assert self._go.wait(TIMEOUT_S)

    def hold(self) -> None:
        """Have the model wait before its next call that prefills."""
        self._reached.clear()
        self._go.clear()

    def reached(self) -> None:
        """Wait until it does."""
        assert self._reached.wait(TIMEOUT_S)

    def go(self) -> None:
        """Have it go on."""
        self._go.set()

    def ask(self, messages: Any = (), **more: Any) -> Future[Answered]:
        """Send a request; returns at once."""
        return self._threads.submit(self.loop.ask, messages, **more)

    def followed_by(self, count: int) -> None:
        """Wait until so many requests wait for another one."""
        until(lambda: self.line.followers == count, f"no {count} requests wait for another one")


@contextmanager
def held(folder: Path, **options: Any) -> Iterator[Held]:
    with Loop(folder, prefill_step_size=128, **options) as loop:
        found = Held(loop)
        try:
            yield found
        finally:
            found.go()


def chat(*parts: tuple[int, int]) -> list[dict[str, str]]:
    """A user's message of words, by seeds and counts."""
    return [{"role": "user", "content": " ".join(words(seed, count) for seed, count in parts)}]


def distinct_tokens(prompts: Iterable[Sequence[int]]) -> int:
    """Tokens of all prompts, those that several begin with counted once."""
    before: Sequence[int] = ()
    count = 0
    for prompt in sorted(map(tuple, prompts)):
        shared = common_prefix_tokens(pack_tokens(before), pack_tokens(prompt))
        count, before = count + len(prompt) - shared, prompt
    return count


def reply_alone(folder: Path, messages: Any, **sampling: Any) -> list[int]:
    """What a model answers that was asked nothing before, and by nobody else."""
    with Loop(folder, prefill_step_size=128) as loop:
        loop.ask(text="w1 w2")
        return loop.ask(messages, **sampling).reply


@pytest.mark.parametrize("sampling", [{}, {"seed": 1}], ids=["batched", "seed"])
@pytest.mark.parametrize("kind", ["plain", "sliding", "hybrid"])
def test_identical_prompts_are_computed_once(
    model: Callable[..., Path], kind: str, sampling: dict[str, Any]
) -> None:
    with held(model(kind, thinks=True)) as one:
        one.hold()
        first = one.ask(chat((1, 600)), **sampling)
        one.reached()
        others = [one.ask(chat((1, 600)), **sampling) for _ in range(3)]
        one.followed_by(3)
        one.go()
        answers = [first.result(TIMEOUT_S), *(other.result(TIMEOUT_S) for other in others)]
        computed = one.loop.prefilled()

    assert computed <= 1.02 * len(answers[0].prompt)
    assert min(answer.cached for answer in answers[1:]) >= 600
    assert {tuple(answer.reply) for answer in answers} == {tuple(answers[0].reply)}


@pytest.mark.parametrize("sampling", [{}, {"seed": 1}], ids=["batched", "seed"])
@pytest.mark.parametrize("kind", ["plain", "sliding", "hybrid"])
def test_a_shared_beginning_is_computed_once(
    model: Callable[..., Path], kind: str, sampling: dict[str, Any]
) -> None:
    """Of eight requests for four prompts, and each gets an answer of its own."""
    chats = [chat((1, 900), (number + 2, 100)) for number in range(4)]
    folder = model(kind, thinks=True)
    with held(folder) as one:
        one.hold()
        asked = [one.ask(chats[0], **sampling)]
        one.reached()
        for number in (1, 2, 3, 0, 1, 2, 3):
            asked.append(one.ask(chats[number], **sampling))
            one.followed_by(len(asked) - 1)
        one.go()
        answers = [each.result(TIMEOUT_S) for each in asked]
        computed = one.loop.prefilled()

    assert computed <= 1.05 * distinct_tokens({tuple(answer.prompt) for answer in answers})
    right = [reply_alone(folder, one, **sampling) for one in chats]
    assert [answer.reply for answer in answers] == [*right, *right]
