"""Servers that share prompts: what one computed, another one fetches for its first request."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from persist_cache.remote import make_secret
from persist_cache_cli.requests import block
from tests.cli import prepared_script
from tests.computed import CountedServer
from tests.mirror import Mirror, wait_for_blobs
from tests.server_process import ServerProcess, free_port
from tests.test_caching_server import CHAT, PATHS, body_of, used
from tests.tiny_models import build_model_dir
from tests.waiting import until

SYSTEM = "You are a helpful assistant. Answer the question of the user in a short sentence. " * 25
words = map("".join, itertools.product("abcdefghij", repeat=4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return build_model_dir(folder / "model", model_type="llama")


@pytest.fixture(scope="module")
def secret(folder: Path) -> str:
    make_secret(folder / "team.secret")
    return str(folder / "team.secret")


def machine(model: Path, folder: Path, url: object, secret: str, **remote: Any) -> CountedServer:
    """A server with a store and a home of its own."""
    choice = {"url": str(url), "secret_file": secret, **remote}
    return CountedServer(model, folder / "store", folder, min_free_bytes=0, remote=choice)


def remote_of(server: ServerProcess) -> dict[str, Any]:
    """The state of its remote."""
    found: dict[str, Any] = server.get("/v1/cache/stats")["remote"]
    return found


def ask(server: ServerProcess, question: str, **more: Any) -> requests.Response:
    body = body_of(CHAT, question, system=SYSTEM, **more)
    return server.request("POST", CHAT, json={**body, "temperature": 0})


@pytest.fixture(scope="module")
def remote(folder: Path, model: Path, secret: str) -> Path:
    """A remote with the system prompt, which a server published when it was used often enough."""
    place = folder / "remote"
    place.mkdir()
    with machine(model, folder / "first", place, secret, publish_plain=True) as first:
        assert ask(first, "One?").headers["x-persist-cache"].startswith("miss")
        first.request("POST", "/v1/cache/flush")
        assert remote_of(first)["publishes"]
        for question in ("Two?", "Three?"):
            assert remote_of(first)["counters"].get("published", 0) == 0
            assert ask(first, question).headers["x-persist-cache"].startswith("memory")
        until(lambda: remote_of(first)["counters"].get("published", 0))
        assert first.stop() == 0
        assert "Traceback" not in first.log.read_text()
    return place


@pytest.fixture
def second(remote: Path, model: Path, secret: str, tmp_path: Path) -> Iterator[CountedServer]:
    """A machine that has never computed anything."""
    with machine(model, tmp_path, remote, secret) as server:
        yield server
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


def metrics(server: ServerProcess) -> dict[tuple[str, ...], float]:
    text = server.request("GET", "/metrics").text
    return {
        (sample.name.removeprefix("persist_cache_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_second_machine_answers_its_first_request_from_the_remote(
    second: CountedServer, remote: Path, model: Path, tmp_path: Path
) -> None:
    with CountedServer(model, tmp_path / "alone", tmp_path / "c", min_free_bytes=0) as alone:
        wanted = ask(alone, "Four?")

    found = ask(second, "Four?")

    said = found.headers["x-persist-cache"]
    usage = used(CHAT, found)
    assert said.startswith(f"remote; tokens={usage.cached}")
    assert usage.cached > 300
    assert sum(map(len, second.prefilled())) == usage.prompt - usage.cached - 1
    assert found.json()["choices"] == wanted.json()["choices"]
    assert used(CHAT, wanted).prompt == usage.prompt


def test_the_first_request_of_a_server_without_a_model_is_answered_from_the_remote(
    remote: Path, model: Path, secret: str, tmp_path: Path
) -> None:
    choice = {"url": str(remote), "secret_file": secret}
    options: dict[str, Any] = {"min_free_bytes": 0, "remote": choice, "unload_after_s": 1.0}
    with ServerProcess(None, tmp_path / "store", tmp_path, **options) as server:
        unknown = ask(server, "Four?", model="nobody/has-it")
        found = ask(server, "Four?", model=str(model))
        assert unknown.status_code == 404
        assert found.headers["x-persist-cache"].startswith("remote")


def test_all_that_counts_and_tells_agrees_with_the_header(second: CountedServer) -> None:
    tokens = used(CHAT, ask(second, "Five?")).cached

    stats = second.get("/v1/cache/stats")
    assert stats["server"]["hits"] == {"memory": 0, "disk": 0, "remote": 1}
    assert stats["server"]["tokens_saved"]["remote"] == tokens
    assert stats["remote"]["hits"] == 1
    assert (stats["remote"]["breaker"], stats["remote"]["publishes"]) == ("closed", False)
    assert stats["remote"]["counters"]["received_bytes"] > 0
    counted = metrics(second)
    assert counted["hits_total", "remote"] == 1
    assert counted["remote_hits_total",] == 1
    assert counted["remote_breaker", "closed"] == 1
    assert counted["remote_received_bytes_total",] > 0
    assert second.get("/v1/cache/ps")["remote"] == "closed"
    (record,) = second.get("/v1/cache/requests")
    assert (record["source"], record["cached_tokens"]) == ("remote", tokens)
    assert record["reused_tokens"] == {"remote": tokens}
    assert (record["remote"]["why"], record["remote"]["num_tokens"]) == ("brought", tokens)
    lines = block(record, 100)
    assert any(line.startswith("  reused    from the remote") for line in lines)
    assert any(line.startswith("  remote    brought after") for line in lines)
    body = body_of(CHAT, "Five?", system=SYSTEM)
    told = second.request("POST", "/v1/cache/explain", json=body).json()["remote"]
    assert (told["why"], told["num_tokens"]) == ("brought", tokens)
    assert "remote hit" in second.log.read_text()
    second.request("POST", "/v1/cache/flush")
    assert second.get("/v1/cache/stats")["store"]["hits"]["remote"] == 1


def test_what_was_brought_is_on_the_disk_and_is_not_asked_for_again(
    second: CountedServer,
) -> None:
    ask(second, "Six?")
    before = remote_of(second)["counters"]["requests"]

    again = ask(second, "Six?")

    assert again.headers["x-persist-cache"].startswith("memory")
    assert remote_of(second)["counters"]["requests"] == before
    entries = second.get("/v1/cache/entries")["entries"]
    assert any(one["tier"] == "system" and one["num_tokens"] > 300 for one in entries)


def test_a_private_request_asks_the_remote_nothing(second: CountedServer) -> None:
    ways: list[dict[str, Any]] = [{"no_store": True}, {"cache_salt": "mine"}]
    for path, private in itertools.product(PATHS, ways):
        body = body_of(path, "Seven?", system=SYSTEM, **private)
        answer = second.request("POST", path, json=body)
        assert answer.ok
        assert "remote" not in answer.headers["x-persist-cache"]

    assert remote_of(second)["counters"].get("requests", 0) == 0


@pytest.mark.long  # two servers more; test_remote.py proves it of the library
def test_private_prompts_are_not_published_however_often_they_are_used(
    model: Path, secret: str, tmp_path: Path
) -> None:
    place = tmp_path / "remote"
    place.mkdir()
    with machine(model, tmp_path, place, secret, publish_plain=True, publish_after=1) as server:
        for _ in range(3):
            ask(server, "Eight?", cache_salt="mine")
        server.request("POST", "/v1/cache/flush")
        for _ in range(3):
            ask(server, "Eight?", cache_salt="mine")
        # Those of another client are, and come after them in the queue.
        for question in ("Nine?", "Ten?", "Eleven?"):
            ask(server, question)
            server.request("POST", "/v1/cache/flush")
        until(lambda: remote_of(server)["counters"].get("published", 0))
        assert server.stop() == 0

    sent = [path for path in place.rglob("*") if path.is_file() and "/a/" in str(path)]
    with machine(model, tmp_path / "b", place, secret) as other:
        found = used(CHAT, ask(other, "Nine?")).cached
    assert sent
    assert found > 300


def test_with_a_dead_remote_answers_go_on_and_it_is_soon_left_alone(
    model: Path, secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with machine(model, tmp_path, "s3://team/prompts", secret) as server:
        for word in itertools.islice(words, 4):
            answer = server.request(
                "POST", CHAT, json=body_of(CHAT, "Twelve?", system=f"{word} {SYSTEM}")
            )
            assert "remote" not in answer.headers["x-persist-cache"]
        state = remote_of(server)
        assert state["breaker"] == "open"
        assert state["last_error"]
        asked = state["counters"]["requests"]
        server.request("POST", CHAT, json=body_of(CHAT, "Twelve?", system=f"zz {SYSTEM}"))
        assert remote_of(server)["counters"]["requests"] == asked
        assert metrics(server)["remote_breaker", "open"] == 1
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


# ---- a mirror that is held up --------------------------------------------------------------------


@pytest.fixture
def mirror(remote: Path) -> Iterator[Mirror]:
    found = Mirror(remote)
    yield found
    found.stop()


def test_a_stream_lives_while_the_remote_is_slow_and_a_client_that_leaves_ends_the_pull(
    mirror: Mirror, model: Path, secret: str, tmp_path: Path
) -> None:
    with machine(model, tmp_path, mirror.url, secret) as server, mirror.held_up("/pc1/b/"):
        body = body_of(CHAT, "Thirteen?", system=SYSTEM, stream=True)
        with requests.post(server.url + CHAT, json=body, stream=True, timeout=60) as stream:
            lines = stream.iter_lines(chunk_size=1)
            assert next(line for line in lines if line).startswith(b": keepalive")
            wait_for_blobs(mirror)

        until(lambda: server.get("/v1/cache/ps")["requests"] == [])
        assert server.stop() == 0
        assert list((server.store / "tmp").iterdir()) == []


def test_requests_for_one_prompt_at_once_cost_one_pull(
    mirror: Mirror, model: Path, secret: str, tmp_path: Path
) -> None:
    with machine(model, tmp_path, mirror.url, secret) as server, ThreadPoolExecutor(6) as pool:
        with mirror.held_up("/pc1/b/"):
            asking = [pool.submit(ask, server, f"Question {n}?") for n in range(6)]
            wait_for_blobs(mirror)
        answers = [one.result() for one in asking]

        assert len(set(mirror.asked)) == len(mirror.asked)
        assert all(used(CHAT, one).cached > 300 for one in answers)
        assert metrics(server)["remote_hits_total",] >= 1


def test_a_mirror_is_only_read(model: Path, secret: str, tmp_path: Path) -> None:
    place = ("--remote", "https://prompts.example/v1", "--remote-secret-file", secret)

    done = prepared_script(tmp_path / "s", "serve", "--model", model, *place, "--publish-plain")

    assert done.status == 1
    assert done.err.splitlines()[-1].startswith("Error: https://prompts.example/v1 is a mirror")
    assert "Traceback" not in done.err


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.long  # four servers; test_cli_remote.py proves it of the commands
def test_a_remote_is_remembered_and_can_be_ended(
    remote: Path, model: Path, secret: str, tmp_path: Path
) -> None:
    with machine(model, tmp_path, remote, secret) as server:
        assert remote_of(server)["url"].endswith("/remote")
        assert "/remote, only read: " in server.log.read_text()

    with CountedServer(model, tmp_path / "store", tmp_path, min_free_bytes=0) as server:
        assert ask(server, "Fourteen?").headers["x-persist-cache"].startswith("remote")

    choice = {"url": "none"}
    for options in ({"remote": choice}, {}):
        with CountedServer(model, tmp_path / "store", tmp_path, min_free_bytes=0, **options) as one:
            assert one.get("/v1/cache/stats")["remote"] is None
            assert one.get("/v1/cache/ps")["remote"] is None


def test_a_remembered_remote_that_cannot_be_used_costs_no_answer(
    remote: Path, model: Path, secret: str, tmp_path: Path
) -> None:
    lost = tmp_path / "lost.secret"
    lost.write_bytes(Path(secret).read_bytes())
    lost.chmod(0o600)
    with machine(model, tmp_path, remote, str(lost)):
        pass
    os.unlink(lost)

    with CountedServer(model, tmp_path / "store", tmp_path, min_free_bytes=0) as server:
        assert ask(server, "Fifteen?").headers["x-persist-cache"].startswith("miss")
        state = remote_of(server)
        assert state["breaker"] == "off"
        assert "lost.secret" in state["last_error"]
        assert "the remote is not used" in server.log.read_text()
