"""Small caches of every class, fed with random rows, and tiny random models of every layout."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)


@dataclass(frozen=True)
class Layer:
    """How to make one layer, and what its rows look like.

    Attributes:
        lag: Rows that the first chunk is short of.
        used: Whether anything is ever written to it.
    """

    make: Callable[[], Any]
    batch: int = 1
    heads: int = 2
    key_dim: int = 8
    value_dim: int = 8
    dtype: Any = mx.bfloat16
    lag: int = 0
    used: bool = True


Spec = Layer | tuple["Spec", ...]
"""A layer, or the members of a `CacheList`."""


def new_cache(specs: Sequence[Spec]) -> list[Any]:
    return [
        CacheList(*new_cache(spec)) if isinstance(spec, tuple) else spec.make() for spec in specs
    ]


def feed(cache: Sequence[Any], specs: Sequence[Spec], num_tokens: int, seed: int) -> list[Any]:
    """Append `num_tokens` random tokens, as a model would; returns all that attention would see."""
    mx.random.seed(seed)
    seen: list[Any] = []
    for layer, spec in _leaves(cache, specs):
        if not spec.used:
            continue
        if isinstance(layer, ArraysCache):
            layer[0] = _random((spec.batch, 3, 5), spec.dtype)
            state = _random((spec.batch, 2, 4, 4), mx.float32)
            layer[1] = state if layer[1] is None else layer[1] * 0.5 + state
            seen += [layer[0], layer[1]]
            continue
        if isinstance(layer, ChunkedKVCache):
            layer.maybe_trim_front()
        num_rows = num_tokens if layer.offset else num_tokens - spec.lag
        keys = _random((spec.batch, spec.heads, num_rows, spec.key_dim), spec.dtype)
        values = _random((spec.batch, spec.heads, num_rows, spec.value_dim), spec.dtype)
        seen += [array for _, array in tree_flatten(layer.update_and_fetch(keys, values))]
    mx.eval(seen)
    return seen


def _random(shape: tuple[int, ...], dtype: Any) -> Any:
    return mx.random.normal(shape).astype(dtype)


def _leaves(cache: Sequence[Any], specs: Sequence[Spec]) -> Iterator[tuple[Any, Layer]]:
    for layer, spec in zip(cache, specs, strict=True):
        if isinstance(spec, tuple):
            yield from _leaves(layer.caches, spec)
        else:
            yield layer, spec


def _kv(**geometry: Any) -> Layer:
    return Layer(KVCache, **geometry)


def _rotating(max_size: int, keep: int = 0) -> Layer:
    return Layer(lambda: RotatingKVCache(max_size, keep))


def _quantized(bits: int) -> Layer:
    return Layer(lambda: QuantizedKVCache(group_size=32, bits=bits), key_dim=64, value_dim=32)


def _chunked(chunk_size: int) -> Layer:
    return Layer(lambda: ChunkedKVCache(chunk_size))


_ARRAYS = Layer(lambda: ArraysCache(3))  # the third slot is never written

CACHES: dict[str, tuple[tuple[Spec, ...], tuple[int, ...]]] = {
    "kv": ((_kv(), _kv()), (300, 1, 1)),
    "kv-step-boundary": ((_kv(),), (256,)),
    "kv-float16": ((_kv(dtype=mx.float16),), (70,)),
    "kv-float32": ((_kv(dtype=mx.float32),), (70,)),
    "kv-batch-of-3": ((_kv(batch=3, heads=1),), (70,)),
    "kv-latent": ((_kv(heads=1, key_dim=16, value_dim=4),), (40,)),
    "kv-values-without-width": ((_kv(heads=1, value_dim=0),), (40,)),
    "kv-unused-layer": ((_kv(), Layer(lambda: RotatingKVCache(32), used=False)), (40,)),
    "quantized-8": ((_quantized(8),), (300, 1)),
    "quantized-4": ((_quantized(4), _kv()), (40, 1)),
    "concatenate": ((Layer(ConcatenateKVCache), _kv()), (40, 1)),
    "rotating-filling-by-chunks": ((_rotating(64),), (20, 20)),
    "rotating-filling-by-steps": ((_rotating(300, 4),), (20, *[1] * 25)),
    "rotating-almost-full": ((_rotating(41),), (20, 20)),
    "rotating-full": ((_rotating(40),), (20, 20)),
    "rotating-wrapped-by-chunks": ((_rotating(32),), (20, 20, 17)),
    "rotating-wrapped-by-chunks-keep-4": ((_rotating(32, 4),), (20, 20, 17)),
    "rotating-wrapped-by-steps": ((_rotating(32),), (30, *[1] * 9)),
    "rotating-wrapped-by-steps-keep-4": ((_rotating(32, 4),), (30, *[1] * 9)),
    "rotating-wrapped-by-both": ((_rotating(32, 4),), (50, *[1] * 40, 5, 1)),
    "rotating-and-kv": ((_rotating(32), _kv(), _rotating(32)), (50, 1, 1)),
    "chunked": ((_chunked(64), _kv()), (40, 1)),
    "chunked-long-first-chunk": ((_chunked(16), _kv()), (40,)),
    "chunked-slid": ((_chunked(16), _kv()), (40, 9, 1, 1)),
    "arrays": ((_ARRAYS, _ARRAYS), (40, 1)),
    "arrays-and-kv": ((_ARRAYS, _kv()), (40, 1)),
    "list-of-kv-and-kv": (((_kv(), _kv(heads=1)), (_kv(),)), (40, 1)),
    "list-of-arrays-and-kv": (((_ARRAYS, _kv()), _kv()), (40, 1)),
    "list-of-arrays-and-wrapped": (((_ARRAYS, _rotating(32)), (_ARRAYS, _kv())), (40, 1)),
    "nested-list": (((_kv(), (_kv(), _quantized(8))),), (40, 1)),
    "draft-one-behind": ((_kv(), _kv(lag=1)), (40, 1)),
    "rotating-draft-one-behind": ((_kv(), _rotating(64), Layer(KVCache, lag=1)), (40, 1)),
}
"""By name: the layers, and the lengths of the chunks that they are fed."""


def model(name: str) -> Any:
    """A random model of the kind `name`, one of `MODELS`; the same one at every call."""
    module_name, config, dtype = MODELS[name]
    module = importlib.import_module(f"mlx_lm.models.{module_name}")
    mx.random.seed(1)
    made = module.Model(module.ModelArgs.from_dict({"model_type": module_name, **config}))
    made.update(
        tree_map(
            lambda weight: (
                (mx.random.normal(weight.shape) * 0.2).astype(dtype)
                if weight.ndim > 1
                else weight.astype(dtype)
            ),
            made.parameters(),
        )
    )
    mx.eval(made.parameters())
    return made


_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
}
_DEEPSEEK = {
    **_SMALL,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "kv_lora_rank": 4,
    "q_lora_rank": 4,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "rope_scaling": None,
}

MODELS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "llama": ("llama", {**_SMALL, "num_hidden_layers": 2}, mx.bfloat16),
    "gemma3_text": (
        "gemma3_text",
        {
            **_SMALL,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "sliding_window": 16,
            "sliding_window_pattern": 3,
        },
        mx.bfloat16,
    ),
    "mamba2": (
        "mamba2",
        {
            **_SMALL,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 16,
            "state_size": 8,
            "layer_norm_epsilon": 1e-4,
            "conv_kernel": 3,
            "n_groups": 2,
            "use_bias": False,
            "use_conv_bias": False,
            "tie_word_embeddings": True,
            "time_step_limit": (0.01, 10),
            "time_step_rank": "auto",
        },
        mx.float32,
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **_SMALL,
            "num_hidden_layers": 4,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 2,
            "shared_expert_intermediate_size": 32,
            "mlp_only_layers": [],
            "moe_intermediate_size": 32,
            "rope_theta": 1000.0,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 512,
            "head_dim": 16,
        },
        mx.float32,
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            **_SMALL,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 2,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
        },
        mx.float32,
    ),
    "baichuan_m1": (
        "baichuan_m1",
        {
            **_SMALL,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rope_theta": 1000,
            "sliding_window": 16,
            "sliding_window_layers": [0],
            "conv_window": 2,
        },
        mx.float32,
    ),
    "deepseek_v3": ("deepseek_v3", _DEEPSEEK, mx.float32),
    "deepseek_v32": ("deepseek_v32", _DEEPSEEK, mx.float32),
    "llama4": (
        "llama4",
        {
            "text_config": {
                **_SMALL,
                "attention_bias": False,
                "attention_chunk_size": 8,
                "head_dim": 16,
                "interleave_moe_layer_step": 2,
                "intermediate_size_mlp": 32,
                "max_position_embeddings": 1000,
                "model_type": "llama4",
                "num_experts_per_tok": 1,
                "num_hidden_layers": 4,
                "num_local_experts": 2,
                "rope_scaling": None,
                "rope_theta": 1000,
                "use_qk_norm": True,
            }
        },
        mx.float32,
    ),
}
"""By name: the module of mlx-lm, its configuration, and the weights' type."""
