"""Prefilling: what a prompt's system part is, and how a model is run over a prompt ahead of time.

The server, `warm` and the demo cut prompts at the same places and in chunks of the same size, so
that what one stores the others find.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persist_cache.errors import MissingDependencyError, ModelError

DEFAULT_STEP_TOKENS = 2048
"""Tokens per model call while prefilling: `mlx_lm.server`'s default."""

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        tokens: Token ids.
        system_tokens: Leading tokens that every conversation with the same system messages and
            tools shares; 0 when there is no system part.
    """

    tokens: list[int]
    system_tokens: int


def load_model(model: str, adapter_path: str | None = None, **options: Any) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a folder or a hub id.

    Raises:
        ModelError: It cannot be found or loaded.
        MissingDependencyError: mlx-lm is not installed.
    """
    try:
        import mlx_lm
    except ImportError as error:
        raise MissingDependencyError(
            "Running a model needs MLX and mlx-lm: pip install mlx mlx-lm."
        ) from error
    try:
        loaded = mlx_lm.load(model, adapter_path=adapter_path, **options)
    except Exception as error:  # mlx-lm, transformers and the hub raise whatever they like
        said = str(error).strip().splitlines()
        detail = said[0] if said else type(error).__name__
        raise ModelError(f"The model {model!r} cannot be loaded: {detail}") from error
    return loaded[0], loaded[1]


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> Prompt:
    """Render a chat request as `mlx_lm.server` does, and find its system part.

    The system part is measured, not parsed: two user messages that differ are rendered in place
    of what follows, and the tokens that both have in common are the part that can be shared.

    Raises:
        ModelError: The model has no chat template, or the template refuses the messages.
    """
    head = []
    for message in messages:
        if message.get("role") != "system":
            break
        head.append(dict(message))
    try:

        def rendered(chat: Sequence[Message], generate: bool) -> list[int]:
            return list(
                tokenizer.apply_chat_template(
                    [dict(one) for one in chat],
                    tools=list(tools) if tools else None,
                    add_generation_prompt=generate,
                    **(template_args or {}),
                )
            )

        tokens = rendered(messages, True)
        if not head:
            return Prompt(tokens, 0)
        probes = [rendered([*head, {"role": "user", "content": text}], True) for text in "AB"]
    except Exception as error:  # templates are programs of their own
        raise ModelError(f"The chat template refuses these messages: {error}") from error
    return Prompt(tokens, common_prefix(tokens, *probes))


def common_prefix(*sequences: Sequence[int]) -> int:
    """Number of leading tokens that all sequences share."""
    count = 0
    for together in zip(*sequences, strict=False):
        if len(set(together)) > 1:
            break
        count += 1
    return count


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
    progress: Callable[[int], None] | None = None,
) -> None:
    """Run `model` over `tokens`, so that `cache` has seen all of them.

    Args:
        model: An mlx-lm model.
        cache: Its cache; changed in place, and evaluated.
        tokens: What comes next.
        step_tokens: Tokens per model call.
        progress: Called after each call with the tokens of it.
    """
    import mlx.core as mx

    for start in range(0, len(tokens), step_tokens):
        chunk = mx.array(list(tokens[start : start + step_tokens]))
        model(chunk[None], cache=cache)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
        if progress is not None:
            progress(chunk.size)


def snapshot(cache: list[Any]) -> list[Any]:
    """A copy to hand over while decoding goes on with the original; shared until then."""
    return copy.deepcopy(cache)
