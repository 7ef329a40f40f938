"""A private request is forgotten without a trace of that in the requests beside it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from persist_cache.server.privacy import Privacy
from persist_cache.server.ticket import Ticket
from persist_cache.server.upstream.provider import Provider
from persist_cache.server.validation import RefusedError
from tests.computed import Call, count_calls
from tests.loops import Answered, Loop, words
from tests.torture.tiny import KINDS, write_model
from tests.waiting import until

SYSTEM = {"role": "system", "content": words(7, 300)}
QUESTION = [SYSTEM, {"role": "user", "content": words(3, 20)}]


class _OneAnswered(Loop):
    """All that it is asked counts as one request, so each is tokenized by the generation thread."""

    def _answering(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), KINDS["plain"], 0)


@pytest.fixture(scope="module")
def alone(model: Path) -> Answered:
    """The answer that nobody else asks beside."""
    with Loop(model) as loop:
        return loop.ask(QUESTION, max_tokens=8)


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


@pytest.mark.parametrize("why", ["its client left", "it is too long"])
def test_one_that_is_never_computed_leaves_the_one_before_it_alone(
    model: Path,
    alone: Answered,
    clients: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    why: str,
) -> None:
    """Upstream's loop holds its answers then, and still the prompt of the one that it computes."""
    may_load, is_forgotten = threading.Event(), threading.Event()
    load = Provider.load_default

    def wait(call: Call) -> None:
        assert is_forgotten.wait(60)

    def slow(self: Provider) -> None:
        assert may_load.wait(60)
        load(self)
        count_calls(self.model, "", wait)

    monkeypatch.setattr(Provider, "load_default", slow)
    with _OneAnswered(model, waits=False) as loop:
        loop.provider.context_given = len(alone.prompt) + 100
        requests, secret = loop.generator.requests, Ticket(privacy=Privacy(no_store=True))
        contexts: list[Any] = []
        generate = loop.generator.generate

        def noted(*arguments: Any) -> Any:
            context, told = generate(*arguments)
            contexts.append(context)
            return context, told

        monkeypatch.setattr(loop.generator, "generate", noted)
        asked = clients.submit(loop.ask, QUESTION, max_tokens=8)
        until(lambda: requests.qsize() == 1)
        other = clients.submit(loop.ask, text=words(5, 1000), ticket=secret)
        until(lambda: requests.qsize() == 2)
        if why == "its client left":
            secret.has_left = lambda: True
        else:
            may_load.set()
        with pytest.raises((ConnectionError, RefusedError)):
            other.result(60)
        loop.generator.forget(secret)
        is_forgotten.set()
        may_load.set()
        found = asked.result(60)

    assert found.reply == alone.reply
    assert list(contexts[0].prompt) == alone.prompt, "of which its usage speaks"


@pytest.mark.parametrize("sampling", [{}, {"seed": 1}], ids=["batched", "alone"])
@pytest.mark.parametrize("kind", ["plain", "sliding", "hybrid"])
def test_what_it_finds_in_memory_stays_as_it_was(
    tmp_path: Path, kind: str, sampling: dict[str, Any]
) -> None:
    with Loop(write_model(tmp_path, KINDS[kind], 0)) as loop:
        first = loop.ask(QUESTION, max_tokens=8, **sampling)
        before = loop.ask(QUESTION, max_tokens=8, **sampling)
        secret = Ticket(privacy=Privacy(no_store=True))
        private = loop.ask(QUESTION, ticket=secret, max_tokens=8, **sampling)
        loop.generator.forget(secret)
        after = loop.ask(QUESTION, max_tokens=8, **sampling)

    assert first.reply == before.reply == private.reply == after.reply
    assert before.cached == private.cached == after.cached > 0
