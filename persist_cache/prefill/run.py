"""Running a model over a prompt, chunk by chunk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

DEFAULT_STEP_TOKENS = 2048
"""Tokens per model call while prefilling: `mlx_lm.server`'s default."""


class KVQuantization(Struct, frozen=True):
    """`mlx_lm.server`'s `--kv-bits`, `--kv-group-size` and `--quantized-kv-start`.

    Attributes:
        bits: Bits per element.
        group_size: Elements that share a scale.
        start: Tokens from which on the cache is quantized.
    """

    bits: int
    group_size: int = 64
    start: int = 5000

    @classmethod
    def of(cls, options: Any) -> KVQuantization | None:
        """What the options of a server ask for; None when they do not."""
        if options.kv_bits is None:
            return None
        return cls(options.kv_bits, options.kv_group_size, options.quantized_kv_start)


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


class Computation:
    """A prompt that a model computes piece by piece, with a draft model beside it if there is one.

    A draft model's layers stay one token behind the model's, as replies leave them: then what is
    kept of prompts and of replies has one layout, and shares its rows.

    Attributes:
        num_tokens: Tokens that the model has seen.
    """

    def __init__(
        self,
        model: Any,
        draft_model: Any | None,
        cache: list[Any] | None,
        num_tokens: int,
        *,
        step_tokens: int = DEFAULT_STEP_TOKENS,
        quantize: KVQuantization | None = None,
    ) -> None:
        """Go on with `cache`.

        Args:
            model: An mlx-lm model.
            draft_model: The one that drafts for it, or None.
            cache: Layers of the model, then those of the draft model; None to begin.
            num_tokens: Tokens that the model's layers have seen.
            step_tokens: Tokens per model call.
            quantize: Quantize the cache as `mlx_lm.generate` does, or not.
        """
        self.num_tokens = num_tokens
        self._model, self._draft_model = model, draft_model
        self._step_tokens, self._quantize = step_tokens, quantize
        if cache is None:
            cache = new_cache(model)
            if draft_model is not None:
                cache += new_cache(draft_model)
        split = len(cache) if draft_model is None else draft_start(model)
        self._layers, self._draft_layers = cache[:split], cache[split:]
        self._drafted = drafted_tokens(self._draft_layers, max(0, num_tokens - 1))

    def advance(self, tokens: Sequence[int], end: int, after: Callable[[], None]) -> None:
        """Compute up to `end` tokens of the prompt.

        Args:
            tokens: The prompt.
            end: Tokens that the model is to have seen.
            after: Called after each model call; what it raises ends the computation, which may
                be gone on with from there.
        """
        while self.num_tokens < end:
            upto = min(self.num_tokens + self._step_tokens, end)
            self._run(self._model, self._layers, tokens[self.num_tokens : upto])
            self.num_tokens = upto
            self._draft_to(tokens, upto - 1)
            after()

    @property
    def layers_nbytes(self) -> list[int]:
        """Bytes of each layer of the cache, room for further tokens included."""
        return [layer.nbytes for layer in [*self._layers, *self._draft_layers]]

    def snapshot(self) -> list[Any]:
        """A copy of the cache to hand over while this goes on."""
        return snapshot([*self._layers, *self._draft_layers])

    def finish(self, tokens: Sequence[int]) -> list[Any]:
        """Hand the cache over for decoding, with all layers at the same token."""
        self._draft_to(tokens, self.num_tokens)
        return [*self._layers, *self._draft_layers]

    def _draft_to(self, tokens: Sequence[int], end: int) -> None:
        if self._draft_model is not None and self._drafted < end:
            self._run(self._draft_model, self._draft_layers, tokens[self._drafted : end])
            self._drafted = end

    def _run(self, model: Any, layers: list[Any], tokens: Sequence[int]) -> None:
        step, quantize = self._step_tokens, self._quantize
        prefill(model, layers, tokens, step_tokens=step, quantize=quantize)


def draft_start(model: Any) -> int:
    """Where a draft model's layers begin in a cache, by mlx-lm's reckoning."""
    return len(model.layers)


def drafted_tokens(layers: Sequence[Any], otherwise: int) -> int:
    """Tokens that a draft model's layers have seen; `otherwise` if they do not count them."""
    offsets = [getattr(layer, "offset", None) for layer in layers]
    return max((one for one in offsets if isinstance(one, int)), default=otherwise)


def even_out_draft(model: Any, cache: Sequence[Any]) -> None:
    """Take the draft layers of a reply back to one token behind the model's, as prompts have them.

    What cannot be taken back stays.
    """
    layers, draft_layers = cache[: draft_start(model)], cache[draft_start(model) :]
    seen = drafted_tokens(layers, 0)
    surplus = drafted_tokens(draft_layers, 0) - max(0, seen - 1)
    if seen and surplus > 0 and all(layer.is_trimmable() for layer in draft_layers):
        for layer in draft_layers:
            layer.trim(surplus)


def snapshot(cache: list[Any]) -> list[Any]:
    """A copy to hand over while decoding goes on with the original; shared until then."""
    return copy.deepcopy(cache)
