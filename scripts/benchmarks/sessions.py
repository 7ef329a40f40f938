"""How much of an agent's session over Anthropic's Messages is reused, and what repairs bring.

Computed is counted at the model's calls; what could be reused is the longest prefix that a
repaired prompt shares with an earlier one. The models are random and tiny: what is reused depends
on their caches and on the prompts, not on what they say. Without a repair nearly all is computed,
so only the first ten requests are sent then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

from scripts.benchmarks import common
from scripts.benchmarks.common import Context, Report, Table, fresh

_NARROW = {"hidden_size": 32, "num_attention_heads": 1, "head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**_NARROW, "num_hidden_layers": 1},
    "lfm2 (hybrid)": {
        **_NARROW,
        "model_type": "lfm2",
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 64,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
    },
    "gemma3 (sliding)": {
        **_NARROW,
        "model_type": "gemma3_text",
        "sliding_window": 64,
        "sliding_window_pattern": 2,
    },
}
SERVED = "as served"
FIRST = "first ten requests"
KILLED = "killed and started again"
WAYS = (SERVED, KILLED, "without billing", "without countdown", "without inline-system")
_WITHOUT = ("llama", "lfm2 (hybrid)")
"""Models that show what is lost without a repair."""
_CONTEXT_TOKENS = 65_536


def run(context: Context) -> Report:
    size = context.pick(
        {"user_turns": 1, "tool_turns": 3, "tools": 3, "words": 20},
        {"user_turns": 3, "tool_turns": 10, "tools": 20, "words": 155},
    )
    cases: list[dict[str, Any]] = []
    for name in context.pick(("llama", "lfm2 (hybrid)"), tuple(MODELS)):
        with context.scratch() as scratch:
            for way in WAYS if name in _WITHOUT else WAYS[:2]:
                common.say(f"sessions: {name}, {way}")
                case = fresh(converse, folder=str(scratch), name=name, way=way, size=size)
                cases += [{"model": name, "way": said, **one} for said, one in case.items()]
    return Report("sessions", "An agent's session", {"size": size, "cases": cases}, [_table(cases)])


def converse(folder: str, name: str, way: str, size: dict[str, Any]) -> dict[str, Any]:
    """Hold the session in one way; what was reused, by the part of it."""
    from tests import sessions
    from tests.loops import Loop
    from tests.tiny_models import build_model_dir

    model = Path(folder) / name
    if not model.exists():
        build_model_dir(model, max_position_embeddings=_CONTEXT_TOKENS, **MODELS[name])
    bodies = list(sessions.session(**size))
    first = bodies[:10]
    prompts: list[bytes] = []
    store = Path(folder) / way
    if way not in (SERVED, KILLED):
        bodies = first
    elif way == KILLED:
        half = len(bodies) // 2
        _, prompts = sessions.converse_until_killed(Path(folder), model, store, size, half)
        bodies = bodies[half:]
    parts = {way: bodies}
    if way == SERVED and len(first) < len(bodies):
        parts = {FIRST: first, way: bodies[len(first) :]}
    found: dict[str, dict[str, int]] = {}
    with _without(way), Loop(model, store, **sessions.SERVER) as loop:
        for said, part in parts.items():
            one = {"requests": len(part), **asdict(sessions.converse(loop, part, prompts))}
            before = found.get(FIRST, {})
            found[said] = {key: value + before.get(key, 0) for key, value in one.items()}
    return found


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
    served: dict[str, dict[str, Any]] = {}
    for case in cases:
        whole = case
        if case["way"].startswith("without"):
            # What could be reused is known from the same requests with all repairs.
            whole = served[case["model"]]
        elif case["way"] in (FIRST, SERVED):
            served.setdefault(case["model"], case)
        reused = case["total"] - case["computed"]
        rows.append(
            [
                f"{case['model']}, {case['way']}",
                f"{case['requests']}",
                f"{case['total']:,}",
                f"{whole['common']:,}",
                f"{reused:,}",
                f"{reused / whole['common']:.2%}",
                f"{case['computed']:,}",
            ]
        )
    return Table(
        "Turns of a user and of tools, with tasks, sub-agents and titles in between",
        [
            "model and way",
            "requests",
            "tokens of all prompts",
            "could be reused",
            "reused",
            "of that",
            "computed",
        ],
        rows,
    )
