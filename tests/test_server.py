"""`serve` in real processes with tiny models: restarts, tool turns, checkpoints, many clients."""

from __future__ import annotations

import random
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from persist_cache import Store
from persist_cache.store import compact
from tests import official
from tests.fakes import disk_usage
from tests.server_process import ServerProcess
from tests.tiny_models import build_model_dir
from tests.waiting import until

SYSTEM = "You are a helpful assistant. Answer the question of the user in a short sentence. " * 6
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "Tells the time of the day in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
SLIDING: dict[str, Any] = {
    "model_type": "gemma3_text",
    "sliding_window": 64,
    "sliding_window_pattern": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("models") / "sliding", **SLIDING)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def server(model: Path, store: Path, tmp_path: Path, **options: Any) -> ServerProcess:
    return ServerProcess(model, store, tmp_path / "logs", min_free_bytes=0, **options)


def ask(running: ServerProcess, *said: tuple[str, str], **body: Any) -> dict[str, Any]:
    """A chat answer, with its cache header beside it."""
    answer = running.chat(*said, **body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    found["header"] = answer.headers.get("x-persist-cache", "")
    return found


def stored(running: ServerProcess) -> int:
    """Entries on disk."""
    return int(running.get("/v1/cache/stats")["store"]["entries"])


def cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_next_request_after_sigkill_starts_where_the_last_one_ended(
    model: Path, store: Path, tmp_path: Path
) -> None:
    """Rapid-MLX #667, oMLX #3015: persisted only at shutdown, SIGKILL loses all."""
    with server(model, store, tmp_path) as first:
        cold = ask(first, ("system", SYSTEM), ("user", "Who are you?"), max_tokens=8)
        before = ask(first, ("system", SYSTEM), ("user", "Tell me a story."), max_tokens=8)
        until(lambda: stored(first) > 2)
        first.kill()

    with server(model, store, tmp_path) as second:
        after = ask(second, ("system", SYSTEM), ("user", "Tell me a story."), max_tokens=8)
        assert second.stop() == 0

    assert cached(cold) == 0
    assert cold["header"].startswith("miss; tokens=0; reason=")
    assert cached(before) > 100
    assert cached(after) >= cached(before)
    assert after["header"] == f"disk; tokens={cached(after)}"
    assert text(after) == text(before)
    with Store.open(store) as checked:
        assert checked.check(read_data=True) == []


def test_sigterm_lets_a_running_request_end_and_saves_it(
    model: Path, store: Path, tmp_path: Path
) -> None:
    answers: list[dict[str, Any]] = []
    with server(model, store, tmp_path) as running:
        client = threading.Thread(
            target=lambda: answers.append(ask(running, ("user", "Once upon"), max_tokens=60))
        )
        client.start()
        until(lambda: "Prompt processing" in running.log.read_text())
        assert running.stop() == 0
        client.join()

    assert answers[0]["usage"]["completion_tokens"] > 0
    with Store.open(store) as checked:
        assert any(entry.tier.label == "assistant" for entry in checked.entries())


@pytest.mark.parametrize("num_lines", [0, 10, 60])
def test_sigterm_that_cuts_requests_ends_with_status_0(
    model: Path, store: Path, tmp_path: Path, num_lines: int
) -> None:
    """The interpreter's end beside living threads aborts the process now and then."""
    with server(model, store, tmp_path, grace_s=0.0) as running:
        streams = [
            _begin_stream(running, [("system", SYSTEM), ("user", f"Story {number}")], 3000)
            for number in range(3)
        ]
        lines = streams[0].iter_lines()
        for _ in range(num_lines):
            next(lines)

        assert running.stop() == 0
        for stream in streams:
            stream.close()

    with Store.open(store) as checked:
        assert checked.check(read_data=True) == []
        assert checked.entries() != []


def test_request_that_waits_for_others_is_read_ahead(
    model: Path, store: Path, tmp_path: Path
) -> None:
    with server(model, store, tmp_path) as first:
        ask(first, ("system", SYSTEM), ("user", "Who are you?"))
        first.stop()

    with server(model, store, tmp_path) as second:
        with _begin_stream(second, [("user", "Once upon a time")], 2000):
            answer = ask(second, ("system", SYSTEM), ("user", "What time is it?"))
            # It is advice, beside the request; nobody waits for it.
            read = until(lambda: second.get("/v1/cache/stats")["server"]["read_ahead_bytes"])
        second.stop()

    why = "what is stored goes on differently"
    assert answer["header"] == f'disk; tokens={cached(answer)}; reason="{why}"'
    assert read > 100 * cached(answer)


def test_tool_turn_leaves_system_and_user_entries(model: Path, store: Path, tmp_path: Path) -> None:
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "clock", "arguments": '{"city": "Rome"}'},
    }
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "What time is it in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "12:30"},
    ]
    with server(model, store, tmp_path) as running:
        answer = running.request(
            "POST",
            "/v1/chat/completions",
            json={"messages": messages, "tools": TOOLS, "max_tokens": 4},
        )
        assert answer.status_code == 200, answer.text
        running.stop()

    with Store.open(store) as checked:
        tiers = [entry.tier.label for entry in checked.entries()]
    assert sorted(tiers) == ["assistant", "system", "user"]


@pytest.mark.parametrize(
    "flags", [("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0"), ()]
)
def test_requests_served_one_at_a_time_leave_a_system_entry(
    model: Path, store: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    with server(model, store, tmp_path, flags=flags) as running:
        first = ask(running, ("system", SYSTEM), ("user", "Who?"), seed=7, max_tokens=4)
        second = ask(running, ("system", SYSTEM), ("user", "What time?"), seed=7, max_tokens=4)
        running.stop()

    why = "what is stored goes on differently"
    assert second["header"] == f'memory; tokens={cached(second)}; reason="{why}"'
    with Store.open(store) as checked:
        systems = [entry for entry in checked.entries() if entry.tier.label == "system"]
        assert checked.check(read_data=True) == []
    assert [entry.num_tokens <= cached(second) for entry in systems] == [True]
    assert first["usage"]["prompt_tokens"] > systems[0].num_tokens


def test_changed_kv_bits_are_a_clean_miss_in_both_directions(
    model: Path, store: Path, tmp_path: Path
) -> None:
    """Rapid-MLX #198: KV-bits flag switched, crash on stored entries."""
    flags = ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0")
    headers = []
    for chosen in ((), flags, (), flags):
        with server(model, store, tmp_path, flags=chosen) as running:
            answer = ask(running, ("system", SYSTEM), ("user", "Who?"), max_tokens=4)
            headers.append(answer["header"].split(";")[0])
            running.stop()

    assert headers == ["miss", "miss", "disk", "disk"]
    with Store.open(store) as checked:
        assert len({entry.fingerprint for entry in checked.entries()}) == 2


def test_third_day_hits_where_the_second_day_placed_a_checkpoint(
    sliding: Path, store: Path, tmp_path: Path
) -> None:
    """A system prompt that ends in the date, on a model whose cache cannot be trimmed."""
    counts = []
    for day in ("Monday", "Tuesday", "Friday"):
        with server(sliding, store, tmp_path) as running:
            system = f"{SYSTEM} Today is {day}."
            answer = ask(running, ("system", system), ("user", "Who are you?"), max_tokens=4)
            counts.append((cached(answer), answer["usage"]["prompt_tokens"]))
            running.stop()

    assert [count for count, _ in counts[:2]] == [0, 0]
    assert counts[2][0] > 0.8 * counts[2][1]


def test_exact_resend_of_prompt_and_completion_answers(
    model: Path, store: Path, tmp_path: Path
) -> None:
    """mlx-lm #1215, #1887: an exact hit leaves nothing to compute and kills the server."""
    with server(model, store, tmp_path) as running:

        def complete(prompt: str) -> dict[str, Any]:
            answer = running.request(
                "POST", "/v1/completions", json={"prompt": prompt, "max_tokens": 6}
            )
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        prompt = "Once upon a time there was a little dragon"
        first = complete(prompt)
        again = complete(prompt)
        whole = complete(prompt + first["choices"][0]["text"])

        assert again["choices"][0]["text"] == first["choices"][0]["text"]
        assert whole["usage"]["completion_tokens"] > 0
        assert running.get("/health")["status"] == "ok"


@pytest.mark.parametrize("name", ["model", pytest.param("sliding", marks=pytest.mark.long)])
def test_long_conversation_is_merged_while_idle_and_goes_on_the_same(
    request: pytest.FixtureRequest, store: Path, tmp_path: Path, name: str
) -> None:
    chosen: Path = request.getfixturevalue(name)
    said: list[tuple[str, str]] = [("system", SYSTEM)]
    with server(chosen, store, tmp_path) as first:
        for number in range(compact.LONG_CHAIN + 2):
            said.append(("user", f"And the city number {number}?"))
            said.append(("assistant", text(ask(first, *said, max_tokens=3))))
        last = (*said, ("user", "Which one was the first?"))
        right = ask(first, *last, max_tokens=8)
        until(lambda: _counters(store).get("merged"), "an idle server merges")
        first.kill()

    with server(chosen, store, tmp_path) as second:
        again = ask(second, *last, max_tokens=8)
        other = ask(second, *said[:-2], ("user", "Which one was the last?"), max_tokens=3)
        assert second.stop() == 0

    assert cached(again) >= cached(right)
    assert text(again) == text(right)
    assert cached(other) > 100
    with Store.open(store) as checked:
        assert checked.check(read_data=True) == []
        assert "quarantined" not in checked.stats().counters


def _counters(store: Path) -> Mapping[str, int]:
    with Store.open(store, read_only=True) as opened:
        return opened.stats().counters


def test_port_that_is_taken_is_one_sentence(model: Path, store: Path, tmp_path: Path) -> None:
    with server(model, store, tmp_path) as running:
        second = server(model, store, tmp_path, flags=("--port", str(running.port)))

        with pytest.raises(RuntimeError, match=rf"Cannot listen on 127.0.0.1:{running.port}"):
            second.start()


def test_second_server_on_the_same_store_finds_what_the_first_stored(
    model: Path, store: Path, tmp_path: Path
) -> None:
    with server(model, store, tmp_path) as one, server(model, store, tmp_path) as other:
        ask(one, ("system", SYSTEM), ("user", "Who are you?"))
        until(lambda: stored(one) > 1)

        answer = ask(other, ("system", SYSTEM), ("user", "What time is it?"))

        assert answer["header"].startswith("disk; tokens=")


@pytest.fixture
def client(
    model: Path, store: Path, tmp_path: Path
) -> Iterator[tuple[official.openai.OpenAI, Any]]:
    """The official client, and a function that restarts the server behind it."""
    running = server(model, store, tmp_path)
    running.start()

    def restart() -> official.openai.OpenAI:
        nonlocal running
        running.stop()
        running = server(model, store, tmp_path)
        running.start()
        return official.openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)

    yield (
        official.openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0),
        restart,
    )
    running.stop()


def test_openai_client_over_two_turns_and_a_restart(
    client: tuple[official.openai.OpenAI, Any],
) -> None:
    first, restart = client
    messages: list[Any] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "What time is it in Rome?"},
    ]
    options: dict[str, Any] = {
        "model": "default_model",
        "tools": TOOLS,
        "temperature": 0,
        "max_tokens": 8,
    }

    answer = first.chat.completions.create(messages=messages, **options)
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 0
    prompt_tokens = usage.prompt_tokens

    second = restart()
    messages += [
        {"role": "assistant", "content": answer.choices[0].message.content or ""},
        {"role": "user", "content": "And in Paris?"},
    ]
    chunks = list(
        second.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    streamed = chunks[-1].usage
    assert streamed is not None
    assert streamed.prompt_tokens_details is not None
    assert streamed.prompt_tokens_details.cached_tokens is not None
    assert prompt_tokens <= streamed.prompt_tokens_details.cached_tokens < streamed.prompt_tokens
    assert streamed.total_tokens == streamed.prompt_tokens + streamed.completion_tokens


def test_many_clients_and_restarts_answer_as_without_a_cache(
    model: Path, store: Path, tmp_path: Path
) -> None:
    """Every greedy answer equals the one of a server that keeps nothing.

    Clients leave in the middle of an answer, and one answer is cut by SIGKILL.
    """
    rng = random.Random(5)
    prompts = [
        [("system", f"{SYSTEM} Style {style}."), ("user", f"Question {number} about {topic}?")]
        for style in range(4)
        for number, topic in enumerate(["bread", "trains", "rain", "cities", "dragons"])
    ]
    wanted: dict[int, str] = {}
    with server(model, store, tmp_path, persist=["system"], flags=("--prompt-cache-size", "0")) as (
        plain
    ):
        for index, prompt in enumerate(prompts):
            wanted[index] = text(ask(plain, *prompt, max_tokens=6))
        plain.stop()

    disk_bytes, memory_bytes = 1_600_000, 600_000
    peaks = {"disk": 0, "disk, as said": 0, "memory": 0}

    def sample(running: ServerProcess) -> None:
        stats = running.get("/v1/cache/stats")
        seen = {
            "disk": disk_usage(store),
            "disk, as said": stats["store"]["bytes"]["total"],
            "memory": sum(tier["bytes"] for tier in stats["server"]["memory"]["tiers"]),
        }
        for what, nbytes in seen.items():
            peaks[what] = max(peaks[what], nbytes)

    def is_over(running: ServerProcess, done: list[Future[list[str]]]) -> bool:
        sample(running)
        return all(one.done() for one in done)

    def work(running: ServerProcess, mine: list[int]) -> list[str]:
        wrong = []
        for index in mine:
            if index % 9 == 8:
                _begin_stream(running, prompts[index]).close()
                continue
            said = text(ask(running, *prompts[index], max_tokens=6))
            if said != wanted[index]:
                wrong.append(f"{index}: {said!r} instead of {wanted[index]!r}")
        return wrong

    for how in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        running = server(model, store, tmp_path, disk_bytes=disk_bytes, memory_bytes=memory_bytes)
        running.start()
        jobs = [0, *(rng.randrange(len(prompts)) for _ in range(70))]
        with ThreadPoolExecutor(8) as clients:
            done = [clients.submit(work, running, jobs[n::8]) for n in range(8)]
            until(partial(is_over, running, done), timeout_s=300)
        assert [wrong for one in done for wrong in one.result()] == []
        health = {"status": "ok", "model": "ok", "disk": "ok", "weights": "loaded"}
        assert running.get("/health") == health
        if how == signal.SIGKILL:
            with _begin_stream(running, prompts[0]):
                running.kill()
        else:
            # The thread that writes lives as well.
            assert running.request("POST", "/v1/cache/flush").status_code == 200
            assert running.stop() == 0
        assert not re.search("Traceback|Exception|died|failed", running.log.read_text())

    assert 0.8 * disk_bytes < peaks["disk"]
    # What is in the batch has its part of the limit, and that may be much while all ask at once.
    assert 0.8 * memory_bytes < peaks["memory"] <= memory_bytes
    assert max(peaks["disk"], peaks["disk, as said"]) <= disk_bytes
    with Store.open(store) as checked:
        assert checked.check(read_data=True) == []


def _begin_stream(
    running: ServerProcess, prompt: list[tuple[str, str]], max_tokens: int = 50
) -> requests.Response:
    """Ask for a stream and read the beginning of it; to be closed in the middle."""
    said = [{"role": role, "content": content} for role, content in prompt]
    answer = running.request(
        "POST",
        "/v1/chat/completions",
        json={"messages": said, "stream": True, "max_tokens": max_tokens},
        stream=True,
    )
    next(answer.iter_lines(), None)
    return answer
