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
from mlx_lm import server as upstream

from persist_cache import Store
from persist_cache.server import underway
from persist_cache.server.ticket import CutPrompt, Ticket
from persist_cache.server.validation import RefusedError
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
        self.tickets: list[Ticket] = []
        self._go = threading.Event()
        self._go.set()
        self._calls_before, self._at_replies = 0, False
        self._reached = threading.Event()
        self._threads = ThreadPoolExecutor(64)
        count_calls(loop.provider.model, "held", self._call)
        loop.prefilled()

    def _call(self, call: Call) -> None:
        if call.sampling == self._at_replies and not self._go.is_set():
            self._calls_before -= 1
            if self._calls_before >= 0:
                return
            self._reached.set()
            assert self._go.wait(TIMEOUT_S)

    def hold(self, after: int = 0, *, at_replies: bool = False) -> None:
        """Have the model wait before a call: the next one, or after so many.

        Args:
            after: Calls of the kind that is meant.
            at_replies: Those that sample are meant, not those that prefill.
        """
        self._calls_before = after
        self._at_replies = at_replies
        self._reached.clear()
        self._go.clear()

    def reached(self) -> None:
        """Wait until it does."""
        assert self._reached.wait(TIMEOUT_S)

    def go(self) -> None:
        """Have it go on."""
        self._go.set()

    def ask(self, messages: Any, *, ticket: Ticket | None = None, **more: Any) -> Future[Answered]:
        """Send a request; returns at once."""
        ticket = ticket or Ticket()
        self.tickets.append(ticket)
        return self._threads.submit(self.loop.ask, messages, ticket=ticket, **more)

    def followed_by(self, count: int) -> None:
        """Wait until so many requests wait for another one."""
        until(
            lambda: sum(one.underway.followers for one in self.tickets) == count,
            f"no {count} requests wait for another one",
        )


class Patient(Ticket):
    """A ticket that says whether its request waits for something."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = threading.Event()
        self.sign = self.waiting.set


@contextmanager
def held(folder: Path, **options: Any) -> Iterator[Held]:
    with Loop(folder, **{"prefill_step_size": 128, **options}) as loop:
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


def replies_alone(folder: Path, chats: Iterable[Any], **sampling: Any) -> list[list[int]]:
    """What a model answers to each when nothing is known of it, and nobody else asks."""
    replies = []
    with Loop(folder, prefill_step_size=128) as loop:
        for one in chats:
            loop.cache.trim_to(n_sequences=0)
            replies.append(loop.ask(one, **sampling).reply)
    return replies


def test_four_identical_prompts_are_computed_once(model: Callable[..., Path]) -> None:
    with held(model("plain", thinks=True)) as one:
        one.hold()
        first = one.ask(chat((1, 600)))
        one.reached()
        others = [one.ask(chat((1, 600))) for _ in range(3)]
        one.followed_by(3)
        one.go()
        answers = [first.result(TIMEOUT_S), *(other.result(TIMEOUT_S) for other in others)]
        computed = one.loop.prefilled()
        stats = one.loop.cache.stats()

    assert computed <= len(answers[0].prompt)
    assert {tuple(answer.reply) for answer in answers} == {tuple(answers[0].reply)}
    assert stats.hits["memory"] == stats.shared == 3
    assert stats.shared_tokens == sum(answer.cached for answer in answers[1:]) > 3 * 600


@pytest.mark.parametrize("sampling", [{}, {"seed": 1}], ids=["batched", "seed"])
@pytest.mark.parametrize("kind", ["plain", "sliding", "hybrid"])
def test_a_shared_beginning_is_computed_once(
    model: Callable[..., Path], kind: str, sampling: dict[str, Any]
) -> None:
    """Of eight requests for four prompts, and each gets an answer of its own."""
    chats = [chat((1, 500), (number + 2, 60)) for number in range(4)]
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
    right = replies_alone(folder, chats, **sampling)
    assert [answer.reply for answer in answers] == [*right, *right]


def test_prompts_that_come_while_the_model_is_loaded_are_computed_once(
    model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can tokenize them yet, and the loop would take all of them at once."""
    go, calls = threading.Event(), list[Call]()
    load = upstream.load

    def slowly(path: str, *args: Any, **options: Any) -> Any:
        loaded = load(path, *args, **options)
        count_calls(loaded[0], path, calls.append)
        assert go.wait(TIMEOUT_S)
        return loaded

    monkeypatch.setattr(upstream, "load", slowly)
    with Loop(model("plain"), waits=False) as loop, ThreadPoolExecutor(4) as clients:
        tickets = [Patient() for _ in range(4)]
        asked = [clients.submit(loop.ask, chat((1, 600)), ticket=one) for one in tickets]
        for ticket in tickets:
            assert ticket.waiting.wait(TIMEOUT_S)
        go.set()
        answers = [one.result(TIMEOUT_S) for one in asked]

    computed = sum(len(row) for call in calls if not call.sampling for row in call.rows)
    assert computed == len(answers[0].prompt) - 1


def test_prompts_for_another_model_are_computed_once_and_load_it_once(
    model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes later for the first model is answered after them, as it would be in the queue."""
    loads: list[str] = []
    load = upstream.load

    def noted(path: str, *args: Any, **options: Any) -> Any:
        loaded = load(path, *args, **options)
        loads.append(path)
        count_calls(loaded[0], path, loop.calls.append)
        return loaded

    other = str(model("plain", 1))
    with held(model("plain")) as one:
        loop = one.loop
        monkeypatch.setattr(upstream, "load", noted)
        one.hold()
        asked = [one.ask(chat((1, 600)))]
        one.reached()
        for number, name in ((1, other), (1, other), (1, other), (2, "default_model")):
            ticket = Patient()
            asked.append(one.ask(chat((number, 600)), ticket=ticket, model=name))
            assert ticket.waiting.wait(TIMEOUT_S)
        one.go()
        for each in asked:
            each.result(TIMEOUT_S)
        computed = [call.rows for call in loop.calls if call.model == other and not call.sampling]

    assert sum(len(row) for rows in computed for row in rows) == 604
    assert loads == [other, str(model("plain"))]


def leave(ticket: Ticket) -> None:
    """What the client of a request does."""
    ticket.has_left = lambda: True


@pytest.mark.parametrize("sampling", [{}, {"seed": 1}], ids=["batched", "seed"])
def test_a_prefill_goes_on_without_its_client_while_another_one_waits_for_it(
    model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    monkeypatch.setattr(underway, "PATIENCE_S", 0.0)
    ticket = Ticket()
    with held(model("plain")) as one:
        one.hold()
        first = one.ask(chat((1, 600)), ticket=ticket, **sampling)
        one.reached()
        others = [one.ask(chat((1, 600)), **sampling) for _ in range(2)]
        one.followed_by(2)
        leave(ticket)
        one.go()
        with pytest.raises(ConnectionAbortedError):
            first.result(TIMEOUT_S)
        answers = [other.result(TIMEOUT_S) for other in others]
        computed = one.loop.prefilled()

    assert computed == len(answers[0].prompt) - 1


@pytest.mark.parametrize("sampling", [{}, {"seed": 1}], ids=["batched", "seed"])
def test_nothing_is_computed_for_those_who_have_left(
    model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    """Whoever has waited and left does not count any more."""
    monkeypatch.setattr(underway, "PATIENCE_S", 0.0)
    tickets = [Ticket() for _ in range(3)]
    with held(model("plain"), prefill_step_size=16) as one:
        one.hold()
        asked = [one.ask(chat((1, 600)), ticket=tickets[0], **sampling)]
        one.reached()
        asked += [one.ask(chat((1, 600)), ticket=ticket, **sampling) for ticket in tickets[1:]]
        one.followed_by(2)
        for ticket in tickets:
            leave(ticket)
        one.followed_by(0)
        one.go()
        for each in asked:
            with pytest.raises(ConnectionAbortedError):
                each.result(TIMEOUT_S)
        until(lambda: tickets[0].underway.has_ended)
        computed = one.loop.prefilled()

    assert computed < 600  # upstream looks every 25 calls, or every half second


def test_a_retry_does_not_overtake_one_that_waits_for_the_end_of_the_batch(
    model: Callable[..., Path],
) -> None:
    """Which came before it: what is computed is kept, and the retry goes on from there later."""
    first, other = Ticket(), Ticket()
    with held(model("plain"), prefill_step_size=16) as one:
        one.hold(2)
        asked = one.ask(chat((1, 600)), ticket=first)
        one.reached()
        before = one.ask(chat((2, 20)), ticket=other, seed=1)
        until(lambda: one.loop.generator.requests.qsize() == 1)
        leave(first)
        retry = one.ask(chat((1, 600)))
        one.followed_by(1)
        one.go()
        with pytest.raises(ConnectionAbortedError):
            asked.result(TIMEOUT_S)
        prompts = {tuple(each.result(TIMEOUT_S).prompt) for each in (before, retry)}
        computed = one.loop.prefilled()

    assert first.underway.computed_tokens < 600
    assert retry.result().cached > 0
    assert computed <= distinct_tokens(prompts)


def test_one_that_leaves_the_line_is_waited_for_no_more(model: Callable[..., Path]) -> None:
    """It is not in upstream's queue, whose thread would note its end."""
    ticket = Ticket()
    with held(model("plain")) as one:
        one.hold()
        asked = [one.ask(chat((1, 300)))]
        one.reached()
        asked.append(one.ask(chat((1, 300), (2, 300)), ticket=ticket))
        one.followed_by(1)
        asked.append(one.ask(chat((1, 300), (2, 300))))
        until(lambda: ticket.underway.followers == 1)
        leave(ticket)
        with pytest.raises(ConnectionAbortedError):
            asked[1].result(TIMEOUT_S)
        until(lambda: one.tickets[0].underway.followers == 1)
        one.go()
        prompts = {tuple(each.result(TIMEOUT_S).prompt) for each in (asked[0], asked[2])}
        computed = one.loop.prefilled()

    assert computed <= distinct_tokens(prompts)


def test_when_one_fails_another_computes_for_those_who_wait(
    model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is refused when its turn comes; of the others one computes, and two wait."""
    tickets = [Ticket() for _ in range(5)]
    with held(model("plain")) as one:
        tokenized = tickets[1].tokenized

        def refused(prompt: CutPrompt) -> None:
            if tickets[1].prompt is not None:
                raise RuntimeError("made up")
            tokenized(prompt)

        monkeypatch.setattr(tickets[1], "tokenized", refused)
        one.hold()
        asked = [one.ask(chat((9, 300)), ticket=tickets[0])]
        one.reached()
        asked.append(one.ask(chat((1, 600)), ticket=tickets[1]))
        until(lambda: one.loop.generator.requests.qsize() == 1)
        asked += [one.ask(chat((1, 600)), ticket=ticket) for ticket in tickets[2:]]
        one.followed_by(3)
        one.go()
        with pytest.raises(RuntimeError, match="made up"):
            asked[1].result(TIMEOUT_S)
        prompts = {tuple(each.result(TIMEOUT_S).prompt) for each in (asked[0], *asked[2:])}
        computed = one.loop.prefilled()

    assert computed <= distinct_tokens(prompts)


@pytest.mark.parametrize("sampling", [{}, {"seed": 1}], ids=["batched", "seed"])
def test_what_memory_cannot_hold_is_waited_for_until_it_is_on_disk(
    model: Callable[..., Path], tmp_path: Path, sampling: dict[str, Any]
) -> None:
    with (
        Store.open(tmp_path, min_free_bytes=0) as store,
        held(model("plain"), store=store, memory_bytes=1) as one,
    ):
        one.hold()
        asked = [one.ask(chat((1, 600)), **sampling)]
        one.reached()
        asked += [one.ask(chat((1, 600)), **sampling) for _ in range(2)]
        one.followed_by(2)
        one.go()
        answers = [each.result(TIMEOUT_S) for each in asked]
        computed = one.loop.prefilled()

    assert computed == len(answers[0].prompt) - 1


def test_what_can_be_kept_nowhere_is_computed_by_all(model: Callable[..., Path]) -> None:
    with held(model("plain"), memory_bytes=1) as one:
        one.hold()
        asked = [one.ask(chat((1, 600)))]
        one.reached()
        asked += [one.ask(chat((1, 600))) for _ in range(2)]
        one.followed_by(2)
        one.go()
        answers = [each.result(TIMEOUT_S) for each in asked]

    assert [answer.cached for answer in answers] == [0, 0, 0]


def test_who_comes_late_takes_what_is_computed_by_then(model: Callable[..., Path]) -> None:
    """The place where the prompts part was passed already, and nobody had asked for it."""
    with held(model("plain")) as one:
        one.hold(after=5)
        asked = [one.ask(chat((1, 900), (2, 100)))]
        one.reached()
        asked.append(one.ask(chat((1, 400), (3, 100))))
        one.followed_by(1)
        one.go()
        prompts = {tuple(each.result(TIMEOUT_S).prompt) for each in asked}
        computed = one.loop.prefilled()

    assert computed <= distinct_tokens(prompts)


def test_who_waits_when_the_server_ends_is_told_so(model: Callable[..., Path]) -> None:
    with held(model("plain")) as one:
        one.hold()
        asked = [one.ask(chat((1, 600)))]
        one.reached()
        asked.append(one.ask(chat((1, 600))))
        one.followed_by(1)
        generator = one.loop.generator
        ending = threading.Thread(target=generator.stop_and_join)
        ending.start()
        until(lambda: generator.is_ending)
        one.go()
        for each in asked:
            with pytest.raises(RefusedError, match="The server is stopping"):
                each.result(TIMEOUT_S)
        ending.join()


def test_who_waits_shows_signs_of_life(model: Callable[..., Path]) -> None:
    ticket = Patient()
    with held(model("plain")) as one:
        one.hold()
        first = one.ask(chat((1, 600)))
        one.reached()
        second = one.ask(chat((1, 600)), ticket=ticket)
        one.followed_by(1)
        assert ticket.waiting.wait(TIMEOUT_S)
        one.go()
        assert first.result(TIMEOUT_S).reply == second.result(TIMEOUT_S).reply


def test_a_request_that_shares_nothing_is_queued_at_once(model: Callable[..., Path]) -> None:
    """As that for a title, which comes beside a long prompt and is short."""
    with held(model("plain")) as one:
        one.hold()
        asked = [one.ask(chat((1, 600)))]
        one.reached()
        asked += [one.ask(chat((number, 300))) for number in (2, 3)]
        until(lambda: one.loop.generator.requests.qsize() == 2)
        one.go()
        for each in asked:
            each.result(TIMEOUT_S)
        assert one.loop.cache.stats().shared == 0


def test_who_asks_is_answered_from_the_next_call_on(model: Callable[..., Path]) -> None:
    """Upstream's loop would go on with a reply for half a second before it looked."""
    with held(model("plain")) as one:
        one.hold(after=3, at_replies=True)
        first = one.ask(chat((1, 600)), max_tokens=400)
        one.reached()
        second = one.ask(chat((2, 100)))
        until(lambda: one.loop.generator.requests.qsize() == 1)
        before = len(one.loop.calls)
        one.go()
        second.result(TIMEOUT_S)
        kinds = [call.sampling for call in one.loop.calls[before:]]
        first.result(TIMEOUT_S)

    assert kinds.index(False) <= 2
