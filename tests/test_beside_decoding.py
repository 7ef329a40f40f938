"""What a request needs of the disk is restored while others decode, and continues bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from persist_cache import Store, tensors
from persist_cache.server.ticket import Ticket
from persist_cache.server.upstream import provider
from persist_cache.server.upstream.provider import Provider
from tests.loops import Loop, words
from tests.torture.tiny import KINDS, write_model
from tests.waiting import until

SYSTEM = {"role": "system", "content": words(7, 300)}
QUESTION = [SYSTEM, {"role": "user", "content": words(3, 20)}]
SEED = {"seed": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models by the name of their kind."""
    folder = tmp_path_factory.mktemp("models")

    def made(name: str) -> Path:
        if not (folder / name).exists():
            write_model(folder / name, KINDS[name], 0)
        return folder / name

    return made


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", min_free_bytes=0) as opened:
        yield opened


@pytest.fixture
def restoring(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads that wait for caches to be restored."""
    threads: list[threading.Thread] = []
    restore = tensors.restore

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return restore(*arguments)

    monkeypatch.setattr(tensors, "restore", noted)
    return threads


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [
        pytest.param("plain", {}, id="plain-batched"),
        pytest.param("sliding", SEED, id="sliding-seed"),
        pytest.param("hybrid", {}, id="hybrid-batched"),
        pytest.param("plain", SEED, id="plain-seed", marks=pytest.mark.long),
        pytest.param("sliding", {}, id="sliding-batched", marks=pytest.mark.long),
        pytest.param("hybrid", SEED, id="hybrid-seed", marks=pytest.mark.long),
    ],
)
def test_a_cache_is_restored_off_the_generation_thread(
    model: Callable[[str], Path],
    store: Store,
    restoring: list[threading.Thread],
    kind: str,
    sampling: dict[str, Any],
) -> None:
    with Loop(model(kind), store) as first:
        fresh = first.ask(QUESTION, max_tokens=8, **sampling)
    with Loop(model(kind), store) as second:
        second.ask(text="w1 w2")  # until then nothing can be tokenized: the model is being loaded
        second.count()
        again = second.ask(QUESTION, max_tokens=8, **sampling)
        restored = list(restoring)
        computed = second.prefilled()
        held = len(second.cache)

    assert again.reply == fresh.reply
    assert again.ticket.fetch is not None
    assert again.ticket.fetch.source == "disk"
    assert computed + 1 == len(again.prompt) - again.cached < 40
    assert len(restored) == 1
    assert restored[0] is not threading.current_thread()
    assert restored[0].name.startswith("persist-cache-load-ahead")
    assert held > 0


def test_what_a_client_that_left_was_to_get_is_released(
    model: Callable[[str], Path], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Loop(model("plain"), store) as first:
        prompt = first.ask(QUESTION, max_tokens=8).prompt
    may_end, begun = threading.Event(), threading.Event()
    restore = tensors.restore

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert may_end.wait(60)
        return restore(*arguments)

    monkeypatch.setattr(tensors, "restore", slow)
    with Loop(model("plain"), store) as second:
        second.ask(text="w1 w2")
        ticket = Ticket()
        ticket.has_left = begun.is_set
        with pytest.raises(ConnectionError):
            second.ask(QUESTION, ticket=ticket)
        may_end.set()
        until(lambda: second.cache.stats().read_ahead_bytes)
        until(lambda: second.cache.outlook(second.provider.model_key, prompt)[1] < 10)
        monkeypatch.setattr(tensors, "restore", restore)
        again = second.ask(QUESTION, max_tokens=8)

    assert again.ticket.fetch is not None
    assert again.ticket.fetch.source == "disk"


class _Noting(Ticket):
    """Notes which thread was the first to tokenize it for a model."""

    tokenized_by = ""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model_key" and value is not None and not self.tokenized_by:
            self.tokenized_by = threading.current_thread().name
        super().__setattr__(name, value)


def test_requests_that_wait_for_the_model_are_tokenized_beside_the_first(
    model: Callable[[str], Path], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is not kept waiting for a copy of the tokenizer; those behind it want one."""
    may_load = threading.Event()
    load = Provider.load_default

    def slow(self: Provider) -> None:
        assert may_load.wait(60)
        load(self)

    monkeypatch.setattr(Provider, "load_default", slow)
    tickets = [_Noting() for _ in range(3)]
    with (
        Loop(model("plain"), store, waits=False) as loop,
        ThreadPoolExecutor(3, "client") as clients,
    ):
        loop.provider.is_loading = True
        asked = []
        for ticket in tickets:
            asked.append(clients.submit(loop.ask, QUESTION, ticket=ticket, max_tokens=200))
            until(lambda: loop.generator.requests.qsize() == 1)
        may_load.set()
        replies = [one.result(60).reply for one in asked]

    assert replies[0] == replies[1] == replies[2]
    assert [one.tokenized_by.startswith("client") for one in tickets] == [False, True, True]


class _OneAnswered(Loop):
    """What it is asked is a part of one request."""

    def _answering(self) -> AbstractContextManager[None]:
        return nullcontext()


def test_the_tokenizer_is_not_copied_while_an_answer_is_told(
    model: Callable[[str], Path], store: Store
) -> None:
    """The thread that tells it would wait for the copy at each of its steps."""
    with _OneAnswered(model("plain"), store, waits=False) as loop:
        with loop.generator.in_flight():
            for _ in range(3):
                loop.ask(QUESTION)
                assert loop.provider.spare is None
        until(lambda: loop.provider.spare is not None)


def test_a_text_that_is_to_be_shown_has_the_tokenizer_copied(
    model: Callable[[str], Path], store: Store
) -> None:
    with (
        _OneAnswered(model("plain"), store, waits=False) as loop,
        loop.generator.in_flight(),
    ):
        prompt = loop.ask(QUESTION).prompt

        assert "w" in loop.generator.decode_beside(loop.provider.model_key, prompt)


def test_a_tokenizer_that_cannot_be_copied_keeps_nobody_waiting(
    model: Callable[[str], Path], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> Any:
        raise TypeError("cannot pickle 'builtins.Trie' object")

    monkeypatch.setattr(provider, "copy", SimpleNamespace(deepcopy=refuse))
    with Loop(model("plain"), store, waits=False) as loop, ThreadPoolExecutor(3) as clients:
        asked = [clients.submit(loop.ask, QUESTION, max_tokens=4) for _ in range(3)]
        replies = [one.result(60).reply for one in asked]
        alone = loop.ask(QUESTION, max_tokens=4, seed=1).reply

    assert replies[0] == replies[1] == replies[2]
    assert len(alone) == len(replies[0])


def test_a_load_that_failed_keeps_nobody_waiting_for_a_tokenizer(
    model: Callable[[str], Path], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Provider, "load_default", lambda self: None)
    with Loop(model("plain"), store, waits=False) as loop, ThreadPoolExecutor(3) as clients:
        asked = [clients.submit(loop.ask, QUESTION, max_tokens=4) for _ in range(3)]
        replies = [one.result(60).reply for one in asked]

    assert replies[0] == replies[1] == replies[2]
