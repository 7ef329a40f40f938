"""What each client needs to be told so that it talks to a server of ours, and to no other.

Pure: a server goes in, the client's environment, arguments and files come out. A client's switches
are set only where nothing is lost by them: a billing line and a count of hosted tokens say nothing
about a model of one's own, and what Claude Code moves out of its system prompt it says elsewhere.
Switches are those of the versions that docs/agents.md names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

KEY_VARIABLE = "PERSIST_CACHE_API_KEY"
"""Holds the API key, if the server asks for one: what is printed or written names this only."""
NO_KEY = "persist-cache"
"""What clients that insist on a key are given where none is asked for."""
PROVIDER = "persist-cache"
_CODEX_PROVIDER = "persist_cache"
"""Without a hyphen, because it is a part of a dotted key."""
_SMALL_CONTEXT_TOKENS = 128_000
_MOST_OUTPUT_TOKENS = 32_000
_CLAUDE_MOVES = ("--exclude-dynamic-system-prompt-sections",)
_CLAUDE_ELSEWHERE = (
    "ANTHROPIC_API_KEY",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_FOUNDRY",
    "CLAUDE_CODE_USE_VERTEX",
)
"""A key that would be sent beside ours, and other places that win over its address."""
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


@dataclass(frozen=True, slots=True)
class Served:
    """What a client has to know of a server.

    Attributes:
        url: Where it answers, without a path.
        model: As it lists it.
        context_tokens: Longest prompt and answer together, None where that is not known.
        api_key: What it asks for; None for nothing.
    """

    url: str
    model: str
    context_tokens: int | None = None
    api_key: str | None = None

    @property
    def key(self) -> str:
        return NO_KEY if self.api_key is None else self.api_key

    @property
    def output_tokens(self) -> int | None:
        """What an answer may have of a known context."""
        if self.context_tokens is None:
            return None
        return min(_MOST_OUTPUT_TOKENS, self.context_tokens // 4)


@dataclass(frozen=True, slots=True)
class Setup:
    """How a client is started.

    Attributes:
        arguments: In front of the user's.
        environment: Variables to set.
        unset: Variables to remove: they would send the client, or a key of the user's, elsewhere.
        files: Contents by name, for clients that read their models from nothing else.
    """

    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Client:
    """A client that can be connected.

    Attributes:
        program: Its executable.
        title: Its name.
        install: The command that installs it.
        setup: Makes its setup for a server; is given the environment as it is, and the arguments
            of the user's.
        is_launched: It needs no file of its own, so `launch` can start it.
    """

    program: str
    title: str
    install: str
    setup: Callable[[Served, Mapping[str, str], Sequence[str]], Setup]
    is_launched: bool = False


def setup_of(
    client: Client, served: Served, environment: Mapping[str, str], words: Sequence[str] = ()
) -> Setup:
    """How a client is started to talk to a server.

    Args:
        client: The client.
        served: The server.
        environment: That it would be started in.
        words: Arguments of the user's.

    Raises:
        click.ClickException: The environment has what cannot be added to.
    """
    setup = client.setup(served, environment, words)
    more = _past_proxies(served, environment)
    if served.api_key is not None:
        more[KEY_VARIABLE] = served.api_key
    return Setup(setup.arguments, {**setup.environment, **more}, setup.unset, setup.files)


def _past_proxies(served: Served, environment: Mapping[str, str]) -> dict[str, str]:
    """Have no proxy be asked for a server of this machine."""
    named = {name.lower() for name, value in environment.items() if value}
    if not named.intersection(_PROXIES):
        return {}
    host = served.url.partition("://")[2].rpartition(":")[0]
    known = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
    if host in known.split(",") or known.strip() == "*":
        return {}
    past = ",".join(filter(None, (known, host)))
    return {"NO_PROXY": past, "no_proxy": past}


# ---- the clients ---------------------------------------------------------------------------------


def _claude(served: Served, environment: Mapping[str, str], words: Sequence[str]) -> Setup:
    model = served.model
    said = {
        "ANTHROPIC_BASE_URL": served.url,
        "ANTHROPIC_AUTH_TOKEN": served.key,
        "ANTHROPIC_MODEL": model,
        "ANTHROPIC_SMALL_FAST_MODEL": model,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
        "CLAUDE_CODE_SUBAGENT_MODEL": model,
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_TOTAL_TOKENS_REMINDER": "off",
    }
    if served.context_tokens is not None:
        said["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(served.context_tokens)
        if served.context_tokens < _SMALL_CONTEXT_TOKENS:
            said["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(served.output_tokens)
    # Without a person it says folder and git's status in the first message then; with one the
    # switch does nothing, and earlier versions do not know it.
    moves = _CLAUDE_MOVES if {"-p", "--print"}.intersection(words) else ()
    return Setup(moves, said, _CLAUDE_ELSEWHERE)


def _codex(served: Served, environment: Mapping[str, str], words: Sequence[str]) -> Setup:
    provider = {"name": PROVIDER, "base_url": f"{served.url}/v1", "wire_api": "responses"}
    if served.api_key is not None:
        provider["env_key"] = KEY_VARIABLE
    table = ", ".join(f"{name} = {_toml(value)}" for name, value in provider.items())
    settings = {
        "model": _toml(served.model),
        "model_provider": _toml(_CODEX_PROVIDER),
        f"model_providers.{_CODEX_PROVIDER}": f"{{ {table} }}",
    }
    if served.context_tokens is not None:
        settings["model_context_window"] = str(served.context_tokens)
    pairs = (("-c", f"{name}={value}") for name, value in settings.items())
    return Setup(tuple(word for pair in pairs for word in pair))


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _opencode(served: Served, environment: Mapping[str, str], words: Sequence[str]) -> Setup:
    model: dict[str, Any] = {"name": served.model, "tool_call": True}
    if served.context_tokens is not None:
        model["limit"] = {"context": served.context_tokens, "output": served.output_tokens}
    named = f"{PROVIDER}/{served.model}"
    ours = {
        "$schema": "https://opencode.ai/config.json",
        "model": named,
        "small_model": named,
        "provider": {
            PROVIDER: {
                "npm": "@ai-sdk/openai-compatible",
                "name": PROVIDER,
                "options": {
                    "baseURL": f"{served.url}/v1",
                    "apiKey": NO_KEY if served.api_key is None else f"{{env:{KEY_VARIABLE}}}",
                },
                "models": {served.model: model},
            }
        },
    }
    whole = _merged(_config_in(environment), ours)
    return Setup(environment={_OPENCODE_CONFIG: json.dumps(whole, ensure_ascii=False)})


_OPENCODE_CONFIG = "OPENCODE_CONFIG_CONTENT"


def _config_in(environment: Mapping[str, str]) -> dict[str, Any]:
    """What the user says in the variable that OpenCode is about to be given."""
    text = environment.get(_OPENCODE_CONFIG)
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise click.ClickException(
            f"{_OPENCODE_CONFIG} is set and is no JSON object, so nothing can be added to it: "
            "unset it, or put what it has into a file that OPENCODE_CONFIG names."
        )
    return found


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both, and of what both have the other's."""
    said = {**one, **other}
    for name in one.keys() & other.keys():
        if isinstance(one[name], dict) and isinstance(other[name], dict):
            said[name] = _merged(one[name], other[name])
    return said


def _qwen(served: Served, environment: Mapping[str, str], words: Sequence[str]) -> Setup:
    said = {
        "OPENAI_BASE_URL": f"{served.url}/v1",
        "OPENAI_API_KEY": served.key,
        "OPENAI_MODEL": served.model,
    }
    return Setup(("--auth-type", "openai"), said)


def _aider(served: Served, environment: Mapping[str, str], words: Sequence[str]) -> Setup:
    said = {"OPENAI_API_BASE": f"{served.url}/v1", "OPENAI_API_KEY": served.key}
    named = f"openai/{served.model}"
    files = {}
    if served.context_tokens is not None:
        known = {"max_input_tokens": served.context_tokens, "max_tokens": served.output_tokens}
        costs = {"input_cost_per_token": 0, "output_cost_per_token": 0}
        files["~/.aider.model.metadata.json"] = _json(
            {named: {**known, **costs, "litellm_provider": "openai", "mode": "chat"}}
        )
    return Setup(("--model", named, "--no-show-model-warnings"), said, files=files)


def _pi(served: Served, environment: Mapping[str, str], words: Sequence[str]) -> Setup:
    model: dict[str, Any] = {"id": served.model}
    if served.context_tokens is not None:
        model |= {"contextWindow": served.context_tokens, "maxTokens": served.output_tokens}
    provider = {
        "baseUrl": f"{served.url}/v1",
        "api": "openai-completions",
        "apiKey": NO_KEY if served.api_key is None else KEY_VARIABLE,
        "models": [model],
    }
    return Setup(
        ("--provider", PROVIDER, "--model", served.model),
        files={"~/.pi/agent/models.json": _json({"providers": {PROVIDER: provider}})},
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


CLIENTS: Mapping[str, Client] = {
    "claude": Client(
        "claude", "Claude Code", "npm install -g @anthropic-ai/claude-code", _claude, True
    ),
    "codex": Client("codex", "Codex CLI", "npm install -g @openai/codex", _codex, True),
    "opencode": Client("opencode", "OpenCode", "npm install -g opencode-ai", _opencode, True),
    "qwen": Client("qwen", "Qwen Code", "npm install -g @qwen-code/qwen-code", _qwen),
    "aider": Client("aider", "Aider", "pipx install aider-chat", _aider),
    "pi": Client("pi", "pi", "npm install -g @mariozechner/pi-coding-agent", _pi),
}
