"""Prompts as text again: the tokenizer of a stored model, loaded only when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from persist_cache.errors import MissingDependencyError, ModelError
from persist_cache.queries.models import Model


class Decoder:
    """Decodes the tokens of one model's entries."""

    def __init__(self, model: Model) -> None:
        """Load the tokenizer from where the model was.

        Raises:
            ModelError: It is not there any more, or cannot be loaded.
            MissingDependencyError: transformers is not installed.
        """
        if not model.path:
            raise ModelError(f"It is not known where the tokenizer of {model.name} is.")
        # It would warn that there is no PyTorch, which a tokenizer does not need.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise MissingDependencyError(
                "Decoding a prompt needs transformers: pip install transformers."
            ) from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model.path, local_files_only=True)
        except Exception as error:  # transformers raises whatever it likes
            raise ModelError(
                f"The tokenizer of {model.name} cannot be loaded from {model.path}."
            ) from error

    def text(self, tokens: Sequence[int], *, plain: bool = False) -> str:
        """The text of `tokens`; ids that stand for no text, such as images, are left out.

        Args:
            tokens: Token ids.
            plain: Leave out the tokens that only structure a prompt, too.
        """
        known = [token for token in tokens if 0 <= token < len(self._tokenizer)]
        return str(self._tokenizer.decode(known, skip_special_tokens=plain))
