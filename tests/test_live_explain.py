"""A running server says of its latest requests what was reused, where it parted, and why."""

from __future__ import annotations

import json
import random
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import official
from tests.cli import SCRIPT, Run, runner
from tests.computed import CountedServer
from tests.pairs import LONG, PROSE, Body, Pair, all_pairs, chat, edited, messages, responses
from tests.server_process import sentence_in
from tests.tiny_models import CHAT_TEMPLATE, build_model_dir

CHAT, MESSAGES, TEXT = "/v1/chat/completions", "/v1/messages", "/v1/completions"
RESPONSES = "/v1/responses"
PAIRS = all_pairs()
TWICE = ("date-words-chat", "time-messages", "git-messages", "nfd-chat", "no-break", "zero-width")
SENT = [one for one in PAIRS if one.name != "title" and not one.name.startswith(TWICE)]
"""Those that others are not alike."""
REQUESTS = 30
"""Random ones; more of them find no more."""
OPTIONS = (
    "{%- if style or reasoning_effort or enable_thinking -%}"
    "<|im_start|>{{ style }} {{ reasoning_effort }} {{ enable_thinking }}<|im_end|>\n{% endif -%}"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CountedServer]:
    folder = tmp_path_factory.mktemp("live")
    model = build_model_dir(folder / "model")
    (model / "chat_template.jinja").write_text(OPTIONS + CHAT_TEMPLATE)
    with CountedServer(model, folder / "store", folder, min_free_bytes=0) as running:
        yield running


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("other") / "model", seed=2)


def path_of(body: Body) -> str:
    if "prompt" in body:
        return TEXT
    if "input" in body:
        return RESPONSES
    return MESSAGES if "claude" in body.get("model", "") else CHAT


def send(server: CountedServer, body: Body, **headers: str) -> Any:
    """The answer to a request that must succeed."""
    answer = server.request("POST", path_of(body), json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def own(body: Body, name: str) -> Body:
    """The same with a beginning of its own, so that it has nothing in common with other pairs."""
    return edited(body, "Read the file before", f"For {name}: read before")


def cached(answer: Any) -> int:
    usage = answer["usage"]
    if "cache_read_input_tokens" in usage:
        return int(usage["cache_read_input_tokens"])
    details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
    return int(details["cached_tokens"])


def total(answer: Any) -> int:
    usage = answer["usage"]
    if "prompt_tokens" in usage:
        return int(usage["prompt_tokens"])
    if "input_tokens_details" in usage:
        return int(usage["input_tokens"])
    names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    return sum(int(usage[name]) for name in names)


def latest(server: CountedServer) -> Any:
    return server.get("/v1/cache/requests?limit=1")[0]


@pytest.mark.parametrize("pair", SENT, ids=lambda pair: pair.name)
def test_cause_place_and_cost_are_told(server: CountedServer, pair: Pair) -> None:
    first = send(server, own(pair.first, pair.name))
    server.calls()
    second = send(server, own(pair.second, pair.name))
    computed = sum(map(len, server.prefilled()))

    said = server.get(f"/v1/cache/requests/{second['id']}")

    assert said["num_tokens"] == total(second)
    assert said["cached_tokens"] == cached(second) == total(second) - 1 - computed
    parted = said["parted"]
    assert parted["response_id"] == first["id"]
    assert (parted["cause"], parted["at"]) == (pair.kind.value, pair.at)
    assert tuple(parted["repairs"]) == pair.repairs
    assert parted["shared_tokens"] == cached(second)
    assert parted["lost_tokens"] == min(total(first), total(second) - 1) - cached(second)
    assert parted["old"] != parted["new"]


def test_a_side_request_is_named(server: CountedServer) -> None:
    send(server, own(PAIRS[0].first, "aside"))
    pair = next(one for one in PAIRS if one.name == "title")

    said = server.get(f"/v1/cache/requests/{send(server, pair.second)['id']}")

    assert said["parted"]["cause"] == "side_request"


def test_a_conversation_that_goes_on_has_no_cause(server: CountedServer) -> None:
    body = own(chat(PROSE, *LONG[:3]), "going on")
    first = send(server, body)
    longer = own(chat(PROSE, *LONG), "going on")
    second = send(server, longer)

    said = server.get(f"/v1/cache/requests/{second['id']}")

    assert said["parted"]["response_id"] == first["id"]
    assert (said["parted"]["cause"], said["parted"]["lost_tokens"]) == (None, 0)
    assert said["parted"]["shared_tokens"] >= total(first)


# ---- the list ------------------------------------------------------------------------------------


def test_what_is_told_is_what_the_model_was_called_with(server: CountedServer) -> None:
    """Requests that share anything from nothing to all but the last word."""
    drawn = random.Random(7)
    texts = [" ".join(drawn.choices(PROSE.split(), k=60)) for _ in range(4)]
    server.calls()
    for number in range(REQUESTS):
        start = drawn.choice(texts)
        head = start[: drawn.randrange(20, len(start))]
        texts[drawn.randrange(4)] = f"{head} {number} {start}"[:800]
        body = chat(start[:700], ("user", start[drawn.randrange(40) :][:300]))
        del body["tools"]
        answer = send(server, body)
        computed = sum(map(len, server.prefilled()))

        said = server.get(f"/v1/cache/requests/{answer['id']}")

        assert said["num_tokens"] == total(answer)
        assert said["cached_tokens"] == total(answer) - 1 - computed
        assert said["computed_tokens"] == computed + 1
        parted = said["parted"]
        assert parted is None or parted["shared_tokens"] <= said["num_tokens"]


def test_the_list_is_newest_first_and_says_who_asked(server: CountedServer) -> None:
    first = send(server, own(chat(), "list"), **{"User-Agent": "ada/1.0 \x07"})
    second = send(server, own(messages(), "list"), **{"User-Agent": "claude-cli/2.1"})

    found = server.get("/v1/cache/requests?limit=2")

    assert [one["response_id"] for one in found] == [second["id"], first["id"]]
    assert [one["client"] for one in found] == ["claude-cli/2.1", "ada/1.0"]
    assert [one["path"] for one in found] == [MESSAGES, CHAT]
    assert found[0]["state"] == "done"
    assert 0 < found[0]["first_token_s"] <= found[0]["total_s"]
    assert "old" not in (found[0]["parted"] or {})
    assert server.get(f"/v1/cache/requests?after={found[1]['number']}") == found[:1]


def test_waiting_ends_with_the_next_request(server: CountedServer) -> None:
    send(server, own(chat(), "before"))
    number = latest(server)["number"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.get, f"/v1/cache/requests?after={number}&wait_s=30")
        answer = send(server, own(chat(), "after"))

        assert [one["response_id"] for one in waiting.result(30)] == [answer["id"]]


def test_requests_of_the_admin_api_and_counts_are_not_remembered(server: CountedServer) -> None:
    send(server, own(chat(), "mine"))
    before = latest(server)["number"]

    server.request("POST", "/v1/cache/warm", json=own(chat(), "warm"))
    body = own(messages(), "count")
    del body["max_tokens"]
    server.request("POST", f"{MESSAGES}/count_tokens", json=body)

    assert latest(server)["number"] == before


def test_a_request_that_is_refused_is_remembered_as_failed(server: CountedServer) -> None:
    body = chat("a" * 200_000)
    answer = server.request("POST", CHAT, json=body)

    said = latest(server)

    assert answer.status_code == 400
    assert (said["state"], said["source"]) == ("failed", None)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("requests?limit=0", 400),
        ("requests?limit=many", 400),
        ("requests?after=-1", 400),
        ("requests?wait_s=31", 400),
        ("requests?colour=red", 400),
        ("requests/none", 404),
        ("requests/a/b", 404),
        ("requests/none?x=1", 400),
    ],
)
def test_what_cannot_be_answered_gets_a_sentence(
    server: CountedServer, path: str, status: int
) -> None:
    answer = server.request("GET", f"/v1/cache/{path}")

    assert answer.status_code == status
    assert answer.json()["error"].endswith(".")


def test_the_token_is_asked_for(server: CountedServer) -> None:
    for path in ("requests", "requests/x"):
        answer = server.request("GET", f"/v1/cache/{path}", with_token=False)
        assert answer.status_code == 401


def test_no_text_of_a_prompt_reaches_the_disk_or_the_log(server: CountedServer) -> None:
    secrets = [f"{one}{'xylophone' * 3}" for one in ("Quark", "Gluon", "Boson")]
    body = own(chat(f"{PROSE}{secrets[0]}", ("user", secrets[1])), "secret")
    send(server, body)
    body["messages"][1]["content"] = secrets[2]
    answer = send(server, body)
    assert secrets[2][:20] in json.dumps(server.get(f"/v1/cache/requests/{answer['id']}"))
    server.request("POST", "/v1/cache/flush")

    files = [one for one in server.store.rglob("*") if one.is_file()]
    assert files
    for file in [*files, server.log]:
        raw = file.read_bytes()
        for secret in secrets:
            assert secret.encode() not in raw, file


# ---- in the protocols' words ---------------------------------------------------------------------


def _compacted(body: Body) -> None:
    summary = "This conversation is continued from a previous one. Summary: lines were read."
    content = body["messages"][-1]["content"]
    said = summary if isinstance(content, str) else [{"type": "text", "text": summary}]
    head = [one for one in body["messages"] if one["role"] == "system"]
    body["messages"] = [*head, {"role": "user", "content": said}]


def _edited(body: Body) -> None:
    body.update(edited(body, "Which lines does it skip?", "Which lines are read?"))


def _system(body: Body) -> None:
    body.update(edited(body, "run every test", "skip every test"))


def _order(body: Body) -> None:
    body["tools"].reverse()


def _schema(body: Body) -> None:
    body.update(edited(body, "number 1 of", "number one of"))


CHANGES: dict[str, tuple[Any, Any, str, str | None]] = {
    # What is done to a chat, and to a request of Messages; the reasons in both protocols.
    "system": (_system, _system, "input_changed", "system_changed"),
    "tool order": (_order, _order, "tools_changed", "tools_changed"),
    "tool schema": (_schema, _schema, "tools_changed", "tools_changed"),
    "message edited": (_edited, _edited, "input_changed", "messages_changed"),
    "compacted": (_compacted, _compacted, "context_compacted", "messages_changed"),
    "option": (
        {"chat_template_kwargs": {"style": "short"}},
        {"thinking": {"type": "enabled", "budget_tokens": 1}},
        "input_changed",
        "unavailable",
    ),
    "effort": (
        {"chat_template_kwargs": {"reasoning_effort": "low"}},
        {"output_config": {"effort": "low"}},
        "reasoning_effort_changed",
        "unavailable",
    ),
    "key": ({"prompt_cache_key": "k"}, {"metadata": {"user_id": "u"}}, "cache_hit", None),
    "format": (
        {"response_format": {"type": "json_object"}},
        {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
        "cache_hit",
        None,
    ),
}


def changed(body: Body, change: Any) -> Body:
    made: Body = json.loads(json.dumps(body))
    if callable(change):
        change(made)
    else:
        made.update(change)
    return made


@pytest.mark.parametrize("name", CHANGES)
def test_chat_says_why_an_earlier_answers_prompt_was_not_reused(
    server: CountedServer, name: str
) -> None:
    change, _, reason, _ = CHANGES[name]
    body = own(chat(PROSE, *LONG), f"{name} in chat")
    first = send(server, body)
    asked = {"comparison_response_id": first["id"]}

    second = send(server, {**changed(body, change), "prompt_cache_options": asked})

    said = second["prompt_cache_diagnostics"]
    if reason == "cache_hit":
        assert said == {"type": "cache_hit"}
        assert cached(second) == total(second) - 1
    else:
        assert said == {
            "type": "cache_miss",
            "reason": reason,
            "cache_missed_tokens": total(second) - cached(second),
            "comparison_reusable_tokens": cached(second),
        }


@pytest.mark.parametrize("name", CHANGES)
def test_messages_says_why_an_earlier_messages_prompt_was_not_reused(
    server: CountedServer, name: str
) -> None:
    _, change, _, reason = CHANGES[name]
    body = own(messages(PROSE, *LONG), f"{name} in Messages")
    first = send(server, body)
    client = official.anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    asked: Any = {"previous_message_id": first["id"]}

    second = client.messages.create(**changed(body, change), diagnostics=asked)

    usage: Any = second.usage.model_dump()
    if reason is None:
        assert second.diagnostics is None
        return
    assert second.diagnostics is not None
    found = second.diagnostics.cache_miss_reason
    assert found is not None
    assert found.type == reason
    if reason != "unavailable":
        parted = usage["cache_read_input_tokens"]
        whole = parted + usage["input_tokens"] + usage["cache_creation_input_tokens"]
        lost = min(total(first), whole - 1) - parted
        assert getattr(found, "cache_missed_input_tokens", None) == lost


def _compacted_input(body: Body) -> None:
    summary = "This conversation is continued from a previous one. Summary: lines were read."
    body["input"] = [{"role": "user", "content": summary}]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_system, "input_changed"),
        (_order, "tools_changed"),
        (_schema, "tools_changed"),
        (_edited, "input_changed"),
        (_compacted_input, "context_compacted"),
        ({"reasoning": {"effort": "low"}}, "reasoning_effort_changed"),
        ({"prompt_cache_key": "k"}, "cache_hit"),
        ({"text": {"format": {"type": "json_object"}}}, "cache_hit"),
        ({"service_tier": "flex"}, "cache_hit"),
    ],
)
def test_responses_says_why_an_earlier_responses_prompt_was_not_reused(
    server: CountedServer, change: Any, reason: str
) -> None:
    name = change.__name__ if callable(change) else json.dumps(list(change))
    body = own(responses(PROSE, *LONG), f"{name} in Responses")
    client = official.openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    first = client.responses.create(**body)
    asked: Any = {"comparison_response_id": first.id}

    second = client.responses.create(**changed(body, change), prompt_cache_options=asked)

    said, usage = second.prompt_cache_diagnostics, second.usage
    assert said is not None
    assert usage is not None
    if reason == "cache_hit":
        assert said.type == reason
        return
    # Other requests may begin alike; an effort stands in front of everything.
    read = min(usage.input_tokens_details.cached_tokens, 1 if "effort" in reason else 1 << 20)
    assert said.model_dump() == {
        "type": "cache_miss",
        "reason": reason,
        "cache_missed_tokens": usage.input_tokens - read,
        "comparison_reusable_tokens": read,
    }
    assert latest(server)["parted"]["response_id"] == first.id


def test_another_model_is_named_in_both_protocols(server: CountedServer, other: Path) -> None:
    for make, key in ((chat, "model"), (messages, "model")):
        body = own(make(PROSE, *LONG), f"model of {make.__name__}")
        first = send(server, body)
        name = str(other)
        if make is chat:
            asked: Body = {"prompt_cache_options": {"comparison_response_id": first["id"]}}
        else:
            asked = {"diagnostics": {"previous_message_id": first["id"]}}
        path = CHAT if make is chat else MESSAGES
        answer = server.request("POST", path, json={**body, **asked, key: name})
        assert answer.status_code == 200, answer.text
        second = answer.json()
        lost = min(total(first), total(second) - 1)
        if make is chat:
            assert second["prompt_cache_diagnostics"] == {
                "type": "cache_miss",
                "reason": "model_changed",
                "cache_missed_tokens": total(second),
                "comparison_reusable_tokens": 0,
            }
        else:
            assert second["diagnostics"]["cache_miss_reason"] == {
                "type": "model_changed",
                "cache_missed_input_tokens": lost,
            }


def test_an_answer_that_is_not_remembered_is_said_to_be_unknown(server: CountedServer) -> None:
    body = own(chat(), "unknown")
    said = send(server, {**body, "prompt_cache_options": {"comparison_response_id": "chatcmpl-x"}})
    assert said["prompt_cache_diagnostics"] == {"type": "comparison_response_not_found"}

    asked = {"diagnostics": {"previous_message_id": "msg_x"}}
    found = send(server, {**own(messages(), "unknown"), **asked})
    reason = {"type": "previous_message_not_found"}
    assert found["diagnostics"] == {"cache_miss_reason": reason}


def test_nothing_is_diagnosed_unasked_or_on_the_first_turn(server: CountedServer) -> None:
    assert "prompt_cache_diagnostics" not in send(server, own(chat(), "unasked"))
    assert "diagnostics" not in send(server, own(messages(), "unasked"))
    asked = {"diagnostics": {"previous_message_id": None}}
    assert send(server, {**own(messages(), "unasked"), **asked})["diagnostics"] is None


def test_streams_say_it_too(server: CountedServer) -> None:
    body = own(messages(PROSE, *LONG), "streams")
    first = send(server, body)
    client = official.anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    asked: Any = {"previous_message_id": first["id"]}
    with client.messages.stream(**changed(body, _edited), diagnostics=asked) as stream:
        found = stream.get_final_message()
    assert found.diagnostics is not None
    assert found.diagnostics.cache_miss_reason is not None
    assert found.diagnostics.cache_miss_reason.type == "messages_changed"

    body = own(chat(PROSE, *LONG), "streams")
    options = {"comparison_response_id": send(server, body)["id"]}
    asked = {"stream": True, "prompt_cache_options": options}
    answer = server.request("POST", CHAT, json={**changed(body, _edited), **asked})
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line[:7] == "data: {"]
    (said,) = [one["prompt_cache_diagnostics"] for one in events if len(one) > 6]
    assert said["reason"] == "input_changed"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (CHAT, {"prompt_cache_options": "x"}),
        (CHAT, {"prompt_cache_options": {"comparison_response_id": 1}}),
        (MESSAGES, {"diagnostics": []}),
        (MESSAGES, {"diagnostics": {"previous_message_id": {}}}),
    ],
)
def test_a_malformed_wish_is_refused(server: CountedServer, path: str, asked: Body) -> None:
    body = chat() if path == CHAT else messages()

    answer = server.request("POST", path, json={**body, **asked})

    assert answer.status_code == 400
    assert sentence_in(answer.json()).endswith(".")


# ---- the commands --------------------------------------------------------------------------------


@pytest.fixture
def run(server: CountedServer, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(server.store, capfd)


def test_the_command_explains_the_latest_requests(server: CountedServer, run: Run) -> None:
    pair = next(one for one in PAIRS if one.name == "env-chat")
    send(server, own(pair.first, "command"))
    answer = send(server, own(pair.second, "command"))

    shown = run("explain", "--last").out
    found = run("explain", "--last", "2", "--json").json

    assert "--stabilize env" in shown
    assert "Working directory: /" in shown
    assert found[1] == server.get(f"/v1/cache/requests/{answer['id']}")
    assert len(found) == 2
    assert run("explain", "--last", "-q").out == ""


@pytest.mark.parametrize("more", [["--model", "m"], ["--messages", "x.json"], ["--check"]])
def test_options_about_a_prompt_do_not_go_with_a_server(run: Run, more: list[str]) -> None:
    done = run("explain", "--last", "1", *more)

    assert done.status == 2
    assert more[0] in done.sentence


def test_without_model_and_server_it_says_what_to_give(run: Run) -> None:
    done = run("explain", "--messages", "x.json")

    assert done.status == 2
    assert "--last" in done.sentence


@pytest.mark.parametrize("command", [["explain", "--last"], ["watch"]])
def test_without_a_server_there_is_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], command: list[str]
) -> None:
    done = runner(tmp_path / "none", capfd)(*command)

    assert done.status == 3
    assert "serve" in done.sentence


def test_a_wrong_secret_is_said(run: Run) -> None:
    done = run("explain", "--last", "--admin-token", "wrong")

    assert done.status == 1
    assert "token" in done.sentence


def watching(server: CountedServer, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SCRIPT, "--store", str(server.store), "watch", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_watch_shows_requests_as_they_come_and_ends_with_ctrl_c(server: CountedServer) -> None:
    send(server, own(chat(), "watched before"))
    with watching(server, "--last", "1", "--json") as watch:
        assert watch.stdout is not None
        assert json.loads(watch.stdout.readline())["state"] == "done"
        answer = send(server, own(chat(), "watched now"))
        assert json.loads(watch.stdout.readline())["response_id"] == answer["id"]
        watch.send_signal(signal.SIGINT)
        out, err = watch.communicate(timeout=30)

    assert (watch.returncode, out, err.strip()) == (130, "", "Interrupted.")


def test_watch_ends_when_nobody_reads_it(server: CountedServer) -> None:
    send(server, own(chat(), "unread"))
    with watching(server, "--last", "1") as watch:
        assert watch.stdout is not None
        assert watch.stderr is not None
        assert watch.stdout.readline()
        watch.stdout.close()

        assert watch.wait(30) == 0
        assert watch.stderr.read() == ""


def test_what_was_repaired_is_told_and_costs_no_more(server: CountedServer) -> None:
    pair = next(one for one in PAIRS if one.name == "date-iso-chat")
    asked = {"x-persist-cache-stabilize": "date"}
    first = send(server, own(pair.first, "repaired"), **asked)
    second = send(server, own(pair.second, "repaired"), **asked)

    said = server.get(f"/v1/cache/requests/{second['id']}")

    assert said["repaired"] == ["date"]
    assert said["parted"]["response_id"] == first["id"]
    assert (said["parted"]["cause"], said["parted"]["repairs"]) == ("date", [])
    assert said["parted"]["lost_tokens"] == total(second) - 1 - cached(second) < 60
