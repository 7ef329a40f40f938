"""Models of a few thousand weights in folders that mlx-lm loads: one of every kind of cache.

Their tokens are words, so an answer that comes back in the next request is the same tokens again,
and a conversation goes on where its cache ends. They say nothing sensible; what a real model does
to a prompt cache they do as well.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny_caches

ROLES = ("system", "user", "assistant", "tool")
SPECIAL = ("<|pad|>", "<|start|>", "<|end|>", "<think>", "</think>")
WORDS = tuple(f"w{number}" for number in range(96 - len(ROLES) - len(SPECIAL)))
VOCABULARY = (*SPECIAL, *ROLES, *WORDS)

_TEMPLATE = (
    "{% for message in messages %}<|start|> {{ message.role }} {{ message.content }} <|end|> "
    "{% endfor %}{% if add_generation_prompt %}<|start|> assistant TAIL{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of cache, and how its model is made and served.

    Attributes:
        module: Module of mlx-lm.
        config: Its configuration, but for what all have.
        flags: Flags of the server.
        draft: Whether a smaller model drafts.
        thinks: Whether its template ends in an open thought, which the history leaves out.
        alone: Whether requests must be answered one at a time.
        spread: Standard deviation of what a matrix makes of numbers that have 1.
        tolerance: How far two computations of one logit may be apart. What is computed in other
            pieces differs in the last digits of float32.
    """

    module: str
    config: dict[str, Any]
    flags: tuple[str, ...] = ()
    draft: bool = False
    thinks: bool = False
    alone: bool = False
    spread: float = 1.4
    tolerance: float = 1e-3


_SMALL: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_QUANTIZED = {**_SMALL, "hidden_size": 64, "head_dim": 64}  # the smallest group is of 64


def _borrowed(name: str) -> dict[str, Any]:
    """The configuration that the tests of the tensors use, with our vocabulary."""
    config = tiny_caches.MODELS[name][1]
    if "text_config" in config:
        inner = {**config["text_config"], "vocab_size": len(VOCABULARY)}
        return {**config, "text_config": inner}
    return {**config, "vocab_size": len(VOCABULARY)}


KINDS: dict[str, Kind] = {
    "plain": Kind("llama", _SMALL),
    "thinking": Kind("qwen3", _SMALL, thinks=True),
    "sliding": Kind(
        "gemma3_text",
        {**_SMALL, "num_hidden_layers": 3, "sliding_window": 48, "sliding_window_pattern": 3},
    ),
    "sinks": Kind(
        "gpt_oss",
        {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    ),
    "states": Kind("mamba2", {**_borrowed("mamba2"), "time_step_limit": [0.01, 10.0]}),
    "hybrid": Kind("qwen3_next", _borrowed("qwen3_next")),
    "convolutions": Kind(
        "lfm2",
        {
            **_SMALL,
            "num_hidden_layers": 3,
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_dim": 32,
            "block_ff_dim": 64,
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    ),
    # By its own multipliers so small a model would hardly hear its prompt.
    "lists": Kind(
        "falcon_h1",
        {**_borrowed("falcon_h1"), "lm_head_multiplier": 1.0, "ssm_out_multiplier": 1.0},
    ),
    # In a batch of prompts of different lengths its convolution sees the padding (mlx-lm 0.32.2).
    "lists with windows": Kind("baichuan_m1", _borrowed("baichuan_m1"), alone=True),
    "lists of rows": Kind("deepseek_v32", _borrowed("deepseek_v32")),
    "chunked": Kind("llama4", _borrowed("llama4")),
    # Rows are rounded to 8 bits, and which of them a piece of the prompt sees before they are
    # depends on where it is cut: upstream's own answers with and without a cache differ by that.
    "quantized": Kind(
        "llama",
        _QUANTIZED,
        flags=("--kv-bits", "8", "--quantized-kv-start", "0"),
        spread=0.9,
        tolerance=0.2,
    ),
    "quantized later": Kind(
        "llama",
        _QUANTIZED,
        flags=("--kv-bits", "8", "--quantized-kv-start", "100"),
        spread=0.9,
        tolerance=0.2,
    ),
    "draft": Kind("llama", _SMALL, draft=True),
}


def write_model(folder: Path, kind: Kind, seed: int, **changes: Any) -> Path:
    """Write a random model of a kind, float32, with tokenizer and template; the same every time.

    `changes` are fields of its configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, thinks=kind.thinks)
    end = VOCABULARY.index("<|end|>")
    config = {"model_type": kind.module, "eos_token_id": end, **kind.config, **changes}
    made = _model(config, seed, kind.spread)
    save_model(folder, made)
    save_config(config, folder / "config.json")
    return folder


def write_adapter(folder: Path, kind: Kind, seed: int) -> Path:
    """Write random LoRA weights for a model of a kind."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"rank": 2, "scale": 8.0, "dropout": 0.0}
    made = _model({"model_type": kind.module, **kind.config}, 0, kind.spread)
    linear_to_lora_layers(made, kind.config["num_hidden_layers"], wanted)
    names = [
        (name, value)
        for name, value in tree_flatten(made.parameters())
        if name.endswith(("lora_a", "lora_b"))
    ]
    keys = mx.random.split(mx.random.key(seed), len(names))
    drawn = {
        name: mx.random.normal(value.shape, key=key) * 0.2
        for (name, value), key in zip(names, keys, strict=True)
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), drawn)
    described = {
        "fine_tune_type": "lora",
        "num_layers": kind.config["num_hidden_layers"],
        "lora_parameters": wanted,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def write_tokenizer(folder: Path, *, thinks: bool = False) -> None:
    """Write a tokenizer whose tokens are words, and a chat template of five tokens a message."""
    words = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>"],
        chat_template=_TEMPLATE.replace("TAIL", "<think> " if thinks else ""),
    ).save_pretrained(folder)


def _model(config: dict[str, Any], seed: int, spread: float) -> Any:
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    made = module.Model(module.ModelArgs.from_dict(config))
    made.set_dtype(mx.float32)
    parameters = tree_flatten(made.parameters())
    keys = mx.random.split(mx.random.key(seed), len(parameters))
    drawn = [
        (name, value if value.ndim < 2 else _drawn(value.shape, key, spread))
        for (name, value), key in zip(parameters, keys, strict=True)
    ]
    made.update(tree_unflatten(drawn))
    mx.eval(made.parameters())
    return made


def _drawn(shape: tuple[int, ...], key: Any, spread: float) -> Any:
    fan_in = shape[-1] * (shape[-2] if shape[-1] == 1 else 1)
    return mx.random.normal(shape, key=key) * (spread * fan_in**-0.5)
