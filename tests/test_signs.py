"""A streamed answer shows signs of life, whatever it waits for; what comes too late is in it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from persist_cache import Store
from persist_cache.server.streaming import Streaming
from tests import official
from tests.computed import told
from tests.server_process import ServerProcess
from tests.tiny_models import CHAT_TEMPLATE, build_model_dir
from tests.waiting import until

SYSTEM = "You are a helpful assistant. Answer the question of the user in a short sentence. " * 6
REFUSING = """\
{%- if messages[-1].content == 'forbidden' %}{{ raise_exception('the last word is forbidden') }}\
{% endif -%}
"""
NEVER_ENDING = {"stream": True, "max_tokens": 100_000, "temperature": 0, "logit_bias": {"2": -100}}
"""Until its client leaves: the end of a message is never chosen."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_model_dir(tmp_path_factory.mktemp("models") / "llama")
    (folder / "chat_template.jinja").write_text(REFUSING + CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is not loaded, so that its template is asked when a request's turn comes."""
    folder = build_model_dir(tmp_path_factory.mktemp("models") / "other", seed=1)
    (folder / "chat_template.jinja").write_text(REFUSING + CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    with ServerProcess(model, folder / "store", folder / "logs", min_free_bytes=0) as server:
        yield server


def begin(running: ServerProcess, text: str, **body: Any) -> tuple[requests.Response, Any]:
    """Send a streamed request; returns the answer and its lines that are not empty."""
    asked = {
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 4,
        **body,
    }
    answer = running.request("POST", "/v1/chat/completions", json=asked, stream=True)
    return answer, filter(None, answer.iter_lines(chunk_size=1))


def test_stream_begins_while_another_request_is_served_alone(running: ServerProcess) -> None:
    first, first_lines = begin(running, "Once upon a time", seed=1, **NEVER_ENDING)
    assert next(line for line in first_lines if line.startswith(b"data: "))

    second, lines = begin(running, "Who are you?")
    sign = next(lines)
    still = next(first_lines)
    first.close()
    rest = list(lines)

    assert second.status_code == 200
    assert second.headers["Content-Type"].startswith("text/event-stream")
    assert "x-persist-cache" not in second.headers
    assert sign.startswith(b": keepalive 0/")
    assert still.startswith(b"data: ")
    (outcome,) = (line for line in rest if line.startswith(b": x-persist-cache: "))
    before = rest[: rest.index(outcome)]
    assert all(line.startswith(b": keepalive ") for line in before)
    cached = int(outcome.partition(b"tokens=")[2].partition(b";")[0])
    events = [json.loads(line[6:]) for line in rest if line.startswith(b"data: {")]
    (usage,) = (event["usage"] for event in events if "usage" in event)
    assert usage["prompt_tokens_details"]["cached_tokens"] == cached > 100
    assert rest[-1] == b"data: [DONE]"


def test_what_goes_wrong_in_a_stream_that_has_begun_is_an_event(
    running: ServerProcess, other: Path
) -> None:
    first, first_lines = begin(running, "Once upon a time", seed=1, **NEVER_ENDING)
    assert next(line for line in first_lines if line.startswith(b"data: "))
    client = official.openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)

    answer, lines = begin(running, "forbidden", model=str(other))
    assert next(lines).startswith(b": keepalive ")
    stream = client.chat.completions.create(
        model=str(other),
        messages=[{"role": "user", "content": "forbidden"}],
        stream=True,
    )
    first.close()
    rest = list(lines)

    assert answer.status_code == 200
    events = [json.loads(line[6:]) for line in rest if line.startswith(b"data: ")]
    (error,) = (event["error"] for event in events)
    assert error["message"].endswith("the last word is forbidden.")
    assert error["type"] == "invalid_request_error"
    with pytest.raises(official.openai.APIError, match="the last word is forbidden"):
        list(stream)
    assert running.get("/health")["status"] == "ok"


def test_what_is_known_to_be_wrong_at_once_is_told_by_the_status(running: ServerProcess) -> None:
    """Also while others are answered."""
    running.chat(("user", "Load the default model again."))
    first, first_lines = begin(running, "Once upon a time", seed=1, **NEVER_ENDING)
    assert next(line for line in first_lines if line.startswith(b"data: "))

    answer = running.chat(("user", "forbidden"), stream=True)
    still = next(first_lines)
    first.close()

    assert answer.status_code == 400
    assert "the last word is forbidden" in answer.text
    assert still.startswith(b"data: ")


def test_client_that_closed_its_connection_has_left() -> None:
    ours, theirs = socket.socketpair()
    handler = object.__new__(Streaming)
    handler.connection = ours

    assert not handler.has_left()
    theirs.send(b"the next request")
    assert not handler.has_left()
    assert ours.recv(100) == b"the next request"
    theirs.close()
    assert handler.has_left()
    ours.close()
    assert handler.has_left()


def test_texts_are_on_disk_soon_enough_for_a_kill(model: Path, tmp_path: Path) -> None:
    """Nothing else is asked meanwhile, and no signal announces the end."""
    store = tmp_path / "store"
    texts = [
        f"def area_{number}(width, height): return width * height\n" * 3 for number in range(4)
    ]

    def complete(server: ServerProcess, text: str) -> requests.Response:
        body = {"prompt": text, "max_tokens": 8}
        return server.request("POST", "/v1/completions", json=body)

    with ServerProcess(model, store, tmp_path / "logs", min_free_bytes=0) as first:
        lengths = [told(complete(first, text)).prompt_tokens for text in texts]
        with Store.open(store, read_only=True) as seen:
            until(lambda: len(_user_entries(seen)) == 4, "not every text is on disk")
        first.kill()
    with ServerProcess(model, store, tmp_path / "logs", min_free_bytes=0) as second:
        again = [told(complete(second, text)) for text in texts]

    assert [one.cached_tokens for one in again] == [length - 1 for length in lengths]


def _user_entries(store: Store) -> list[int]:
    return [entry.num_tokens for entry in store.entries() if entry.tier.label == "user"]
