"""Many requests at once whose prompts begin alike, some of whose clients leave: all answers right.

What they have in common is computed for one of them and taken by the others, in the midst of
prefills that are cut, batched and alone. Each answer is that of a model which was asked nothing
else.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persist_cache import Store
from persist_cache.server import underway
from persist_cache.server.ticket import Ticket
from tests.loops import Loop, words, write_thinking_model
from tests.torture.tiny import KINDS
from tests.waiting import until

TIMEOUT_S = 120
KINDS_HERE = ("plain", "sliding", "hybrid")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model by the name of its kind."""
    folder = tmp_path_factory.mktemp("models")

    def made(name: str) -> Path:
        path = folder / name
        if not path.exists():
            config = {**KINDS[name].config, "max_position_embeddings": 4096}
            write_thinking_model(path, replace(KINDS[name], config=config), 0)
        return path

    return made


class Storm:
    """Prompts that a seed makes, and those who ask for them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        roots = [self._words(self.random.randrange(260, 420)) for _ in range(2)]
        self.chats = [
            [{"role": "user", "content": " ".join([root, self._words(length)]).strip()}]
            for root in roots
            for length in (0, self.random.randrange(1, 30), self.random.randrange(260, 300))
        ]
        self.chats.append([{"role": "user", "content": self._words(12)}])

    def _words(self, count: int) -> str:
        return words(self.random.randrange(1000), count)

    def right(self, folder: Path) -> list[list[int]]:
        """The answers of a model to each prompt, asked alone and of an empty cache."""
        replies = []
        with Loop(folder, prefill_step_size=64) as loop:
            for chat in self.chats:
                loop.cache.trim_to(n_sequences=0)
                replies.append(loop.ask(chat).reply)
        return replies

    def blow(self, loop: Loop, right: list[list[int]], requests: int) -> int:
        """Send requests at once; how many were answered, and those rightly."""
        loop.count()
        tickets = []

        def ask(number: int, ticket: Ticket, sampling: dict[str, Any]) -> bool:
            try:
                reply = loop.ask(self.chats[number], ticket=ticket, **sampling).reply
            except ConnectionAbortedError:
                assert ticket.has_left()
                return False
            assert reply == right[number]
            return True

        with ThreadPoolExecutor(self.random.choice([4, requests])) as clients:
            asked = []
            for _ in range(requests):
                tickets.append(self._client(loop))
                sampling = {"seed": 1} if self.random.random() < 0.2 else {}
                number = self.random.randrange(len(self.chats))
                asked.append(clients.submit(ask, number, tickets[-1], sampling))
            answered = sum(one.result(TIMEOUT_S) for one in asked)
        until(lambda: all(one.underway.has_ended for one in tickets), "a prefill goes on")
        assert not any(one.underway.followers for one in tickets)
        return answered

    def _client(self, loop: Loop) -> Ticket:
        """One who stays, or who leaves when the model was called some more times."""
        ticket = Ticket()
        if self.random.random() < 0.3:
            last = self.random.randrange(40)
            ticket.has_left = lambda: len(loop.calls) > last
        return ticket


def blow(folder: Path, place: Path, seed: int, requests: int) -> None:
    storm = Storm(seed)
    right = storm.right(folder)
    with (
        Store.open(place, min_free_bytes=0) as store,
        Loop(folder, store, prefill_step_size=64) as loop,
    ):
        loop.ask(text="w1 w2")
        assert storm.blow(loop, right, requests) > requests // 3


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_answers_are_right_in_a_storm(
    model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(underway, "PATIENCE_S", 0.0)

    blow(model(kind), tmp_path, 1, 20)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS_HERE)
@pytest.mark.parametrize("seed", range(2, 12))
def test_answers_are_right_in_many_storms(
    model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    seed: int,
) -> None:
    monkeypatch.setattr(underway, "PATIENCE_S", 0.1 * (seed % 3))

    blow(model(kind), tmp_path, seed, 60)
