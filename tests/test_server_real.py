"""`serve` with a real model, killed and started again: the README's second example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from persist_cache_cli.demo.openblas import preload_env
from persist_cache_cli.demo.prompt import QUESTIONS, messages
from tests.server_process import ServerProcess
from tests.waiting import until


def ask(running: ServerProcess, question: str, characters: int) -> dict[str, Any]:
    """The answer to a question under so much of the demo's system prompt."""
    system, user = messages(question)
    asked = [{**system, "content": system["content"][:characters]}, user]
    answer = running.request(
        "POST", "/v1/chat/completions", json={"messages": asked, "max_tokens": 24}, timeout=900
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    found["header"] = answer.headers["x-persist-cache"]
    return found


@pytest.mark.parametrize(
    ("characters", "tokens"),
    [(1_500, 250), pytest.param(100_000, 1_500, marks=pytest.mark.long)],
    ids=["the beginning", "the whole prompt"],
)
def test_restart_after_sigkill_computes_the_question_only(
    smollm2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    characters: int,
    tokens: int,
) -> None:
    for name, value in preload_env().items():
        monkeypatch.setenv(name, value)
    options: dict[str, Any] = {"min_free_bytes": 0}
    logs = tmp_path / "logs"

    with ServerProcess(smollm2, tmp_path / "never restarted", logs, **options) as running:
        ask(running, QUESTIONS[0], characters)
        uninterrupted = ask(running, QUESTIONS[1], characters)
    with ServerProcess(smollm2, tmp_path / "store", logs, **options) as first:
        cold = ask(first, QUESTIONS[0], characters)
        until(lambda: first.get("/v1/cache/stats")["store"]["entries"] > 1)
        first.kill()
    with ServerProcess(smollm2, tmp_path / "store", logs, **options) as second:
        restarted = ask(second, QUESTIONS[1], characters)

    def cached(answer: dict[str, Any]) -> int:
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cold["usage"]["prompt_tokens"] > tokens
    assert cached(cold) == 0
    assert cached(restarted) == cached(uninterrupted) > tokens
    why = "what is stored goes on differently"
    assert restarted["header"] == f'disk; tokens={cached(restarted)}; reason="{why}"'
    assert restarted["choices"][0]["message"] == uninterrupted["choices"][0]["message"]
