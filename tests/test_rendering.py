"""Command, admin API and server read the same prompt out of every body that a client sends.

The recorded bodies are described in tests/requests/README.md. A running server is the judge: what
it used is in the `usage` of its answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persist_cache.prefill.loading import load_tokenizer
from persist_cache.server.protocols.openai import lenient
from persist_cache.server.rendering import read_request, render
from persist_cache.server.validation import RefusedError
from tests import cli, tiny_models
from tests.server_process import ServerProcess, running
from tests.waiting import until

REQUESTS = sorted((Path(__file__).parent / "requests").glob("*.json"))
IMAGES = {"llm-07"}
SYSTEM = "You are a helpful assistant. Answer in a short sentence. " * 3
TOOL = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tells the time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}
# A template with an argument of its own, and one that refuses in words of its own.
TEMPLATE = (
    "{%- if effort %}<|im_start|>effort {{ effort }}<|im_end|>\n{% endif -%}"
    "{%- for message in messages if message.role == 'narrator' -%}"
    "{{ raise_exception('Nobody narrates here.') }}{%- endfor -%}" + tiny_models.CHAT_TEMPLATE
)
ASK = {"role": "user", "content": "What time is it?"}
CALL = {"id": "1", "type": "function", "function": {"name": "clock"}}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": SYSTEM}, *messages], **more}


def called(arguments: Any) -> dict[str, Any]:
    call = {**CALL, "function": {"name": "clock", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


RESULT = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "Noon."}]}
MADE_UP: dict[str, dict[str, Any]] = {
    "content parts": chat(
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("What ", "time?")]}
    ),
    "system parts": {
        "messages": [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]}, ASK]
    },
    "no parts at all": chat({"role": "user", "content": []}),
    "null content": chat({"role": "user", "content": None}),
    "no content": chat({"role": "user"}),
    "two system messages": chat({"role": "system", "content": "Be kind."}, ASK),
    "tools": chat(ASK, tools=[TOOL]),
    "empty tools": chat(ASK, tools=[]),
    "null everywhere": chat(
        ASK, tools=None, chat_template_kwargs=None, role_mapping=None, stop=None
    ),
    "arguments as JSON text": chat(
        ASK, called('{"zone": "CET", "deep": {"a": [1, 2.5, null]}}'), RESULT, tools=[TOOL]
    ),
    "arguments as an object": chat(ASK, called({"zone": "CET"}), RESULT, tools=[TOOL]),
    "empty arguments": chat(ASK, called(""), RESULT, tools=[TOOL]),
    "null arguments": chat(ASK, called(None), RESULT, tools=[TOOL]),
    "empty list of calls": chat(ASK, {"role": "assistant", "content": "Noon.", "tool_calls": []}),
    "a turn after a tool turn": chat(
        ASK, called('{"zone":"CET"}'), RESULT, {"role": "assistant", "content": "Noon."}, ASK
    ),
    "the last message is the assistant's": chat(ASK, {"role": "assistant", "content": "It is"}),
    "template arguments": chat(ASK, chat_template_kwargs={"effort": "high"}),
    "template argument taken back": chat(ASK, chat_template_kwargs={"effort": None}),
    "developer": {"messages": [{"role": "developer", "content": SYSTEM}, ASK]},
    "no system part": {"messages": [ASK]},
    "sampling that depends on the model": chat(ASK, top_k=300, logit_bias={"300": 1.0}),
    "null stream options": chat(ASK, stream_options=None),
    "text completion": {"prompt": f"{SYSTEM} And now"},
}
CASES = [path.stem for path in REQUESTS if path.stem not in IMAGES] + list(MADE_UP)
EFFORT = json.dumps({"effort": "low"})


def body_of(case: str) -> dict[str, Any]:
    """The body as a client sends it, but for the name of the model."""
    if case in MADE_UP:
        return MADE_UP[case]
    recorded = json.loads((Path(__file__).parent / "requests" / f"{case}.json").read_text())
    body: dict[str, Any] = recorded["body"]
    del body["model"]
    return body


def ask(server: ServerProcess, body: dict[str, Any]) -> tuple[int, int]:
    """Tokens of a prompt, and those that the server did not compute."""
    body = {**body, "stream": False, "max_tokens": 2}
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = server.request("POST", path, json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    details = usage.get("prompt_tokens_details") or {}
    return usage["prompt_tokens"], details.get("cached_tokens", 0)


def explain_over_http(server: ServerProcess, body: dict[str, Any]) -> Any:
    """What the admin API says, once the server has loaded its model."""
    answers: list[Any] = []

    def has_loaded() -> bool:
        answers.append(server.request("POST", "/v1/cache/explain", json=body))
        return bool(answers[-1].status_code != 409)

    until(has_loaded, "no model is loaded")
    assert answers[-1].status_code == 200, answers[-1].text
    return answers[-1].json()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rendering")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    # One small layer: one of the recorded prompts has some 50,000 tokens here.
    path = tiny_models.build_model_dir(
        folder / "model",
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=100_000,
    )
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def server(model: Path, folder: Path) -> Iterator[ServerProcess]:
    flags = ("--chat-template-args", EFFORT, "--prefill-step-size", "512")
    with running(model, folder / "store", folder, flags=flags) as started:
        yield started


@pytest.fixture
def run(folder: Path, capfd: pytest.CaptureFixture[str]) -> cli.Run:
    return cli.runner(folder / "store", capfd)


@pytest.fixture
def explain(run: cli.Run, model: Path, tmp_path: Path) -> Any:
    def explained(body: Any, *options: str) -> cli.Done:
        path = tmp_path / "request.json"
        path.write_text(json.dumps(body))
        return run(
            "explain",
            "--model",
            model,
            "--messages",
            path,
            *("--chat-template-args", EFFORT),
            *options,
        )

    return explained


@pytest.mark.parametrize("case", CASES)
def test_command_and_admin_api_say_what_the_server_serves(
    case: str, server: ServerProcess, explain: Any
) -> None:
    body = body_of(case)
    num_tokens, _ = ask(server, body)
    assert server.request("POST", "/v1/cache/flush").json()["flushed"] is True

    told = explain_over_http(server, body)
    by_command = explain(body, "--json")

    assert by_command.status == 0, by_command.err
    said = by_command.json
    assert said["num_tokens"] == told["num_tokens"] == num_tokens
    assert said["cached_tokens"] == told["cached_tokens"] == num_tokens - 1
    assert ask(server, body) == (num_tokens, told["now_tokens"])


def test_what_memory_and_disk_have_is_told_now_and_for_after_a_restart(
    server: ServerProcess, explain: Any
) -> None:
    bodies = {case: body_of(case) for case in CASES if case in MADE_UP}
    for body in bodies.values():
        ask(server, body)
    server.stop()
    on_disk = {case: explain(body, "--json").json["cached_tokens"] for case, body in bodies.items()}
    server.start()

    told, served = {}, {}
    for case, body in bodies.items():
        told[case] = explain_over_http(server, body)
        served[case] = ask(server, body)[1]

    first = next(iter(bodies))
    assert served[first] == on_disk[first]
    assert {case: one["now_tokens"] for case, one in told.items()} == served
    assert {case: one["cached_tokens"] for case, one in told.items()} == on_disk
    # A few tokens more are not worth reading: memory serves, and says so.
    shorter = [one for one in told.values() if 0 < one["memory_tokens"] < one["cached_tokens"]]
    assert shorter
    for one in shorter:
        assert f"{one['now_tokens']:,} of {one['num_tokens']:,} tokens now" in one["message"]
        assert f"{one['cached_tokens']:,} after a restart" in one["message"]


@pytest.mark.parametrize("case", CASES)
def test_a_request_is_rendered_as_the_generation_loop_renders_it(case: str, model: Path) -> None:
    """Token by token, the system part included; the lengths alone might agree by chance."""
    from types import SimpleNamespace

    from persist_cache.server.model import LoadedModel
    from persist_cache.server.segments import system_tokens
    from persist_cache.server.upstream.generator import Generator
    from persist_cache.server.upstream.prompts import Prompts
    from persist_cache.server.upstream.requests import TicketedRequest

    tokenizer = load_tokenizer(str(model))
    options = SimpleNamespace(chat_template_args=json.loads(EFFORT))
    generator = Generator.__new__(Generator)
    generator._is_distributed = False
    generator.model_provider = SimpleNamespace(processor=None, cli_args=options, model_key=("m",))
    generator.cache = SimpleNamespace(branch_point=lambda *_, **__: 0)  # type: ignore[assignment]
    body = body_of(case)
    asked = lenient(body)
    request = TicketedRequest(
        request_type="chat" if "messages" in body else "text",
        prompt=asked.get("prompt", ""),
        messages=json.loads(json.dumps(asked.get("messages", []))),
        tools=asked.get("tools") or None,
        role_mapping=asked.get("role_mapping"),
    )
    args = SimpleNamespace(
        chat_template_kwargs=body.get("chat_template_kwargs"),
        max_tokens=4,
        sampling=SimpleNamespace(top_k=0),
    )

    prompt, segments, kinds, _, _ = Prompts._tokenize(generator, tokenizer, request, args)
    found = LoadedModel(generator, ("m",), tokenizer, None, "").render(body)

    assert found.tokens == prompt
    assert found.system_tokens == system_tokens(segments, kinds)


@pytest.mark.parametrize("case", ["qwen-02", "pydantic-ai-03", "arguments as JSON text"])
def test_warming_a_body_by_command_is_what_the_server_looks_for(
    case: str, model: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = body_of(case)
    if case == "qwen-02":
        body["tools"] = body["tools"][:2]
        body["messages"][0]["content"] = body["messages"][0]["content"][:2000]
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"client": "c", "path": "/v1/chat/completions", "body": body}))
    run = cli.runner(tmp_path / "store", capfd)

    options = ("--chat-template-args", EFFORT, "--json")
    warmed = run("warm", "--model", model, "--messages", path, *options)

    assert warmed.status == 0, warmed.err
    flags = ("--chat-template-args", EFFORT)
    with running(model, tmp_path / "store", tmp_path, flags=flags) as started:
        num_tokens, cached = ask(started, body)
    assert cached == warmed.json[0]["num_tokens"] == num_tokens - 1


@pytest.mark.parametrize("case", ["pydantic-ai-03", "text completion", "top_k"])
def test_warming_a_body_over_http_is_what_the_next_request_finds(
    case: str, server: ServerProcess
) -> None:
    more = {"max_completion_tokens": 50, "stop": None, "temperature": None}
    made_up: dict[str, dict[str, Any]] = {
        "text completion": {"prompt": f"A text of its own. {SYSTEM}"},
        "top_k": {"messages": [{"role": "user", "content": f"Mine. {SYSTEM}"}], "top_k": 300},
    }
    body = made_up.get(case) or body_of(case)

    warmed = server.request("POST", "/v1/cache/warm", json={**body, **more})

    assert warmed.status_code == 200, warmed.text
    num_tokens, cached = ask(server, body)
    assert cached == warmed.json()["num_tokens"] == num_tokens - 1


@pytest.mark.parametrize("cache", ["rows", "sliding"])
def test_after_warming_a_conversation_another_one_finds_its_system_part(
    cache: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A cache that cannot be trimmed is resumed only where a state was saved."""
    sliding: dict[str, Any] = {
        "model_type": "gemma3_text",
        "sliding_window": 16,
        "sliding_window_pattern": 2,
    }
    model = tiny_models.build_model_dir(
        tmp_path / "model", **(sliding if cache == "sliding" else {})
    )
    body = chat({"role": "user", "content": "Tell me a story. " * 20}, tools=[TOOL])
    path = tmp_path / "request.json"
    path.write_text(json.dumps(body))
    run = cli.runner(tmp_path / "store", capfd)

    warmed = run("warm", "--model", model, "--messages", path, "--label", "mine", "--json").json

    path.write_text(json.dumps(chat(ASK, tools=[TOOL])))
    said = run("explain", "--model", model, "--messages", path).out
    prompt = render(load_tokenizer(str(model)), read_request(chat(ASK, tools=[TOOL])))
    assert f"all {prompt.system_tokens:,} system tokens" in " ".join(said.split())
    entries = run("list", "--json").json
    entries = entries["entries"] if isinstance(entries, dict) else entries
    assert [(one["tier"], one["label"]) for one in entries if one["label"]] == [("user", "mine")]
    assert {one["num_tokens"] for one in entries} == {
        prompt.system_tokens,
        warmed[0]["num_tokens"],
    }


def test_messages_that_are_the_system_part_alone_warm_that_part(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = cli.runner(tmp_path / "store", capfd)
    path = tmp_path / "system.json"
    path.write_text(json.dumps({"messages": [{"role": "system", "content": SYSTEM}]}))

    by_messages = run("warm", "--model", model, "--messages", path, "--json").json
    by_system = run("warm", "--model", model, "--system", SYSTEM, "--json").json

    assert by_messages[0]["tier"] == "system"
    assert by_system[0]["id"] == by_messages[0]["id"]


def test_tools_given_besides_a_body_take_the_place_of_its_own(explain: Any, tmp_path: Path) -> None:
    other = {**TOOL, "function": {**TOOL["function"], "name": "calendar"}}  # type: ignore[dict-item]
    (tmp_path / "tools.json").write_text(json.dumps([other]))
    option = ("--tools", str(tmp_path / "tools.json"), "--json")

    both = explain(chat(ASK, tools=[TOOL, TOOL]), *option)
    alone = explain(chat(ASK, tools=[other]), "--json")

    assert both.json["num_tokens"] == alone.json["num_tokens"]
    assert "takes the place of the tools" in both.err
    assert alone.err == ""


@pytest.mark.parametrize("body", [chat(ASK), chat(ASK, tools=[TOOL])["messages"]])
def test_a_recorded_body_a_body_and_its_messages_are_one_request(explain: Any, body: Any) -> None:
    recorded = {"client": "c", "path": "/p", "body": chat(ASK)}

    assert explain(body, "--json").json == explain(recorded, "--json").json


def refused(case: str) -> Any:
    return {
        "image": chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
        "audio": chat({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}),
        "broken arguments": chat(ASK, called('{"zone": '), RESULT),
        "function": chat(ASK, {"role": "assistant", "tool_calls": [{"function": "clock"}]}),
        "template": chat({"role": "narrator", "content": "Once"}),
        "template arguments": chat(ASK, chat_template_kwargs={"tokenize": False}),
        "nothing": {"client": "c", "path": "/p"},
    }[case]


@pytest.mark.parametrize(
    ("case", "said"),
    {
        "image": "messages[1].content has an image; only text can be explained or warmed.",
        "audio": "messages[1].content has a part that is neither text nor an image.",
        "broken arguments": "messages[2].tool_calls[0].function.arguments must be valid JSON.",
        "function": "messages[2].tool_calls[0].function must be an object.",
        "template": "The chat template refuses these messages: Nobody narrates here.",
        "template arguments": "chat_template_kwargs must not set tokenize.",
        "nothing": "messages must be a list of at least one message.",
    }.items(),
)
def test_what_cannot_be_rendered_is_one_sentence_from_both(
    case: str, said: str, server: ServerProcess, explain: Any
) -> None:
    body = refused(case)

    by_api = server.request("POST", "/v1/cache/explain", json=body)
    warmed = server.request("POST", "/v1/cache/warm", json=body)
    by_command = explain(body)

    assert (by_api.status_code, by_api.json()["error"]) == (400, said)
    assert warmed.status_code in (400, 404)
    assert by_command.status in (1, 2)
    assert said in " ".join(by_command.err.split())
    assert "Traceback" not in by_command.err


def test_broken_arguments_of_a_tool_call_are_refused_before_anything_runs(
    server: ServerProcess,
) -> None:
    answer = server.request("POST", "/v1/chat/completions", json=refused("broken arguments"))

    assert answer.status_code == 400
    assert answer.json() == {
        "error": {
            "message": "messages[2].tool_calls[0].function.arguments must be valid JSON.",
            "type": "invalid_request_error",
            "param": "messages[2].tool_calls[0].function.arguments",
            "code": None,
        }
    }


def test_rendering_leaves_the_request_as_it_was(model: Path) -> None:
    body = chat(ASK, called('{"zone": "CET"}'), RESULT, tools=[TOOL])
    before = json.dumps(body)

    render(load_tokenizer(str(model)), read_request(body))

    assert json.dumps(body) == before


@pytest.mark.parametrize("path", [one for one in REQUESTS if one.stem in IMAGES])
def test_a_recorded_image_is_told_as_one(path: Path) -> None:
    with pytest.raises(RefusedError, match="has an image"):
        read_request(json.loads(path.read_text())["body"])
