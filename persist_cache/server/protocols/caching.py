"""What a request asks of the cache, in the words of OpenAI's API; all protocols here take them.

`read_caching` reads the fields of the body, `breakpoint_of` those of a part of its content. What
is null is absent, and fields that are not known are accepted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from persist_cache.entry import MAX_GROUP, check_group
from persist_cache.server.protocols.asked import Caching, Mark
from persist_cache.server.protocols.fields import below, flag, object_of, text_of
from persist_cache.server.validation import wrong

GROUP, OPTIONS, RETENTION = "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"
NO_STORE, SALT, STORE = "no_store", "cache_salt", "store"
CACHING_FIELDS = (GROUP, OPTIONS, RETENTION, NO_STORE, SALT)
BREAKPOINT = "prompt_cache_breakpoint"
_RETENTIONS = {"in_memory": 0, "in-memory": 0, "24h": 86400}
"""Seconds for which an entry is to be kept at least; entries here are never in memory alone."""
_BREAKPOINT_S = 30 * 60
"""Of a breakpoint that names no time."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_TTL = re.compile(r"([0-9]{1,9})([smhd])")
_MAX_TTL_S = 366 * 86400
_MAX_SALT = 1024


def read_caching(body: Mapping[str, Any]) -> Caching:
    """Read what the body of a request asks of the cache.

    Raises:
        RefusedError: It is malformed.
    """
    options = object_of(body, OPTIONS)
    mode = _one_of(options, "mode", OPTIONS, ("implicit", "explicit"))
    retention = _one_of(body, RETENTION, "", tuple(_RETENTIONS))
    ttl_s = _ttl(options, OPTIONS)
    if ttl_s is None:
        ttl_s = _RETENTIONS[retention or "in_memory"]
    return Caching(
        group=_group(body),
        only_marked=mode == "explicit",
        ttl_s=ttl_s,
        prewarm=bool(flag(options, "prewarm", OPTIONS)),
        salt=salt_of(body),
    )


def checked_group(group: str, name: str) -> str:
    """The name of a group, as it is.

    Raises:
        RefusedError: It can be none; `name` is what the request calls it.
    """
    try:
        check_group(group)
    except ValueError:
        said = f"must be one line of at most {MAX_GROUP} printable characters."
        raise wrong(name, said) from None
    return group


def salt_of(body: Mapping[str, Any]) -> str:
    """What keeps the entries of a request apart from those of others; "" for nothing.

    Raises:
        RefusedError: It is malformed: a request whose salt is not understood is not to be answered
            from what others share.
    """
    salt = body.get(SALT)
    if salt is None:
        return ""
    if not isinstance(salt, str) or not 0 < len(salt) <= _MAX_SALT:
        raise wrong(SALT, f"must be a text of 1 to {_MAX_SALT:,} characters.")
    return salt


def no_store_of(body: Mapping[str, Any], *, respects_store: bool) -> bool | None:
    """Whether nothing of a request is to be kept; None where its body does not say.

    Args:
        body: Of the request.
        respects_store: `store: false` says so as well.

    Raises:
        RefusedError: A field is malformed.
    """
    said = flag(body, NO_STORE)
    if said is not True and respects_store and flag(body, STORE) is False:
        return True
    return said


def breakpoint_of(part: Mapping[str, Any], name: str) -> int | None:
    """For how many seconds what ends with this part is to be kept; None if it has no breakpoint.

    Raises:
        RefusedError: The breakpoint is malformed.
    """
    if part.get(BREAKPOINT) is None:
        return None
    at = below(name, BREAKPOINT)
    found = object_of(part, BREAKPOINT, name)
    _one_of(found, "mode", at, ("explicit",))
    ttl_s = _ttl(found, at)
    return _BREAKPOINT_S if ttl_s is None else ttl_s


def marks_of_chat(messages: Sequence[Mapping[str, Any]]) -> list[Mark]:
    """The places that a chat marks. Parts of a message's content are one text, as they are.

    Raises:
        RefusedError: A breakpoint is malformed.
    """
    marks = []
    for index, message in enumerate(messages):
        content, characters = message.get("content"), 0
        for place, part in enumerate(content if isinstance(content, list) else ()):
            characters += len(part.get("text") or "") if part.get("type") == "text" else 0
            ttl_s = breakpoint_of(part, f"messages[{index}].content[{place}]")
            if ttl_s is not None:
                marks.append(Mark(index, characters, ttl_s))
    return marks


def _group(body: Mapping[str, Any]) -> str:
    if body.get(GROUP) is None:
        return ""
    return checked_group(text_of(body, GROUP, ""), GROUP)


def _ttl(options: Mapping[str, Any], name: str) -> int | None:
    """A length of time in seconds; None where there is none."""
    ttl = options.get("ttl")
    if ttl is None:
        return None
    found = _TTL.fullmatch(ttl) if isinstance(ttl, str) else None
    seconds = 0 if found is None else int(found[1]) * _UNITS[found[2]]
    if not 0 < seconds <= _MAX_TTL_S:
        raise wrong(
            below(name, "ttl"), "must be a length of time such as 30m or 12h, at most 366 days."
        )
    return seconds


def _one_of(
    body: Mapping[str, Any], member: str, name: str, allowed: tuple[str, ...]
) -> str | None:
    value = body.get(member)
    if value is None:
        return None
    if not isinstance(value, str) or value not in allowed:
        raise wrong(below(name, member), f"must be {' or '.join(allowed)}.")
    return value
