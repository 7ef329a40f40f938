"""The groups that an entry belongs to, as its record in the index has them: texts, oldest first.

A group is what clients name by `prompt_cache_key`. Requests that name none are of no group, and
where they share an entry with a group, that is remembered, too: as `NO_GROUP`.
"""

from __future__ import annotations

from typing import Any

from persist_cache.entry import NO_GROUP, check_group

MOST_GROUPS = 8
"""That one entry names. Of the oldest beyond that it is only known that there are others."""
_BETWEEN = b"\0"


def joined(groups: tuple[str, ...], group: str, *, is_new: bool) -> tuple[str, ...]:
    """The groups of an entry that a request uses.

    Args:
        groups: Before; none for an entry that only requests of no group stored.
        group: Of the request.
        is_new: The request has just stored it.
    """
    if not groups:
        if group == NO_GROUP:
            return ()
        return (group,) if is_new else (NO_GROUP, group)
    if group in groups:
        return groups
    others = NO_GROUP in groups or group == NO_GROUP
    named = [one for one in (*groups, group) if one != NO_GROUP]
    if len(named) > MOST_GROUPS:
        named, others = named[-MOST_GROUPS:], True
    return (NO_GROUP, *named) if others else tuple(named)


def pack_groups(groups: tuple[str, ...]) -> bytes:
    """The record of an entry's groups."""
    return _BETWEEN.join(group.encode() for group in groups)


def unpack_groups(raw: Any) -> tuple[str, ...]:
    """What a record says; a damaged one says nothing."""
    try:
        found = tuple(part.decode() for part in bytes(raw or b"").split(_BETWEEN))
        for group in found:
            check_group(group)
    except ValueError:
        return ()
    named = [group for group in found if group != NO_GROUP]
    return found if named and len(set(found)) == len(found) <= MOST_GROUPS + 1 else ()
