"""Where moved text stands in each conversation, remembered so that it stays there.

What is moved goes to the end of the first message of the user. When it changes in the course of a
conversation, the old text stays and the new one goes with the newest message of the user. The
client sends nothing of that back, so it is remembered by what the client did send.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

_MOST_ALIKE = 4
"""Conversations with the same messages that are told apart by what was moved out of them."""


class Told(Struct, frozen=True):
    """What was moved within a conversation.

    Attributes:
        places: Indices of messages, each with the text that stands at its end, in order.
        latest: What the client told last, piece by piece.
    """

    places: tuple[tuple[int, str], ...] = ()
    latest: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        return 200 + sum(len(text) for _, text in self.places) + sum(map(len, self.latest))


class Moves:
    """Remembers what was told where, for a bounded number of conversations.

    A conversation is recognized by messages up to one of its earlier requests, an answer of the
    model among them. One that is forgotten is told anew at its first message.

    Thread safety: may be shared between threads; `_lock` guards what is remembered.
    """

    def __init__(self, *, max_requests: int = 4096, max_bytes: int = 8 << 20) -> None:
        """Remember nothing yet.

        Args:
            max_requests: How many requests are remembered at most, the latest ones.
            max_bytes: What their texts take at most.
        """
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._told: OrderedDict[bytes, tuple[Told, ...]] = OrderedDict()
        self._nbytes = 0

    def __len__(self) -> int:
        with self._lock:
            return len(self._told)

    @property
    def nbytes(self) -> int:
        """About how much memory is taken."""
        return self._nbytes

    def place(
        self, messages: Sequence[Mapping[str, Any]], pieces: Sequence[str], *, keep: bool
    ) -> tuple[tuple[int, str], ...]:
        """Say where moved text stands in a conversation.

        Args:
            messages: Without the text; one of them at least is the user's.
            pieces: The text, in the order of the client.
            keep: Remember it for later requests.

        Returns:
            Indices of messages, each with a text for its end.
        """
        users = [at for at, one in enumerate(messages) if one.get("role") == "user"]
        latest = tuple(pieces)
        keys = _keys(messages)
        with self._lock:
            before = self._before(messages, keys, latest)
            told = _told_next(before, users, latest)
            if keep and (told.places or told.latest):
                self._remember(keys[-1], told)
        return told.places

    def _before(
        self, messages: Sequence[Mapping[str, Any]], keys: Sequence[bytes], latest: tuple[str, ...]
    ) -> Told | None:
        """What was told in the longest part of a conversation that is known."""
        answers = [at for at, one in enumerate(messages) if one.get("role") == "assistant"]
        for at in range(len(messages) - 1, answers[0] - 1 if answers else len(messages), -1):
            alike = self._told.get(keys[at], ())
            same = [one for one in alike if one.latest == latest]
            if same:
                return same[-1]
            if at < len(messages) - 1 and len(alike) == 1:
                return alike[0]
        return None

    def _remember(self, key: bytes, told: Told) -> None:
        alike = [one for one in self._told.pop(key, ()) if not self._forgets(one, told)]
        while len(alike) >= _MOST_ALIKE:
            self._nbytes -= alike.pop(0).nbytes
        self._told[key] = (*alike, told)
        self._nbytes += told.nbytes
        while len(self._told) > self._max_requests or self._nbytes > self._max_bytes:
            _, gone = self._told.popitem(last=False)
            self._nbytes -= sum(one.nbytes for one in gone)

    def _forgets(self, one: Told, told: Told) -> bool:
        if one.latest != told.latest:
            return False
        self._nbytes -= one.nbytes
        return True


class SaltedMoves:
    """A `Moves` for each salt of requests, which are not to meet; those used last are remembered.

    Thread safety: may be shared between threads; `_lock` guards the collection.
    """

    def __init__(self, *, max_salts: int = 32) -> None:
        """Remember nothing yet.

        Args:
            max_salts: So many at most, besides the requests without one.
        """
        self._max_salts = max_salts
        self._lock = threading.Lock()
        self._shared = Moves()
        self._salted: OrderedDict[str, Moves] = OrderedDict()

    def of(self, salt: str) -> Moves:
        """What is remembered of requests of one salt."""
        if not salt:
            return self._shared
        with self._lock:
            found = self._salted.get(salt)
            if found is None:
                found = self._salted[salt] = Moves(max_requests=512, max_bytes=1 << 20)
            self._salted.move_to_end(salt)
            while len(self._salted) > self._max_salts:
                self._salted.popitem(last=False)
            return found


def _told_next(before: Told | None, users: Sequence[int], latest: tuple[str, ...]) -> Told:
    if before is None:
        return Told(((users[0], "\n".join(latest)),) if latest else (), latest)
    new = [piece for piece in latest if piece not in before.latest]
    if not new:
        return Told(before.places, latest or before.latest)
    return Told((*before.places, (users[-1], "\n".join(new))), latest)


def _keys(messages: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """For each message a digest of the conversation up to it."""
    running = hashlib.blake2b(digest_size=16)
    found = []
    for message in messages:
        running.update(json.dumps(message, sort_keys=True, default=str).encode())
        running.update(b"\n")
        found.append(running.copy().digest())
    return found
