"""Running a model over a prompt, chunk by chunk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

DEFAULT_STEP_TOKENS = 2048
"""Tokens per model call while prefilling: `mlx_lm.server`'s default."""


@dataclass(frozen=True, slots=True)
class KVQuantization:
    """`mlx_lm.server`'s `--kv-bits`, `--kv-group-size` and `--quantized-kv-start`.

    Attributes:
        bits: Bits per element.
        group_size: Elements that share a scale.
        start: Tokens from which on the cache is quantized.
    """

    bits: int
    group_size: int = 64
    start: int = 5000


def new_cache(model: Any) -> list[Any]:
    """An empty cache for `model`, as mlx-lm makes it."""
    from mlx_lm.models.cache import make_prompt_cache

    return list(make_prompt_cache(model))


def prefill(
    model: Any,
    cache: list[Any],
    tokens: Sequence[int],
    *,
    step_tokens: int = DEFAULT_STEP_TOKENS,
    quantize: KVQuantization | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Run `model` over `tokens`, so that `cache` has seen all of them.

    Args:
        model: An mlx-lm model.
        cache: Its cache; changed in place, and evaluated.
        tokens: What comes next.
        step_tokens: Tokens per model call.
        quantize: Quantize the cache as `mlx_lm.generate` does, or not.
        progress: Called after each call with the tokens of it.
    """
    import mlx.core as mx
    from mlx_lm.generate import maybe_quantize_kv_cache

    for start in range(0, len(tokens), step_tokens):
        chunk = mx.array(list(tokens[start : start + step_tokens]))
        model(chunk[None], cache=cache)
        if quantize is not None:
            maybe_quantize_kv_cache(cache, quantize.start, quantize.group_size, quantize.bits)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
        if progress is not None:
            progress(chunk.size)


def snapshot(cache: list[Any]) -> list[Any]:
    """A copy to hand over while decoding goes on with the original; shared until then."""
    return copy.deepcopy(cache)
