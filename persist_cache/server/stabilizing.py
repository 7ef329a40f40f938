"""Which repairs may be done to a request: as the server was started, or as the request says."""

from __future__ import annotations

from email.message import Message
from typing import Any

from persist_cache.server.guard import STABILIZE_HEADER
from persist_cache.server.validation import RefusedError
from persist_cache.stability.names import DEFAULTS, parse_names


def chosen_by(headers: Message, generator: Any) -> frozenset[str]:
    """Names of the repairs that may be done to a request.

    Args:
        headers: Of the request.
        generator: The server's, whose `stabilize` holds where the request says nothing.

    Raises:
        RefusedError: It names one that there is not.
    """
    said = headers.get(STABILIZE_HEADER)
    if said is None:
        chosen: frozenset[str] = getattr(generator, "stabilize", DEFAULTS)
        return chosen
    try:
        return parse_names(said)
    except ValueError as error:
        raise RefusedError(400, f"{STABILIZE_HEADER}: {error}") from None
