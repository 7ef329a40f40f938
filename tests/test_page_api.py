"""What the page asks of a server: history, previews, a request's entry, warming one again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from persist_cache.server.guard import Request
from tests.bulk_store import conversations
from tests.cli import runner
from tests.page_server import MODEL, TOKEN, PageServer, many, remember, serving
from tests.page_traffic import QUESTIONS, drive
from tests.server_process import ServerProcess, running
from tests.tiny_models import build_model_dir


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("real")
    model = build_model_dir(folder / "model")
    with running(model, folder / "store", folder, min_free_bytes=0) as started:
        drive(started, number=6)
        assert started.request("POST", "/v1/cache/flush").status_code == 200
        yield started


def answered(server: PageServer, path: str, method: str = "GET", body: bytes = b"") -> Any:
    headers = Message()
    headers["Host"], headers["Authorization"] = "127.0.0.1", f"Bearer {TOKEN}"
    answer = server.admin.answer(Request(method, f"/v1/cache/{path}", headers, body=body))
    return answer.status, json.loads(answer.body)


def test_history_adds_up_what_the_requests_say(real: ServerProcess) -> None:
    listed = real.get("/v1/cache/requests?limit=50")
    history = real.get("/v1/cache/history")

    for window in history["windows"]:
        assert window["requests"] == len(listed)
        assert window["tokens_asked"] == sum(one["num_tokens"] for one in listed)
        reused = sum(sum(one["reused_tokens"].values()) for one in listed)
        assert sum(window["tokens_reused"].values()) == reused > 0
        assert window["since"] <= min(one["time"] for one in listed) + 60
    assert len(history["written"]) == 14
    stats = real.get("/v1/cache/stats")["store"]
    assert history["written"][-1]["bytes"] == stats["written_today_bytes"] > 0
    assert history["disk"][-1]["total"] == stats["bytes"]["total"]
    assert history["disk"][-1]["tiers"] == {one["tier"]: one["bytes"] for one in stats["tiers"]}
    assert history["reclaimable"]["not_pinned"] > 0


def test_previews_have_text_turns_and_the_last_client(real: ServerProcess) -> None:
    entries = real.get("/v1/cache/entries?tier=user")["entries"]
    ids = ",".join(one["id"] for one in entries)

    found = real.get(f"/v1/cache/previews?ids={ids}")

    assert found["notes"] == []
    previews = found["previews"].values()
    assert {one["text"] for one in previews} & set(QUESTIONS)
    assert {one["client"] for one in previews} == {
        "claude-cli/2.1 (external)",
        "codex_cli/0.40",
        "opencode/0.9.1",
    }
    assert all(one["turns"] >= 1 for one in previews)


def test_a_request_names_the_entry_that_it_went_on_from(real: ServerProcess) -> None:
    listed = real.get("/v1/cache/requests?limit=50")
    reused = [one for one in listed if one["cached_tokens"] > 100]
    entries = {one["id"]: one for one in real.get("/v1/cache/entries?limit=1000")["entries"]}

    for one in reused:
        entry = real.get(f"/v1/cache/requests/{one['id']}")["entry"]
        assert entries[entry["id"]]["num_tokens"] == entry["num_tokens"] >= 231
    assert reused


def test_a_recent_request_is_warmed_again(real: ServerProcess) -> None:
    latest = real.get("/v1/cache/requests?limit=1")[0]
    path = f"/v1/cache/requests/{latest['id']}/warm"

    whole = real.request("POST", path, json={"cache": {"label": "again", "pin": True}})
    head = real.request("POST", path, json={"part": "system"})
    wrong = real.request("POST", path, json={"part": "all"})
    gone = real.request("POST", "/v1/cache/requests/nobody/warm", json={})

    assert whole.status_code == 200, whole.text
    assert whole.json()["num_tokens"] == latest["num_tokens"] - 1
    assert real.get(f"/v1/cache/entries/{whole.json()['id']}")["pinned"]
    assert head.json()["tier"] == "system"
    assert wrong.status_code == 400
    assert gone.status_code == 404


def test_requests_are_asked_for_page_by_page(tmp_path: Path) -> None:
    with serving(tmp_path, []) as server:
        many(server.ring, 12)
        first = answered(server, "requests?limit=5")[1]
        second = answered(server, f"requests?limit=5&before={first[-1]['number']}")[1]

        assert [one["number"] for one in first + second] == list(range(12, 2, -1))


def test_no_text_hides_all_texts(tmp_path: Path) -> None:
    prompts = list(conversations(MODEL, 3))
    secret = "the secret of the day is 1"
    with serving(tmp_path, prompts, texts=False) as server:
        bodies = [
            json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
            for text in (secret, secret.replace("1", "2"))
        ]
        for body in bodies:
            id = remember(server.ring, [ord(one) for one in body.decode()], body=body)
        ids = [one.id for one in server.store.entries()]

        told = answered(server, f"requests/{id}")[1]
        previews = answered(server, f"previews?ids={','.join(ids)}")[1]["previews"]
        status, refusal = answered(server, f"entries/{ids[0]}?text=true")

        assert "secret" not in json.dumps(told)
        assert told["parted"]["cause"] is not None
        assert {one["text"] for one in previews.values()} == {None}
        assert (status, "--no-text" in refusal["error"]) == (403, True)
        assert answered(server, "stats")[1]["texts"] is False


def test_a_prompt_whose_tokenizer_is_not_there_says_so(tmp_path: Path) -> None:
    with serving(tmp_path, list(conversations(MODEL, 2))) as server:
        (id, *_) = (one.id for one in server.store.entries())

        found = answered(server, f"previews?ids={id}")[1]

        assert found["previews"][id]["text"] is None
        assert found["notes"] == ["It is not known where the tokenizer of org/A-Model-4bit is."]


@pytest.mark.parametrize("ids", ["", "xyz", "0123", ",".join(["0" * 16] * 101)])
def test_previews_of_nonsense_are_refused(tmp_path: Path, ids: str) -> None:
    with serving(tmp_path, []) as server:
        assert answered(server, f"previews?ids={ids}")[0] == 400


def test_the_tree_is_sorted_by_size(tmp_path: Path) -> None:
    with serving(tmp_path, list(conversations(MODEL, 40, systems=5))) as server:
        sizes = [one["below"]["bytes"] for one in answered(server, "tree?sort=size")[1]["branches"]]

        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) > 1


# ---- commands ----------------------------------------------------------------------------------


def test_list_shows_how_prompts_begin(
    real: ServerProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    run = runner(real.store, capfd)

    shown = run("list", "--text", "--tier", "user").out
    said = run("list", "--text", "--json").json
    without = run("list", "--json").json

    assert any(question in shown for question in QUESTIONS)
    assert any(one["text"] in QUESTIONS for one in said)
    assert all("text" not in one for one in without)


def test_list_without_the_tokenizer_says_so_in_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path, list(conversations(MODEL, 2))):
        pass

    done = runner(tmp_path / "store", capfd)("list", "--text")

    assert done.status == 0
    assert done.err == "No text: It is not known where the tokenizer of org/A-Model-4bit is.\n"
    assert "system" in done.out


def test_top_shows_the_page_in_a_terminal(
    real: ServerProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    run = runner(real.store, capfd)

    shown = run("top", "--once").out
    said = run("top", "--json").json

    assert "tokens reused" in shown
    assert "Most disk" in shown
    assert "T4 date" in shown
    assert said.keys() == {"stats", "history", "requests", "largest", "previews"}
