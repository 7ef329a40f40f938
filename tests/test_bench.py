"""`bench agents`: equal answers, every way measured, and no more said than the runs show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from persist_cache.server.validation import check_chat
from persist_cache_cli.bench import agents
from persist_cache_cli.bench.agents import COLD, FOLDER, KILLED, MEMORY, WAYS, Sample, summary
from persist_cache_cli.bench.sessions import as_chat, session
from persist_cache_cli.bench.timing import sentence_of
from tests.cli import runner
from tests.tiny_models import build_model_dir


def sample(way: str, first_s: float, run: int = 0, server: str = "s") -> Sample:
    return Sample(server, run, way, first_s, first_s + 1, 1000, 900, 8)


def samples(cold: list[float], cached: list[float]) -> list[Sample]:
    return [
        sample(way, first_s, run)
        for run in range(len(cold))
        for way in WAYS
        for first_s in [cold[run] if way == COLD else cached[run]]
    ]


def test_a_chat_says_what_messages_say() -> None:
    size = {"user_turns": 1, "tool_turns": 4, "tools": 3, "words": 5}
    bodies = list(session(**size, hosted=False, folder="/a/b"))

    for body in bodies:
        chat = as_chat(body)
        check_chat({**chat, "max_tokens": 1}, vocabulary=None)
        said = json.dumps(chat)
        assert "billing" not in said
        assert "tokens left" not in said
        roles = [one["role"] for one in chat["messages"]]
        assert roles[0] == "system"
        assert roles.count("tool") == said.count('"tool_call_id"')
    assert "Working directory: /a/b" in as_chat(bodies[1])["messages"][0]["content"]


def test_factors_are_of_the_same_run() -> None:
    rows = {row.way: row for row in summary(samples([10.0, 12.0, 11.0], [1.0, 2.0, 1.0]))}

    assert rows[KILLED].faster == (10.0, 6.0, 11.0)
    assert rows[KILLED].first_s == (1.0, 1.0, 2.0)
    assert not rows[KILLED].is_range


def test_cold_runs_that_differ_by_more_than_half_give_a_range() -> None:
    rows = {row.way: row for row in summary(samples([10.0, 16.0], [1.0, 1.0]))}

    assert rows[MEMORY].is_range
    assert agents.cells(rows[MEMORY])[-1] == "10.0–16.0 ×"
    assert agents.cells(rows[COLD])[-1] == "–"


def test_ways_that_take_several_requests_count_by_the_median_of_a_run() -> None:
    found = [*samples([10.0], [1.0]), sample(MEMORY, 5.0), sample(MEMORY, 9.0)]

    rows = {row.way: row for row in summary(found)}
    assert rows[MEMORY].faster[0] == 2.0
    assert rows[FOLDER].faster[0] == 10.0
    assert summary([replace(one, server="t") for one in found])[0].server == "t"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            b'{"error": {"message": "The prompt\\nis too long.", "type": "x"}}',
            "The prompt is too long.",
        ),
        (b'{"error": "no model"}', "no model"),
        (b"<html>Bad gateway</html>", "<html>Bad gateway</html>"),
        (b"[1]", "[1]"),
        (b"", "without a word"),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(body: bytes, said: str) -> None:
    assert sentence_of(body) == said


def test_a_model_with_too_little_context_is_refused_before_a_server_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = build_model_dir(tmp_path / "model", max_position_embeddings=1024)

    done = runner(tmp_path / "store", capfd)("bench", "agents", "--model", model)

    assert done.status == 1
    assert f"{model} has a context of 1,024 tokens, and the last turn needs" in done.sentence


@pytest.mark.long
def test_what_is_done_is_told_and_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = build_model_dir(tmp_path / "model", max_position_embeddings=6000)
    run = runner(tmp_path / "store", capfd)

    done = run("bench", "agents", "--model", model, "--runs", "1", "--max-tokens", "2")

    assert done.status == 0, done.err
    assert done.err.splitlines() == [
        f"{model} has a context of 6,000 tokens: the first prompt takes half of it ...",
        *(f"persist-cache, run 1 of 1: {way} ..." for way in WAYS),
    ]


@pytest.mark.long
def test_a_session_is_timed_against_both_servers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Four servers of a tiny model, one after the other: half a minute."""
    model = build_model_dir(tmp_path / "model", max_position_embeddings=4096)
    run = runner(tmp_path / "store", capfd)

    done = run(
        *("bench", "agents", "--model", model, "--stock", "--runs", "1", "--tokens", "500"),
        *("--max-tokens", "4", "--json"),
    )

    assert done.status == 0, done.err
    rows = {(row["server"], row["way"]): row for row in done.json["summary"]}
    assert {way for _, way in rows} == set(WAYS)
    ours = {way: rows["persist-cache", way] for way in WAYS}
    assert ours[COLD]["cached_tokens"] < 50
    for way in (MEMORY, KILLED, FOLDER):
        assert ours[way]["cached_tokens"] > 400, way
    assert rows["mlx_lm.server", KILLED]["cached_tokens"] < 50
    assert {one["output_tokens"] for one in done.json["samples"]} == {4}
