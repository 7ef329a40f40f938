"""A prefill that is interrupted keeps what it computed, and whoever asks again goes on from there.

What was computed is counted at the model's calls. What goes on has the bits of what was never
interrupted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from persist_cache.server import underway
from persist_cache.server.ticket import Ticket
from persist_cache.server.validation import RefusedError
from tests.holding import CHAT, STEP, WAYS, Gate, held_up
from tests.loops import Answered, Loop, words
from tests.torture.tiny import KINDS, write_model
from tests.waiting import until

KEPT_KINDS = ["plain", "sliding", "hybrid", "convolutions"]
CUT = 3 * STEP
"""Tokens that are computed before anything happens."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def made(name: str) -> Path:
        if not (folder / name).exists():
            write_model(folder / name, KINDS[name], 0)
        return folder / name

    return made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(underway, "PATIENCE_S", 0.0)


class Client:
    """A client that may leave."""

    def __init__(self) -> None:
        self._gone = threading.Event()
        self.ticket = Ticket()
        self.ticket.has_left = self._gone.is_set

    def leave(self) -> None:
        self._gone.set()

    def is_over(self) -> bool:
        """Whether nothing more is computed of its prompt."""
        return self.ticket.underway.has_ended


def bits(loop: Loop, **sampling: Any) -> tuple[Answered, list[tuple[int, float]]]:
    """An answer, with the log probability of each of its tokens."""
    said: list[tuple[int, float]] = []

    def read(answer: Iterator[Any]) -> list[Any]:
        found = list(answer)
        said.extend((one.token, one.logprob) for one in found)
        return found

    return loop.ask(CHAT, read=read, **sampling), said


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KEPT_KINDS)
def test_prefill_that_is_cut_is_kept_and_gone_on_with(
    model: Callable[[str], Path], kind: str, way: str, impatient: None
) -> None:
    with Loop(model(kind), prefill_step_size=STEP) as loop:
        loop.ask(text="w1 w2")
        whole, right = bits(loop, **WAYS[way])
    client = Client()
    with Loop(model(kind), prefill_step_size=STEP) as loop:
        with held_up(loop, CUT, client.ticket, **WAYS[way]) as asked:
            client.leave()
        with pytest.raises(ConnectionAbortedError):
            asked.result()
        until(client.is_over)
        computed = loop.prefilled()
        again, said = bits(loop, **WAYS[way])

        assert 0 < computed < len(whole.prompt) - 1 - STEP
        assert again.cached == computed
        assert again.ticket.fetch is not None
        assert again.ticket.fetch.source == "memory"
        assert computed + loop.prefilled() == len(whole.prompt) - 1
        assert said == right


@pytest.mark.parametrize("kind", KEPT_KINDS)
def test_prompt_that_is_cut_again_and_again_is_computed_once(
    model: Callable[[str], Path], kind: str, impatient: None
) -> None:
    total = 0
    with Loop(model(kind), prefill_step_size=STEP) as loop:
        for cut in (1, 2, 3):
            client = Client()
            known = loop.cache.stats().tokens
            with held_up(loop, STEP, client.ticket) as asked:
                client.leave()
            with pytest.raises(ConnectionAbortedError):
                asked.result()
            until(client.is_over)
            total += loop.prefilled()
            assert total >= cut * STEP, known
        answered = loop.ask(CHAT)
        total += loop.prefilled()

        assert total == len(answered.prompt) - 1


@pytest.mark.parametrize("way", WAYS)
def test_prefill_goes_on_for_a_client_that_may_come_back(
    model: Callable[[str], Path], way: str
) -> None:
    """It completes, nobody is answered, and the retry finds all of it."""
    client = Client()
    with Loop(model("plain"), prefill_step_size=STEP) as loop:
        with held_up(loop, CUT, client.ticket, **WAYS[way]) as asked:
            client.leave()
            with pytest.raises(ConnectionAbortedError):
                asked.result(60)
        until(client.is_over)
        again = loop.ask(CHAT, **WAYS[way])

        assert again.cached == len(again.prompt) - 1
        assert loop.prefilled() == len(again.prompt) - 1


@pytest.mark.parametrize("way", WAYS)
def test_prefill_that_another_request_waits_for_goes_on(
    model: Callable[[str], Path], way: str, impatient: None
) -> None:
    client = Client()
    with Loop(model("plain"), prefill_step_size=STEP) as loop:
        with client.ticket.underway.followed():
            with held_up(loop, CUT, client.ticket, **WAYS[way]) as asked:
                client.leave()
                with pytest.raises(ConnectionAbortedError):
                    asked.result(60)
            until(client.is_over)

        assert loop.ask(CHAT).cached == len(client.ticket.prompt.tokens) - 1  # type: ignore[union-attr]


def test_prefill_beside_which_nothing_is_computed_makes_way_for_who_waits(
    model: Callable[[str], Path],
) -> None:
    """Served alone, it would keep the retry itself from being looked at."""
    client = Client()
    with Loop(model("plain"), prefill_step_size=STEP) as loop, ThreadPoolExecutor(1) as others:
        with held_up(loop, CUT, client.ticket, seed=1) as asked:
            retry = others.submit(loop.ask, CHAT, seed=1)
            until(lambda: not loop.generator.requests.empty())
            client.leave()
        with pytest.raises(ConnectionAbortedError):
            asked.result()

        assert CUT <= retry.result().cached < len(retry.result().prompt) - 1
        assert loop.prefilled() == len(retry.result().prompt) - 1


@pytest.mark.parametrize("way", WAYS)
def test_client_that_leaves_while_it_is_answered_ends_the_answer(
    model: Callable[[str], Path], way: str
) -> None:
    """However patient a prefill is."""
    client = Client()
    count = 0

    def read(answer: Iterator[Any]) -> list[Any]:
        nonlocal count
        for _ in answer:
            count += 1
            if count == 3:
                client.leave()
        return []

    with Loop(model("plain")) as loop:
        with pytest.raises(ConnectionAbortedError):
            loop.ask(
                CHAT,
                ticket=client.ticket,
                read=read,
                max_tokens=1 << 30,
                **WAYS[way],
            )
        after = loop.ask(text="w1 w2", seed=2)

    assert count == 3
    assert after.reply


def test_client_that_leaves_behind_a_full_batch_is_noticed(
    model: Callable[[str], Path], impatient: None
) -> None:
    """Upstream reports nothing of a prompt while as many answers as it takes are under way."""
    enough = threading.Event()

    def read(answer: Iterator[Any]) -> list[Any]:
        for _ in answer:
            if enough.is_set():
                break
        return []

    client, short = Client(), [{"role": "user", "content": "w3 w4"}]
    options: dict[str, Any] = {
        "prefill_step_size": STEP,
        "decode_concurrency": 2,
        "prompt_concurrency": 2,
    }
    with Loop(model("plain"), **options) as loop, ThreadPoolExecutor(3) as clients:
        gate = Gate(loop, STEP)
        first = clients.submit(loop.ask, short, read=read, max_tokens=1 << 30)
        asked = clients.submit(loop.ask, CHAT, ticket=client.ticket)
        second = clients.submit(loop.ask, text="w5 w6 w7", read=read, max_tokens=1 << 30)
        gate.open()
        # One of three waits for a place; whichever does, none is stuck.
        client.leave()
        with pytest.raises(ConnectionAbortedError):
            asked.result(60)
        until(client.is_over)
        enough.set()
        first.result(60)
        second.result(60)

        assert loop.ask(CHAT).reply


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["plain", "sliding", "hybrid"])
def test_server_that_ends_keeps_what_is_being_computed(
    model: Callable[[str], Path], kind: str, way: str, tmp_path: Path
) -> None:
    """On disk, so that the next one goes on from there."""
    store = tmp_path / "store"
    with (
        ThreadPoolExecutor(1) as ending,
        Loop(model(kind), store, prefill_step_size=STEP) as loop,
    ):
        with held_up(loop, CUT, Ticket(), **WAYS[way]) as asked:
            ended = ending.submit(loop.generator.stop_and_join)
            until(lambda: loop.generator._is_ending)
        with pytest.raises(RefusedError, match="The server is stopping"):
            asked.result()
        ended.result()
        computed = loop.prefilled()
    with Loop(model(kind), store, prefill_step_size=STEP) as loop:
        loop.ask(text="w1 w2")
        loop.count()
        again = loop.ask(CHAT, **WAYS[way])

        assert CUT <= computed < len(again.prompt) - 1 - STEP
        assert again.ticket.fetch is not None
        assert again.ticket.fetch.source == "disk"
        assert again.cached == computed
        assert computed + loop.prefilled() == len(again.prompt) - 1


def test_requests_that_wait_when_the_server_ends_are_told_in_a_sentence(
    model: Callable[[str], Path],
) -> None:
    with Loop(model("plain"), prefill_step_size=STEP) as loop, ThreadPoolExecutor(2) as others:
        with held_up(loop, CUT, Ticket(), seed=1):
            queued = others.submit(loop.ask, text=words(3, 20))
            until(lambda: not loop.generator.requests.empty())
            ended = others.submit(loop.generator.stop_and_join)
            until(lambda: loop.generator._is_ending)

        with pytest.raises(RefusedError, match=r"The server is stopping; ask again"):
            queued.result()
        ended.result()
