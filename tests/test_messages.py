"""`/v1/messages` of a real server, asked by the official client; the model says what it is told."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from persist_cache.prefill.loading import load_tokenizer
from persist_cache.stability.names import REPAIRS
from tests import official
from tests.anthropic_bodies import BILLING, COUNTDOWN, EPHEMERAL, agent_body, spoilt
from tests.computed import CountedServer
from tests.examples import examples
from tests.scripted_model import SCRIPTS, THINKS, build_scripted_model
from tests.tiny_models import build_model_dir

SYSTEM = "You are a helpful assistant. Answer the question of the user in a short sentence. " * 4
CLOCK: Any = {
    "name": "clock",
    "description": "Tells the time of the day in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CONTEXT = 4096
VERSION = {"anthropic-version": "2023-06-01", "anthropic-beta": "made-up-2030-01-01"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("messages")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return build_scripted_model(folder / "model", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def sliding(folder: Path) -> Path:
    """A model whose cache can be resumed only where it was kept."""
    options: Any = {"sliding_window": 32, "sliding_window_pattern": 2}
    return build_model_dir(folder / "sliding", model_type="gemma3_text", **options)


@pytest.fixture(scope="module")
def server(folder: Path, model: Path, sliding: Path) -> Iterator[CountedServer]:
    options = {
        "min_free_bytes": 0,
        "api_key": "secret",
        "aliases": {"claude-here": str(model), "other": str(sliding)},
    }
    with CountedServer(model, folder / "store", folder, **options) as live:
        yield live
        assert live.stop() == 0
        assert "Traceback" not in live.log.read_text()


@pytest.fixture(scope="module")
def client(server: CountedServer) -> official.anthropic.Anthropic:
    return official.anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0)


def said(text: str, **more: Any) -> dict[str, Any]:
    """A request in which the user says something."""
    return {
        "model": "claude-large",
        "max_tokens": 64,
        "messages": [{"role": "user", "content": text}],
        **more,
    }


def post(server: CountedServer, body: Any, path: str = "/v1/messages") -> requests.Response:
    headers = {"x-api-key": "secret", **VERSION}
    return server.request("POST", path, json=body, headers=headers)


def blocks(message: official.anthropic.types.Message) -> list[tuple[str, Any]]:
    """Type and content of each block."""
    return [
        (one.type, one.input if one.type == "tool_use" else getattr(one, one.type))
        for one in message.content
    ]


def read_and_written(usage: Any) -> tuple[int, int, int]:
    return (
        usage.input_tokens,
        usage.cache_read_input_tokens,
        usage.cache_creation_input_tokens,
    )


# ---- what is answered ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("hello", [("text", "Hello, I am here. ")], "end_turn"),
        ("silent", [], "end_turn"),
        ("think", [("thinking", THINKS), ("text", "\n\nIt is six.")], "end_turn"),
        ("clock", [("text", "I look."), ("tool_use", {"city": "Bern"})], "tool_use"),
        (
            "both",
            [("text", "Twice."), ("tool_use", {"city": "Rom"}), ("tool_use", {"city": "Ulm"})],
            "tool_use",
        ),
        ("broken", [("text", f"So: {''.join(SCRIPTS['broken'][1:])}")], "end_turn"),
    ],
)
def test_answer_and_its_stream_are_the_same_message(
    client: official.anthropic.Anthropic, name: str, content: list[tuple[str, Any]], reason: str
) -> None:
    body = said(f"play {name}", tools=[CLOCK])

    whole = client.messages.create(**body)
    with client.messages.stream(**body) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()

    assert blocks(whole) == blocks(streamed) == content
    assert whole.stop_reason == streamed.stop_reason == reason
    assert whole.model == streamed.model == "claude-large"
    assert whole.usage.output_tokens == streamed.usage.output_tokens == len(SCRIPTS[name]) + 1
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(content)


def test_tool_calls_are_text_where_there_are_no_tools(client: official.anthropic.Anthropic) -> None:
    without = client.messages.create(**said("play clock"))
    forbidden = client.messages.create(
        **said("play clock", tools=[CLOCK], tool_choice={"type": "none"})
    )

    for found in (without, forbidden):
        assert blocks(found) == [("text", "".join(SCRIPTS["clock"]))]
        assert found.stop_reason == "end_turn"


def test_answer_ends_with_its_first_call_when_only_one_is_allowed(
    client: official.anthropic.Anthropic,
) -> None:
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}

    found = client.messages.create(**said("play both", tools=[CLOCK], tool_choice=choice))

    assert blocks(found) == [("text", "Twice."), ("tool_use", {"city": "Rom"})]
    assert found.stop_reason == "tool_use"


def test_what_follows_the_only_call_in_the_same_piece_is_left_out(
    client: official.anthropic.Anthropic,
) -> None:
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}

    found = client.messages.create(**said("play glued", tools=[CLOCK], tool_choice=choice))

    assert blocks(found) == [("text", "At once."), ("tool_use", {})]


def test_mark_of_thinking_in_a_question_makes_no_thought_of_the_answer(
    client: official.anthropic.Anthropic,
) -> None:
    found = client.messages.create(**said("What does <think> stand for in this? play hello"))

    assert blocks(found) == [("text", "Hello, I am here. ")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("words", "text", "word"),
    [
        # One that is a token, one that goes over two, one that never comes.
        (["four", "two, "], "One, ", "two, "),
        (["STOP"], "One, two, ", "STOP"),
        (["never"], "One, two, STOP three, four", None),
    ],
)
def test_stop_sequence_ends_the_answer_in_front_of_it_and_is_named(
    client: official.anthropic.Anthropic,
    words: list[str],
    text: str,
    word: str | None,
    stream: bool,
) -> None:
    body = said("play stop", stop_sequences=words)

    if stream:
        with client.messages.stream(**body) as events:
            found = events.get_final_message()
    else:
        found = client.messages.create(**body)

    assert blocks(found) == [("text", text)]
    assert (found.stop_reason, found.stop_sequence) == (
        "end_turn" if word is None else "stop_sequence",
        word,
    )


def test_answer_that_is_cut_off_says_so(client: official.anthropic.Anthropic) -> None:
    found = client.messages.create(**{**said("play long"), "max_tokens": 3})

    assert blocks(found) == [("text", "100, 101, 102, ")]
    assert found.stop_reason == "max_tokens"
    assert found.usage.output_tokens == 3


# ---- what is asked -------------------------------------------------------------------------------


def test_conversation_with_calls_results_and_thoughts_is_rendered_as_the_template_would(
    client: official.anthropic.Anthropic, server: CountedServer, model: Path
) -> None:
    asked = said(
        "play clock, please",
        system=[{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
        tools=[CLOCK],
    )
    first = client.messages.create(**asked)
    result = {"type": "tool_result", "tool_use_id": first.content[1].id, "content": "play think"}
    asked["messages"] += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    second = client.messages.create(**asked)
    asked["messages"] += [
        {"role": "assistant", "content": second.content},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    server.calls()
    asked["system"][0]["text"] = "Be very brief."

    found = client.messages.create(**asked)

    function = {"name": "clock", "description": CLOCK["description"]}
    function["parameters"] = CLOCK["input_schema"]
    expected = load_tokenizer(str(model)).apply_chat_template(
        [
            {"role": "system", "content": "Be very brief.\n\nBe kind."},
            {"role": "user", "content": "play clock, please"},
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [{"function": {"name": "clock", "arguments": {"city": "Bern"}}}],
            },
            {"role": "tool", "content": "play think"},
            {"role": "assistant", "content": "\n\nIt is six.", "reasoning_content": THINKS},
            {"role": "user", "content": "a\n\nb"},
        ],
        tools=[{"type": "function", "function": function}],
        add_generation_prompt=True,
        tokenize=True,
    )
    read = found.usage.cache_read_input_tokens or 0
    computed = [token for piece in server.prefilled() for token in piece]
    assert computed == list(expected)[read:-1]
    assert sum(read_and_written(found.usage)) == len(expected)


@pytest.mark.parametrize("name", ["x-api-key", "Authorization"])
def test_key_may_be_in_either_header(server: CountedServer, name: str) -> None:
    value = "secret" if name == "x-api-key" else "Bearer secret"

    answer = server.request(
        "POST", "/v1/messages?beta=true", json=said("play hello"), headers={name: value}
    )

    assert answer.status_code == 200, answer.text


def test_key_that_is_wrong_is_refused_in_the_protocols_form(server: CountedServer) -> None:
    stranger = official.anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)

    with pytest.raises(official.anthropic.AuthenticationError) as refusal:
        stranger.messages.create(**said("play hello"))

    assert refusal.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]


# ---- what is counted -----------------------------------------------------------------------------


def test_usage_is_what_the_model_computed_now_and_after_a_kill(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    def ask(server: CountedServer, **body: Any) -> tuple[int, int, int]:
        client = official.anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        server.calls()
        found = client.messages.create(**body)
        usage = read_and_written(found.usage)
        assert sum(map(len, server.prefilled())) == sum(usage) - usage[1] - 1
        counted = client.messages.count_tokens(
            **{name: value for name, value in body.items() if name != "max_tokens"}
        )
        assert counted.input_tokens == sum(usage)
        return usage

    first = said("play hello", system=SYSTEM)
    second = said("play hello", system=SYSTEM)
    second["messages"] = [
        *first["messages"],
        {"role": "assistant", "content": "Hello, I am here. "},
        {"role": "user", "content": "And now? play hello"},
    ]
    with CountedServer(model, tmp_path / "store", tmp_path, min_free_bytes=0) as server:
        cold = ask(server, **first)
        warm = ask(server, **second)
        server.request("POST", "/v1/cache/flush")
        server.kill()
    with CountedServer(model, tmp_path / "store", tmp_path, min_free_bytes=0) as server:
        restarted = ask(server, **second)

    assert cold == (1, 0, sum(cold) - 1)
    assert warm[1] >= sum(cold) - 5
    assert warm[0] == 1
    assert restarted == (1, sum(warm) - 1, 0)


def test_max_tokens_0_fills_the_cache_and_says_nothing(
    client: official.anthropic.Anthropic, server: CountedServer
) -> None:
    body = said("play hello", system=f"{SYSTEM} Fill.")

    filled = client.messages.create(**{**body, "max_tokens": 0})
    found = client.messages.create(**body)

    assert (blocks(filled), filled.stop_reason) == ([], "max_tokens")
    assert filled.usage.output_tokens == 0
    assert found.usage.cache_read_input_tokens == sum(read_and_written(filled.usage)) - 1


def test_billing_line_and_countdown_leave_the_prefix_and_are_told(server: CountedServer) -> None:
    def ask(version: str, digest: str, left: int) -> requests.Response:
        system = [
            {"type": "text", "text": BILLING.format(version, digest)},
            {"type": "text", "text": f"{SYSTEM} Told.\n{COUNTDOWN.format(left)}"},
        ]
        body = said("play hello", system=system)
        counted = post(server, {**body, "max_tokens": None}, "/v1/messages/count_tokens")
        assert "repaired=billing,countdown" in counted.headers["x-persist-cache"]
        return post(server, body)

    def counted() -> dict[str, int]:
        text = server.request("GET", "/metrics").text
        found = re.findall(r'repaired_requests_total\{repair="([a-z-]+)"\} (\d+)', text)
        return {name: int(count) for name, count in found}

    before = counted()
    first, second = ask("f27", "00000", 900_000), ask("b11", "12345", 7)

    gained = {name: count - before[name] for name, count in counted().items()}
    assert gained == {**dict.fromkeys(REPAIRS, 0), "billing": 2, "countdown": 2}

    usage = second.json()["usage"]
    assert usage["input_tokens"] == 1
    assert usage["cache_read_input_tokens"] > 50
    assert first.headers["x-persist-cache"].endswith("; repaired=billing,countdown")
    assert re.match(r"(memory|disk); tokens=\d+", second.headers["x-persist-cache"])


def test_repairs_are_asked_for_by_a_header_in_all_protocols_and_counted(
    server: CountedServer,
) -> None:
    def system(day: int) -> str:
        return f"{SYSTEM} By header.\nToday's date: 2026-11-{day}"

    def ask(path: str, day: int, names: str) -> requests.Response:
        body = said("play hello", system=system(day))
        if "chat" in path:
            head = {"role": "system", "content": body.pop("system")}
            body = {**body, "messages": [head, *body["messages"]], "model": "default_model"}
        if "responses" in path:
            body = {"model": "m", "instructions": system(day), "input": "play hello"}
        headers = {"x-api-key": "secret", **VERSION, "x-persist-cache-stabilize": names}
        return server.request("POST", path, json=body, headers=headers)

    for path in ("/v1/messages", "/v1/chat/completions", "/v1/responses"):
        first, second = (ask(path, day, "date,env") for day in (25, 26))
        plain, unknown = ask(path, 27, "none"), ask(path, 27, "dats")

        assert first.headers["x-persist-cache"].endswith("; repaired=date"), path
        found = re.search(r"tokens=(\d+)", second.headers["x-persist-cache"])
        assert found is not None
        assert int(found[1]) > 50
        assert "repaired" not in plain.headers["x-persist-cache"]
        assert unknown.status_code == 400
        assert "did you mean 'date'?" in unknown.json()["error"]["message"]
    counted = ask("/v1/messages/count_tokens", 25, "date")
    assert counted.headers["x-persist-cache"] == "repaired=date"
    text = server.request("GET", "/metrics").text
    assert 'repaired_requests_total{repair="date"} 6.0' in text


def test_what_is_ignored_is_named(server: CountedServer) -> None:
    body = said(
        "play hello",
        tools=[CLOCK, {"type": "web_search_20250305", "name": "web_search"}],
        tool_choice={"type": "any"},
        thinking={"type": "enabled", "budget_tokens": 1024},
    )

    answer = post(server, body)

    assert answer.status_code == 200
    assert answer.headers["x-persist-cache-ignored"] == "thinking.budget_tokens, tool_choice, tools"


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ([], 400, "invalid_request_error"),
        ({}, 400, "invalid_request_error"),
        (said("a", system=7), 400, "invalid_request_error"),
        (said(""), 400, "invalid_request_error"),
    ],
)
def test_malformed_body_is_refused_in_the_protocols_form(
    server: CountedServer, path: str, body: Any, status: int, kind: str
) -> None:
    answer = post(server, body, path)

    assert answer.status_code == status
    assert set(answer.json()) == {"type", "error"}
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == kind
    assert answer.json()["error"]["message"].endswith(".")


def test_what_is_no_json_is_refused_in_the_protocols_form(server: CountedServer) -> None:
    answer = server.request("POST", "/v1/messages", data=b"{no", headers={"x-api-key": "secret"})

    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_agents_body_is_served_and_counted(server: CountedServer) -> None:
    body = {**agent_body(tools=3, tool_words=20, system_words=80, turns=2), "max_tokens": 2}
    counted = post(server, body, "/v1/messages/count_tokens").json()["input_tokens"]

    answer = post(server, {**body, "stream": False})

    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    assert sum(usage[name] for name in names) == counted
    assert EPHEMERAL in [one.get("cache_control") for one in body["system"]]


def test_prompt_beyond_the_context_is_refused_in_the_words_that_clients_compact_on(
    client: official.anthropic.Anthropic, server: CountedServer
) -> None:
    with pytest.raises(official.anthropic.BadRequestError) as refusal:
        client.messages.create(**said("one " * 5_000))

    assert re.search(rf"prompt is too long: \d+ tokens > {CONTEXT} maximum", refusal.value.message)


def test_answer_that_ends_with_the_context_says_so(client: official.anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="m", messages=said("play long ")["messages"])
    padding = "<|endoftext|>" * (CONTEXT - counted.input_tokens - 3)

    found = client.messages.create(**said(f"play long {padding}"))

    assert found.stop_reason == "model_context_window_exceeded"
    assert found.usage.output_tokens == 3


def test_other_methods_are_refused_in_the_protocols_form(server: CountedServer) -> None:
    answer = server.request("GET", "/v1/messages", headers={"x-api-key": "secret"})

    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_is_not_there_is_refused_in_the_protocols_form(
    server: CountedServer, method: str
) -> None:
    answer = server.request(
        method, "/v1/messages/batches", json={}, headers={"x-api-key": "secret"}
    )

    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"


def test_no_malformed_body_ends_a_thread_or_leaves_a_trace_in_the_log(
    server: CountedServer, client: official.anthropic.Anthropic
) -> None:
    secret = "xylophone"
    whole = agent_body(tools=2, tool_words=5, system_words=20, turns=1)
    drawn = random.Random(18)
    odd: list[Any] = [
        None,
        True,
        -1,
        1e300,
        "",
        [],
        {},
        [[]],
        [None],
        {"type": secret},
        f"{secret} {secret}",
    ]
    statuses = []
    for number in range(examples(150, 500)):
        body = spoilt({**whole, "max_tokens": 1, "stream": number % 2 == 0}, drawn, odd)
        path = "/v1/messages/count_tokens" if number % 3 else "/v1/messages"
        answer = post(server, body, path)
        statuses.append(answer.status_code)
        if answer.status_code != 200:
            assert answer.json()["type"] == "error"
            assert secret not in answer.text
    assert statuses.count(400) > len(statuses) * 0.3
    assert set(statuses) == {200, 400}
    assert client.messages.create(**said("play hello")).stop_reason == "end_turn"
    assert secret not in server.log.read_text()


# ---- models --------------------------------------------------------------------------------------


def test_models_are_listed_for_the_official_client(client: official.anthropic.Anthropic) -> None:
    found = [one.id for one in client.models.list()]

    assert {"claude-here", "other"} <= set(found)
    assert client.models.retrieve("claude-here").display_name == "claude-here"


@pytest.mark.parametrize("name", ["claude-small-20990101", "claude-here", "default_model"])
def test_any_name_of_no_model_means_the_one_of_the_command_line(
    client: official.anthropic.Anthropic, name: str
) -> None:
    found = client.messages.create(**{**said("play hello"), "model": name})

    assert found.model == name
    assert blocks(found) == [("text", "Hello, I am here. ")]


def test_tokens_are_counted_for_a_model_that_is_not_loaded(
    client: official.anthropic.Anthropic, sliding: Path
) -> None:
    asked: Any = [{"role": "user", "content": "What time is it?"}]

    found = client.messages.count_tokens(model="other", messages=asked)

    tokenizer = load_tokenizer(str(sliding))
    assert found.input_tokens == len(
        tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True)
    )


# ---- while it takes long -------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_folder_without_a_model_is_refused_by_its_name(
    server: CountedServer, folder: Path, path: str
) -> None:
    answer = post(server, said("Hello", model=str(folder)), path)

    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"
    assert "has no config.json" in answer.json()["error"]["message"]


def test_top_k_may_be_larger_than_the_vocabulary_of_a_model_that_is_not_loaded(
    server: CountedServer, model: Path
) -> None:
    post(server, said("play hello"))
    size = len(load_tokenizer(str(model)))

    # The other model has fewer tokens.
    found = post(server, said("Hello", model="other", top_k=size - 1, temperature=1.0))

    assert found.status_code == 200, found.text
    assert post(server, said("play hello")).status_code == 200


def test_stop_sequence_is_named_right_after_another_models_answer(
    client: official.anthropic.Anthropic,
) -> None:
    client.messages.create(**said("Hello", model="other", max_tokens=2))

    found = client.messages.create(**said("play stop", stop_sequences=["two, "]))

    assert blocks(found) == [("text", "One, ")]
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", "two, ")


def test_stream_that_has_to_wait_begins_and_pings(server: CountedServer) -> None:
    endless = {
        "messages": [{"role": "user", "content": "play long"}],
        "seed": 1,
        "stream": True,
        "max_tokens": 8_000,
        "logit_bias": {"2": -100},
    }
    headers = {"x-api-key": "secret"}
    first = server.request(
        "POST", "/v1/chat/completions", json=endless, headers=headers, stream=True
    )
    assert next(line for line in first.iter_lines() if line.startswith(b"data: "))

    # The template has no such option, which is known before the answer begins.
    asked = said("play hello", stream=True, output_config={"effort": "low"})
    second = server.request("POST", "/v1/messages", json=asked, headers=headers, stream=True)
    lines = filter(None, second.iter_lines(chunk_size=1))
    names = [next(lines) for _ in range(4)][::2]
    first.close()
    rest = [line for line in lines if line.startswith((b"event: ", b": "))]

    assert names == [b"event: message_start", b"event: ping"]
    assert any(line.startswith(b": x-persist-cache: ") for line in rest)
    assert second.headers["x-persist-cache-ignored"] == "output_config.effort"
    assert rest[-1] == b"event: message_stop"
    assert b"event: message_start" not in rest


# ---- marks ---------------------------------------------------------------------------------------


def test_mark_in_mid_conversation_is_where_the_next_request_goes_on(
    sliding: Path, tmp_path: Path
) -> None:
    def ask(client: official.anthropic.Anthropic, text: str, *, marked: bool, name: str) -> Any:
        mark = {"cache_control": {"type": "ephemeral"}} if marked else {}
        content: Any = [
            {"type": "text", "text": f"{name}: {SYSTEM}", **mark},
            {"type": "text", "text": text},
        ]
        body: Any = {"model": "m", "max_tokens": 1, "system": SYSTEM}
        return client.messages.create(**body, messages=[{"role": "user", "content": content}]).usage

    with CountedServer(sliding, tmp_path / "store", tmp_path, min_free_bytes=0) as server:
        client = official.anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        tokenizer = load_tokenizer(str(sliding))
        up_to_mark = tokenizer.apply_chat_template(
            [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"With: {SYSTEM}\n\n"},
            ],
            tokenize=False,
        )
        exact = len(tokenizer.encode(up_to_mark[: up_to_mark.rindex(SYSTEM) + len(SYSTEM)]))
        ask(client, "Once upon a time", marked=True, name="With")
        with_mark = ask(client, "The capital of France", marked=True, name="With")
        ask(client, "Once upon a time", marked=False, name="Without")
        without = ask(client, "The capital of France", marked=False, name="Without")

    assert exact - 2 <= with_mark.cache_read_input_tokens <= exact
    assert without.cache_read_input_tokens < exact - 40
