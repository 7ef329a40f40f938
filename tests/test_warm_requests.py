"""`warm --requests`: what recorded requests share is stored, and found by later ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from persist_cache import Store
from persist_cache.entry import Tier
from persist_cache.stability.prefixes import Known, worth_keeping
from tests.anthropic_bodies import prose
from tests.cli import Run, runner
from tests.tiny_models import build_model_dir

DRAWN = random.Random(7)
SYSTEM = prose(DRAWN, 150)
CONTEXT = prose(DRAWN, 100)
HYBRID: dict[str, Any] = {
    "model_type": "gemma3_text",
    "sliding_window": 32,
    "sliding_window_pattern": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("requests") / "tiny")


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose cache can be resumed only where it was kept."""
    return build_model_dir(tmp_path_factory.mktemp("requests") / "sliding", **HYBRID)


def chat(*turns: str, system: str = SYSTEM) -> dict[str, Any]:
    roles = ("user", "assistant")
    said = [{"role": roles[at % 2], "content": turn} for at, turn in enumerate(turns)]
    return {"messages": [{"role": "system", "content": system}, *said]}


def written(path: Path, *bodies: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(body) for body in bodies))
    return path


@pytest.mark.parametrize("kind", ["model", "sliding"])
def test_head_and_context_of_sessions_are_stored_and_found_by_the_next_one(
    kind: str, request: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder: Path = request.getfixturevalue(kind)
    run: Run = runner(tmp_path / "store", capfd)
    recorded = tmp_path / "recorded"
    first = chat(CONTEXT, "Understood.", "Add a test.")
    turn = [{"role": "assistant", "content": "Done."}, {"role": "user", "content": "Go on."}]
    written(recorded / "a.json", {"client": "agent", "path": "/v1/chat/completions", "body": first})
    written(recorded / "b.json", {**first, "messages": [*first["messages"], *turn]})
    written(recorded / "c.jsonl", chat(CONTEXT, "Understood.", "What is it?"))

    planned = run("warm", "--model", folder, "--requests", recorded, "--dry-run", "--json").json
    warmed = run("warm", "--model", folder, "--requests", recorded, "--json").json
    again = run("warm", "--model", folder, "--requests", recorded, "--check", "--json").json

    assert [one["tier"] for one in planned] == ["system", "user"]
    assert all(one["missing_tokens"] == one["num_tokens"] for one in planned)
    assert [one["num_tokens"] for one in warmed] == [one["num_tokens"] for one in planned]
    assert warmed[0]["label"] == "agent"
    assert all(one["missing_tokens"] == 0 for one in again)
    with Store.open(tmp_path / "store", min_free_bytes=0) as opened:
        kept = {entry.num_tokens: entry.tier for entry in opened.entries()}
    assert kept[warmed[0]["num_tokens"]] == Tier.SYSTEM
    assert kept[warmed[1]["num_tokens"]] == Tier.USER
    body = written(tmp_path / "next.json", chat(CONTEXT, "Understood.", "And now?"))
    said = run("explain", "--model", folder, "--messages", body, "--json").json
    assert said["cached_tokens"] >= warmed[1]["num_tokens"]


def test_bodies_of_both_protocols_with_repairs_share_a_head(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run: Run = runner(tmp_path / "store", capfd)
    days = [f"{SYSTEM}\nToday's date is 2026-11-{day}" for day in (25, 26)]
    asks = {"messages": [{"role": "user", "content": "Hello"}]}
    bodies = [
        chat("Hello", system=days[0]),
        {**asks, "system": days[1], "max_tokens": 1, "model": "m"},
    ]
    path = written(tmp_path / "days.jsonl", *bodies)

    (one,) = run("warm", "--model", model, "--requests", path, "--stabilize", "date", "--json").json

    with_next_day = f"{SYSTEM}\nToday's date is 2027-01-01"
    body = written(tmp_path / "next.json", chat("Hello", system=with_next_day))
    found = run(
        *("explain", "--model", model, "--messages", body, "--json"), "--stabilize", "date"
    ).json
    assert one["tier"] == "system"
    assert found["cached_tokens"] >= one["num_tokens"]
    assert found["repaired"] == ["date"]


def test_what_cannot_be_read_is_left_out_in_a_sentence_each(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run: Run = runner(tmp_path / "store", capfd)
    recorded = tmp_path / "recorded"
    written(recorded / "good.json", chat("Hello"))
    written(recorded / "lines.jsonl", chat("Hi"), {"messages": "no"}, 5)
    (recorded / "cut.json").write_text('{"messages": [')
    (recorded / "empty.json").write_text("")
    (recorded / "latin.json").write_bytes(b'{"messages": "\xff"}')
    (recorded / "folder.json").mkdir()
    (recorded / "notes.txt").write_text("no request")

    done = run("warm", "--model", model, "--requests", recorded, "--json")

    assert done.status == 1
    assert [one["tier"] for one in done.json] == ["system"]
    complaints = done.err.strip().splitlines()
    assert len(complaints) == 6
    assert all(one.startswith("Left out: ") and one.endswith(".") for one in complaints)
    for name in ("cut", "empty", "latin", "folder"):
        assert sum(f"{name}.json" in one for one in complaints) == 1
    assert sum("lines.jsonl, line" in one for one in complaints) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--requests", "missing"), "does not exist"),
        (("--requests", "."), "has no file *.json or *.jsonl"),
        (("--requests", ".", "--system", "x"), "--requests says it all"),
        (("--system", "x", "--stabilize", "dats"), "did you mean 'date'?"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: tuple[str, ...],
    said: str,
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run: Run = runner(tmp_path / "store", capfd)

    done = run("warm", "--model", model, *arguments)

    assert done.status == 2
    assert said in done.sentence


# ---- which beginnings ----------------------------------------------------------------------------


def lengths(*known: Known) -> list[tuple[int, bool, int]]:
    found = worth_keeping(known, least_tokens=10)
    return [(one.num_tokens, one.is_head, one.prompts) for one in found]


HEAD = list(range(100, 200))


def test_one_conversation_has_a_head_and_no_more() -> None:
    first = [*HEAD, 1, 2, 3, 4]

    assert lengths(Known(first, 100), Known([*first, 5, 6, 7], 100)) == [(100, True, 2)]


def test_conversations_that_part_late_share_what_comes_before() -> None:
    known = [Known([*HEAD, *range(80), *[end] * 30], 100) for end in (901, 902, 903)]

    assert lengths(*known) == [(100, True, 3), (180, False, 3)]


def test_what_the_user_says_first_is_no_place_of_its_own() -> None:
    known = [Known([*HEAD, 1, 2, *[end] * 30], 100) for end in (901, 902)]

    assert lengths(*known) == [(100, True, 2)]


def test_heads_that_part_share_a_beginning_that_is_one_as_well() -> None:
    known = [Known([*HEAD, *[end] * 100, 1], 200) for end in (901, 902)]

    assert lengths(*known) == [(100, True, 2), (200, True, 1), (200, True, 1)]


def test_heads_that_part_near_the_end_of_one_are_all_there_is_to_keep() -> None:
    known = [Known([*HEAD, *[end] * 30, 1], 130) for end in (901, 902)]

    assert lengths(*known) == [(130, True, 1), (130, True, 1)]


def test_short_heads_are_left_out() -> None:
    assert lengths(Known([1, 2, 3], 2), Known([1, 2, 4], 2)) == []
