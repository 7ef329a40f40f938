"""Why a request could not reuse an earlier one's prompt, in the words of its protocol.

The client names the answer that it compares with. What is said compares the two requests, whatever
else the cache had: so a difference that cost nothing is no miss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from persist_cache.server.recent.ring import Ring
from persist_cache.server.ticket import Ticket
from persist_cache.server.validation import RefusedError
from persist_cache.stability.causes.cause import Cause, cause_of
from persist_cache.stability.causes.kinds import Kind

_EFFORT = ("reasoning", "thinking", "effort")


def previous_message(body: Mapping[str, Any]) -> tuple[bool, str | None]:
    """What a body of Messages asks to be compared with.

    Returns:
        Whether it asks for a comparison, and the id of the answer; None for the first turn.

    Raises:
        RefusedError: That is malformed.
    """
    if (asked := body.get("diagnostics")) is None:
        return False, None
    if not isinstance(asked, dict):
        raise RefusedError(400, "diagnostics must be an object.")
    named = asked.get("previous_message_id")
    if named is not None and not isinstance(named, str):
        raise RefusedError(400, "diagnostics.previous_message_id must be a text.")
    return True, named


def comparison_response(body: Mapping[str, Any]) -> str | None:
    """The id of the answer that a body of OpenAI's APIs asks to be compared with, or None.

    Raises:
        RefusedError: That is malformed.
    """
    if (options := body.get("prompt_cache_options")) is None:
        return None
    if not isinstance(options, dict):
        raise RefusedError(
            400, "prompt_cache_options must be an object.", param="prompt_cache_options"
        )
    named = options.get("comparison_response_id")
    if named is not None and not isinstance(named, str):
        param = "prompt_cache_options.comparison_response_id"
        raise RefusedError(400, f"{param} must be a text.", param=param)
    return named


def of_messages(ring: Ring, ticket: Ticket, message_id: str | None) -> dict[str, Any] | None:
    """The member `diagnostics` of an answer of Anthropic's Messages.

    Args:
        ring: Remembers earlier requests.
        ticket: Of the request.
        message_id: `diagnostics.previous_message_id` of the request; None for its first turn.

    Returns:
        None when nothing was missed, or there is nothing to compare with.
    """
    if message_id is None:
        return None
    if ticket.fetch is None:
        return {"cache_miss_reason": None}  # it is not known yet
    found = _compared(ring, ticket, message_id)
    if found is None or found == _NOT_KEPT:
        return None
    if isinstance(found, str):
        kind = "previous_message_not_found" if found == _FORGOTTEN else found
        return {"cache_miss_reason": {"type": kind}}
    if (reason := _of_messages(found)) == _UNAVAILABLE:
        return {"cache_miss_reason": {"type": reason}}
    said = {"type": reason, "cache_missed_input_tokens": found.lost_tokens}
    return {"cache_miss_reason": said}


def of_openai(ring: Ring, ticket: Ticket, response_id: str) -> dict[str, Any]:
    """The member `prompt_cache_diagnostics` of an answer of OpenAI's APIs.

    Args:
        ring: Remembers earlier requests.
        ticket: Of the request.
        response_id: `prompt_cache_options.comparison_response_id` of the request.
    """
    if ticket.fetch is None or ticket.prompt is None:
        return {"type": _UNAVAILABLE}
    found = _compared(ring, ticket, response_id)
    if isinstance(found, str):
        found = _UNAVAILABLE if found == _NOT_KEPT else found
        return {"type": "comparison_response_not_found" if found == _FORGOTTEN else found}
    if found is None:
        return {"type": "cache_hit"}
    return {
        "type": "cache_miss",
        "reason": _of_openai(found),
        "cache_missed_tokens": len(ticket.prompt.tokens) - found.position,
        "comparison_reusable_tokens": found.position,
    }


_FORGOTTEN, _UNAVAILABLE, _NOT_KEPT = "not_found", "unavailable", "not_kept"
_FEW_TOKENS = 32
"""So much less than all is all: a template may print the end of a prompt otherwise."""


def _compared(ring: Ring, ticket: Ticket, response_id: str) -> Cause | str | None:
    """Why the request parts from the one named; a word if that cannot be told; None if not."""
    compared = ring.compare(ticket, response_id)
    if compared is None:
        return _FORGOTTEN
    old, new, parting = compared
    before, after = old.read(), new.read()
    if before is None or after is None or not parting.old_tokens:
        return _UNAVAILABLE
    cause = cause_of(before, after, parting)
    whole = min(parting.old_tokens, parting.new_tokens - 1)
    read = 0 if ticket.fetch is None else ticket.fetch.num_tokens
    if cause is None:
        return None if read + _FEW_TOKENS >= whole else _NOT_KEPT
    # A cache that cannot be cut where prompts part loses what is in front of that, too.
    lost = max(0, whole - min(cause.position, read))
    return replace(cause, position=min(cause.position, read), lost_tokens=lost) if lost else None


def _of_messages(cause: Cause) -> str:
    match cause.where:
        case "model" | "system" | "tools" | "messages":
            return f"{cause.where}_changed"
        case _:
            return _UNAVAILABLE


def _of_openai(cause: Cause) -> str:
    if cause.where in ("model", "tools"):
        return f"{cause.where}_changed"
    if cause.where == "option" and any(word in cause.at for word in _EFFORT):
        return "reasoning_effort_changed"
    return "context_compacted" if cause.kind is Kind.COMPACTED else "input_changed"
