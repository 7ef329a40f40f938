"""Asking a remote what it has of a prompt: all anchors in one parallel round trip."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

from msgspec import Struct

from persist_cache.fingerprint.value import Fingerprint
from persist_cache.remote.keys import Place, anchor_name
from persist_cache.remote.manifest import (
    MAX_MANIFEST_BYTES,
    Found,
    Manifest,
    RefusedError,
    open_manifest,
)
from persist_cache.remote.means import Means
from persist_cache.remote.transport import Failure, TooLargeError, TransportError
from persist_cache.tokens import common_prefix_tokens

LOOK_S = 2.0
"""All of a look-up: what did not answer by then is not there."""
_REMEMBERED_BAD = 4096
_BAD_S = 3600.0
"""For so long: what a lifecycle rule removed may have been published again."""


class Candidate(Struct, frozen=True):
    """An entry of the remote that begins as the prompt does.

    Attributes:
        anchor: Name of the object under which it was found.
        manifest: What it is made of.
        packed: Its tokens.
        common: Leading tokens that the prompt shares with it.
    """

    anchor: str
    manifest: Manifest
    packed: bytes
    common: int


class Look(Struct, frozen=True):
    """What the remote said.

    Attributes:
        candidates: By the place where each was found.
        nbytes: Bytes received.
        failure: The worst that a request met, or None.
        refused: Something that lay there was not what was published.
    """

    candidates: Mapping[Place, Candidate]
    nbytes: int
    failure: TransportError | None
    refused: bool


class Bad:
    """Anchors that led to nothing good: left alone by this process for an hour.

    Thread safety: may be shared between threads; `_lock` guards the names.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._since: OrderedDict[str, float] = OrderedDict()

    def add(self, name: str) -> None:
        with self._lock:
            self._since[name] = self._clock()
            self._since.move_to_end(name)
            while len(self._since) > _REMEMBERED_BAD:
                self._since.popitem(last=False)

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return self._clock() - self._since.get(name, -math.inf) < _BAD_S


class Looker:
    """Asks for anchors, and lets nothing pass that nobody vouches for.

    Thread safety: may be shared between threads.
    """

    def __init__(self, means: Means, clock: Callable[[], float]) -> None:
        self._means = means
        self.bad = Bad(clock)

    def look(
        self,
        fingerprint: Fingerprint,
        packed: bytes,
        places: list[Place],
        pause: Callable[[], None] = lambda: None,
    ) -> Look:
        """Ask for all `places` at once.

        Args:
            fingerprint: Identity of the model.
            packed: The prompt.
            places: The shortest first.
            pause: Called while waiting; what it raises ends the look-up.

        Raises:
            TransportError: The transport is closed.
        """
        anchors = self._means.keys.anchors(fingerprint, packed, places)
        asked = {place: key for place, key in anchors.items() if anchor_name(key) not in self.bad}
        answers = self._means.transport.call(
            self._ask([anchor_name(key) for key in asked.values()]), pause
        )
        candidates: dict[Place, Candidate] = {}
        nbytes, failure, is_refused = 0, None, False
        for (place, key), answer in zip(asked.items(), answers, strict=True):
            if isinstance(answer, TransportError):
                failure = _worse(failure, answer)
            elif answer is not None:
                nbytes += len(answer)
                try:
                    found = open_manifest(answer, key, self._means.seal, fingerprint)
                    common = _common(packed, found, place)
                except RefusedError as error:
                    self.refuse(anchor_name(key), error.kind)
                    is_refused = True
                    continue
                candidates[place] = Candidate(
                    anchor_name(key), found.manifest, found.packed, common
                )
        return Look(candidates, nbytes, failure, is_refused)

    def refuse(self, anchor: str, kind: str) -> None:
        """Leave an anchor alone for a while, and count why."""
        self.bad.add(anchor)
        self._means.counters.add(f"refused:{kind}")

    async def _ask(self, names: list[str]) -> list[bytes | TransportError | None]:
        tasks = [
            asyncio.create_task(self._means.transport.read(name, MAX_MANIFEST_BYTES))
            for name in names
        ]
        if not tasks:
            return []
        try:
            await asyncio.wait(tasks, timeout=LOOK_S)
        finally:
            for task in tasks:
                task.cancel()
        return [_answer(task) for task in tasks]


def _common(packed: bytes, found: Found, place: Place) -> int:
    """Leading tokens that a prompt shares with what was found for a beginning of it.

    Raises:
        RefusedError: They are fewer than those for which it was found.
    """
    common = common_prefix_tokens(packed, found.packed)
    if common < place.num_tokens or (
        place.is_end and found.manifest.num_tokens != place.num_tokens
    ):
        raise RefusedError("tokens", "it is of other tokens")
    return common


def _answer(task: asyncio.Task[bytes | None]) -> bytes | TransportError | None:
    if not task.done() or task.cancelled():
        return TransportError(Failure.TIME_OUT, "it did not answer in time")
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, TooLargeError):
        return b""  # which is no manifest
    if isinstance(error, TransportError):
        return error
    raise error


def _worse(one: TransportError | None, other: TransportError) -> TransportError:
    """The one to be told: a time-out is what others would wait for again."""
    if one is None or other.kind == Failure.TIME_OUT:
        return other
    return one
