"""The ticket is the one thing that travels with a request through the generation loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import server as upstream
from mlx_lm.tokenizer_utils import load as load_tokenizer

from persist_cache import PromptCache
from persist_cache.cache.origin import Origin
from persist_cache.cache.stats import Fetch
from persist_cache.server.privacy import Privacy
from persist_cache.server.ticket import CutPrompt, Ticket, TicketedCache, TicketTokens, ticket_of
from persist_cache.server.upstream.requests import TicketedRequest
from persist_cache.server.validation import RefusedError
from tests.loops import Loop, arguments
from tests.tiny_models import build_model_dir
from tests.waiting import until

CHAT = [
    {"role": "system", "content": "You are a helpful assistant. Answer in a short sentence."},
    {"role": "user", "content": "Who are you?"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def loop(model: Path) -> Iterator[Loop]:
    with Loop(model) as running:
        running.ask([{"role": "user", "content": "Load the model."}])
        yield running


def test_tokens_keep_their_ticket_when_they_are_copied_and_extended() -> None:
    ticket = Ticket()
    tokens = TicketTokens([1, 2, 3], ticket)

    copied = tokens[:2]
    copied += [4]
    copied.append(5)

    assert copied[:] == [1, 2, 4, 5]
    assert ticket_of(copied[:]) is ticket
    assert tokens == [1, 2, 3]
    assert tokens[0] == 1


def test_what_is_not_kept_is_not_written() -> None:
    ticket = Ticket()
    ticket.prompt = CutPrompt(None, [], range(161), [range(161)], ["user"], "normal")
    ticket.fetch = Fetch("memory", 116, "")
    ticket.origin.written_tokens = 54  # the rows of a reply that was found among them
    assert ticket.written_tokens == 161 - 116

    ticket.keep_limit = 158
    assert ticket.written_tokens == 158 - 116

    ticket.keep_limit = 100
    assert ticket.written_tokens == 0


@pytest.mark.parametrize("sampling", [{}, {"seed": 1}], ids=["batched", "alone"])
@pytest.mark.parametrize("privacy", [Privacy(), Privacy(no_store=True)], ids=["kept", "private"])
def test_an_answer_ends_when_the_cache_was_given_what_it_left(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any], privacy: Privacy
) -> None:
    """So a flush, a list or an `explain` that its client asks for next knows of it."""
    has_ended = threading.Event()
    ended_before: list[bool] = []
    insert_cache = TicketedCache.insert_cache

    def held(cache: TicketedCache, *arguments: Any, **options: Any) -> None:
        if options.get("cache_type", "assistant") == "assistant":
            ended_before.append(has_ended.wait(0.3))
        insert_cache(cache, *arguments, **options)

    monkeypatch.setattr(TicketedCache, "insert_cache", held)

    def read(responses: Iterator[Any]) -> list[Any]:
        answer = list(responses)
        has_ended.set()
        return answer

    loop.ask(CHAT, ticket=Ticket(privacy=privacy), read=read, **sampling)

    until(lambda: bool(ended_before), "nothing was inserted")
    assert ended_before == [False]


def test_an_answer_that_leaves_no_cache_ends_nevertheless(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TicketedCache, "insert_cache", lambda cache, *arguments, **options: None)

    assert loop.ask(CHAT).reply
    assert loop.ask(CHAT, seed=1).reply


@pytest.mark.parametrize("sampling", [{}, {"seed": 1}], ids=["batched", "alone"])
def test_what_a_request_leaves_comes_with_its_ticket(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    origins: list[Origin | None] = []
    insert_cache = PromptCache.insert_cache

    def noted(*arguments: Any, origin: Origin | None = None, **options: Any) -> None:
        origins.append(origin)
        insert_cache(*arguments, origin=origin, **options)

    monkeypatch.setattr(PromptCache, "insert_cache", noted)

    unknown = [{**CHAT[0], "content": f"{sampling} Be brief."}, CHAT[1]]
    answered = loop.ask(unknown, **sampling)
    until(lambda: len(origins) == 3, "system, user and reply are not all kept")

    assert all(origin is answered.ticket.origin for origin in origins)


@pytest.mark.parametrize("sampling", [{}, {"seed": 1}], ids=["batched", "alone"])
def test_ticket_tells_what_happened_and_when(loop: Loop, sampling: dict[str, Any]) -> None:
    ticket = Ticket(b"what was read")

    answered = loop.ask(CHAT, ticket=ticket, **sampling)

    assert ticket.prompt is not None
    assert list(ticket.prompt.tokens) == answered.prompt
    assert [*chain(*ticket.prompt.segments)] == answered.prompt
    assert ticket.prompt.kinds == ["system", "user"]
    times = ticket.times
    known = [times.arrived, times.tokenized, times.looked, times.first_token, times.ended]
    assert known == sorted(time for time in known if time is not None)
    assert ticket.is_over


def test_prompt_is_tokenized_once_by_the_thread_that_answers(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    tokenize = upstream.ResponseGenerator._tokenize

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return tokenize(*arguments)

    monkeypatch.setattr(upstream.ResponseGenerator, "_tokenize", noted)

    loop.ask(CHAT)
    loop.ask(CHAT, seed=1)

    assert threads == [threading.current_thread()] * 2


def test_prompt_of_another_load_is_tokenized_again(loop: Loop, tmp_path: Path) -> None:
    """It was queued, and its model was loaded again before it left the queue."""
    request = TicketedRequest("chat", "", [dict(one) for one in CHAT], None, None)
    loop.generator.tokenize_ahead(request, arguments())
    assert request.ticket.prompt is not None
    here = list(request.ticket.prompt.tokens)
    other = load_tokenizer(build_model_dir(tmp_path / "other", vocab_size=300))

    tokens, segments, *_ = loop.generator._tokenize(other, request, arguments())

    assert tokens != here
    assert list(tokens) == other.apply_chat_template(CHAT, add_generation_prompt=True)
    assert [*chain(*segments)] == list(tokens)
    assert list(request.ticket.prompt.tokens) == list(tokens)


def test_request_whose_client_left_while_it_waited_is_not_computed(loop: Loop) -> None:
    loop.count()
    loop.prefilled()
    left = Ticket()
    left.drop()

    with pytest.raises(ConnectionAbortedError):
        loop.ask(CHAT, ticket=left)

    assert loop.prefilled() == 0
    assert loop.ask(CHAT).reply


def test_prompt_without_tokens_is_an_error_of_its_request_alone(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer may make nothing of a text; an empty prompt would end the generation thread."""
    tokenize = upstream.ResponseGenerator._tokenize

    def nothing(self: Any, tokenizer: Any, request: Any, args: Any) -> Any:
        if request.prompt == "nothing":
            return [], [[]], ["assistant"], "normal", None
        return tokenize(self, tokenizer, request, args)

    monkeypatch.setattr(upstream.ResponseGenerator, "_tokenize", nothing)

    for seed in (None, 1):
        with pytest.raises(RefusedError, match="has no tokens"):
            loop.ask(text="nothing", seed=seed)

    assert loop.ask(CHAT).reply


def test_each_of_many_requests_has_its_own_outcome(loop: Loop) -> None:
    def ask(number: int) -> tuple[int, int]:
        chat = [{"role": "user", "content": f"Tell me a story about {number // 3} dragons. " * 3}]
        answered = loop.ask(chat, seed=number if number % 2 else None)
        return answered.cached, len(answered.prompt)

    with ThreadPoolExecutor(6) as clients:
        said = list(clients.map(ask, range(12)))

    assert all(cached < length for cached, length in said)
    hits = loop.cache.stats().tokens
    assert sum(cached for cached, _ in said) <= sum(hits.values())


def test_the_generation_thread_has_others_tokenize(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a thread has had tokenized is kept until it ends, and that one does not."""
    threads: list[threading.Thread] = []
    tokenize = upstream.ResponseGenerator._tokenize

    def noted(generator: Any, *arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return tokenize(generator, *arguments)

    monkeypatch.setattr(upstream.ResponseGenerator, "_tokenize", noted)
    with Loop(model, waits=False) as loop:
        loop.ask(CHAT)

        assert threads
        others = [one for one in threads if one is not threading.current_thread()]
        assert not any(one.is_alive() for one in others)
