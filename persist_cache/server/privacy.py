"""What is to become of a request in the cache: whether it is kept, and with whose it may meet.

It is read before anything else of the body is, because from then on nothing of a private request
may reach a log.
"""

from __future__ import annotations

from collections.abc import Mapping
from email.message import Message
from typing import Any

from msgspec import Struct

from persist_cache.fingerprint.value import salt_digest
from persist_cache.server.guard import OUTCOME_HEADER
from persist_cache.server.protocols.caching import (
    no_store_of,
    read_caching,
    salt_of,
)
from persist_cache.server.validation import RefusedError

PRIVACY_HEADER = OUTCOME_HEADER
"""A request may say here what its answer says of the cache."""
_NO_STORE, _STORE = "no-store", "store"


class Rules(Struct, frozen=True):
    """What a server keeps of requests that do not say.

    Attributes:
        no_store: Nothing, unless they ask for it.
        respect_store: `store: false` in a body means `no-store`. Some clients always send it.
        min_tokens: Shorter prompts are not stored on disk.
    """

    no_store: bool = False
    respect_store: bool = False
    min_tokens: int = 0


class Privacy(Struct, frozen=True):
    """What was decided for one request.

    Attributes:
        no_store: Nothing of it is kept.
        salt: Digest of its salt, or "".
    """

    no_store: bool = False
    salt: str = ""

    @property
    def may_publish(self) -> bool:
        """Whether others may be given what is stored of it: not if somebody set it apart."""
        return not self.no_store and not self.salt


def wants_no_store(headers: Message) -> bool | None:
    """Whether the headers of a request forbid that anything of it is kept; None: they do not say.

    Raises:
        RefusedError: They say something that is not understood.
    """
    words = [
        word.strip().lower()
        for line in headers.get_all(PRIVACY_HEADER) or []
        for word in line.split(",")
    ]
    if unknown := set(words) - {_NO_STORE, _STORE}:
        raise RefusedError(
            400,
            f"{PRIVACY_HEADER}: {sorted(unknown)[0]!r} is not known; a request says {_NO_STORE} "
            f"or {_STORE} there.",
        )
    return (_NO_STORE in words) if words else None


def privacy_of(headers: Message, body: Mapping[str, Any], rules: Rules) -> Privacy:
    """Decide what is to become of a request; where it says two things, nothing is kept.

    Raises:
        RefusedError: It is not understood, or asks for something to be kept of nothing.
    """
    said = (
        wants_no_store(headers),
        no_store_of(body, respects_store=rules.respect_store),
    )
    no_store = True in said or (False not in said and rules.no_store)
    if no_store and read_caching(body).prewarm:
        raise RefusedError(
            400,
            "This request asks for its prompt to be kept ahead (prewarm), and nothing of it is to "
            f"be kept; leave one out, or send {PRIVACY_HEADER}: {_STORE}.",
            param="prompt_cache_options.prewarm",
        )
    return Privacy(no_store, salt_digest(salt_of(body)))


def scrub(*values: Any) -> None:
    """Empty lists and objects, and those in them, which others may still hold."""
    pending = list(values)
    while pending:
        one = pending.pop()
        if isinstance(one, dict):
            pending += one.values()
            one.clear()
        elif isinstance(one, list):
            pending += [item for item in one if isinstance(item, dict | list)]
            one.clear()
