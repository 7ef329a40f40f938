"""What drives real clients: its model works as an agent does, and a client that fails costs a row.

The clients themselves are installed and asked by `scripts/clients`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from persist_cache_cli.launch.clients import CLIENTS
from tests.clients.__main__ import Row, table
from tests.clients.agent_model import STEPS, build_agent_model
from tests.clients.drivers import DRIVERS
from tests.clients.environments import NotInstalledError, install
from tests.clients.served import Reuse

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = build_agent_model(tmp_path_factory.mktemp("agent") / "model")
    return PreTrainedTokenizerFast.from_pretrained(model)


def last_word(tokenizer: Any, results: int, tools: list[str]) -> str:
    """The script that a prompt ends with, after so many results."""
    call = {"function": {"name": tools[-1] if tools else "", "arguments": {}}}
    done = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "step"}]
    messages = [{"role": "user", "content": "Go."}, *(done * results)]
    functions = [{"type": "function", "function": {"name": name}} for name in tools]
    rendered = tokenizer.apply_chat_template(
        messages, tools=functions or None, add_generation_prompt=True, tokenize=False
    )
    return str(rendered.rpartition("<|im_start|>assistant\n")[2])


@pytest.mark.parametrize("tool", ["exec_command", "Bash", "bash", "run_shell_command", "clock"])
def test_the_model_calls_the_tool_that_a_client_has_five_times(tool: str, tokenizer: Any) -> None:
    said = [last_word(tokenizer, results, ["read", tool]) for results in range(STEPS + 1)]

    assert said == [f"<|play {tool} {number}|>" for number in range(1, STEPS + 1)] + [
        "<|play done|>"
    ]
    assert all(tokenizer.convert_tokens_to_ids(one) != tokenizer.unk_token_id for one in said)


def test_a_request_without_tools_is_answered_at_once(tokenizer: Any) -> None:
    assert last_word(tokenizer, 0, []) == last_word(tokenizer, 0, ["read"]) == "<|play done|>"


def test_tokens_are_those_of_the_latest_measurement(tokenizer: Any) -> None:
    said = "Working directory: /home/ada/parser\nPlatform: linux\nToday's date: Wed Nov 25 2026\n"
    sent = (ROOT / "tests" / "requests" / "qwen-01.json").read_text()

    counted = [len(tokenizer.encode(text)) for text in (said, sent)]

    assert counted == [31, 21591], "scripts/clients has to be run again, for docs/agents.md"


def test_a_client_that_cannot_be_installed_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotInstalledError, match="npm is not installed"):
        install(tmp_path / "one", "npm", ["some-client"])
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error 404' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(NotInstalledError, match="npm error 404"):
        install(tmp_path / "one", "npm", ["some-client"])

    row = Row("Some client", "chat", trouble="not installed: npm error 404")
    assert "| Some client | chat | no: not installed: npm error 404 | – | – | – | – |" in table(
        [row]
    )


def test_a_row_says_what_was_reused_of_what_was_asked_and_of_what_could_be() -> None:
    first, later = Reuse(6, 1000, 800, 200, (90, 150)), Reuse(6, 2000, 1900, 119)
    steps = {"works": first, "turn 2": later, "after SIGKILL": later, "other folder": first}
    (*_, said) = table([Row("A client", "chat", "1.2", steps=steps)]).splitlines()

    assert said == (
        "| A client 1.2 | chat | yes, 6 requests; 800 of 1,000 (100.0%) | 1,881 of 2,000 (99.0%) "
        "| 1,881 of 2,000 (99.0%) | 800 of 1,000 (100.0%) | 90 of 150 |"
    )


def test_every_client_that_launch_knows_is_driven() -> None:
    assert set(CLIENTS) <= set(DRIVERS)


@pytest.mark.long
def test_codex_reuses_what_it_can_in_a_loop_of_five_tools(tmp_path: Path) -> None:
    numbers = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.clients", "codex", "--json", str(numbers)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(numbers.read_text())
    for step in row["steps"].values():
        assert step["requests"] >= STEPS + 1
        assert step["total"] - step["computed"] >= 0.99 * step["common"], row
