"""Letting go of a model that nobody asks, and loading it again for the next request.

What upstream's loop has in its local variables keeps the weights alive, so the loop is left, and
begun again at once on the same thread, where it waits for a request with nothing loaded.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Hashable
from typing import Any

import mlx.core as mx

from persist_cache.server.names import Key
from persist_cache.server.streaming import SIGN_S
from persist_cache.server.ticket import Ticket
from persist_cache.server.upstream.prompts import Prompts
from persist_cache.server.upstream.provider import Provider
from persist_cache.system import memory

log = logging.getLogger(__name__)

_SAVE_S = 0.1
"""How long saving may keep the generation thread at a time: a request may come meanwhile."""
_PATIENCE_S = 60.0
"""How long saving may take in all before the weights go without it."""


class Unloading(Prompts):
    """The part of the generator that lets go of its model when it was idle for long enough."""

    unload_after_s: float | None = None
    """Seconds without a request after which weights and caches leave memory; None for never."""
    is_ending = False
    """The server is to end."""
    prompt_cache: Any
    _leaves = False
    """Upstream's loop is to be left, and begun again."""
    _idle_since = 0.0
    _wanted: Hashable = None
    """The model that was let go and that a thread waits for, by its key."""
    _ahead: Key | None = None
    """The model that a thread waits for before its request is queued."""

    @property
    def weights(self) -> str:
        """Where a model's weights are: `loaded`, `loading`, `unloaded`, or `none` of any model."""
        provider = self.model_provider
        if getattr(provider, "is_loading", False):
            return "loading"
        if provider.model_key is not None:
            return "loaded"
        return "none" if getattr(provider, "asleep", None) is None else "unloaded"

    @property
    def unloads_at(self) -> float | None:
        """When the model goes if nobody asks, by `time.monotonic`; None when it stays."""
        provider = self.model_provider
        if self.unload_after_s is None or provider.model is None or self._is_distributed:
            return None
        if self._is_busy():
            self._idle_since = time.monotonic()
        return max(self._idle_since, getattr(provider, "loaded_at", 0.0)) + self.unload_after_s

    def _is_busy(self) -> bool:
        raise NotImplementedError

    def check_available(self) -> None:
        """See whether there can be an answer; raises what is to be said if not."""
        raise NotImplementedError

    # ---- beside the generation thread ----------------------------------------------------------

    def wake(self, model: str, pause: Callable[[], None] = lambda: None) -> None:
        """Have the model loaded that was let go, if that is `model`, and wait for it.

        Args:
            model: As in mlx-lm's key.
            pause: Called while it is waited for.
        """
        asleep = getattr(self.model_provider, "asleep", None)
        if asleep is None or asleep.key[0] != model:
            return
        while self.model_provider.asleep is asleep and self.generation_available():
            self._wanted = asleep.key
            time.sleep(SIGN_S / 10)
            pause()

    def load_before(self, key: Key, pause: Callable[[], None]) -> None:
        """Have a model loaded that is not, and wait for it, or until it turns out that it cannot.

        For a thread whose request is the only one.

        Args:
            key: Of the model; its own request would have it loaded, too.
            pause: Called while it is waited for.
        """
        self._ahead = key
        while self._ahead is key and self.generation_available():
            time.sleep(SIGN_S / 10)
            pause()

    def _awaited_spare(self, model: str, ticket: Ticket) -> Any:
        self.wake(model, ticket.waits)
        return super()._awaited_spare(model, ticket)

    # ---- on the generation thread --------------------------------------------------------------

    def _run_generate(self) -> None:
        """As upstream's; the loop is begun again when it was left to let the model go."""
        prompt_cache: Any = self.prompt_cache  # which upstream deletes
        while True:
            super()._run_generate()
            if not self._leaves or self._generation_failed or self.is_ending:
                return
            self.prompt_cache, self._leaves = prompt_cache, False
            self._state_machine_cache.clear()
            self.line.forget_ended()
            waiting = self.cache.unload()
            gc.collect()
            mx.clear_cache()
            memory.give_back()
            memory.page_out_programs()
            left = f"; {waiting} caches wait for the disk" if waiting else ""
            log.info("the model was unloaded; the next request loads it%s", left)

    def _next_request(self, timeout: float | None = None) -> Any:
        # With a time limit upstream has nothing to compute, and nothing put aside.
        if timeout is not None and self.requests.empty():
            self._load_wanted()
            self._load_ahead()
            if self._is_to_leave():
                self.model_provider.doze()
                self._leaves = True
                return None
        return super()._next_request(timeout)

    def _load_wanted(self) -> None:
        wanted, self._wanted = self._wanted, None
        asleep = getattr(self.model_provider, "asleep", None)
        if asleep is None or asleep.key != wanted:
            return
        try:
            self.model_provider.load(*asleep.key)
        except Exception as error:
            # Whoever waits for it finds that out, and is told why by a load of its own.
            log.warning("the model could not be loaded again: %s", error)

    def _load_ahead(self) -> None:
        key = self._ahead
        if key is None:
            return
        try:
            self.model_provider.load(*key)
        except Exception:
            log.debug("why a model was not loaded ahead of its request", exc_info=True)
        finally:
            self._ahead = None  # the request finds out by itself what is wrong with it

    def _is_to_leave(self) -> bool:
        """Whether the model is to go now; what is not on the disk yet is saved first."""
        at, now = self.unloads_at, time.monotonic()
        if at is None or now < at or not isinstance(self.model_provider, Provider):
            return False
        is_saved = self.cache.flush(_SAVE_S)
        if not is_saved and not self.cache.disk_off and now < at + _PATIENCE_S:
            return False
        return self.requests.empty() and not self._is_busy()
