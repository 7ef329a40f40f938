"""The room's face: one remote, used by one process for one store.

Thread safety: all of `Remote` may be called from any thread.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence

from persist_cache.errors import RemoteError
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.remote.breaker import Breaker
from persist_cache.remote.bringing import Bringer
from persist_cache.remote.counting import Counters
from persist_cache.remote.keys import probe_name
from persist_cache.remote.looking import LOOK_S, Looker
from persist_cache.remote.means import Means
from persist_cache.remote.policy import Policy
from persist_cache.remote.probing import probe
from persist_cache.remote.publishing import Publisher
from persist_cache.remote.settings import RemoteSettings, check_settings, folder_of
from persist_cache.remote.told import Brought, Probe, Published, RemoteStatus
from persist_cache.remote.transport import Transport, TransportError
from persist_cache.remote.trust import open_trust
from persist_cache.store.store import Store


class Remote:
    """A remote that is in use; made by `Remote.open`."""

    def __init__(self, store: Store, settings: RemoteSettings, clock: Callable[[], float]) -> None:
        check_settings(settings)
        _refuse_the_store(store, settings)
        keys, seal = open_trust(settings.trust, settings.secret_file, settings.public_key)
        self.settings = settings
        counters = Counters(store)
        self._means = Means(
            store=store,
            settings=settings,
            transport=Transport(settings, counters.add),
            keys=keys,
            seal=seal,
            breaker=Breaker(self._begin_probe, clock),
            counters=counters,
        )
        looker = Looker(self._means, clock)
        self._bringer = Bringer(self._means, looker)
        self._publisher = Publisher(self._means, looker, clock)
        self._policy = Policy(store, settings, self._publisher, self._means.breaker, clock)

    @classmethod
    def open(
        cls,
        store: Store,
        settings: RemoteSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> Remote:
        """Get ready to use a remote. Nothing is asked over the network.

        Args:
            store: Open for change; stays open as long as the remote is.
            settings: As `read_settings` gives them.
            clock: Seconds by which breaker, claims and what was bad are told; for tests.

        Raises:
            RemoteError: They cannot be used: no secret, a URL that is none, and so on.
            MissingDependencyError: The extra `remote` is not installed.
        """
        return cls(store, settings, clock)

    def bring(
        self,
        fingerprint: Fingerprint,
        tokens: bytes | Sequence[int],
        *,
        known: int,
        limit: int,
        prefill_s: Callable[[int], float] | None = None,
        pause: Callable[[], None] = lambda: None,
        ends: Sequence[int] = (),
    ) -> Brought:
        """Look for more of a prompt, and pull it into the store where that is worth it.

        It asks nothing of the network when too little could be won or the breaker is open, and
        else makes one parallel round trip before it knows what is there.

        Args:
            fingerprint: Identity of the model. One with a salt is never looked up.
            tokens: The prompt, or packed.
            known: Leading tokens that need not be computed anyway, from memory or disk.
            limit: Use at most this many tokens; mostly the prompt's length less one.
            prefill_s: What computing so many tokens takes, 0 when nobody knows; then what it took
                the publisher stands for it. None if nothing would be computed instead.
            pause: Called many times a second while waiting. What it raises ends the call, and
                the pull.
            ends: Further lengths at which an entry may end, such as that of the system part. For
                models with states they are the surest way to be found.

        Returns:
            What the store has now; failures are a miss with a reason. Nothing is raised but what
            `pause` raises.
        """
        return self._bringer.bring(fingerprint, tokens, known, limit, prefill_s, pause, ends)

    def note_hit(self, entry: str) -> None:
        """Count a hit of an entry, which is published in the background when it is due.

        Never blocks, asks nothing, raises nothing. To be called for every id in `Match.entries`,
        so that a system part is seen whose prompts go on.
        """
        self._policy.note_hit(entry)

    def publish(self, entry: str) -> Published:
        """Publish an entry now, whatever its tier and hits.

        Raises:
            RemoteError: It may not be, or the remote failed; the sentence says why.
        """
        return self._publisher.publish(entry)

    def probe(self) -> Probe:
        """Find out whether the remote can be reached and used; for people, and slow."""
        return probe(self._means.transport, may_write=not self._publisher.why_not())

    def status(self) -> RemoteStatus:
        """The state of the remote; asks nothing of the network."""
        return RemoteStatus(
            url=self.settings.url,
            breaker=self._means.breaker.state,
            retry_in_s=self._means.breaker.retry_in_s,
            last_error=self._means.breaker.last_error,
            bytes_per_s=self._bringer.bytes_per_s,
            publishes=not self.why_not_publish,
            queued=self._policy.queued,
            counters=self._means.counters.now(),
        )

    @property
    def why_not_publish(self) -> str:
        """Why nothing can be published from here, in a sentence; "" if it can."""
        return self._publisher.why_not()

    def close(self, timeout_s: float = 5.0) -> bool:
        """Stop publishing and give up what is under way; further calls do nothing.

        Returns:
            Whether all has ended within that time.
        """
        started = time.monotonic()
        self._policy.close(0)
        has_ended = self._means.transport.close(timeout_s)
        left_s = max(0.0, timeout_s - (time.monotonic() - started))
        return self._policy.close(left_s) and has_ended

    def _begin_probe(self) -> None:
        """Find out by itself whether the remote is back."""
        self._means.counters.add("probes")
        self._means.transport.start(self._probe_once())

    async def _probe_once(self) -> None:
        try:
            async with asyncio.timeout(LOOK_S):
                await self._means.transport.read(probe_name(secrets.token_bytes(32)), 1)
        except TransportError as error:
            self._means.breaker.failed(str(error))
        except TimeoutError:
            self._means.breaker.failed("it did not answer in time")
        except BaseException:
            self._means.breaker.failed("the probe was ended")
            raise
        else:
            self._means.breaker.succeeded()


def _refuse_the_store(store: Store, settings: RemoteSettings) -> None:
    """Refuse a folder that has to do with the store's own.

    Raises:
        RemoteError: One lies within the other.
    """
    folder = folder_of(settings.url)
    if folder is None:
        return
    here, there = store.root.resolve(), folder.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise RemoteError(
            f"{folder} cannot be the remote of the store in {store.root}: one lies within the "
            "other; name a folder elsewhere."
        )
