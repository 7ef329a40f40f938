"""Tokens that a server computes for each new one, turn after turn, however a request is served.

Counted at the model's call. The models are random and of a few thousand weights: what is computed
depends on their caches and on where prompts are cut, not on what they say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.benchmarks import common
from scripts.benchmarks.common import Context, Report, Table, fresh

TURNS = 8
TURN_WORDS = 220
SYSTEM_WORDS = 300
MODELS = ("llama", "qwen3_5", "gpt_oss", "lfm2", "gemma3")
MODES = ("plain", "seed", "kv-bits", "draft")
ROLES = {"tool": "tool loop", "user": "chat"}
_STOCK = ("plain", "seed")
"""How mlx-lm's own server is measured beside it."""


def run(context: Context) -> Report:
    models = context.pick(("llama", "gemma3"), MODELS)
    found = []
    for name in models:
        with context.scratch() as scratch:
            for mode in MODES:
                common.say(f"turns: {name}, {mode}")
                case = fresh(converse, folder=str(scratch), name=name, mode=mode)
                if mode in _STOCK:
                    case["stock"] = fresh(
                        converse, folder=str(scratch), name=name, mode=mode, stock=True
                    )["ours"]
                found.append({"model": name, "mode": mode, **case})
    return Report("turns", "Computed for each new token", {"cases": found}, _tables(found))


def worst(values: Any) -> float:
    """The most that was computed for each new token in any case."""
    return max(float(one) for case in values["cases"] for one in case["ours"].values())


def converse(folder: str, name: str, mode: str, stock: bool = False) -> dict[str, Any]:
    """Hold the conversations with one model; tokens computed for each new one, or why not."""
    from persist_cache.errors import ModelError
    from tests.loops import Loop, StockLoop, computed_of_new, make_provider

    model = write_kind(Path(folder) / name, name, 1)
    options: dict[str, Any] = {}
    if mode == "kv-bits":
        options["kv_bits"] = 8
    if mode == "draft":
        options["draft"] = write_kind(Path(folder) / "draft", "llama", 2)
    sampling: dict[str, Any] = {"seed": 1} if mode == "seed" else {}
    found: dict[str, Any] = {}
    try:
        make_provider(model, **options).load("default_model", None, "default_model")
        with (StockLoop if stock else Loop)(model, **options) as loop:
            loop.ask(text="w1 w2")
            for role in ROLES:
                found[role] = computed_of_new(
                    loop,
                    role,
                    turns=TURNS,
                    turn_words=TURN_WORDS,
                    system_words=SYSTEM_WORDS,
                    **sampling,
                )
    except ModelError as error:
        return {"ours": {}, "refused": str(error).replace(str(model), name)}
    return {"ours": found}


def write_kind(folder: Path, name: str, seed: int = 1) -> Path:
    """A model of a kind; where transformers has a tokenizer for it, under another name."""
    from mlx_lm.utils import MODEL_REMAPPING

    from tests.loops import write_thinking_model

    MODEL_REMAPPING["qwen3_5_of_words"] = "qwen3_5"
    if not folder.exists():
        write_thinking_model(folder, _kinds()[name], seed)
        if name == "qwen3_5":
            config = folder / "config.json"
            values = json.loads(config.read_text()) | {"model_type": "qwen3_5_of_words"}
            config.write_text(json.dumps(values))
    return folder


def _kinds() -> dict[str, Any]:
    """Every kind, with heads that can be quantized."""
    from tests.torture.tiny import KINDS, Kind

    wide = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64}
    kinds = {
        "llama": KINDS["plain"],
        "qwen3_5": Kind(
            "qwen3_5",
            {
                **KINDS["plain"].config,
                "num_hidden_layers": 4,
                "linear_num_value_heads": 4,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_conv_kernel_dim": 4,
            },
        ),
        "gpt_oss": KINDS["sinks"],
        "lfm2": KINDS["convolutions"],
        "gemma3": KINDS["sliding"],
    }
    lfm2 = {"block_dim": 128, "block_ff_dim": 128}
    return {
        name: replace(
            kind,
            config={**kind.config, **wide, **(lfm2 if name == "lfm2" else {})},
        )
        for name, kind in kinds.items()
    }


def _tables(cases: Sequence[Any]) -> list[Table]:
    rows, notes = [], {}
    for name in dict.fromkeys(case["model"] for case in cases):
        row = [name]
        for mode in MODES:
            (case,) = (one for one in cases if (one["model"], one["mode"]) == (name, mode))
            for role in ROLES:
                cell = "refused"
                if case["ours"]:
                    cell = f"{case['ours'][role]:.3f}"
                    if "stock" in case:
                        cell += f" ({case['stock'][role]:.2f})"
                row.append(cell)
            if not case["ours"]:
                notes[mode] = case["refused"]
        rows.append(row)
    columns = ["model", *(f"{mode}, {said}" for mode in MODES for said in ROLES.values())]
    refused = " ".join(f"`{mode}`: {why}" for mode, why in notes.items())
    note = (
        f"{TURNS} turns of {TURN_WORDS} tokens after a system message of {SYSTEM_WORDS}; prompts "
        "end in an open thought, which the next request leaves out. In brackets: mlx-lm's own "
        "server. `kv-bits`: 8, from the first token."
    )
    if refused:
        note += f" Refused, for instance: {refused}"
    return [Table("Tokens computed at the model's call / new tokens", columns, rows, note)]
