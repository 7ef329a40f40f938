"""Bodies of Messages and Responses in files and in the admin API: they mean the prompt served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persist_cache import Store
from persist_cache.entry import Tier
from persist_cache.server.protocols.recognized import (
    CHAT,
    MESSAGES,
    RESPONSES,
    protocol_at,
    protocol_of,
)
from tests import responses_bodies
from tests.anthropic_bodies import EPHEMERAL, agent_body
from tests.cli import Run, runner
from tests.computed import CountedServer
from tests.tiny_models import build_model_dir

REQUESTS = sorted((Path(__file__).parent / "requests").glob("*.json"))
ASK = [{"role": "user", "content": "What time is it?"}]
TOOL = {"name": "clock", "input_schema": {"type": "object", "properties": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Six."}


@pytest.mark.parametrize(
    ("body", "protocol"),
    [
        ({"messages": ASK}, CHAT),
        ({"prompt": "Once"}, CHAT),
        ({"messages": ASK, "system": "Be brief."}, MESSAGES),
        ({"messages": ASK, "system": None}, CHAT),
        ({"messages": ASK, "tools": [TOOL]}, MESSAGES),
        ({"messages": ASK, "tools": [{"type": "function", "function": TOOL}]}, CHAT),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, MESSAGES),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": [CALL]}], "system": "x"}, CHAT),
        ({"messages": [{"role": "tool", "content": "Six."}], "stop_sequences": ["x"]}, CHAT),
        ({"messages": "no list", "tools": 3}, CHAT),
        ({"system": "Be brief."}, MESSAGES),
        ({"input": "Hello"}, RESPONSES),
        ({"input": ASK, "instructions": "Be brief."}, RESPONSES),
        ({"instructions": "Be brief.", "tools": [{"type": "function", "name": "a"}]}, RESPONSES),
        ({"messages": ASK, "input": "Hello", "instructions": "Be brief."}, CHAT),
        ({"input": None, "prompt": "Once"}, CHAT),
        # A chat's parts may have marks, too.
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "x", "cache_control": EPHEMERAL}],
                    }
                ]
            },
            CHAT,
        ),
    ],
)
def test_protocol_is_told_by_the_shape_of_a_body(body: dict[str, Any], protocol: str) -> None:
    assert protocol_of(body) == protocol


def test_recorded_bodies_are_of_the_protocol_of_their_path() -> None:
    for path in REQUESTS:
        recorded = json.loads(path.read_text())
        assert protocol_of(recorded["body"]) == protocol_at(recorded["path"]) == CHAT
    assert protocol_of(agent_body(tools=1, tool_words=1, system_words=8, turns=1)) == MESSAGES
    assert protocol_at("/v1/messages/count_tokens?beta=true") == MESSAGES
    assert protocol_of(responses_bodies.agent_body(tools=1, turns=1)) == RESPONSES
    assert protocol_at("/v1/responses?a=b") == protocol_at("/responses/") == RESPONSES
    assert protocol_at("/somewhere") == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recognized")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A model whose cache can be resumed only where it was kept."""
    options: Any = {"sliding_window": 32, "sliding_window_pattern": 2}
    return build_model_dir(folder / "sliding", model_type="gemma3_text", **options)


@pytest.fixture(scope="module")
def server(folder: Path, model: Path) -> Iterator[CountedServer]:
    with CountedServer(model, folder / "store", folder, min_free_bytes=0) as live:
        yield live
        assert live.stop() == 0
        assert "Traceback" not in live.log.read_text()


@pytest.fixture
def body() -> dict[str, Any]:
    whole = agent_body(tools=2, tool_words=20, system_words=80, turns=2)
    # A mark in the middle of the conversation, where it goes on in another way below.
    whole["messages"][2]["content"][-1]["cache_control"] = EPHEMERAL
    return {**whole, "stream": False, "max_tokens": 1}


def written(path: Path, body: dict[str, Any]) -> Path:
    path.write_text(json.dumps(body))
    return path


def elsewhere(body: dict[str, Any]) -> dict[str, Any]:
    """The same conversation, which parts right behind the mark in its middle."""
    other = json.loads(json.dumps(body))
    other["messages"][3] = {"role": "assistant", "content": "Something else."}
    return {**other, "messages": [*other["messages"][:4], *ASK]}


def test_what_is_warmed_from_a_file_is_what_the_server_reads(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], body: dict[str, Any]
) -> None:
    store = tmp_path / "store"
    run: Run = runner(store, capfd)
    recording = written(tmp_path / "body.json", {"path": "/v1/messages?beta=true", "body": body})

    (warmed,) = run("warm", "--model", model, "--messages", recording, "--json").json
    plain = written(tmp_path / "plain.json", body)
    said = run("explain", "--model", model, "--messages", plain, "--json").json
    shown = run("explain", "--model", model, "--messages", plain).out

    assert said["cached_tokens"] == warmed["num_tokens"] == said["num_tokens"] - 1
    assert said["repaired"] == ["billing"]
    assert said["marks"] == 4
    assert "repaired  billing" in shown
    with CountedServer(model, store, tmp_path, min_free_bytes=0) as server:
        usage = server.request("POST", "/v1/messages", json=body).json()["usage"]
        assert usage["cache_read_input_tokens"] == warmed["num_tokens"]
        marked = server.request("POST", "/v1/messages", json=elsewhere(body)).json()["usage"]
    with Store.open(store, min_free_bytes=0) as opened:
        lengths = {entry.num_tokens: entry.tier for entry in opened.entries()}
    assert lengths[marked["cache_read_input_tokens"]] == Tier.USER, "it ends at the mark"


def test_head_alone_can_be_warmed_from_a_file(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], body: dict[str, Any]
) -> None:
    run: Run = runner(tmp_path / "store", capfd)
    head = written(tmp_path / "head.json", {"system": body["system"], "tools": body["tools"]})

    (warmed,) = run("warm", "--model", model, "--messages", head, "--json").json

    assert warmed["tier"] == "system"
    said = run(
        *("explain", "--model", model, "--json"),
        *("--messages", written(tmp_path / "body.json", body)),
    ).json
    assert said["cached_tokens"] == warmed["num_tokens"]


def test_option_says_what_the_shape_does_not(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run: Run = runner(tmp_path / "store", capfd)
    parts = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]
    path = written(tmp_path / "body.json", {"messages": [{"role": "user", "content": parts}]})

    def tokens(*options: str) -> int:
        said = run("explain", "--model", model, "--messages", path, "--json", *options).json
        return int(said["num_tokens"])

    assert tokens() == tokens("--protocol", "chat") < tokens("--protocol", "messages")


def test_admin_api_explains_and_warms_what_is_served(
    server: CountedServer, body: dict[str, Any]
) -> None:
    def post(path: str, asked: dict[str, Any]) -> dict[str, Any]:
        answer = server.request("POST", path, json=asked)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    head = {"system": body["system"], "tools": body["tools"]}
    warmed = post("/v1/cache/warm", {**head, "cache": {"label": "agent"}})
    before = post("/v1/cache/explain", body)
    whole = post("/v1/cache/warm", body)
    after = post("/v1/cache/explain", body)
    server.calls()
    usage = post("/v1/messages", body)["usage"]

    assert warmed["tier"] == "system"
    assert before["cached_tokens"] == warmed["num_tokens"]
    assert before["repaired"] == ["billing"]
    assert after["cached_tokens"] == whole["num_tokens"] == usage["cache_read_input_tokens"]
    assert after["num_tokens"] == sum(
        usage[name]
        for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    )
    assert not server.prefilled()


@pytest.fixture
def response_body() -> dict[str, Any]:
    whole = responses_bodies.agent_body(tools=2, tool_words=20, system_words=80, turns=2)
    return {**whole, "stream": False, "max_output_tokens": 1}


def test_response_that_is_warmed_from_a_file_is_what_the_server_reads(
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    response_body: dict[str, Any],
) -> None:
    run: Run = runner(tmp_path / "store", capfd)
    body = response_body
    recording = written(tmp_path / "body.json", {"path": "/v1/responses", "body": body})
    items = written(tmp_path / "items.json", {**body, "instructions": None}["input"])

    (warmed,) = run("warm", "--model", model, "--messages", recording, "--json").json
    said = run(
        *("explain", "--model", model, "--json"),
        *("--messages", written(tmp_path / "plain.json", body)),
    ).json
    bare = run(
        *("explain", "--model", model, "--json", "--protocol", "responses"),
        *("--messages", items),
    ).json

    assert said["cached_tokens"] == warmed["num_tokens"] == said["num_tokens"] - 1
    assert said["ignored"] == ["reasoning.effort", "text.verbosity", "tools"]
    assert 0 < bare["num_tokens"] < said["num_tokens"]
    with CountedServer(model, tmp_path / "store", tmp_path, min_free_bytes=0) as server:
        usage = server.request("POST", "/v1/responses", json=body).json()["usage"]
        assert usage["input_tokens_details"]["cached_tokens"] == warmed["num_tokens"]


def test_head_of_responses_alone_can_be_warmed(
    server: CountedServer, response_body: dict[str, Any]
) -> None:
    def post(path: str, asked: dict[str, Any]) -> dict[str, Any]:
        answer = server.request("POST", path, json=asked)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    body = response_body
    head = {"instructions": body["instructions"], "tools": body["tools"]}
    with_developer = {**head, "input": body["input"][:1]}

    first = post("/v1/cache/warm", head)
    second = post("/v1/cache/warm", with_developer)
    before = post("/v1/cache/explain", body)
    whole = post("/v1/cache/warm", body)
    server.calls()
    usage = post("/v1/responses", body)["usage"]

    assert first["tier"] == second["tier"] == "system"
    assert first["num_tokens"] < second["num_tokens"] == before["cached_tokens"]
    assert whole["num_tokens"] == usage["input_tokens_details"]["cached_tokens"]
    assert not server.prefilled()


@pytest.mark.parametrize(
    ("path", "asked", "said"),
    [
        (
            "explain?protocol=telex",
            {"messages": ASK},
            "protocol must be one of chat, messages, responses.",
        ),
        ("explain?protocol=messages", {"messages": 3}, "messages must be a list"),
        ("warm", {"input": [3]}, "input[0] must be an object."),
        ("explain", {"instructions": "a", "input": 3}, "input must be a text"),
        ("warm", {"system": 3, "messages": ASK}, "system must be a text or a list of blocks."),
    ],
)
def test_bad_bodies_are_refused_by_the_admin_api(
    server: CountedServer, path: str, asked: dict[str, Any], said: str
) -> None:
    answer = server.request("POST", f"/v1/cache/{path}", json=asked)

    assert answer.status_code == 400
    assert said in answer.json()["error"]
