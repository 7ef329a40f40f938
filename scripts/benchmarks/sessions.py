"""How much of an agent's session over Anthropic's Messages is reused, and what repairs bring.

Reused is counted by what the cache had when each request was looked up; what could be is the
longest prefix that its repaired prompt shares with an earlier one. The models are random and tiny:
what is reused depends on their caches and on the prompts, not on what they say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from scripts.benchmarks import common
from scripts.benchmarks.common import Context, Report, Table, fresh

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "lfm2": {
        "model_type": "lfm2",
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 128,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 64,
        "sliding_window_pattern": 2,
    },
}
WAYS = ("as served", "restarted", "without billing", "without countdown", "without inline-system")


def run(context: Context) -> Report:
    size = context.pick(
        {"user_turns": 1, "tool_turns": 3, "tools": 3, "words": 20},
        {"user_turns": 3, "tool_turns": 4, "tools": 5, "words": 20},
    )
    cases = []
    for name in context.pick(("llama", "gemma3"), tuple(MODELS)):
        with context.scratch() as scratch:
            for way in WAYS:
                common.say(f"sessions: {name}, {way}")
                case = fresh(converse, folder=str(scratch), name=name, way=way, size=size)
                cases.append({"model": name, "way": way, **case})
    return Report("sessions", "An agent's session", {"cases": cases}, [_table(cases)])


def converse(folder: str, name: str, way: str, size: dict[str, Any]) -> dict[str, Any]:
    """Hold the session in one way; tokens of all prompts, in common, and reused."""
    from tests import sessions
    from tests.loops import Loop
    from tests.tiny_models import build_model_dir

    model = Path(folder) / name
    if not model.exists():
        build_model_dir(model, **MODELS[name])
    bodies = list(sessions.session(**size))
    prompts: list[bytes] = []
    store = Path(folder) / f"{name}-store" if way == "restarted" else None
    if store is not None:
        half = len(bodies) // 2
        with Loop(model, store, **sessions.SERVER) as loop:
            sessions.converse(loop, bodies[:half], prompts)
            loop.cache.flush()
        bodies = bodies[half:]
    with _without(way), Loop(model, store, **sessions.SERVER) as loop:
        found = sessions.converse(loop, bodies, prompts)
    return {"total": found.total, "common": found.common, "read": found.read}


def _without(way: str) -> Any:
    """Take one repair away."""
    same: Callable[[str], str] = lambda text: text  # noqa: E731
    repair = way.removeprefix("without ")
    if repair in ("billing", "countdown"):
        return mock.patch(f"persist_cache.stability.repairs.without_{repair}", same)
    if repair == "inline-system":
        # As servers do that know system messages at the head only.
        return mock.patch("persist_cache.server.form.fit", _hoisting)
    return contextlib.nullcontext()


def _hoisting(messages: Any, tools: Any, template_args: Any, takes: Any) -> Any:
    from persist_cache.server.templates import fit

    texts = [one["content"] for one in messages if one["role"] == "system"]
    rest = [one for one in messages if one["role"] != "system"]
    head = [{"role": "system", "content": "\n\n".join(texts)}] if texts else []
    return fit([*head, *rest], tools, template_args, takes)


def _table(cases: list[dict[str, Any]]) -> Table:
    rows = []
    for case in cases:
        shared = case["read"] / case["common"] if case["common"] else 1.0
        rows.append(
            [
                f"{case['model']}, {case['way']}",
                f"{case['total']:,}",
                f"{case['read'] / case['total']:.1%}",
                f"{shared:.1%}",
            ]
        )
    return Table(
        "Three user turns of four tool turns each, sub-agents and titles in between",
        ["model and way", "tokens of all prompts", "reused", "of what the prompts share"],
        rows,
    )
