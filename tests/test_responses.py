"""`/v1/responses` of a real server, asked by the official client; the model says a script."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from persist_cache.prefill.loading import load_tokenizer
from tests import official
from tests.anthropic_bodies import spoilt
from tests.computed import CountedServer
from tests.examples import examples
from tests.held_server import HeldServer
from tests.responses_bodies import PATCH, agent_body
from tests.scripted_model import SCRIPTS, THINKS, build_scripted_model
from tests.waiting import until

SYSTEM = "You are a helpful assistant. Answer the question of the user in a short sentence. " * 4
CLOCK: Any = {
    "type": "function",
    "name": "clock",
    "description": "Tells the time of the day in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
DAY: Any = {"type": "function", "name": "day", "parameters": {"type": "object", "properties": {}}}
TOOLS: Any = [
    CLOCK,
    PATCH,
    {"type": "namespace", "name": "mcp__cal", "description": "Dates.", "tools": [DAY]},
]
PATCHED = '*** Begin\n+ "a"'
CONTEXT = 4096
PATH = "/v1/responses"
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("responses")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return build_scripted_model(folder / "model", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def server(folder: Path, model: Path) -> Iterator[CountedServer]:
    options = {"min_free_bytes": 0, "api_key": "secret", "aliases": {"gpt-here": str(model)}}
    with CountedServer(model, folder / "store", folder, **options) as live:
        yield live
        assert live.stop() == 0
        assert "Traceback" not in live.log.read_text()


@pytest.fixture(scope="module")
def client(server: CountedServer) -> official.openai.OpenAI:
    return official.openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


def said(words: str, **more: Any) -> dict[str, Any]:
    """A request in which the user says something."""
    return {"model": "gpt-large", "input": [{"role": "user", "content": words}], **more}


def post(server: CountedServer, body: Any, path: str = PATH) -> requests.Response:
    return server.request("POST", path, json=body, headers=KEY)


def items(response: Any) -> list[tuple[str, Any]]:
    """Type and content of each item."""

    def content(item: Any) -> Any:
        match item.type:
            case "message" | "reasoning":
                return item.content[0].text
            case "function_call":
                return (item.namespace, item.name, item.arguments)
            case "custom_tool_call":
                return (item.name, item.input)

    return [(one.type, content(one)) for one in response.output]


# ---- what is answered ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("hello", [("message", "Hello, I am here. ")]),
        ("silent", []),
        ("think", [("reasoning", THINKS), ("message", "\n\nIt is six.")]),
        (
            "clock",
            [("message", "I look."), ("function_call", (None, "clock", '{"city": "Bern"}'))],
        ),
        ("patch", [("message", "So be it."), ("custom_tool_call", ("patch", PATCHED))]),
        ("day", [("function_call", ("mcp__cal", "day", "{}"))]),
        ("broken", [("message", f"So: {''.join(SCRIPTS['broken'][1:])}")]),
    ],
)
def test_answer_and_its_stream_are_the_same_response(
    client: official.openai.OpenAI, name: str, content: list[tuple[str, Any]]
) -> None:
    body = said(f"play {name}", tools=TOOLS)

    whole = client.responses.create(**body)
    with client.responses.stream(**body) as stream:
        events = [(event.type, event.sequence_number) for event in stream]
        streamed = stream.get_final_response()

    assert items(whole) == items(streamed) == content
    assert whole.status == streamed.status == "completed"
    assert whole.model == streamed.model == "gpt-large"
    assert whole.store is False
    assert whole.usage is not None
    assert streamed.usage is not None
    assert whole.usage.output_tokens == streamed.usage.output_tokens == len(SCRIPTS[name]) + 1
    thought = 3 if name == "think" else 0
    assert whole.usage.output_tokens_details.reasoning_tokens == thought
    kinds = [kind for kind, _ in events]
    assert [number for _, number in events] == list(range(len(events)))
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == len(content)


def test_calls_are_text_where_there_are_no_tools(client: official.openai.OpenAI) -> None:
    without = client.responses.create(**said("play clock"))
    forbidden = client.responses.create(**said("play clock", tools=TOOLS, tool_choice="none"))

    for found in (without, forbidden):
        assert items(found) == [("message", "".join(SCRIPTS["clock"]))]


def test_answer_ends_with_its_first_call_when_only_one_is_allowed(
    client: official.openai.OpenAI,
) -> None:
    found = client.responses.create(**said("play both", tools=TOOLS, parallel_tool_calls=False))

    assert [kind for kind, _ in items(found)] == ["message", "function_call"]


def test_thought_is_the_summary_where_one_is_asked_for(client: official.openai.OpenAI) -> None:
    body = said("play think", reasoning={"summary": "auto"})

    found = client.responses.create(**body)
    kinds = [event.type for event in client.responses.create(**body, stream=True)]

    assert [one.text for one in found.output[0].summary] == [THINKS]
    assert "response.reasoning_summary_text.delta" in kinds
    assert "response.reasoning_text.delta" not in kinds


@pytest.mark.parametrize("stream", [False, True])
def test_answer_that_is_cut_off_is_incomplete(client: official.openai.OpenAI, stream: bool) -> None:
    body = said("play long", max_output_tokens=3)

    if stream:
        found = list(client.responses.create(**body, stream=True))[-1].response
    else:
        found = client.responses.create(**body)

    assert found.output_text == "100, 101, 102, "
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.usage.output_tokens == 3


def test_answer_without_a_limit_goes_on_to_the_end_of_the_context(
    client: official.openai.OpenAI,
) -> None:
    count = client.responses.input_tokens.count(**said("play long ")).input_tokens
    padding = "<|endoftext|>" * (CONTEXT - count - 3)

    found = client.responses.create(**said(f"play long {padding}"))

    assert found.usage is not None
    assert (found.status, found.usage.output_tokens) == ("incomplete", 3)


def test_stop_word_ends_the_answer_in_front_of_it(client: official.openai.OpenAI) -> None:
    found = client.responses.create(**said("play stop"), extra_body={"stop": ["STOP"]})

    assert (found.output_text, found.status) == ("One, two, ", "completed")


def test_no_tokens_fill_the_cache_and_say_nothing(
    client: official.openai.OpenAI, server: CountedServer
) -> None:
    body = said("play hello", instructions=f"{SYSTEM} Fill.")

    filled = post(server, {**body, "max_output_tokens": 0}).json()
    found = client.responses.create(**body)

    assert (filled["output"], filled["status"]) == ([], "incomplete")
    assert found.usage is not None
    cached = found.usage.input_tokens_details.cached_tokens
    assert cached == filled["usage"]["input_tokens"] - 1


# ---- what is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [{}, {"reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"]}]
)
def test_next_turn_made_of_what_was_answered_is_what_the_template_would_render(
    client: official.openai.OpenAI, server: CountedServer, model: Path, more: dict[str, Any]
) -> None:
    asked = said("play clock, please", instructions="Be brief.", tools=TOOLS, **more)

    def result(response: Any) -> dict[str, Any]:
        (call,) = [one for one in response.output if one.type.endswith("_call")]
        kind = f"{call.type}_output"
        return {"type": kind, "call_id": call.call_id, "output": f"Well, {len(call.name)}."}

    first = client.responses.create(**asked)
    asked["input"] += [*first.output, result(first), {"role": "user", "content": "play patch"}]
    second = client.responses.create(**asked)
    asked["input"] += [*second.output, result(second), {"role": "user", "content": "play day"}]
    third = client.responses.create(**asked)
    asked["input"] += [*third.output, result(third), {"role": "user", "content": "play think"}]
    fourth = client.responses.create(**asked)
    asked["input"] += [*fourth.output, {"role": "user", "content": "play hello"}]
    asked["instructions"] = f"Be very brief. {len(more)}"
    server.calls()

    found = client.responses.create(**asked)

    def called(name: str, **arguments: Any) -> Any:
        return [{"function": {"name": name, "arguments": arguments}}]

    definitions = [
        (CLOCK["name"], CLOCK["description"], CLOCK["parameters"]),
        (
            "patch",
            PATCH["description"],
            {
                "type": "object",
                "properties": {
                    "input": {
                        "type": "string",
                        "description": 'A text of this grammar (lark):\nstart: "begin"',
                    }
                },
                "required": ["input"],
            },
        ),
        ("mcp__cal__day", "Dates.", DAY["parameters"]),
    ]
    user = [
        {"role": "user", "content": text}
        for text in ("play clock, please", "play patch", "play day", "play think", "play hello")
    ]
    expected = load_tokenizer(str(model)).apply_chat_template(
        [
            {"role": "system", "content": f"Be very brief. {len(more)}"},
            user[0],
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": called("clock", city="Bern"),
            },
            {"role": "tool", "content": "Well, 5."},
            user[1],
            {
                "role": "assistant",
                "content": "So be it.",
                "tool_calls": called("patch", input=PATCHED),
            },
            {"role": "tool", "content": "Well, 5."},
            user[2],
            {"role": "assistant", "content": "", "tool_calls": called("mcp__cal__day")},
            {"role": "tool", "content": "Well, 3."},
            user[3],
            {"role": "assistant", "content": "\n\nIt is six.", "reasoning_content": THINKS},
            user[4],
        ],
        tools=[
            {
                "type": "function",
                "function": {"name": name, "description": about, "parameters": parameters},
            }
            for name, about, parameters in definitions
        ],
        add_generation_prompt=True,
        tokenize=True,
    )
    assert found.usage is not None
    read = found.usage.input_tokens_details.cached_tokens
    computed = [token for piece in server.prefilled() for token in piece]
    assert computed == list(expected)[read:-1]
    assert found.usage.input_tokens == len(expected)
    assert found.output_text == "Hello, I am here. "


@pytest.mark.parametrize("name", ["gpt-7", "gpt-here", "default_model", None])
def test_any_name_of_no_model_means_the_one_of_the_command_line(
    server: CountedServer, name: str | None
) -> None:
    found = post(server, said("play hello", model=name)).json()

    assert found["model"] == (name or "default_model")
    assert found["output"][0]["content"][0]["text"] == "Hello, I am here. "


def test_what_is_ignored_is_named(server: CountedServer) -> None:
    body = said(
        "play hello",
        tools=[*TOOLS, {"type": "web_search"}],
        tool_choice="required",
        reasoning={"effort": "low"},
        text={"format": {"type": "json_object"}},
    )

    answer = post(server, body)

    assert answer.status_code == 200, answer.text
    assert answer.headers["x-persist-cache-ignored"] == (
        "reasoning.effort, text.format, tool_choice, tools"
    )


# ---- what is counted -----------------------------------------------------------------------------


def ask_plainly(client: official.openai.OpenAI, turns: list[dict[str, str]]) -> tuple[Any, str]:
    found = client.responses.create(model="m", instructions=SYSTEM, input=turns)  # type: ignore[arg-type]
    return found.usage, found.output_text


def ask_streamed(client: official.openai.OpenAI, turns: list[dict[str, str]]) -> tuple[Any, str]:
    body: Any = {"model": "m", "instructions": SYSTEM, "input": turns}
    with client.responses.stream(**body) as stream:
        found = stream.get_final_response()
    return found.usage, found.output_text


def ask_with_tools(client: official.openai.OpenAI, turns: list[dict[str, str]]) -> tuple[Any, str]:
    body: Any = {"model": "m", "instructions": SYSTEM, "input": turns, "tools": TOOLS}
    found = client.responses.create(**body)
    return found.usage, found.output_text


def ask_in_a_chat(client: official.openai.OpenAI, turns: list[dict[str, str]]) -> tuple[Any, str]:
    messages: Any = [{"role": "system", "content": SYSTEM}, *turns]
    found = client.chat.completions.create(model="default_model", messages=messages)
    return found.usage, found.choices[0].message.content or ""


def counted(usage: Any) -> tuple[int, int, int | None]:
    """Tokens of a prompt, those that were read and those that were written, where that is said."""
    if hasattr(usage, "input_tokens"):
        details = usage.input_tokens_details
        return usage.input_tokens, details.cached_tokens, details.cache_write_tokens
    return usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, None


@pytest.mark.parametrize("ask", [ask_plainly, ask_streamed, ask_with_tools, ask_in_a_chat])
def test_usage_is_what_the_model_computed_now_and_after_a_kill(
    model: Path,
    tmp_path: Path,
    ask: Callable[[official.openai.OpenAI, list[dict[str, str]]], tuple[Any, str]],
) -> None:
    turns = [{"role": "user", "content": "play hello"}]

    def asked(server: CountedServer) -> tuple[int, int, int | None]:
        client = official.openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        server.calls()
        usage, text = ask(client, turns)
        assert text == "Hello, I am here. "
        prompt, read, written = counted(usage)
        assert sum(map(len, server.prefilled())) == prompt - read - 1
        return prompt, read, written

    with CountedServer(model, tmp_path / "store", tmp_path, min_free_bytes=0) as server:
        cold = asked(server)
        turns += [
            {"role": "assistant", "content": "Hello, I am here. "},
            {"role": "user", "content": "And now? play hello"},
        ]
        warm = asked(server)
        server.request("POST", "/v1/cache/flush")
        server.kill()
    with CountedServer(model, tmp_path / "store", tmp_path, min_free_bytes=0) as server:
        restarted = asked(server)

    assert cold[1] == 0
    assert warm[1] >= cold[0] - 5
    assert restarted[1] == warm[0] - 1
    if ask is not ask_in_a_chat:
        assert (cold[2], restarted[2]) == (cold[0] - 1, 0)
        assert warm[2] == warm[0] - warm[1] - 1


def test_tokens_of_a_prompt_are_counted(client: official.openai.OpenAI) -> None:
    body = said("play hello", instructions=SYSTEM, tools=TOOLS)

    number = client.responses.input_tokens.count(**body).input_tokens
    found = client.responses.create(**body)

    assert found.usage is not None
    assert number == found.usage.input_tokens


# ---- what is refused -----------------------------------------------------------------------------


def test_response_of_before_cannot_be_continued(client: official.openai.OpenAI) -> None:
    with pytest.raises(official.openai.BadRequestError) as refusal:
        client.responses.create(**said("Hello"), previous_response_id="resp_1")

    assert refusal.value.code == "previous_response_not_found"
    assert refusal.value.param == "previous_response_id"
    assert "send the whole conversation" in refusal.value.message


def test_there_are_no_responses_to_get_or_delete(
    client: official.openai.OpenAI, server: CountedServer
) -> None:
    for action in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(official.openai.NotFoundError, match="this server keeps none"):
            action("resp_1")
    answer = server.request("GET", PATH, headers=KEY)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")


def test_prompt_beyond_the_context_is_refused_in_openais_words(
    client: official.openai.OpenAI,
) -> None:
    with pytest.raises(official.openai.BadRequestError) as refusal:
        client.responses.create(**said("one " * 5_000))

    assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "input")


def test_no_malformed_body_ends_a_thread_or_leaves_a_trace_in_the_log(
    server: CountedServer, client: official.openai.OpenAI
) -> None:
    secret = "xylophone"
    whole = agent_body(tools=1, tool_words=5, system_words=5, turn_words=5, turns=1)
    drawn = random.Random(18)
    odd: list[Any] = [None, True, -1, 1e300, "", [], {}, [[]], [None], {"type": secret}]
    odd.append(f"{secret} {secret}")
    statuses = []
    for number in range(examples(150, 500)):
        body = {**whole, "max_output_tokens": 1, "stream": number % 2 == 0}
        path = f"{PATH}/input_tokens" if number % 2 else PATH
        answer = post(server, spoilt(body, drawn, odd), path)
        statuses.append(answer.status_code)
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert secret not in answer.text
    assert statuses.count(400) > len(statuses) * 0.3
    assert set(statuses) == {200, 400}
    assert client.responses.create(**said("play hello")).status == "completed"
    assert secret not in server.log.read_text()


@pytest.mark.parametrize("levels", [400, 900])
@pytest.mark.parametrize("stream", [False, True])
def test_body_that_is_nested_too_deeply_for_a_repair_is_refused(
    server: CountedServer, levels: int, stream: bool
) -> None:
    nested = '{"a":' * levels + "1" + "}" * levels
    tools = f'[{{"type": "function", "name": "clock", "parameters": {nested}}}]'
    body = f'{{"input": "play hello", "tools": {tools}, "stream": {str(stream).lower()}}}'
    headers = {**KEY, "x-persist-cache-stabilize": "tools"}

    answer = server.request("POST", PATH, data=body, headers=headers)

    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "The body is nested too deeply."


# ---- while it takes long -------------------------------------------------------------------------


@pytest.fixture
def busy(server: CountedServer) -> Iterator[requests.Response]:
    """An answer beside which nothing else is computed, until it is closed."""
    endless = {
        "messages": [{"role": "user", "content": "play long"}],
        "seed": 1,
        "stream": True,
        "max_tokens": 8_000,
        "logit_bias": {"2": -100},
    }
    path = "/v1/chat/completions"
    with server.request("POST", path, json=endless, headers=KEY, stream=True) as answer:
        assert next(line for line in answer.iter_lines() if line.startswith(b"data: "))
        yield answer


def events_after(
    server: CountedServer, busy: requests.Response, body: dict[str, Any]
) -> tuple[list[str], str]:
    """The names of the events of a stream that had to wait, and all of its text."""
    answer = server.request("POST", PATH, json={**body, "stream": True}, headers=KEY, stream=True)
    lines = answer.iter_lines(chunk_size=1)
    seen = [next(lines)]
    busy.close()
    text = b"\n".join([*seen, *lines]).decode()
    return re.findall(r"^event: (.*)$", text, re.MULTILINE), text


def test_stream_that_has_to_wait_begins(server: CountedServer, busy: requests.Response) -> None:
    names, text = events_after(server, busy, said("play hello"))

    assert names[:2] == ["response.created", "response.in_progress"]
    assert names.count("response.created") == 1
    assert names[-1] == "response.completed"
    assert ": x-persist-cache: " in text


def test_stream_that_is_cut_by_the_end_of_the_server_says_that_it_failed(
    model: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"min_free_bytes": 0, "grace_s": 0.2}
    with HeldServer(model, tmp_path / "store", tmp_path, **options) as server:
        body = said("play hello", instructions=SYSTEM, stream=True)
        server.request("POST", PATH, json={**said("play hello"), "max_output_tokens": 1})
        with server.held_up(0):
            answer = server.request("POST", PATH, json=body, stream=True)
            lines = answer.iter_lines(chunk_size=1)
            begun = next(lines)
            assert server.process is not None
            server.process.send_signal(signal.SIGTERM)
            until(lambda: "were cut" in server.log.read_text())
            server.release()
            text = b"\n".join([begun, *lines]).decode()
            assert server.process.wait(60) == 0

    names = re.findall(r"^event: (.*)$", text, re.MULTILINE)
    assert names == ["response.created", "response.in_progress", "response.failed"]
    assert "The server is stopping; ask again when it is back." in text
    assert "ERROR" not in server.log.read_text(), "an end in order is no failure"


def test_codex_gets_a_list_of_models_in_its_form_and_nobody_else(server: CountedServer) -> None:
    asked = server.request("GET", "/v1/models?client_version=0.169.0", headers=KEY).json()
    plain = server.request("GET", "/v1/models", headers=KEY).json()

    assert asked.pop("models") == []
    assert asked == plain
