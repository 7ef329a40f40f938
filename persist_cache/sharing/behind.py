"""One process's use of a remote, for its `PromptCache`."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.cache.stats import FromRemote
from persist_cache.errors import MissingDependencyError, RemoteError, StoreError
from persist_cache.remote import Brought, RemoteStatus
from persist_cache.sharing.choice import RemoteChoice
from persist_cache.store.trail import Trail
from persist_cache.tokens import pack_tokens, prompt_digest

if TYPE_CHECKING:
    from persist_cache.remote import Remote

log = logging.getLogger(__name__)
_REMEMBERED = 64
_AGAIN_S = 30.0
"""After which a remote that could not be opened is tried again, such as a folder of a NAS."""


class Shown(Struct, frozen=True):
    """What a remote said of a prompt lately.

    Attributes:
        brought: Its answer.
        at: When, in UTC seconds.
    """

    brought: Brought
    at: float


class Sharing:
    """A cache's remote, if its store has one.

    Thread safety: all methods may be called from any thread; `_lock` guards what is remembered,
    and the one attempt to open the remote.
    """

    def __init__(self, cache: PromptCache, choice: RemoteChoice | None = None) -> None:
        """Use the remote of a cache's store, now or as soon as there is a store.

        Args:
            cache: From now on its uses are noted for publishing.
            choice: What was said of the remote, to be remembered in the store.

        Raises:
            RemoteError: It cannot be used.
            MissingDependencyError: What it needs is not installed.
        """
        self._cache = cache
        self._choice = choice or RemoteChoice()
        self._lock = threading.Lock()
        self._remote: Remote | None = None
        self._is_settled = False
        self._tried_at = -math.inf
        self._trouble = ""
        self._shown: OrderedDict[bytes, Shown] = OrderedDict()
        if self._choice != RemoteChoice() and cache.store is not None:
            self._open()
        else:
            _ = self.remote
        cache.on_use = self._used

    @property
    def remote(self) -> Remote | None:
        """The remote; None where the store has none, or cannot be asked for it yet."""
        if not self._is_settled and time.monotonic() >= self._tried_at + _AGAIN_S:
            try:
                self._open()
            except (RemoteError, MissingDependencyError, StoreError) as error:
                if str(error) != self._trouble:
                    log.warning("the remote is not used: %s", error)
                self._trouble = str(error)
        return self._remote

    @property
    def trouble(self) -> str:
        """Why the remote is not used at all; "" when it is, or there is none."""
        return self._trouble

    @property
    def is_asked(self) -> bool:
        """Whether the remote is asked for prompts at present."""
        remote = self.remote
        return remote is not None and remote.status().breaker == "closed"

    def bring(
        self,
        model: Hashable,
        tokens: Sequence[int],
        *,
        trail: Trail | None = None,
        leave_tokens: int = 0,
        ends: Sequence[int] = (),
        pause: Callable[[], None] = lambda: None,
    ) -> FromRemote | None:
        """Ask the remote for what is not known here of a prompt, and put it into the store.

        Not for requests with a salt, or of which nothing is to be kept.

        Args:
            model: mlx-lm's model key.
            tokens: The prompt.
            trail: Of the request; as for `PromptCache.look_up`.
            leave_tokens: As there.
            ends: Where parts of the prompt end at which a cache may have been kept.
            pause: Called every now and then; what it raises ends the call.

        Returns:
            What to give to `look_up`, which finds what was brought; None where it was not asked.
        """
        remote = self.remote
        if remote is None:
            return None
        known = self._cache.known_of(model, tokens, trail=trail, leave_tokens=leave_tokens)
        if known is None:
            return None
        brought = remote.bring(
            known.fingerprint,
            known.packed,
            known=known.num_tokens,
            limit=known.limit,
            prefill_s=lambda num_tokens: self._cache.prefill_s(model, num_tokens),
            pause=pause,
            ends=ends,
        )
        self._note(known.packed, brought)
        gained = brought.is_hit and brought.num_tokens > known.num_tokens
        return FromRemote(
            known.num_tokens,
            brought.num_tokens if gained else 0,
            brought.seconds,
            brought.why.value,
        )

    def shown(self, tokens: Sequence[int]) -> Shown | None:
        """What the remote said when it was asked for this prompt last, if that is remembered."""
        with self._lock:
            return self._shown.get(prompt_digest(pack_tokens(tokens)))

    def status(self) -> RemoteStatus | None:
        """The state of the remote; None without one."""
        remote = self.remote
        return None if remote is None else remote.status()

    def close(self, timeout_s: float) -> bool:
        """Publish nothing more; returns whether all has ended in time."""
        with self._lock:
            self._is_settled, remote = True, self._remote
        return remote is None or remote.close(timeout_s)

    def _open(self) -> None:
        """Open the remote, if there is a store, and that has one.

        Raises:
            RemoteError: It cannot be used.
            MissingDependencyError: What it needs is not installed.
            StoreError: The store cannot be asked.
        """
        with self._lock:
            store = self._cache.store
            if self._is_settled or store is None:
                return
            self._tried_at = time.monotonic()
            settings = self._choice.of(store)
            if settings is None:
                self._choice.remember(store, None)
            else:
                from persist_cache.remote import Remote  # most servers have none

                remote = Remote.open(store, settings)
                try:
                    self._choice.remember(store, settings)
                except StoreError:
                    remote.close()
                    raise
                log.info("%s", _start_line(remote))
                self._remote = remote
            self._is_settled, self._trouble = True, ""

    def _note(self, packed: bytes, brought: Brought) -> None:
        key = prompt_digest(packed)
        with self._lock:
            self._shown[key] = Shown(brought, time.time())
            self._shown.move_to_end(key)
            while len(self._shown) > _REMEMBERED:
                self._shown.popitem(last=False)

    def _used(self, entries: Sequence[str]) -> None:
        remote = self._remote
        if remote is not None:
            for one in entries:
                remote.note_hit(one)


def _start_line(remote: Remote) -> str:
    """What is done with a remote, for the log."""
    settings = remote.settings
    if why := remote.why_not_publish:
        return f"remote: {settings.url}, only read: {why}"
    tiers = ", ".join(settings.tiers)
    return f"remote: {settings.url}, published at hit {settings.publish_after}: {tiers}"
