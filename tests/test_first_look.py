"""Each answer tells what was there when its request left the queue; each request counts once."""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from persist_cache import Store
from persist_cache.cache.stats import Fetch
from persist_cache.entry import SOURCES
from persist_cache.server.flight import Line
from persist_cache.server.ticket import Ticket
from persist_cache.server.upstream.generator import Generator
from persist_cache.server.upstream.requests import TicketedRequest
from tests.computed import CountedServer, told
from tests.tiny_models import build_model_dir

SYSTEM = "You are a helpful assistant. Answer the question of the user in a short sentence. " * 6
KV_BITS = ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0")
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("models") / "llama")


def server(model: Path, folder: Path, *flags: str) -> CountedServer:
    return CountedServer(model, folder / "store", folder / "logs", min_free_bytes=0, flags=flags)


def counted(running: CountedServer) -> tuple[dict[str, int], int, dict[str, int]]:
    said = running.get("/v1/cache/stats")["server"]
    return said["hits"], said["misses"], said["tokens_saved"]


@pytest.mark.parametrize(
    ("flags", "options"), [((), {}), ((), {"seed": 7}), (KV_BITS, {})], ids=["plain", "seed", "kv"]
)
def test_cold_request_is_told_and_counted_as_a_miss(
    model: Path, tmp_path: Path, flags: tuple[str, ...], options: dict[str, Any]
) -> None:
    """The system part is prefilled and kept first, and then found: that is no hit."""
    with server(model, tmp_path, *flags) as running:
        cold = told(running.chat(("system", SYSTEM), ("user", "Who are you?"), **options))
        streamed = told(
            running.chat(("system", f"No. {SYSTEM}"), ("user", "Who?"), **options, **STREAM)
        )
        after_two = counted(running)
        warm = told(running.chat(("system", SYSTEM), ("user", "What time is it?"), **options))
        after_three = counted(running)

    assert (cold.source, cold.num_tokens, cold.cached_tokens) == ("miss", 0, 0)
    # Its template's first words are those of the other one.
    assert streamed.num_tokens == streamed.cached_tokens < 8
    assert sum(after_two[2].values()) == streamed.num_tokens
    assert warm.num_tokens == warm.cached_tokens > 50
    assert sum(after_three[2].values()) == streamed.num_tokens + warm.num_tokens
    assert sum(after_three[0].values()) + after_three[1] == 3


def test_prefill_of_our_own_is_no_use_of_an_entry(model: Path, tmp_path: Path) -> None:
    with server(model, tmp_path) as running:
        told(running.chat(("system", SYSTEM), ("user", "Who are you?"), seed=1))
        running.stop()

    with Store.open(tmp_path / "store", read_only=True) as store:
        assert {entry.hits for entry in store.entries()} == {0}
        assert {entry.saved_s for entry in store.entries()} == {0.0}


def test_requests_of_the_admin_api_are_in_no_statistics(model: Path, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": SYSTEM}]
    asked = {"messages": [*messages, {"role": "user", "content": "Who are you?"}]}
    with server(model, tmp_path) as running:
        told(running.chat(("user", "Once upon a time")))
        before = counted(running)
        for body in ({"messages": messages}, {"messages": messages}, asked, asked):
            answer = running.request("POST", "/v1/cache/warm", json=body)
            assert answer.status_code == 200, answer.text
        found = answer.json()["found_tokens"]
        running.request("POST", "/v1/cache/explain", json=asked)
        after = counted(running)
        recent = running.get("/v1/cache/stats")["recent"]
        running.stop()

    assert found > 100
    nothing = dict.fromkeys(SOURCES, 0)
    assert after == before == (nothing, 1, nothing)
    assert len(recent) == 1
    with Store.open(tmp_path / "store", read_only=True) as store:
        assert store.stats().counters["misses"] == 1
        assert {entry.hits for entry in store.entries()} == {0}


def test_every_answer_tells_its_own_outcome_among_many(model: Path, tmp_path: Path) -> None:
    """One of 24 had no header: its prompt had grown by a token when it was compared."""
    bodies: list[dict[str, Any]] = []
    for number in range(36):
        body: dict[str, Any] = {"max_tokens": 4}
        if number % 3 == 2:
            body["prompt"] = f"Once upon a time there were {number // 6} dragons. " * 3
        else:
            text = f"Tell me a story about {number // 4} trains."
            body["messages"] = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": text},
            ]
        if number % 2:
            body["seed"] = number
        if number % 5 < 2:
            body |= STREAM
        bodies.append(body)

    def send(body: dict[str, Any]) -> Any:
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        return running.request("POST", path, json=body)

    with server(model, tmp_path) as running, ThreadPoolExecutor(12) as clients:
        said = [told(answer) for answer in clients.map(send, bodies)]
        hits, misses, saved = counted(running)

    assert all(one.num_tokens == one.cached_tokens for one in said)
    assert Counter(one.source for one in said) == Counter({**hits, "miss": misses})
    assert sum(one.num_tokens for one in said) == sum(saved.values())


def test_request_that_fails_before_its_look_raises_why() -> None:
    """Served alone, its context is out before it looks; nobody may wait for that look."""
    generator: Any = object.__new__(Generator)
    generator.requests = Queue()
    generator.line = Line()
    generator._in_flight = 0
    generator._stop = False
    generator._is_distributed = False
    generator._generation_failed = False
    generator._generation_thread = threading.current_thread()
    tokenizer = SimpleNamespace(has_thinking=False, has_tool_calling=False, tool_parser=None)
    generator.model_provider = SimpleNamespace(
        model=None,
        draft_model=None,
        model_key=("m", None, None),
        tokenizer=tokenizer,
        spare=None,
        has_no_spare=True,
        make_spare=lambda: None,
    )
    generator._tokenize = lambda *_: ([1, 2], [[1, 2]], ["assistant"], "normal", None)
    generator._make_state_machine = lambda *_: (None, None)
    request = TicketedRequest("text", "", [], None, None)
    logits = SimpleNamespace(repetition_penalty=0, presence_penalty=0, frequency_penalty=0)
    model = SimpleNamespace(model="m", adapter=None, draft=None)
    args = SimpleNamespace(
        stop_words=[], seed="no number", logits=logits, model=model, max_tokens=4
    )
    loop = threading.Thread(
        target=lambda: generator._serve_single(generator.requests.get(timeout=10), None)
    )
    loop.start()

    with pytest.raises(TypeError):
        generator.generate(request, args)

    loop.join()
    assert request.ticket.fetch is None


def test_ticket_tells_the_first_look_only() -> None:
    ticket = Ticket()

    assert not ticket.wait(0)
    ticket.looked(Fetch("miss", 0, "nothing is stored for this model"))
    ticket.looked(Fetch("memory", 9))

    assert ticket.wait(0)
    assert ticket.fetch == Fetch("miss", 0, "nothing is stored for this model")


def test_ticket_that_is_settled_lets_go_of_who_waits() -> None:
    ticket = Ticket()

    ticket.settle()

    assert ticket.wait(0)
    assert ticket.fetch is None


def test_ticket_goes_to_other_ranks_with_its_request() -> None:
    ticket = Ticket(b"what was read", keeps="system")
    ticket.looked(Fetch("memory", 9))

    there = pickle.loads(pickle.dumps(ticket))

    assert (there.keeps, there.fetch) == ("system", None)
