"""A server's days: prompts computed at its start, a model that goes and comes, `ps` of all that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from persist_cache_cli.warm_file import read_warm_file
from tests.cli import runner
from tests.command_server import CommandServer
from tests.loops import words
from tests.torture.tiny import KINDS, write_model
from tests.waiting import until

SYSTEM = words(3, 200)
REQUEST = [{"role": "system", "content": words(9, 80)}, {"role": "user", "content": words(4, 50)}]
WARM = """
[[prompt]]
system = "@system.txt"
label = "assistant"
pin = true

[[prompt]]
request = "request.json"
label = "morning"
ttl = "7d"
group = "mine"

[[prompt]]
prompt = "w1 w2 w3 w4 w5 w6 w7 w8"

[[prompt]]
system = "w1"
model = "nowhere/at-all"
label = "another model"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a file for `--warm`, and what that names."""
    found = tmp_path_factory.mktemp("boot")
    write_model(found / "model", KINDS["plain"], 0)
    (found / "system.txt").write_text(SYSTEM)
    (found / "request.json").write_text(json.dumps({"messages": REQUEST, "max_tokens": 3}))
    (found / "warm.toml").write_text(WARM)
    return found


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[CommandServer]:
    """A server that has warmed what it was told to."""
    flags = ("--warm", str(folder / "warm.toml"), "--unload-after", "1s")
    with CommandServer(folder / "model", folder / "store", folder, *flags) as running:
        until(lambda: warming(running)["state"] == "done", "it never ended warming")
        yield running


def warming(server: CommandServer) -> Any:
    return server.get("/health")["warming"]


def test_health_tells_how_far_warming_is_and_what_failed(server: CommandServer) -> None:
    said = warming(server)

    assert (said["done"], said["total"]) == (4, 4)
    (failed,) = said["failed"]
    assert failed.startswith("another model: ")
    assert "nowhere/at-all" in failed


def test_what_was_warmed_is_found_by_the_first_request(server: CommandServer) -> None:
    answer = server.chat(("system", SYSTEM), ("user", "w5 w6"))
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 200
    answer = server.request(
        "POST", "/v1/chat/completions", json={"messages": REQUEST, "max_tokens": 2}
    )
    usage = answer.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_entries_have_the_marks_of_the_file(server: CommandServer) -> None:
    entries = server.get("/v1/cache/entries")["entries"]

    marked = {one["label"]: one for one in entries if one["label"]}
    assert marked["assistant"]["tier"] == "system"
    assert marked["assistant"]["pinned"]
    assert marked["morning"]["expires"] is not None
    mine = server.get("/v1/cache/entries?group=mine")["entries"]
    assert marked["morning"]["id"] in {one["id"] for one in mine}


def test_ps_says_what_is_resident_and_until_when(server: CommandServer) -> None:
    server.chat(("user", "w1"))
    told = server.ps()

    assert told["pid"] == server.process.pid  # type: ignore[union-attr]
    assert told["model"]["name"] == str(server.get("/v1/models")["data"][0]["id"])
    assert told["model"]["nbytes"] > 0
    assert told["model"]["unloads"] - told["model"]["loaded"] > 0
    assert told["requests"] == []
    assert told["caches"] > 0


def test_an_idle_server_is_told_as_unloaded_and_answers_the_same(server: CommandServer) -> None:
    before = server.chat(("user", "w1 w2 w3")).json()["choices"]

    until(lambda: server.get("/health")["weights"] == "unloaded", "it was not unloaded")

    told = server.ps()
    assert told["model"]["weights"] == "unloaded"
    assert (told["model"]["nbytes"], told["caches"], told["cache_bytes"]) == (0, 0, 0)
    models = [one["id"] for one in server.get("/v1/models")["data"]]
    assert server.chat(("user", "w1 w2 w3")).json()["choices"] == before
    assert [one["id"] for one in server.get("/v1/models")["data"]] == models


def test_the_command_tells_it_to_people(
    server: CommandServer, capfd: pytest.CaptureFixture[str]
) -> None:
    run = runner(server.store, capfd)
    until(lambda: server.ps()["model"]["weights"] == "unloaded", "it was not unloaded")

    said = run("ps").out

    assert "unloaded; the next request loads it" in said
    assert "no request in flight" in said
    assert "not warm: another model: " in said
    (told,) = run("ps", "--json").json
    assert told["url"].startswith(server.url)


def test_ps_without_a_server_says_how_to_start_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = runner(tmp_path, capfd)("ps")

    assert done.status == 3
    assert "No server runs" in done.sentence


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[prompt]\n", "cannot be understood"),
        ("prompt = 1\n", "cannot be understood"),
        ("[[promt]]\nsystem = 'x'\n", "promt"),
        ("[[prompt]]\n", "prompt 1: give one of system, prompt and request"),
        ("[[prompt]]\nsystem = 'x'\nprompt = 'y'\n", "give one of"),
        ("[[prompt]]\nsystem = '@nowhere.txt'\n", "nowhere.txt cannot be read"),
        ("[[prompt]]\nsystem = ' '\n", "empty"),
        ("[[prompt]]\nsystem = '-'\n", "standard input"),
        ("[[prompt]]\nrequest = 'warm.toml'\n", "not valid JSON"),
        ("[[prompt]]\nsystem = 'x'\n[[prompt]]\nsystem = 'x'\nttl = 'soon'\n", "prompt 2: "),
        ("[[prompt]]\nsystem = 'x'\nkv_bits = 8\n", "--kv-bits"),
        ("[[prompt]]\nsystem = 'x'\nlabl = 'y'\n", "labl"),
        ("[[prompt]]\nsystem = 'x'\nstabilize = 'everything'\n", "everything"),
    ],
)
def test_a_bad_file_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "warm.toml"
    path.write_text(text)

    with pytest.raises(click.UsageError) as refused:
        read_warm_file(path)
    sentence = refused.value.format_message()
    assert said in sentence
    assert str(path) in sentence
    assert "\n" not in sentence


def test_a_bad_file_is_refused_before_anything_is_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = runner(tmp_path / "store", capfd)
    (tmp_path / "warm.toml").write_text("[[prompt]]\nrequest = 'nowhere.json'\n")

    done = run("serve", "--model", "nowhere/at-all", "--warm", tmp_path / "warm.toml")

    assert done.status == 2
    assert "nowhere.json cannot be read" in done.sentence
