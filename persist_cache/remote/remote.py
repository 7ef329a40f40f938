"""The room's face: one remote, used by one process for one store.

Thread safety: all of `Remote` may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from persist_cache.fingerprint.value import Fingerprint
from persist_cache.remote.settings import RemoteSettings
from persist_cache.remote.told import Brought, Probe, Published, RemoteStatus
from persist_cache.store.store import Store


class Remote:
    """A remote that is in use; made by `Remote.open`."""

    @classmethod
    def open(cls, store: Store, settings: RemoteSettings) -> Remote:
        """Get ready to use a remote. Nothing is asked over the network.

        Args:
            store: Open for change; stays open as long as the remote is.
            settings: As `read_settings` gives them.

        Raises:
            RemoteError: They cannot be used: no secret, a URL that is none, and so on.
            MissingDependencyError: The extra `remote` is not installed.
        """
        raise NotImplementedError

    def bring(
        self,
        fingerprint: Fingerprint,
        tokens: bytes | Sequence[int],
        *,
        known: int,
        limit: int,
        prefill_s: Callable[[int], float] = lambda num_tokens: 0.0,
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
            prefill_s: What computing so many tokens takes, 0 when nobody knows.
            pause: Called many times a second while waiting. What it raises ends the call, and
                the pull.
            ends: Further lengths at which an entry may end, such as that of the system part. For
                models with states they are the surest way to be found.

        Returns:
            What the store has now; failures are a miss with a reason. Nothing is raised but what
            `pause` raises.
        """
        raise NotImplementedError

    def note_hit(self, entry: str) -> None:
        """Count a hit of an entry, which is published in the background when it is due.

        Never blocks, asks nothing, raises nothing. To be called for every id in `Match.entries`,
        so that a system part is seen whose prompts go on.
        """
        raise NotImplementedError

    def publish(self, entry: str) -> Published:
        """Publish an entry now, whatever its tier and hits.

        Raises:
            RemoteError: It may not be, or the remote failed; the sentence says why.
        """
        raise NotImplementedError

    def probe(self) -> Probe:
        """Find out whether the remote can be reached and used; for people, and slow."""
        raise NotImplementedError

    def status(self) -> RemoteStatus:
        """The state of the remote; asks nothing of the network."""
        raise NotImplementedError

    def close(self, timeout_s: float = 5.0) -> bool:
        """Stop publishing and give up what is under way; further calls do nothing.

        Returns:
            Whether all has ended within that time.
        """
        raise NotImplementedError
