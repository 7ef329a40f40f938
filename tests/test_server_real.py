"""`serve` with a real model, killed and started again: the README's second example."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from persist_cache_cli.demo.openblas import preload_env
from persist_cache_cli.demo.prompt import QUESTIONS, messages
from tests.server_process import ServerProcess


def ask(running: ServerProcess, question: str) -> dict[str, Any]:
    answer = running.request(
        "POST",
        "/v1/chat/completions",
        json={"messages": messages(question), "max_tokens": 24},
        timeout=900,
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    found["header"] = answer.headers["x-persist-cache"]
    return found


def test_restart_after_sigkill_computes_the_question_only(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in preload_env().items():
        monkeypatch.setenv(name, value)
    options: dict[str, Any] = {"min_free_bytes": 0}
    logs = tmp_path / "logs"

    with ServerProcess(smollm2, tmp_path / "never restarted", logs, **options) as running:
        ask(running, QUESTIONS[0])
        uninterrupted = ask(running, QUESTIONS[1])
    with ServerProcess(smollm2, tmp_path / "store", logs, **options) as first:
        cold = ask(first, QUESTIONS[0])
        threading.Event().wait(1.0)
        first.kill()
    with ServerProcess(smollm2, tmp_path / "store", logs, **options) as second:
        restarted = ask(second, QUESTIONS[1])

    def cached(answer: dict[str, Any]) -> int:
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cold["usage"]["prompt_tokens"] > 1500
    assert cached(cold) == 0
    assert cached(restarted) == cached(uninterrupted) > 1500
    why = "what is stored goes on differently"
    assert restarted["header"] == f'disk; tokens={cached(restarted)}; reason="{why}"'
    assert restarted["choices"][0]["message"] == uninterrupted["choices"][0]["message"]
