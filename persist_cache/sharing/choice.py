"""What a command line says of the remote, and what the store then remembers of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from persist_cache.errors import RemoteError
from persist_cache.remote import RemoteSettings, checked_url, read_settings, write_settings

if TYPE_CHECKING:
    from persist_cache.store.store import Store

TIERS = ("system", "pinned", "user", "assistant")
"""What may be published by itself; `pinned` is whatever is pinned."""
NO_REMOTE = "none"
"""Given in the place of a URL, it makes the store forget its remote."""


class RemoteChoice(Struct, frozen=True):
    """What was said of the remote; None for what was not, and holds as last set.

    Attributes:
        url: Where it is, or `none`.
        secret_file: With the shared secret, or a publisher's private key.
        public_key: Of the publisher who is trusted, where it is no shared secret.
        publish_plain: Whether entries may be published, which others can read then.
        tiers: Which are, by themselves.
        publish_after: At which hit.
        budget_bytes_per_day: Most that is sent in a UTC day.
    """

    url: str | None = None
    secret_file: str | None = None
    public_key: str | None = None
    publish_plain: bool | None = None
    tiers: tuple[str, ...] | None = None
    publish_after: int | None = None
    budget_bytes_per_day: int | None = None

    def settings(self, before: RemoteSettings | None) -> RemoteSettings | None:
        """The remote that is meant; None for none.

        Args:
            before: What was set last. Of another remote nothing holds any more.

        Raises:
            RemoteError: There is no remote for what was said, or it cannot be used.
        """
        if self.url == NO_REMOTE:
            return None
        url = None if self.url is None else checked_url(self.url)
        said = {name: value for name, value in self._said().items() if value is not None}
        if before is None or (url is not None and url != before.url):
            if url is None:
                if said:
                    raise RemoteError(
                        "There is no remote that this could be said of; give its --remote URL, or "
                        "run `persist-cache remote add URL` first."
                    )
                return None
            before = RemoteSettings(url)
        if self.public_key is not None:
            said["trust"] = "publisher" if self.public_key else "secret"
        try:
            return msgspec.convert({**msgspec.to_builtins(before), **said}, RemoteSettings)
        except msgspec.ValidationError as error:
            raise RemoteError(f"The remote cannot be used so: {error}.") from None

    def of(self, store: Store) -> RemoteSettings | None:
        """As `settings`, for a store; nothing is remembered yet.

        Raises:
            RemoteError: It cannot be used.
            StoreError: The store cannot be read.
        """
        return self.settings(None if self.url == NO_REMOTE else read_settings(store))

    def remember(self, store: Store, chosen: RemoteSettings | None) -> None:
        """Have the store remember what was said, now that it was seen to be of use.

        Raises:
            StoreError: The store cannot be changed.
        """
        if self != RemoteChoice():
            write_settings(store, chosen)

    def _said(self) -> dict[str, Any]:
        return {
            "secret_file": self.secret_file,
            "public_key": self.public_key,
            "publish_plain": self.publish_plain,
            "tiers": self.tiers,
            "publish_after": self.publish_after,
            "budget_bytes_per_day": self.budget_bytes_per_day,
        }
