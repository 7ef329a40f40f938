"""How long a prompt and its answer may be: the context of the model, by its `config.json`.

Checked where a prompt's tokens are known and nothing of it is computed yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from persist_cache.server.validation import MAX_NEW_TOKENS, RefusedError

NO_LIMIT = MAX_NEW_TOKENS
"""As `max_tokens`: to the end of the context."""
UNBOUNDED_REPLY_TOKENS = 32_768
"""An answer without a limit, where the configuration names no context."""
_CONTEXT_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
    "n_ctx",
)
_STRETCHED = ("linear", "dynamic", "yarn")
"""Kinds of rope scaling that make the context longer than the field says, by a factor."""


class TooLongError(RefusedError):
    """A prompt that is beyond the model's context, in OpenAI's words.

    Attributes:
        num_tokens: Length of the prompt.
        context: Of the model.
    """

    def __init__(self, num_tokens: int, context: int, param: str):
        super().__init__(
            400,
            f"This model's maximum context length is {context} tokens. However, your prompt "
            f"resulted in {num_tokens} tokens. Please reduce the length of the prompt.",
            code="context_length_exceeded",
            param=param,
        )
        self.num_tokens = num_tokens
        self.context = context


def context_tokens(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model was made for, by its `config.json`; None when it does not say."""
    found = _context(config)
    inner = config.get("text_config")
    return found or (_context(inner) if isinstance(inner, Mapping) else None)


def _context(config: Mapping[str, Any]) -> int | None:
    named = [config.get(name) for name in _CONTEXT_FIELDS]
    context = next((one for one in named if isinstance(one, int) and one > 1), None)
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if context is None or not isinstance(scaling, Mapping):
        return context
    factor = scaling.get("factor")
    if not isinstance(factor, (int, float)) or factor < 1:
        return context
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in _STRETCHED or "gemma3" in str(config.get("model_type")):
        return context  # the field has the whole length already
    original = scaling.get("original_max_position_embeddings")
    if isinstance(original, int):
        return max(context, int(original * factor))
    return int(context * factor)


def room(num_tokens: int, max_tokens: int, context: int | None, *, param: str = "") -> int:
    """Tokens that an answer may have.

    Args:
        num_tokens: Length of the prompt.
        max_tokens: What was asked for; 0 is answered with one token, which the client never sees.
        context: Of the model; None when it is not known.
        param: The field that the prompt came in.

    Raises:
        TooLongError: The prompt leaves no room for what was asked for.
    """
    wanted = max(1, max_tokens)
    if context is None:
        return UNBOUNDED_REPLY_TOKENS if wanted >= NO_LIMIT else wanted
    left = context - num_tokens
    if left < min(1, max_tokens):
        raise TooLongError(num_tokens, context, param)
    return max(1, min(wanted, left))
