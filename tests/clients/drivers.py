"""How each client is asked, and asked again in the same conversation, without a person.

Claude Code, Codex and OpenCode are run by `persist-cache launch`; what the others need is taken
from the same place as what `launch --print` shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from persist_cache_cli.launch.clients import CLIENTS, Served, setup_of
from tests.cli import SCRIPT
from tests.clients import programs


@dataclass(frozen=True)
class Place:
    """Where a client is asked.

    Attributes:
        served: The server.
        store: Of the server.
        home: The client's.
        folder: In which it runs.
    """

    served: Served
    store: Path
    home: Path
    folder: Path

    @property
    def kept(self) -> Path:
        """A file for the conversation of a client that keeps none itself."""
        return self.home / f"{self.folder.name}.conversation"


@dataclass(frozen=True)
class Call:
    """A command line, and what is added to its environment."""

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Driver:
    """A client.

    Attributes:
        title: Its name.
        protocol: That it speaks.
        registry: `npm` or `pypi`.
        packages: That it is installed by.
        call: Makes the command that asks a question; the last argument says whether it goes on
            with the conversation.
        says_folder: Its prompts say in which folder it runs.
    """

    title: str
    protocol: str
    registry: str
    packages: Sequence[str]
    call: Callable[[Place, str, bool], Call]
    says_folder: bool = True


def _launched(name: str, place: Place, words: Sequence[str]) -> Call:
    command = [str(SCRIPT), "--store", str(place.store), "launch", name, "--quiet", "--"]
    return Call([*command, *words])


def _claude(place: Place, question: str, again: bool) -> Call:
    words = ["-p", *(["-c"] if again else []), question, "--allowedTools", "Bash"]
    return _launched("claude", place, words)


def _codex(place: Place, question: str, again: bool) -> Call:
    resumed = ["resume", "--last"] if again else []
    free = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    return _launched("codex", place, ["exec", *resumed, *free, question])


def _opencode(place: Place, question: str, again: bool) -> Call:
    return _launched("opencode", place, ["run", *(["-c"] if again else []), question])


def _set_up(name: str, place: Place, words: Sequence[str]) -> Call:
    client = CLIENTS[name]
    setup = setup_of(client, place.served, {})
    for file, text in setup.files.items():
        path = place.home / file.removeprefix("~/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Call([client.program, *setup.arguments, *words], setup.environment)


def _qwen(place: Place, question: str, again: bool) -> Call:
    return _set_up("qwen", place, ["--yolo", *(["--continue"] if again else []), "-p", question])


def _aider(place: Place, question: str, again: bool) -> Call:
    alone = ["--yes-always", "--no-git", "--no-check-update", "--no-analytics", "--no-pretty"]
    kept = ["--restore-chat-history"] if again else []
    return _set_up("aider", place, [*alone, *kept, "--message", question])


def _pi(place: Place, question: str, again: bool) -> Call:
    return _set_up("pi", place, ["-p", *(["-c"] if again else []), question])


def _llm(place: Place, question: str, again: bool) -> Call:
    folder = place.home / f"llm-{place.folder.name}"
    folder.mkdir(parents=True, exist_ok=True)
    known = {
        "model_id": "local",
        "model_name": place.served.model,
        "api_base": f"{place.served.url}/v1",
        "supports_tools": True,
    }
    # JSON is YAML, too.
    (folder / "extra-openai-models.yaml").write_text(json.dumps([known]))
    words = ["-c", question] if again else ["-m", "local", "-s", programs.SYSTEM, question]
    tools = ["--functions", programs.CLOCK, "--chain-limit", "10"]
    environment = {"LLM_USER_PATH": str(folder), "OPENAI_API_KEY": place.served.key}
    return Call(["llm", "prompt", *words, *tools], environment)


def _library(program: str, prefix: str = "") -> Callable[[Place, str, bool], Call]:
    def call(place: Place, question: str, again: bool) -> Call:
        model = prefix + place.served.model
        return Call(["python", "-c", program, place.served.url, model, str(place.kept), question])

    return call


DRIVERS: Mapping[str, Driver] = {
    "claude": Driver("Claude Code", "Messages", "npm", ["@anthropic-ai/claude-code"], _claude),
    "codex": Driver("Codex CLI", "Responses", "npm", ["@openai/codex"], _codex),
    "opencode": Driver("OpenCode", "chat", "npm", ["opencode-ai"], _opencode),
    "qwen": Driver("Qwen Code", "chat", "npm", ["@qwen-code/qwen-code"], _qwen),
    "pi": Driver("pi", "chat", "npm", ["@mariozechner/pi-coding-agent"], _pi),
    "aider": Driver("Aider", "chat", "pypi", ["aider-chat"], _aider),
    "llm": Driver("llm", "chat", "pypi", ["llm"], _llm, False),
    "pydantic-ai": Driver(
        "pydantic-ai",
        "chat",
        "pypi",
        ["pydantic-ai-slim[openai]"],
        _library(programs.PYDANTIC_AI),
        False,
    ),
    "litellm-openai": Driver(
        "LiteLLM `openai/`",
        "chat",
        "pypi",
        ["litellm"],
        _library(programs.LITELLM, "openai/"),
        False,
    ),
    "litellm-anthropic": Driver(
        "LiteLLM `anthropic/`",
        "Messages",
        "pypi",
        ["litellm"],
        _library(programs.LITELLM, "anthropic/"),
        False,
    ),
}
