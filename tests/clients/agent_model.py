"""A model that works as an agent does: it calls a client's shell tool five times, then it is done.

The template ends a prompt with the script that fits: which tool there is, by the names that clients
give theirs, and how many results have come since the user's last message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import tiny_models
from tests.scripted_model import build_scripted_model

STEPS = 5
"""Tool calls that it makes for each message of the user."""
DONE = "All steps are done."
CONTEXT_TOKENS = 131_072
_VOCABULARY = 4096
_RECORDED = Path(__file__).parents[1] / "requests"
_TOOLS: Mapping[str, Mapping[str, Any]] = {
    "exec_command": {"cmd": "echo step NUMBER"},
    "shell_command": {"command": "echo step NUMBER"},
    "shell": {"command": ["echo", "step NUMBER"]},
    "Bash": {"command": "echo step NUMBER", "description": "Say a step"},
    "bash": {"command": "echo step NUMBER", "description": "Say a step"},
    "run_shell_command": {"command": "echo step NUMBER", "is_background": False},
    "clock": {"city": "Bern NUMBER"},
}
"""Arguments that each tool takes."""
_COUNTING = """\
{%- set now = namespace(results=0, tool='') -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set now.results = 0 -%}
{%- elif message.role == 'tool' -%}{%- set now.results = now.results + 1 -%}{%- endif -%}
{%- endfor -%}
{%- for tool in tools or [] -%}
{%- if tool.function.name in KNOWN and not now.tool -%}
{%- set now.tool = tool.function.name -%}
{%- endif -%}
{%- endfor -%}
"""
_START = """\
{% if now.tool and now.results < STEPS -%}
{{ '<|play ' ~ now.tool ~ ' ' ~ (now.results + 1) ~ '|>' }}
{%- else -%}<|play done|>{%- endif -%}
{%- endif -%}
"""


def build_agent_model(path: Path) -> Path:
    """Write the model into the folder `path`."""
    known = json.dumps(list(_TOOLS))
    template = _COUNTING.replace("KNOWN", known) + tiny_models.CHAT_TEMPLATE.removesuffix(
        "{% endif -%}\n"
    )
    return build_scripted_model(
        path,
        scripts=_scripts(),
        template=template + _START.replace("STEPS", str(STEPS)),
        tokenizer={"vocab_size": _VOCABULARY, "corpus": _corpus()},
        num_hidden_layers=1,
        head_dim=16,
        max_position_embeddings=CONTEXT_TOKENS,
    )


def _scripts() -> dict[str, Sequence[str]]:
    scripts: dict[str, Sequence[str]] = {"done": [DONE]}
    for name, arguments in _TOOLS.items():
        for number in range(1, STEPS + 1):
            said = json.dumps(arguments).replace("NUMBER", str(number))
            call = f'{{"name": "{name}", "arguments": {said}}}'
            scripts[f"{name} {number}"] = [
                f"Step {number} by {name}.\n",
                f"<tool_call>{call}</tool_call>",
            ]
    return scripts


def _corpus() -> list[str]:
    """What clients have sent, whose words are not to be cut into letters.

    Recordings stay as they are: what is measured would differ with each change of a text that is
    worked on.
    """
    return [path.read_text() for path in sorted(_RECORDED.glob("*.json"))]
