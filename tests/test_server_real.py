"""`serve` with a real model, killed and started again: the README's second example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from persist_cache_cli.demo.openblas import preload_env
from persist_cache_cli.demo.prompt import QUESTIONS, messages
from tests import official
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
    [(700, 100), pytest.param(100_000, 1_500, marks=pytest.mark.long)],
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


@pytest.mark.long
def test_messages_go_on_after_sigkill_and_say_what_a_chat_says(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in preload_env().items():
        monkeypatch.setenv(name, value)
    system, question = (one["content"] for one in messages(QUESTIONS[0]))
    said: list[Any] = [{"role": "user", "content": question}]
    options: dict[str, Any] = {"min_free_bytes": 0}

    def ask(running: ServerProcess) -> official.anthropic.types.Message:
        client = official.anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)
        return client.messages.create(
            model="claude-large", max_tokens=16, system=system[:800], messages=said
        )

    with ServerProcess(smollm2, tmp_path / "store", tmp_path / "logs", **options) as first:
        cold = ask(first)
        assert first.request("POST", "/v1/cache/flush").status_code == 200
        first.kill()
    said += [
        {"role": "assistant", "content": cold.content},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    with ServerProcess(smollm2, tmp_path / "store", tmp_path / "logs", **options) as second:
        warm = ask(second)
        assert cold.content[0].type == "text"
        chat = second.chat(
            ("system", system[:800]),
            ("user", question),
            ("assistant", cold.content[0].text),
            ("user", QUESTIONS[1]),
            max_tokens=16,
        )

    usage = cold.usage
    assert usage.cache_read_input_tokens == 0
    assert usage.input_tokens == 1
    # The reply is there, too, but for its last token, which no call has computed.
    prompt = usage.input_tokens + (usage.cache_creation_input_tokens or 0)
    assert (warm.usage.cache_read_input_tokens or 0) >= prompt + usage.output_tokens - 2
    assert warm.content[0].type == "text"
    assert warm.content[0].text == chat.json()["choices"][0]["message"]["content"]
