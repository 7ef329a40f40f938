"""Whether a repair would make the same of two texts where they differ: tried, not guessed."""

from __future__ import annotations

import json
from collections.abc import Sequence

from persist_cache.stability import reminders
from persist_cache.stability.causes.differences import Difference
from persist_cache.stability.causes.kinds import Kind
from persist_cache.stability.causes.shapes import shared
from persist_cache.stability.names import BILLING, CLEARED, COUNTDOWN, DATE, ENV, REMINDERS
from persist_cache.stability.repairs import system_text
from persist_cache.stability.volatile import take_out

_CLEARED = "[Old tool result content cleared"


def mends(one: Difference, kind: Kind, *, is_first: bool) -> bool:
    """Whether the repair of a kind would help.

    Args:
        one: Where two requests differ.
        kind: One of its kinds.
        is_first: It is in the first message of the user.
    """
    repair = kind.known.repair
    if not repair:
        return False
    texts = one.old, one.new
    if repair in (BILLING, COUNTDOWN):
        return all(repair in system_text(text, {repair}).names for text in texts)
    if repair in (DATE, ENV) and one.where == "system":
        return _differ([take_out(text, {repair})[1] for text in texts])
    if repair == DATE:
        return is_first and _differ([_dates_in_reminders(text) for text in texts])
    if repair == ENV:
        return False
    if repair == REMINDERS:
        sorted_texts = [reminders.in_order(text) for text in texts]
        return shared(*sorted_texts) > one.character
    if repair == CLEARED:
        stripped = [text.strip() for text in texts]
        is_whole = all(text.startswith(_CLEARED) and text.endswith("]") for text in stripped)
        return is_whole and one.role == "tool"
    if kind is Kind.TOOL_SPELLING:
        # White space in a description is what it says.
        return bool(json.loads(one.old) == json.loads(one.new))
    return kind is not Kind.THINKING or not one.where  # what the client leaves out is gone


def _dates_in_reminders(text: str) -> list[str]:
    blocks = (text[start:end] for start, end in reminders.blocks_of(text))
    return [found for block in blocks for found in take_out(block, {DATE})[1]]


def _differ(taken: Sequence[Sequence[str]]) -> bool:
    return taken[0] != taken[1]
