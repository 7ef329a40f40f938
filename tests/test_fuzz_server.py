"""Any request to a live server: an answer or one sentence, and the server lives on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.memory import fast_folder
from tests.server_process import ServerProcess, sentence_in
from tests.tiny_models import build_model_dir

BOUNDED = settings(
    max_examples=examples(30, 150), deadline=None, suppress_health_check=list(HealthCheck)
)
NUMBERS = st.sampled_from([0, 1, -1, 2**31, 2**53, 2**63, -(2**60), 0.5, -0.0, 1e308])
TEXTS = st.text(max_size=8) | st.sampled_from(["", "\x00", "<|im_end|>", "{{ 1/0 }}", "é" * 900])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]) | TEXTS, inner)
    ),
    max_leaves=6,
)
MESSAGE = {"role": "user", "content": "Hello!"}
CHAT = {"messages": [MESSAGE]}
FIELDS = [
    "messages", "prompt", "model", "stream", "stream_options", "temperature", "top_p", "top_k",
    "min_p", "repetition_penalty", "repetition_context_size", "presence_penalty",
    "frequency_penalty", "xtc_probability", "xtc_threshold", "logit_bias", "logprobs",
    "top_logprobs", "seed", "stop", "tools", "tool_choice", "adapters", "draft_model",
    "num_draft_tokens", "role_mapping", "chat_template_kwargs", "response_format", "user", "n",
    "input", "instructions", "reasoning", "text", "include", "metadata", "previous_response_id",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
]  # fmt: skip
"""All but the length of the answer, which may be asked to be long."""
PATHS = [
    *("/v1/chat/completions", "/v1/completions", "/v1/cache/explain", "/v1/cache/warm"),
    *("/v1/responses", "/v1/cache/entries", "/v1/cache/import"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with fast_folder() as folder:
        model = build_model_dir(folder / "model")
        flags = ("--max-tokens", "2")
        with ServerProcess(model, folder / "store", folder, flags=flags, min_free_bytes=0) as live:
            yield live
            assert live.chat(("user", "Are you there?")).status_code == 200
            assert live.stop() == 0
            assert "Traceback" not in live.log.read_text()


def send(server: ServerProcess, method: str, path: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = server.request(method, path, data=body, headers=headers)

    assert answer.status_code < 500, (answer.status_code, answer.text)
    if answer.status_code >= 400 and method != "HEAD":
        sentence = sentence_in(json.loads(answer.text))
        assert "\n" not in sentence, sentence
        assert len(sentence) < 500
    health = server.request("GET", "/health")
    assert health.status_code == 200, health.text


@given(path=st.sampled_from(PATHS), body=st.binary(max_size=200))
@example(path=PATHS[0], body=b"[" * 100_000)
@example(path=PATHS[3], body=b'{"messages":' * 10_000)
@example(path=PATHS[0], body=b'{"messages": "\\ud800"}')
@BOUNDED
def test_any_bytes_as_a_body(server: ServerProcess, path: str, body: bytes) -> None:
    send(server, "POST", path, body)


@pytest.mark.parametrize("changes", [{"top_logprobs": True}, {"temperature": True}])
def test_true_is_no_number(server: ServerProcess, changes: dict[str, Any]) -> None:
    """Found by what follows: upstream's generation thread died of it."""
    answer = server.request("POST", PATHS[0], json={**CHAT, **changes, "logprobs": True})

    assert answer.status_code == 400
    assert next(iter(changes)) in answer.text


@given(
    path=st.sampled_from(PATHS),
    changes=st.dictionaries(st.sampled_from(FIELDS) | TEXTS, VALUES, min_size=1, max_size=2),
)
@example(path=PATHS[0], changes={"model": "é" * 900})
@example(path=PATHS[1], changes={"adapters": "a/" + "b" * 300})
@BOUNDED
def test_any_values_in_a_request(server: ServerProcess, path: str, changes: dict[str, Any]) -> None:
    good = {"/v1/completions": {"prompt": "Hello!"}, "/v1/responses": {"input": "Hello!"}}
    send(server, "POST", path, json.dumps({**good.get(path, CHAT), **changes}).encode())


@given(
    message=st.dictionaries(
        st.sampled_from(
            [
                "role",
                "content",
                "tool_calls",
                "name",
                "tool_call_id",
                "reasoning",
                "type",
                "call_id",
            ]
        ),
        VALUES | st.sampled_from(["system", "user", "assistant", "tool", "reasoning"]),
        max_size=3,
    )
)
@BOUNDED
def test_any_message(server: ServerProcess, message: dict[str, Any]) -> None:
    for path in (PATHS[0], PATHS[2]):
        body = {"messages": [MESSAGE, {"role": "user", **message}]}
        send(server, "POST", path, json.dumps(body).encode())
    send(server, "POST", "/v1/responses", json.dumps({"input": body["messages"]}).encode())


@given(
    method=st.sampled_from(["GET", "PUT", "POST", "DELETE"]),
    parts=st.lists(
        st.sampled_from(
            [
                "entries",
                "tree",
                "stats",
                "pin",
                "flush",
                "0" * 16,
                "groups",
                "label",
                "ttl",
                "export",
            ]
        )
        | TEXTS,
        max_size=3,
    ),
    query=st.dictionaries(
        st.sampled_from(
            ["tier", "model", "sort", "limit", "offset", "parent", "text", "pinned", "group", "ids"]
        )
        | TEXTS,
        TEXTS | st.integers().map(str),
        max_size=2,
    ),
)
@BOUNDED
def test_any_path_and_query(
    server: ServerProcess, method: str, parts: list[str], query: dict[str, str]
) -> None:
    # Dots would be taken for steps up by the client.
    path = "/v1/cache/" + "/".join(quote(part, safe="").replace(".", "%2E") for part in parts)
    asked = "&".join(f"{quote(name)}={quote(value)}" for name, value in query.items())
    send(server, method, f"{path}?{asked}", b"")
