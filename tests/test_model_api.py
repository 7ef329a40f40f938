"""Leniency and truth of chat and text completions: what is understood, refused, and told."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from persist_cache.prefill.loading import load_tokenizer
from persist_cache.server.protocols.openai import ignored, lenient, one_head
from persist_cache.server.rendering import read_request, render
from tests import official
from tests.server_process import ServerProcess, running
from tests.tiny_models import CHAT_TEMPLATE, build_model_dir

REQUESTS = sorted((Path(__file__).parent / "requests").glob("*.json"))
HELLO = {"role": "user", "content": "Hello!"}
CHAT: dict[str, Any] = {"messages": [HELLO], "max_tokens": 2}
PATH = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/never.png"}}
# A template that takes one system message, at the head, and no role that it does not know.
STRICT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' and not loop.first -%}"
    "{{ raise_exception('System message must be at the beginning.') }}{%- endif -%}"
    "{%- if message.role not in ('system', 'user', 'assistant', 'tool') -%}"
    "{{ raise_exception('Unknown role.') }}{%- endif -%}{%- endfor -%}" + CHAT_TEMPLATE
)
CONTEXT = 160


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def strict_template(folder: Path) -> Path:
    path = build_model_dir(folder / "picky", max_position_embeddings=CONTEXT)
    (path / "chat_template.jinja").write_text(STRICT_TEMPLATE)
    return path


@pytest.fixture(scope="module")
def server(folder: Path, strict_template: Path) -> Iterator[ServerProcess]:
    # A small layer, and a tokenizer that knows the words: some recorded prompts are long.
    model = build_model_dir(
        folder / "model",
        vocab_size=2048,
        corpus=[path.read_text() for path in REQUESTS],
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=100_000,
    )
    aliases = {"local-model": str(model), "short": str(strict_template)}
    with running(model, folder / "store", folder, min_free_bytes=0, aliases=aliases) as live:
        yield live
        assert live.stop() == 0
        assert "Traceback" not in live.log.read_text()


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> official.openai.OpenAI:
    return official.openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(server: ServerProcess, **body: Any) -> requests.Response:
    return server.request("POST", PATH, json={**CHAT, **body})


def answered(server: ServerProcess, **body: Any) -> dict[str, Any]:
    answer = post(server, **body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def refused(answer: requests.Response, status: int) -> dict[str, Any]:
    """The error object of an answer, which must have its form."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert "\n" not in error["message"]
    assert error["message"].endswith(".")
    return error


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", PATH, b"{", 400, None),
        ("POST", PATH, b"[]", 400, None),
        ("POST", PATH, b"{}", 400, "messages"),
        ("POST", PATH, {**CHAT, "stop": 5}, 400, "stop"),
        ("POST", PATH, {**CHAT, "temperature": "hot"}, 400, None),
        ("POST", PATH, {**CHAT, "temperature": -1}, 400, None),
        ("POST", PATH, {**CHAT, "model": 5}, 400, "model"),
        ("POST", "/v1/completions", {"prompt": 5}, 400, "prompt"),
        ("POST", "/v1/nowhere", {}, 404, None),
        ("POST", "/v1/models", {}, 405, None),
        ("GET", "/", None, 404, None),
        ("GET", PATH, None, 405, None),
        ("DELETE", PATH, None, 405, None),
        ("PUT", "/v1/nowhere", None, 404, None),
        ("BREW", PATH, None, 501, None),
    ],
)
def test_every_error_of_the_model_api_is_an_object(
    server: ServerProcess, method: str, path: str, body: Any, status: int, param: str | None
) -> None:
    raw = json.dumps(body).encode() if isinstance(body, dict) else body

    error = refused(server.request(method, path, data=raw), status)

    assert error["param"] == param


def test_admin_api_keeps_its_own_form_of_errors(server: ServerProcess) -> None:
    for answer in (
        server.request("GET", "/v1/cache/nowhere"),
        server.request("GET", "/v1/cache/stats", with_token=False),
        server.request("BREW", "/v1/cache/stats"),
        server.request("POST", "/v1/cache/warm", json={"messages": [{"role": "narrator"}, 5]}),
        server.request("POST", "/v1/cache/warm", json={**CHAT, "model": "no/such"}),
    ):
        assert answer.status_code >= 400
        assert isinstance(answer.json()["error"], str)


def test_openai_client_shows_our_sentences(client: official.openai.OpenAI) -> None:
    with pytest.raises(official.openai.BadRequestError, match="stop must be a text") as bad:
        client.chat.completions.create(model="default_model", messages=[HELLO], stop=[""])  # type: ignore[list-item]
    assert bad.value.param == "stop"
    with pytest.raises(official.openai.BadRequestError, match="has an image"):
        client.chat.completions.create(
            model="default_model",
            messages=[{"role": "user", "content": [IMAGE]}],  # type: ignore[list-item,misc]
            stream=True,
        )


# ---- paths and methods --------------------------------------------------------------------------


def test_queries_are_ignored_on_all_paths(server: ServerProcess) -> None:
    for path in ("/health", "/v1/models", "/v1/models/local-model", "/metrics", "/cache"):
        assert server.request("GET", f"{path}?api-version=1").status_code == 200, path
    for path in (PATH, "/chat/completions"):
        answer = server.request("POST", f"{path}?api-version=2024-10-21&x=/", json=CHAT)
        assert answer.status_code == 200, path
    assert server.request("OPTIONS", f"{PATH}?x").status_code == 204
    assert (
        server.request(
            "POST", "/v1/completions?beta=true", json={"prompt": "Hello", "max_tokens": 1}
        ).status_code
        == 200
    )


@pytest.mark.parametrize(
    "path", ["/health", "/v1/models", "/v1/models/nothing", "/metrics", "/v1/cache/stats", PATH]
)
def test_head_is_get_without_its_body(server: ServerProcess, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {"Authorization": f"Bearer {server.token}"}
    connection.request("HEAD", path, headers=headers)
    head = connection.getresponse()
    get = server.request("GET", path, headers=headers)

    assert head.status == get.status_code
    assert head.headers["Content-Type"] == get.headers["Content-Type"]
    # Straight from the connection: a client's library would not show a body.
    assert head.fp is None or head.fp.read() == b""
    connection.close()


# ---- bodies in chunks ---------------------------------------------------------------------------


def chunked(server: ServerProcess, raw: bytes, path: str = PATH, *head: bytes) -> Any:
    """Send a body as it is, said to be in chunks; returns status and decoded answer.

    After a piece of one, as is seen at its end, nothing more is sent.
    """
    token = f"Authorization: Bearer {server.token}".encode()
    lines = (b"POST %s HTTP/1.1" % path.encode(), b"Host: localhost", token, *head)

    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"\r\n".join((*lines, b"Transfer-Encoding: chunked", b"", b"")) + raw)
        if not raw.endswith(b"\r\n\r\n"):
            connection.shutdown(socket.SHUT_WR)
        said = b""
        while more := connection.recv(1 << 16):
            said += more
    status, _, body = said.partition(b"\r\n\r\n")
    return int(status.split()[1]), json.loads(body)


def in_chunks(raw: bytes, size: int = 7, trailer: bytes = b"") -> bytes:
    pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
    return b"".join(b"%X;a=b\r\n%s\r\n" % (len(one), one) for one in pieces) + (
        b"0\r\n" + trailer + b"\r\n"
    )


@pytest.mark.parametrize("path", [PATH, "/v1/cache/explain"])
@pytest.mark.parametrize("trailer", [b"", b"Checksum: abc\r\nOther: d\r\n"])
def test_chunked_bodies_are_read(server: ServerProcess, path: str, trailer: bytes) -> None:
    assert post(server).status_code == 200

    status, said = chunked(server, in_chunks(json.dumps(CHAT).encode(), trailer=trailer), path)

    assert status == 200, said


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400),
        (b"x\r\n{}\r\n0\r\n\r\n", 400),
        (b"-2\r\n{}\r\n0\r\n\r\n", 400),
        (b"0x2\r\n{}\r\n0\r\n\r\n", 400),
        (b"2\n{}\n0\n\n", 400),
        (b"2\r\n{}0\r\n\r\n", 400),
        (b"5\r\n{}\r\n", 400),
        (b"2\r\n{}\r\n", 400),
        (b"2\r\n{}\r\n0\r\n", 400),
        (b"2\r\n{}\r\n0\r\nno trailer\r\n\r\n", 400),
        (b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 1000 + b"\r\n", 400),
        (b"2;" + b"a" * 100_000 + b"\r\n{}\r\n0\r\n\r\n", 400),
        (b"FFFFFFFFFFFFFFFF\r\n{}", 413),
        (b"4000001\r\n{}", 413),
    ],
)
def test_malformed_or_endless_chunks_are_refused(
    server: ServerProcess, raw: bytes, status: int
) -> None:
    said = chunked(server, raw)

    assert said[0] == status, said
    assert set(said[1]["error"]) == {"message", "type", "param", "code"}
    assert server.get("/health")["status"] == "ok"


def test_two_kinds_of_length_are_refused(server: ServerProcess) -> None:
    raw = in_chunks(json.dumps(CHAT).encode())

    assert chunked(server, raw, PATH, b"Content-Length: 5")[0] == 400
    assert chunked(server, raw, PATH, b"Transfer-Encoding: gzip")[0] == 501


# ---- what is absent, and what a role is ---------------------------------------------------------


def test_null_is_absent_everywhere(server: ServerProcess) -> None:
    fields = [
        "temperature", "top_p", "top_k", "min_p", "stop", "seed", "n", "tools", "tool_choice",
        "response_format", "logit_bias", "logprobs", "top_logprobs", "stream", "stream_options",
        "presence_penalty", "frequency_penalty", "repetition_penalty", "xtc_probability",
        "max_completion_tokens", "model", "draft_model", "adapters", "num_draft_tokens", "user",
        "chat_template_kwargs", "role_mapping", "repetition_context_size",
    ]  # fmt: skip
    message = {**HELLO, "name": None, "tool_calls": None, "refusal": None, "tool_call_id": None}

    plain = answered(server)
    answer = post(server, messages=[message], **dict.fromkeys(fields))

    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == plain["choices"]
    assert answer.json()["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    assert "x-persist-cache-ignored" not in answer.headers
    text = {"prompt": "Hello", "max_tokens": None, "suffix": None, "echo": None, "stop": None}
    body = {**text, "max_completion_tokens": 1}
    assert server.request("POST", "/v1/completions", json=body).status_code == 200


def test_values_of_schemas_and_of_templates_may_be_null() -> None:
    schema = {"type": "object", "default": None, "enum": [None]}
    tool = {"type": "function", "strict": None, "function": {"name": "f", "parameters": schema}}

    said = lenient({"tools": [tool], "chat_template_kwargs": {"a": None}})

    assert said["tools"] == [{"type": "function", "function": tool["function"]}]
    assert said["chat_template_kwargs"] == {"a": None}


def test_a_body_is_left_as_it_was() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": None}, "x": None}
    body = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "a", "x": None}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        "stream_options": {"include_usage": None},
    }
    before = json.dumps(body)

    lenient(body)

    assert json.dumps(body) == before


def test_developer_messages_are_system_messages(server: ServerProcess) -> None:
    said = {"content": "You are brief, and you know what time it is in all cities."}

    for more in ([HELLO], [HELLO, {"role": "developer", "content": "Now be long."}, HELLO]):
        system = [{**one, "role": one["role"].replace("developer", "system")} for one in more]
        by_system = answered(server, messages=[{**said, "role": "system"}, *system])
        by_developer = answered(server, messages=[{**said, "role": "developer"}, *more])
        assert by_system["usage"]["prompt_tokens"] == by_developer["usage"]["prompt_tokens"]
        assert by_system["choices"] == by_developer["choices"]


def test_developer_messages_at_the_head_join_the_system_message() -> None:
    system, developer = ({"role": role, "content": role} for role in ("system", "developer"))
    parts = {"role": "developer", "content": [{"type": "text", "text": t} for t in ("a", "b")]}

    assert lenient({"messages": [system, developer, parts, HELLO, developer]})["messages"] == [
        {"role": "system", "content": "system\n\ndeveloper\n\nab"},
        HELLO,
        {"role": "system", "content": "developer"},
    ]
    # Without a developer's message they are left to the template.
    assert lenient({"messages": [system, system, HELLO]})["messages"] == [system, system, HELLO]


def test_templates_that_take_one_system_message_get_one(
    server: ServerProcess, strict_template: Path
) -> None:
    messages = [{"role": "system", "content": f"Rule {n}."} for n in range(3)] + [HELLO]
    body = {"messages": messages}
    tokenizer = load_tokenizer(str(strict_template))

    answer = answered(server, messages=messages, model="short")

    one = {"messages": [{"role": "system", "content": "Rule 0.\n\nRule 1.\n\nRule 2."}, HELLO]}
    rendered = render(tokenizer, read_request(body))
    assert rendered == render(tokenizer, read_request(one))
    assert answer["usage"]["prompt_tokens"] == len(rendered.tokens)
    late = {"messages": [HELLO, messages[0]], "model": "short"}
    assert "repaired=inline-system" in post(server, **late).headers["x-persist-cache"]
    none = {"x-persist-cache-stabilize": "none"}
    unrepaired = server.request("POST", PATH, headers=none, json={**CHAT, **late})
    assert "at the beginning" in refused(unrepaired, 400)["message"]
    assert post(server).status_code == 200


@pytest.mark.parametrize("content", [[{"type": "image_url"}], 5, [5]])
def test_heads_that_are_not_text_are_not_put_together(content: Any) -> None:
    assert one_head([{"role": "system", "content": content}, HELLO]) is None
    messages = [{"role": "developer", "content": content}, {"role": "system", "content": "a"}]
    assert len(lenient({"messages": messages})["messages"]) == 2


@pytest.mark.parametrize("body", [{"messages": [5, None]}, {"messages": {}}, {"tools": [5]}, {}])
def test_nonsense_is_left_to_be_refused(body: dict[str, Any]) -> None:
    assert lenient({**body, "messages": body.get("messages", 5)})


def test_images_and_broken_arguments_are_refused_with_400(server: ServerProcess) -> None:
    image = post(server, messages=[{"role": "user", "content": [IMAGE]}])
    call = {"function": {"name": "clock", "arguments": '{"a": '}, "type": "function", "id": "1"}
    broken = post(server, messages=[HELLO, {"role": "assistant", "tool_calls": [call]}])
    unloaded = post(server, messages=[{"role": "user", "content": [IMAGE]}], model="short")

    assert refused(image, 400)["param"] == "messages[0].content"
    assert "JSON" in refused(broken, 400)["message"]
    # Nothing is fetched from its address, where nobody answers.
    assert "has an image" in refused(unloaded, 400)["message"]


# ---- lengths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_fill_the_cache_and_end_because_of_length(
    server: ServerProcess, stream: bool
) -> None:
    said = [{"role": "user", "content": f"Remember the city of Rome, with a stream: {stream}."}]
    options = {"include_usage": True} if stream else None

    answer = post(server, messages=said, max_tokens=0, stream=stream, stream_options=options)
    after = answered(server, messages=said)

    assert answer.status_code == 200, answer.text
    if stream:
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        chunks = [json.loads(event) for event in events]
        assert "content" not in chunks[0]["choices"][0]["delta"]
        choice, usage = chunks[0]["choices"][0], chunks[-1]["usage"]
    else:
        choice, usage = answer.json()["choices"][0], answer.json()["usage"]
        assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "length"
    assert usage["completion_tokens"] == 0
    assert usage["total_tokens"] == usage["prompt_tokens"]
    cached = after["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == usage["prompt_tokens"] - 1


@pytest.mark.parametrize(
    "limit",
    [{}, {"max_tokens": -1}, {"max_completion_tokens": -1}, {"max_tokens": 10_000}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["chat", "tools", "text", "seed"])
def test_without_a_limit_an_answer_goes_to_the_end_of_the_context(
    server: ServerProcess, limit: dict[str, int], kind: str
) -> None:
    # A token that ends nothing is all that it may say.
    body: dict[str, Any] = {"model": "short", "logit_bias": {"100": 100.0}, **limit}
    body |= {"prompt": "Hello"} if kind == "text" else {"messages": [HELLO]}
    body |= {"tools": [{"type": "function", "function": {"name": "f"}}]} if kind == "tools" else {}
    body |= {"seed": 5} if kind == "seed" else {}

    answer = server.request("POST", "/v1/completions" if kind == "text" else PATH, json=body)

    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert answer.json()["usage"]["total_tokens"] == CONTEXT


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"seed": 3}, {"max_tokens": 0}], ids=str)
def test_prompt_beyond_the_context_is_refused_before_anything_is_computed(
    server: ServerProcess, more: dict[str, Any]
) -> None:
    long = "the capital of France is Paris, " * 40
    before = server.get("/v1/cache/stats")["server"]["tokens_asked"]

    chat = post(server, model="short", messages=[{"role": "user", "content": long}], **more)
    text = server.request("POST", "/v1/completions", json={"prompt": long, "model": "short"} | more)

    for answer, param in ((chat, "messages"), (text, "prompt")):
        error = refused(answer, 400)
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == param
        assert f"This model's maximum context length is {CONTEXT} tokens." in error["message"]
    assert server.get("/v1/cache/stats")["server"]["tokens_asked"] == before


def test_openai_client_is_told_of_the_context(client: official.openai.OpenAI) -> None:
    with pytest.raises(official.openai.BadRequestError) as refusal:
        client.chat.completions.create(
            model="short", messages=[{"role": "user", "content": "the capital " * 99}]
        )

    assert refusal.value.code == "context_length_exceeded"


# ---- what is not done ---------------------------------------------------------------------------

IGNORED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "none"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": TOOL}, "tool_choice"),
    ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"n": 2, "reasoning_effort": "high", "verbosity": "low"}, "n, reasoning_effort, verbosity"),
    ({"functions": [{"name": "f"}], "function_call": "auto"}, "function_call, functions"),
    ({"modalities": ["text", "audio"], "audio": {"voice": "a"}}, "audio, modalities"),
    ({"prediction": {"a": 1}, "web_search_options": {}}, "prediction, web_search_options"),
]


@pytest.mark.parametrize(("options", "told"), IGNORED, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_done_is_served_and_told(
    server: ServerProcess, options: dict[str, Any], told: str, stream: bool
) -> None:
    answer = post(server, **options, stream=stream)

    assert answer.status_code == 200, answer.text
    assert answer.headers["x-persist-cache-ignored"] == told


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": {"type": "text"}, "n": 1, "tool_choice": "none", "echo": False},
        {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True},
        {"parallel_tool_calls": False, "modalities": ["text"], "best_of": 1},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "prompt_cache_key": "k", "made_up": 1},
    ],
)
def test_what_changes_nothing_is_not_told(options: dict[str, Any]) -> None:
    assert ignored({**CHAT, **options}, is_chat=True) == []


def test_what_is_not_done_of_a_text_completion_is_told(server: ServerProcess) -> None:
    body = {"prompt": ["Hello"], "max_tokens": 1, "echo": True, "suffix": "!", "logprobs": 3}

    answer = server.request("POST", "/v1/completions", json=body)

    assert answer.status_code == 200, answer.text
    assert answer.headers["x-persist-cache-ignored"] == "echo, logprobs, suffix"


def test_strict_server_refuses_what_it_does_not_do(tmp_path: Path) -> None:
    with running(None, tmp_path / "store", tmp_path, min_free_bytes=0, strict=True) as server:
        for options, told in IGNORED:
            error = refused(post(server, **options), 400)
            assert error["param"] == told.split(",")[0]
            assert told in error["message"]
            assert "--strict" in error["message"]
        # Nothing else is in the way of the same request.
        assert refused(post(server), 404)["code"] == "model_not_found"


# ---- recorded clients ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", REQUESTS, ids=lambda one: one.stem)
def test_recorded_request_is_served(server: ServerProcess, path: Path) -> None:
    recorded = json.loads(path.read_text())
    body = {**recorded["body"], "max_tokens": 2}

    answer = server.request("POST", recorded["path"], json=body)

    if path.stem == "llm-07":
        assert "has an image" in refused(answer, 400)["message"]
        return
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
        first = next(one for one in answer.text.splitlines() if one.startswith("data: "))
        assert json.loads(first[6:])["model"] == "local-model"
    else:
        assert answer.json()["model"] == "local-model"
    asked = {name for name in ("response_format",) if name in body}
    asked |= {"tool_choice"} if body.get("tool_choice", "auto") != "auto" else set()
    assert answer.headers.get("x-persist-cache-ignored", "") == ", ".join(sorted(asked))
