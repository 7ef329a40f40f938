"""Which prompts the disk will have: those that are on their way, and the latest that arrived."""

from __future__ import annotations

import threading
from collections import deque

from persist_cache.cache.owners import Owner
from persist_cache.tokens import TOKEN_BYTES, common_prefix_tokens

_LATEST = 16
"""More than arrive between the look-ups of requests that are answered together and their saves."""


class Promised:
    """Prompts whose rows need not be counted again when others have them, too.

    Thread safety: may be shared between threads; `_lock` guards everything.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[Owner, bytes]] = []
        self._latest: deque[tuple[int, Owner, bytes]] = deque(maxlen=_LATEST)
        self._arrived = 0

    @property
    def arrived(self) -> int:
        """How many have arrived so far."""
        with self._lock:
            return self._arrived

    def add(self, owner: Owner, packed: bytes) -> None:
        """Note a prompt that is queued."""
        with self._lock:
            if (owner, packed) not in self._waiting:
                self._waiting.append((owner, packed))

    def ended(self, owner: Owner, packed: bytes, *, saved: bool) -> None:
        """Note that something is on the disk, or could not be queued or saved.

        It is no prompt if it was not added.
        """
        with self._lock:
            if (owner, packed) in self._waiting:
                self._waiting.remove((owner, packed))
                if saved:
                    self._arrived += 1
                    self._latest.append((self._arrived, owner, packed))

    def tokens(self, owner: Owner, packed: bytes, since: int = 0) -> int:
        """Leading tokens of a prompt that one of them has, too.

        Args:
            owner: Whose KV it is.
            packed: The prompt.
            since: What `arrived` was when the disk was asked. That has those that came before, or
                has let them go.
        """
        with self._lock:
            latest = [(whose, one) for number, whose, one in self._latest if number > since]
            known = [one for whose, one in (*latest, *self._waiting) if whose == owner]
        most = 0
        for one in reversed(known):
            # To share more it has to have the next token, too; hardly one that is older does.
            start, end = most * TOKEN_BYTES, (most + 1) * TOKEN_BYTES
            if len(one) >= end and one[start:end] == packed[start:end]:
                most = max(most, common_prefix_tokens(packed, one))
        return most
