"""A model that is held up in the midst of a prefill, so that a test can do something meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from persist_cache.server.ticket import Ticket
from tests.computed import Call, count_calls
from tests.loops import Answered, Loop, words
from tests.torture.tiny import KINDS, write_model

CHAT = [
    {"role": "system", "content": words(7, 40)},
    {"role": "user", "content": words(1, 200)},
]
STEP = 32
"""Tokens of a chunk."""
WAYS: dict[str, dict[str, Any]] = {"batched": {}, "alone": {"seed": 1}}
"""How a request is served, by what it asks for."""


def models_in(folder: Path) -> Callable[[str], Path]:
    """What gives the folders of tiny models by the name of their kind; each is made once."""

    def made(name: str) -> Path:
        if not (folder / name).exists():
            write_model(folder / name, KINDS[name], 0)
        return folder / name

    return made


class Gate:
    """Holds a model up before a prefill call that goes beyond so many tokens."""

    def __init__(self, loop: Loop, num_tokens: int) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        self._left = num_tokens
        loop.ask(text="w1 w2")
        count_calls(loop.provider.model, "gate", self._note)
        loop.count()
        loop.prefilled()

    def _note(self, call: Call) -> None:
        if call.sampling or self._open.is_set():
            return
        if self._left <= 0:
            self.reached.set()
            assert self._open.wait(60), "it was never opened"
        self._left -= sum(map(len, call.rows))

    def open(self) -> None:
        """Let it go on."""
        self._open.set()


@contextmanager
def held_up(
    loop: Loop,
    num_tokens: int,
    ticket: Ticket,
    chat: Sequence[Mapping[str, Any]] = CHAT,
    **sampling: Any,
) -> Iterator[Future[Answered]]:
    """A request whose prefill waits behind so many tokens for the end of the block."""
    gate = Gate(loop, num_tokens)
    with ThreadPoolExecutor(1) as client:
        try:
            asked = client.submit(loop.ask, chat, ticket=ticket, **sampling)
            assert gate.reached.wait(60), "so much was never computed"
            yield asked
        finally:
            gate.open()
