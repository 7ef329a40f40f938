"""Publishing one entry: look, claim, blobs, and the anchors last.

Everything is created and nothing overwritten, so that a reader sees either nothing or a manifest
whose blobs are all there. What was published before is referred to.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from persist_cache import __version__
from persist_cache.entry import PARTIAL_LABEL
from persist_cache.errors import RemoteError, StoreError
from persist_cache.remote.cutting import Cutter, StoredEntry, opened, parts_of
from persist_cache.remote.keys import MIN_TOKENS, anchor_name, places_of_entry
from persist_cache.remote.looking import Candidate, Look, Looker
from persist_cache.remote.manifest import (
    MAX_MANIFEST_BYTES,
    MAX_TOKENS,
    VERSION,
    BlobSection,
    Manifest,
    Part,
    encode_manifest,
    pack,
    sealed,
)
from persist_cache.remote.means import Means
from persist_cache.remote.told import Published, PublishOutcome
from persist_cache.remote.transport import Failure, TransportError
from persist_cache.store.store import Store

CLAIM_S = 900.0
"""A claim that this store has seen for so long is of a publisher that died."""
CLAIMS = "remote.claims"
_REMEMBERED_CLAIMS = 256
_MAX_GENERATIONS = 1000
_CLAIM = b"claimed\n"
_SEAL_BYTES = 1024


class _Sent(Struct):
    """What one publication did so far."""

    nbytes: int = 0
    requests: int = 0
    blobs: int = 0


class _Claims:
    """The claims of others that this store has seen, and those of this process.

    Only the time that passed here counts: no clock of another machine is believed. The store
    remembers what was seen, because a command lives for a shorter time than a claim is respected.
    """

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self.own: set[str] = set()
        self.seen: dict[str, float] = {}
        self._store = store
        self._clock = clock

    def is_stale(self, name: str) -> bool:
        """Whether a claim that is there was seen long ago for the first time, or given up here."""
        now = self._clock()
        if now - self.seen.setdefault(name, now) >= CLAIM_S:
            return True
        today = self._store.clock()
        since = self._remembered().get(name)
        if since is None or since > today:  # the clock was put back
            self._remember(name, today)
            return False
        return today - since >= CLAIM_S

    def give_up(self, name: str) -> None:
        """Let others of this store claim at once what this process did not bring to its end."""
        self._remember(name, 0.0)

    def _remembered(self) -> dict[str, float]:
        try:
            return msgspec.json.decode(
                self._store.remembered(CLAIMS) or b"{}", type=dict[str, float]
            )
        except (StoreError, msgspec.MsgspecError):
            return {}

    def _remember(self, name: str, since: float) -> None:
        # What two processes note at once may be lost, which costs a claim's time once more.
        known = self._remembered()
        known.pop(name, None)
        known[name] = since
        kept = dict(list(known.items())[-_REMEMBERED_CLAIMS:])
        with contextlib.suppress(StoreError):
            self._store.remember(CLAIMS, msgspec.json.encode(kept))


class Publisher:
    """Publishes entries of a store, one at a time.

    Thread safety: may be shared between threads; `_lock` is held while one is published.
    """

    def __init__(
        self, means: Means, looker: Looker, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._means = means
        self._store = means.store
        self._settings = means.settings
        self._looker = looker
        self._lock = threading.Lock()
        self._claims = _Claims(means.store, clock)

    def why_not(self) -> str:
        """Why nothing can be published from here, in a sentence; "" if it can."""
        url = self._settings.url
        if not self._settings.may_write:
            return f"{url} is a mirror, which is only read."
        if not self._settings.publish_plain:
            return (
                f"Nothing is published to {url}: prompts and their KV would go there unencrypted. "
                "If that is what you want, say so once with `persist-cache remote add "
                "--publish-plain`."
            )
        if not self._means.seal.can_sign:
            return (
                f"Only its publisher can publish to {url}; its private key is not on this machine."
            )
        return ""

    def publish(self, entry: str) -> Published:
        """See `Remote.publish`."""
        if said := self.why_not():
            raise RemoteError(said)
        with self._lock:
            found = self._entry(entry)
            try:
                done = self._publish(found)
            except TransportError as error:
                self._means.note_failure(error)
                raise RemoteError(f"The remote {self._settings.url}: {error}.") from error
        if done.outcome == PublishOutcome.SENT:
            self._means.counters.add("published")
            self._means.counters.add("published_tokens", done.num_tokens)
        return done

    def _entry(self, entry: str) -> StoredEntry:
        """The entry, if it may be published.

        Raises:
            RemoteError: It may not be, or is not there.
        """
        try:
            found = StoredEntry.of(self._store, entry)
        except KeyError:
            raise RemoteError(f"No entry has the id {entry}.") from None
        except StoreError as error:
            raise RemoteError(str(error)) from error
        if not found.fingerprint.may_publish:
            raise RemoteError(f"Entry {entry} has a salt, so it is for nobody else.")
        if found.label == PARTIAL_LABEL:
            raise RemoteError(f"Entry {entry} is not at its end yet.")
        if not MIN_TOKENS <= found.num_tokens <= MAX_TOKENS:
            raise RemoteError(
                f"Entry {entry} has {found.num_tokens} tokens; what is published has "
                f"{MIN_TOKENS} to {MAX_TOKENS}."
            )
        return found

    def _publish(self, entry: StoredEntry) -> Published:
        self._means.transport.check_folder()
        sent = _Sent()
        places = places_of_entry(entry.num_tokens)
        look = self._looker.look(entry.fingerprint, entry.packed, places)
        sent.requests += len(places)
        if look.failure is not None and (
            not look.candidates or look.failure.kind != Failure.DENIED
        ):
            raise look.failure
        self._means.breaker.succeeded()
        end = places[-1]
        if end in look.candidates:
            return _told(entry, PublishOutcome.THERE_ALREADY, sent)
        anchors = self._means.keys.anchors(entry.fingerprint, entry.packed, places)
        claim = self._claim(anchors[end], sent)
        if claim is None:
            return _told(entry, PublishOutcome.CLAIMED, sent)
        try:
            self._send_all(entry, look, list(anchors.values()), sent)
        except BaseException:
            self._claims.give_up(claim)
            raise
        return _told(entry, PublishOutcome.SENT, sent)

    def _send_all(
        self, entry: StoredEntry, look: Look, anchors: Sequence[bytes], sent: _Sent
    ) -> None:
        """Create the blobs of an entry, and then its anchors, of which the last is its end's."""
        with opened(self._store, entry) as (cutter, state):
            blobs = self._known(entry, look, cutter.complete)
            start = blobs[-1].end if blobs else 0
            for first, last in _cuts(start, entry.num_tokens, cutter.block_tokens):
                blobs.append(BlobSection(first, last, self._send(cutter.block(first, last), sent)))
            section = None
            if not cutter.complete:
                if state is None:
                    raise RemoteError(
                        f"Entry {entry.id} has neither all of its rows nor a state; run "
                        "`persist-cache check`."
                    )
                parts = self._send(cutter.checkpoint(state), sent)
                section = BlobSection(entry.num_tokens, entry.num_tokens, parts)
            manifest = self._manifest(entry, cutter, blobs, section)
        body = encode_manifest(manifest)
        if len(body) > MAX_MANIFEST_BYTES - _SEAL_BYTES:
            raise RemoteError(f"Entry {entry.id} is too long to be published.")
        contents = {anchor_name(key): sealed(body, key, self._means.seal) for key in anchors}
        *others, last_name = contents
        # One that is there already stands for an entry that begins alike.
        self._create({name: contents[name] for name in others}, sent)
        self._create({last_name: contents[last_name]}, sent)

    def _known(self, entry: StoredEntry, look: Look, complete: bool) -> list[BlobSection]:
        """Blobs that were published before and hold the same tokens, from the first on."""

        def fits(one: Candidate) -> bool:
            return one.manifest.layout == entry.layout and (one.manifest.complete or not complete)

        best: list[BlobSection] = []
        for one in filter(fits, look.candidates.values()):
            blobs = [blob for blob in one.manifest.blobs if blob.end <= one.common]
            if blobs and (not best or blobs[-1].end > best[-1].end):
                best = blobs
        return best

    def _claim(self, end: bytes, sent: _Sent) -> str | None:
        """The claim by which this process publishes the entry; None if another one does."""
        for generation in range(_MAX_GENERATIONS):
            name = self._means.keys.claim_name(end, generation)
            if name in self._claims.own:
                return name
            if name in self._claims.seen:
                if self._claims.is_stale(name):
                    continue
                return None
            if self._create({name: _CLAIM}, sent):
                self._claims.own.add(name)
                return name
            if not self._claims.is_stale(name):
                return None
        return None

    def _send(self, pieces: Iterable[memoryview], sent: _Sent) -> tuple[Part, ...]:
        """Create the objects of one blob."""
        parts = []
        for content in parts_of(pieces):
            part = Part(hashlib.blake2b(content, digest_size=32).digest(), len(content))
            name = self._means.keys.blob_name(part.digest)
            sent.blobs += self._create({name: content}, sent)
            parts.append(part)
        return tuple(parts)

    def _create(self, contents: Mapping[str, Any], sent: _Sent) -> int:
        """Create objects at once, within the day's budget; how many were not there already."""
        self._spend(sum(map(len, contents.values())))
        sent.requests += len(contents)
        done = self._means.transport.call(self._create_all(contents))
        new = sum(
            len(content) for content, is_new in zip(contents.values(), done, strict=True) if is_new
        )
        self._spend(new - sum(map(len, contents.values())))
        sent.nbytes += new
        return sum(done)

    async def _create_all(self, contents: Mapping[str, Any]) -> list[bool]:
        work = [self._means.transport.create(name, content) for name, content in contents.items()]
        return await asyncio.gather(*work)

    def _spend(self, nbytes: int) -> None:
        """Take bytes from the day's budget; give back those below 0.

        Raises:
            RemoteError: It is spent.
        """
        budget = self._settings.budget_bytes_per_day
        if budget is None or nbytes == 0:
            return
        day = f"remote.sent:{time.strftime('%Y-%m-%d', time.gmtime(self._store.clock()))}"
        if self._store.tally(day, nbytes) > budget and nbytes > 0:
            self._store.tally(day, -nbytes)
            self._means.counters.add("budget_refused")
            raise RemoteError(
                f"Today's budget of {budget} bytes for the remote is spent; publishing goes on "
                "tomorrow (UTC)."
            )

    def _manifest(
        self,
        entry: StoredEntry,
        cutter: Cutter,
        blobs: list[BlobSection],
        state: BlobSection | None,
    ) -> Manifest:
        return Manifest(
            version=VERSION,  # type: ignore[arg-type]
            writer=f"persist-cache {__version__}",
            created=self._store.clock(),
            fields=dict(entry.fingerprint.fields),
            info=dict(entry.fingerprint.info),
            layout=entry.layout,
            tier=entry.tier.label,  # type: ignore[arg-type]
            num_tokens=entry.num_tokens,
            complete=cutter.complete,
            prefill_s=max(0.0, entry.prefill_s),
            blobs=tuple(blobs),
            state=state,
            tokens=pack(entry.packed),
        )


def _cuts(start: int, end: int, step: int) -> list[tuple[int, int]]:
    """Where to cut the tokens `[start, end)`: at multiples of `step`."""
    inner = range(start - start % step + step, end, step)
    positions = [start, *inner, end] if start < end else []
    return list(itertools.pairwise(positions))


def _told(entry: StoredEntry, outcome: PublishOutcome, sent: _Sent) -> Published:
    return Published(entry.id, outcome, entry.num_tokens, sent.nbytes, sent.requests, sent.blobs)
