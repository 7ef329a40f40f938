"""Upstream's model provider: which model is loaded, and what is known of it."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import signal
import time
from collections.abc import Hashable
from typing import Any, NamedTuple

from mlx.utils import tree_flatten
from mlx_lm import server as upstream
from mlx_lm.models.cache import make_prompt_cache
from msgspec import Struct
from msgspec.structs import replace

from persist_cache import tensors
from persist_cache.errors import MissingDependencyError, ModelError, UnsupportedCacheError
from persist_cache.fingerprint.identifier import Identifier
from persist_cache.fingerprint.model_files import folder_of
from persist_cache.prefill import loadable, loading
from persist_cache.prefill.loading import model_errors
from persist_cache.prefill.tokenizer_file import read_in_part
from persist_cache.server.lengths import context_tokens

log = logging.getLogger(__name__)


class Spare(NamedTuple):
    """A copy of a tokenizer, to be used by one thread at a time: not all bear company.

    Attributes:
        of: What the generation thread uses.
        tokenizer: The copy.
    """

    of: Any
    tokenizer: Any


class Asleep(Struct, frozen=True):
    """A model that was let go because nobody asked, and is loaded again when somebody does.

    Another object takes its place when an attempt to load it has failed.

    Attributes:
        key: mlx-lm's key of it.
        vocabulary: How many token ids it has.
    """

    key: tuple[str, str | None, str | None]
    vocabulary: int


class Provider(upstream.ModelProvider):  # type: ignore[misc]
    """Upstream's model provider; a model's identity is that of the files it was loaded from."""

    identifier: Identifier | None = None
    is_trimmable = True
    """The loaded model's cache can be resumed at any token."""
    state_layers: tuple[int, ...] = ()
    """Which of its layers cannot."""
    spare: Spare | None = None
    """Of what is loaded, for use beside the generation thread; made when that has time for it."""
    wants_spare = False
    """Somebody waits for it."""
    has_no_spare = False
    """What is loaded cannot be copied: the generation thread tokenizes all requests."""
    is_loading = False
    """A model is being loaded."""
    context: int | None = None
    """Tokens that the loaded model was made for, if its configuration says so."""
    context_given: int | None = None
    """What counts instead; 0 for no limit."""
    asleep: Asleep | None = None
    """What was let go, until a model is loaded."""
    nbytes = 0
    """Of the weights that are loaded."""
    loaded_at = 0.0
    """When the loaded model was, by `time.monotonic`."""
    failed: ModelError | MissingDependencyError | None = None
    """Why the model of the command line could not be loaded, which ends the server."""

    @property
    def known_key(self) -> Hashable:
        """The key of what is loaded, or was before it was let go; None for nothing."""
        if self.model_key is None and self.asleep is not None:
            return self.asleep.key
        key: Hashable = self.model_key
        return key

    def doze(self) -> None:
        """Note that the loaded model is let go; what holds its weights is the caller's to drop."""
        if self.model_key is not None and self.tokenizer is not None:
            self.asleep = Asleep(self.model_key, len(self.tokenizer))

    def reset(self) -> None:
        super().reset()
        self.spare = None

    def load_default(self) -> None:
        if self.asleep is not None:
            return  # the loop begins again, and the request to come says which
        try:
            super().load_default()
        except (ModelError, MissingDependencyError) as error:
            self.failed = error
            # This is the generation thread: without it upstream would listen on, and never answer.
            # Not by SIGINT, which is ignored in what a shell's script starts in the background.
            os.kill(os.getpid(), signal.SIGTERM)
            raise SystemExit from None

    def _load(
        self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None
    ) -> None:
        self.is_loading, self.has_no_spare = True, False
        try:
            self._load_identified(model_path, adapter_path, draft_model_path)
            self.asleep, self.loaded_at = None, time.monotonic()
        except BaseException:
            if self.asleep is not None:
                self.asleep = replace(self.asleep)
            raise
        finally:
            self.is_loading = False

    def _load_identified(
        self, model_path: str, adapter_path: str | None, draft_model_path: str | None
    ) -> None:
        # The key is formed as upstream forms it when the model is loaded.
        model_key = (model_path, adapter_path, draft_model_path)

        def read() -> None:
            super(Provider, self)._load(*model_key)
            loading.evaluate(self.model, self.draft_model)

        errors = model_errors(model_path) if model_path else contextlib.nullcontext()
        with errors, read_in_part():
            if self.identifier is None or self.is_distributed:
                # A rank loads a shard, which has no identity.
                self.spare = None
                super()._load(*model_key)
            else:
                # What cannot be had costs the model in memory neither its place nor its name.
                for name in filter(None, (model_path, draft_model_path)):
                    fetched = loading.fetch(name)
                    if self.model is not None or draft_model_path is not None:
                        adapter = adapter_path if name == model_path else None
                        trusted = self.cli_args.trust_remote_code
                        built = loadable.build(name, fetched, adapter, trust_remote_code=trusted)
                        if draft_model_path is not None and name == model_path:
                            _check_draft(built)
                self.spare = None
                # The weights in memory go, and with them what is known of their files.
                self.identifier.forget()
                self.identifier.around_load(model_key, read)
            self.context = self.context_given or None
            folder = folder_of(model_path) if model_path else None
            if self.context_given is None and folder is not None:
                self.context = context_tokens(loadable.read_config(folder))
        self.nbytes = _nbytes(self.model) + _nbytes(self.draft_model)
        self.state_layers = () if self.model is None else state_layers(self.model)
        self.is_trimmable = not self.state_layers

    @property
    def lacks_spare(self) -> bool:
        """Whether a tokenizer is loaded of which there is no copy, but can be."""
        return self.tokenizer is not None and self.spare is None and not self.has_no_spare

    def make_spare(self) -> None:
        """Copy the tokenizer of what is loaded, which can take as long as a short prompt does."""
        self.wants_spare = False
        if not self.lacks_spare:
            return
        try:
            self.spare = Spare(self.tokenizer, copy.deepcopy(self.tokenizer))
        except Exception:  # a tokenizer may be code of the model's
            self.has_no_spare = True
            log.warning("the tokenizer cannot be copied; requests are tokenized one by one")
            log.debug("why", exc_info=True)


def _nbytes(model: Any) -> int:
    """Of the weights of a model, or of none."""
    if model is None:
        return 0
    return sum(int(one.nbytes) for _, one in tree_flatten(model.parameters()))


def _check_draft(model: Any) -> None:
    """Refuse a draft model whose wrong guesses the cache of `model` could not take back.

    Upstream notices for the classes that say so, with the first request; a sliding window says so
    only when it has slid, and answers wrongly from then on.

    Raises:
        ValueError: They could not be.
    """
    layers = tensors.supported(make_prompt_cache(model))
    names = sorted({layer.class_name for layer in layers if layer.storage != "rows"})
    if names:
        raise ValueError(
            f"it cannot have a draft model: wrong guesses could not be taken back from its "
            f"cache ({', '.join(names)}); leave the draft model out"
        )


def state_layers(model: Any) -> tuple[int, ...]:
    """Which layers of a model do not keep all of their rows, so that it cannot be cut anywhere.

    None of a model whose cache cannot be kept: it needs no places.
    """
    try:
        layers = tensors.supported(make_prompt_cache(model))
    except UnsupportedCacheError:
        return ()
    return tuple(index for index, layer in enumerate(layers) if layer.storage != "rows")
