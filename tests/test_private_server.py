"""Requests of which nothing is to be kept, in all protocols of a real server."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

from persist_cache.prefill.loading import load_tokenizer
from tests.scripted_model import build_scripted_model
from tests.searched import SearchedServer, in_folder, patterns
from tests.test_caching_server import (
    CHAT,
    MESSAGES,
    PATHS,
    RESPONSES,
    SYSTEM,
    TEXT,
    body_of,
    entries,
    flush,
    used,
)
from tests.waiting import until

HEADER = {"x-persist-cache": "no-store"}
secrets = (f"zq{number}xjk secret vow gnu {number}qzx" for number in itertools.count(1000))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_scripted_model(tmp_path_factory.mktemp("model") / "plain")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchedServer]:
    folder = tmp_path_factory.mktemp("private")
    flags = ("--log-level", "DEBUG")
    with SearchedServer(model, folder / "store", folder, flags=flags, min_free_bytes=0) as live:
        assert live.chat(("user", "Are you there?")).status_code == 200
        yield live
        assert live.stop() == 0
        assert "Traceback" not in live.log.read_text()


def send(
    server: SearchedServer, path: str, body: Mapping[str, Any], private: bool = True
) -> requests.Response:
    if body.get("stream") and path in (CHAT, TEXT):
        body = {**body, "stream_options": {"include_usage": True}}
    return server.request("POST", path, json=body, headers=HEADER if private else {})


def requests_so_far(server: SearchedServer) -> int:
    windows = server.get("/v1/cache/history")["windows"]
    return int(next(one["requests"] for one in windows if one["window"] == "start"))


def assert_nowhere(server: SearchedServer, model: Path, *texts: str) -> None:
    tokenizer = load_tokenizer(str(model))
    ids = [tokenizer.encode(text, add_special_tokens=False)[2:-2] for text in texts]
    assert all(len(one) >= 3 for one in ids)
    flush(server)
    # The generation thread lets go of it when it looks for another request.
    until(lambda: not server.in_memory(texts, ids), timeout_s=20)
    wanted = patterns(texts, ids)
    assert in_folder(server.store, wanted) == []
    assert in_folder(server.folder, wanted[: len(texts)]) == []  # the log


@pytest.mark.parametrize(
    ("path", "stream"), [(CHAT, True), (TEXT, False), (MESSAGES, True), (RESPONSES, False)]
)
def test_nothing_of_a_private_request_is_anywhere_afterwards(
    server: SearchedServer, model: Path, path: str, stream: bool
) -> None:
    secret = next(secrets)
    flush(server)
    before = entries(server)
    body = body_of(path, secret, system=f"{SYSTEM} {secret}", stream=stream)

    counted = requests_so_far(server)
    first = used(path, send(server, path, body))
    again = used(path, send(server, path, body))

    assert (again.cached, again.written) == (first.cached, 0)
    assert_nowhere(server, model, secret)
    assert {one["id"] for one in entries(server)} == {one["id"] for one in before}
    assert secret not in str(server.get("/v1/cache/requests"))
    until(lambda: requests_so_far(server) == counted + 2)


def test_a_body_says_it_as_well_as_a_header(server: SearchedServer, model: Path) -> None:
    secret = next(secrets)

    for path in PATHS:
        assert send(server, path, body_of(path, secret, no_store=True), private=False).ok

    assert_nowhere(server, model, secret)


def test_a_private_request_finds_what_others_stored(server: SearchedServer) -> None:
    for path in PATHS:
        words = next(secrets)
        body = body_of(path, words)
        send(server, path, body, private=False)
        flush(server)

        found = used(path, send(server, path, body))

        assert found.cached == found.prompt - 1


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_understood_is_refused_and_not_stored(
    server: SearchedServer, path: str
) -> None:
    for headers, more in (
        ({"x-persist-cache": "nostore"}, {}),
        ({"x-persist-cache": "no-store, yes"}, {}),
        ({}, {"no_store": "yes"}),
        ({}, {"cache_salt": ""}),
        ({}, {"cache_salt": 7}),
    ):
        answer = server.request("POST", path, json=body_of(path, "Hi", **more), headers=headers)
        assert answer.status_code == 400, (headers, more)
        assert "Traceback" not in answer.text


def test_a_private_prewarm_is_refused(server: SearchedServer) -> None:
    body = body_of(CHAT, "Hi", prompt_cache_options={"prewarm": True})

    assert send(server, CHAT, body).status_code == 400


def test_a_private_request_that_fails_is_in_no_log(server: SearchedServer, model: Path) -> None:
    secret = next(secrets)
    bad = [{"role": "user", "content": secret}, {"role": secret, "content": secret}]

    answer = send(server, CHAT, {"messages": bad, "logit_bias": {secret: 1}})
    refused = send(server, MESSAGES, {"model": secret, "messages": bad, "max_tokens": 1})

    assert answer.status_code == refused.status_code == 400
    assert_nowhere(server, model, secret)


def test_a_private_request_that_is_served_alone_leaves_nothing(
    server: SearchedServer, model: Path
) -> None:
    secret = next(secrets)

    assert send(server, CHAT, body_of(CHAT, secret, seed=7)).ok

    assert_nowhere(server, model, secret)


@pytest.mark.parametrize("more", [{}, {"seed": 7}], ids=["batched", "alone"])
def test_stop_words_of_a_private_request_are_forgotten(
    server: SearchedServer, model: Path, more: dict[str, Any]
) -> None:
    word = next(secrets)

    assert send(server, CHAT, body_of(CHAT, "What comes before it?", stop=[word], **more)).ok

    assert_nowhere(server, model, word)


def test_a_server_may_keep_nothing_unless_it_is_asked_to(model: Path, tmp_path: Path) -> None:
    rules = {"no_store": True, "respect_store": True, "min_tokens": 60}
    with SearchedServer(model, tmp_path / "store", tmp_path, min_free_bytes=0, rules=rules) as live:
        store = {"x-persist-cache": "store"}
        for path in PATHS:
            live.request("POST", path, json=body_of(path, "private"))
            live.request("POST", path, json=body_of(path, "hi", system=""), headers=store)
            body = body_of(path, "this, too", store=False)
            live.request("POST", path, json=body, headers=store)
        flush(live)
        assert entries(live) == []
        for path in PATHS:
            live.request("POST", path, json=body_of(path, f"kept {path}"), headers=store)
        flush(live)

        assert len(entries(live)) >= len(PATHS)
        assert live.request("POST", "/v1/cache/gc?erase=true").json()["left"] == []


def test_only_requests_of_one_salt_share_anything(server: SearchedServer) -> None:
    for path in PATHS:
        words = next(secrets)
        system = f"{words} {SYSTEM}"
        salted = [
            body_of(path, words, system=system, cache_salt=salt) for salt in ("a", "b", "a", "b")
        ]

        found = []
        for body in (*salted, body_of(path, words, system=system)):
            found.append(used(path, send(server, path, body, private=False)))
            flush(server)

        assert [one.cached for one in found[:2]] == [found[0].cached] * 2
        assert found[4].cached < 20  # what all templates begin with
        assert [one.cached for one in found[2:4]] == [found[2].prompt - 1] * 2


def test_explain_speaks_of_the_salt_of_the_request(server: SearchedServer) -> None:
    words = next(secrets)
    body = body_of(CHAT, words, system=f"{words} {SYSTEM}")
    send(server, CHAT, {**body, "cache_salt": "x"}, private=False)
    flush(server)

    def explained(**more: Any) -> int:
        said = server.request("POST", "/v1/cache/explain", json={**body, **more}).json()
        assert "salt" not in said["message"]
        return int(said["cached_tokens"])

    assert explained(cache_salt="x") > 50
    assert explained() < 20  # what all templates begin with
    assert explained(cache_salt="y") == 0


def test_a_comparison_knows_no_answer_of_another_salt(server: SearchedServer) -> None:
    body = body_of(RESPONSES, next(secrets))
    first = send(server, RESPONSES, {**body, "cache_salt": "x"}, private=False).json()["id"]
    options = {"prompt_cache_options": {"comparison_response_id": first}}

    def compared(**more: Any) -> str:
        said = send(server, RESPONSES, {**body, **options, **more}, private=False).json()
        return str(said["prompt_cache_diagnostics"]["type"])

    assert compared(cache_salt="x") == "cache_hit"
    assert compared() == compared(cache_salt="y") == "comparison_response_not_found"
