"""What requests ask of the cache, done by a real server in all of its protocols."""

from __future__ import annotations

import itertools
import json
import random
import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests

from persist_cache.prefill.loading import load_tokenizer
from tests.computed import CountedServer
from tests.examples import examples
from tests.scripted_model import build_scripted_model
from tests.server_process import ServerProcess
from tests.tiny_models import build_model_dir

SYSTEM = "You are a helpful assistant. Answer the question of the user in a short sentence. " * 4
CHAT, TEXT, MESSAGES, RESPONSES = (
    *("/v1/chat/completions", "/v1/completions"),
    *("/v1/messages", "/v1/responses"),
)
PATHS = [CHAT, TEXT, MESSAGES, RESPONSES]
words = map("".join, itertools.product(string.ascii_lowercase, repeat=3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caching")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[CountedServer]:
    """A model whose cache can be cut anywhere."""
    yield from running(build_scripted_model(folder / "plain"), folder / "a")


@pytest.fixture(scope="module")
def sliding(folder: Path) -> Iterator[CountedServer]:
    """A model whose cache can be resumed only where it was kept."""
    options: Any = {"sliding_window": 32, "sliding_window_pattern": 2}
    model = build_model_dir(folder / "sliding", model_type="gemma3_text", **options)
    yield from running(model, folder / "b")


def running(model: Path, folder: Path) -> Iterator[CountedServer]:
    with CountedServer(model, folder / "store", folder, min_free_bytes=0) as live:
        assert live.chat(("user", "Are you there?")).status_code == 200  # the model is loaded
        yield live
        assert live.stop() == 0
        assert "Traceback" not in live.log.read_text()


class Used(NamedTuple):
    """The usage of a request, whatever its protocol."""

    prompt: int
    cached: int
    written: int
    output: int


def body_of(path: str, words: str, system: str = SYSTEM, **more: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": words}]
    match path:
        case "/v1/chat/completions":
            told = [{"role": "system", "content": system}, *said]
            return {"messages": told, "max_tokens": 2, **more}
        case "/v1/completions":
            return {"prompt": f"{system} {words}", "max_tokens": 2, **more}
        case "/v1/messages":
            return {"model": "m", "system": system, "messages": said, "max_tokens": 2, **more}
    return {"instructions": system, "input": said, "max_output_tokens": 2, **more}


def post(server: CountedServer, path: str, body: Mapping[str, Any]) -> requests.Response:
    if body.get("stream") and path in (CHAT, TEXT):
        body = {**body, "stream_options": {"include_usage": True}}
    return server.request("POST", path, json=body)


def used(path: str, answer: requests.Response) -> Used:
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = {}
    if answer.headers["Content-Type"].startswith("text/event-stream"):
        for line in answer.text.splitlines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                for one in (event, event.get("message") or {}, event.get("response") or {}):
                    said |= one.get("usage") or {}
    else:
        said = answer.json()["usage"]
    if path == MESSAGES:
        cached, written = said["cache_read_input_tokens"], said["cache_creation_input_tokens"]
        return Used(said["input_tokens"] + cached + written, cached, written, said["output_tokens"])
    asked, answered = ("input", "output") if path == RESPONSES else ("prompt", "completion")
    details = said[f"{asked}_tokens_details"]
    return Used(
        said[f"{asked}_tokens"],
        details["cached_tokens"],
        details["cache_write_tokens"],
        said[f"{answered}_tokens"],
    )


def ask(server: CountedServer, path: str, body: Mapping[str, Any]) -> Used:
    """Send a request, and hold its usage against what the model computed."""
    server.calls()
    known = server.request("POST", "/v1/cache/explain", json=body).json()["common_tokens"]
    found = used(path, post(server, path, body))
    assert sum(map(len, server.prefilled())) == max(0, found.prompt - found.cached - 1)
    if (body.get("prompt_cache_options") or {}).get("mode") != "explicit":
        new = max(0, found.prompt - 1 - max(known, found.cached))
        # The row of the last token of an earlier prompt is its reply's until another goes on.
        assert found.written - new in (0, int(found.cached > 0))
        assert found.cached + found.written <= found.prompt
    flush(server)
    return found


def flush(server: ServerProcess) -> None:
    assert server.request("POST", "/v1/cache/flush").status_code == 200


def entries(server: ServerProcess, query: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.get(f"/v1/cache/entries?limit=1000{query}")["entries"]
    return found


def unique(what: str) -> str:
    """A text that begins as no other does."""
    return f"{next(words)} {what}"


# ---- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_usage_is_what_was_computed_and_what_is_stored(
    server: CountedServer, path: str, stream: bool
) -> None:
    system = unique(SYSTEM)
    before = server.get("/v1/cache/stats")["server"]["written_bytes"]

    cold = ask(server, path, body_of(path, "The sky is", system, stream=stream))
    (stored, *_) = entries(server, "&tier=user&sort=created")
    after = server.get("/v1/cache/stats")["server"]["written_bytes"]
    again = ask(server, path, body_of(path, "The sky is", system, stream=stream))
    longer = ask(server, path, body_of(path, "The sky is very, very blue", system, stream=stream))

    nbytes = stored["own_bytes"] + stored["shared_bytes"]
    assert stored["num_tokens"] == cold.prompt - 1
    assert cold.written > 0.9 * cold.prompt
    assert after - before > cold.written * nbytes // cold.prompt // 2 > 0
    assert again == cold._replace(cached=cold.prompt - 1, written=0)
    assert cold.cached < longer.cached < longer.prompt - 1
    assert longer.cached + longer.written >= longer.prompt - 1


SOUND = ("a", "30m", "24h", "explicit", "implicit", True, None)
ODD: tuple[Any, ...] = (
    *(0, -1, 1.5, 2**53, False, "", "x" * 300, "\x00", "two\nlines", "ü"),
    *([], {}, [None], {"ttl": "1h"}, {"mode": "explicit"}, {"mode": 3}, {"prewarm": "no"}),
    *({"ttl": "99999999d"}, {"ttl": {}}, {"comparison_response_id": 3}, [{"ttl": "1h"}]),
)


@pytest.mark.parametrize("path", PATHS)
def test_any_value_of_these_fields_is_answered_or_refused_in_a_sentence(
    server: CountedServer, path: str
) -> None:
    drawn = random.Random(path)
    tried, refused = examples(150, 500), 0
    for _ in range(tried):
        values = drawn.choices([*ODD, *SOUND], k=6)
        mark = {"mode": values[0], "ttl": values[1]} if drawn.random() < 0.5 else values[0]
        fields = {
            "prompt_cache_key": values[2],
            "prompt_cache_retention": values[3],
            "prompt_cache_options": {"mode": values[4], "ttl": values[5], "prewarm": values[0]},
        }
        chosen = drawn.sample(sorted(fields), drawn.randrange(1, 4))
        more = {name: fields[name] for name in chosen}
        if drawn.random() < 0.3:
            more["prompt_cache_options"] = values[5]
        body = body_of(path, "Hello", "Be brief.", **more)
        if path != TEXT and drawn.random() < 0.3:
            kind = "input_text" if path == RESPONSES else "text"
            part = {"type": kind, "text": "Hello", "prompt_cache_breakpoint": mark}
            body["input" if path == RESPONSES else "messages"][-1]["content"] = [part]
        answer = post(server, path, body)
        assert answer.status_code in (200, 400), (body, answer.text)
        if answer.status_code == 400:
            refused += 1
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert re.fullmatch(r"\S*prompt_cache_\w+(\.\w+)? must [^\n]+\.", error["message"])
    assert tried * 0.2 < refused < tried * 0.98
    assert server.chat(("user", "Are you there?")).status_code == 200


# ---- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_key_lists_what_its_requests_use_and_matches_nothing_less(
    server: CountedServer, path: str
) -> None:
    system, mine, yours = unique(SYSTEM), unique("mine"), unique("yours")
    first = ask(server, path, body_of(path, "The sky is", system, prompt_cache_key=mine))
    other = ask(server, path, body_of(path, "The sea is", system, prompt_cache_key=yours))

    own = {one["id"] for one in entries(server, f"&group={mine}")}
    theirs = {one["id"] for one in entries(server, f"&group={yours}")}
    assert other.cached > first.cached
    assert own
    assert theirs
    assert own != theirs
    assert all(one["group"] == mine for one in entries(server) if one["id"] in own - theirs)
    used_by_both = ask(server, path, body_of(path, "The sky is", system, prompt_cache_key=yours))
    assert used_by_both.cached == first.prompt - 1
    wanted = theirs | {one["id"] for one in entries(server, f"&group={yours}")}
    assert {one["id"] for one in entries(server, f"&group={yours}")} == wanted >= theirs


def test_a_user_is_no_group(server: CountedServer) -> None:
    user = unique("someone")
    for path in PATHS:
        ask(server, path, body_of(path, unique("Hello"), metadata={"user_id": user}, user=user))

    assert entries(server, f"&group={user}") == []


def test_a_malformed_key_is_refused_in_the_protocols_form(server: CountedServer) -> None:
    for path in PATHS:
        answer = post(server, path, body_of(path, "Hello", prompt_cache_key="two\nlines"))
        error = answer.json()["error"]
        assert answer.status_code == 400
        assert error["type"] == "invalid_request_error"
        assert error["message"].startswith("prompt_cache_key must be one line")
        assert path == MESSAGES or error["param"] == "prompt_cache_key"


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_ttl_is_how_long_its_prompt_is_kept_behind_each_use(
    server: CountedServer, path: str
) -> None:
    key, system = unique("ttl"), unique(SYSTEM)
    options = {"prompt_cache_key": key, "prompt_cache_options": {"ttl": "30m"}}
    ask(server, path, body_of(path, "The sky is", system, **options))

    kept = {one["tier"]: one.get("keep_s") for one in entries(server, f"&group={key}")}
    assert kept["user"] == 1800
    assert path == TEXT or kept["system"] == 1800


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_prewarming_leaves_the_prompt_and_says_nothing(
    server: CountedServer, path: str, stream: bool
) -> None:
    body = body_of(path, unique("The sky is"), unique(SYSTEM), stream=stream)
    warm = ask(server, path, {**body, "prompt_cache_options": {"prewarm": True}})
    then = ask(server, path, body)

    assert warm.output == 0
    assert then.cached == then.prompt - 1
    assert warm.written > 0.9 * warm.prompt


@pytest.mark.parametrize("path", PATHS)
def test_explicit_mode_without_a_mark_keeps_nothing(server: CountedServer, path: str) -> None:
    body = body_of(path, unique("The sky is"), unique(SYSTEM))
    before = {one["id"] for one in entries(server)}
    explicit = {**body, "prompt_cache_options": {"mode": "explicit"}}
    first = ask(server, path, explicit)
    again = ask(server, path, explicit)

    assert (first.written, again) == (0, first)
    assert {one["id"] for one in entries(server)} == before


def marked(path: str, first: str, then: str, **more: Any) -> dict[str, Any]:
    """A request whose user says two things, the first of which is marked."""
    mark = {"prompt_cache_breakpoint": {"mode": "explicit", "ttl": "12h"}}
    kind = "input_text" if path == RESPONSES else "text"
    content = [{"type": kind, "text": first, **mark}, {"type": kind, "text": then}]
    body = body_of(path, "", **more)
    body["input" if path == RESPONSES else "messages"][-1]["content"] = content
    return body


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("mode", ["implicit", "explicit"])
def test_a_prompt_can_be_resumed_at_a_breakpoint(
    sliding: CountedServer, path: str, mode: str
) -> None:
    key = unique("mark")
    first = f"{unique('First')} {SYSTEM}"
    system = unique(SYSTEM)
    options = {"mode": mode}
    more: dict[str, Any] = {"prompt_cache_key": key, "prompt_cache_options": options}
    tokenizer = load_tokenizer(str(sliding.model))
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": system}, {"role": "user", "content": first}],
        tokenize=False,
    )
    exact = len(tokenizer.encode(text[: text.rindex(first) + len(first)]))

    cold = ask(sliding, path, marked(path, first, " Once upon a time", system=system, **more))
    then = ask(sliding, path, marked(path, first, " The capital of France", system=system, **more))

    assert exact - 4 <= then.cached <= exact
    listed = {one["num_tokens"]: one for one in entries(sliding, f"&group={key}")}
    assert listed[then.cached]["keep_s"] == 43200
    if mode == "explicit":
        assert set(listed) == {then.cached}
        assert (cold.written > 0.9 * then.cached, then.written) == (True, 0)


@pytest.mark.parametrize(
    ("path", "sampled"), [(CHAT, {}), (CHAT, {"seed": 1}), (MESSAGES, {}), (RESPONSES, {})]
)
def test_explicit_mode_keeps_up_to_the_mark_of_what_can_be_cut_anywhere(
    server: CountedServer, path: str, sampled: dict[str, Any]
) -> None:
    first, key = f"{unique('First')} {SYSTEM}", unique("mark")
    more: dict[str, Any] = {"system": unique(SYSTEM), "prompt_cache_key": key}
    more["prompt_cache_options"] = {"mode": "explicit"}
    more |= sampled  # a seed has it served alone

    explained = server.request(
        "POST", "/v1/cache/explain", json=marked(path, first, " Once upon a time", **more)
    )
    assert explained.json()["marks"] == 1
    cold = ask(server, path, marked(path, first, " Once upon a time", **more))
    again = ask(server, path, marked(path, first, " Once upon a time", **more))

    assert {one["num_tokens"] for one in entries(server, f"&group={key}")} == {again.cached}
    assert cold.written > 0.9 * again.cached
    assert again.cached < cold.prompt - 4
