"""Why no more of a prompt was found: the sentences, and which one is true of memory and disk."""

from __future__ import annotations

from persist_cache.entry import Match
from persist_cache.store.kin import NOTHING_STORED, STORED_OTHERWISE

OTHER_PROMPT = "no stored prompt begins with the first token"
NO_CHECKPOINT = "no checkpoint there: this model's cache cannot be trimmed"
ENDS = "what is stored ends here"
DIVERGES = "what is stored goes on differently"
FEW_MORE = "the disk has a few tokens more: computing them is faster than reading them"
UNREADABLE = "what was stored could not be read"

_OF_THE_DISK = ("", NOTHING_STORED, OTHER_PROMPT, NO_CHECKPOINT, ENDS, DIVERGES)


def kind_of_reason(reason: str) -> str:
    """The part of a reason that is the same for all of its kind, to count by."""
    return reason.partition(":")[0] or "nothing is known of this prompt"


def why_no_more(
    found: int, limit: int, on_disk: Match, in_memory: tuple[int, bool], *, asked_disk: bool
) -> str:
    """Say why a request gets `found` tokens and not `limit`.

    Args:
        found: Tokens that it gets, from wherever.
        limit: Tokens that it could get at most.
        on_disk: What the disk has; its reason is an error's sentence if it could not be read.
        in_memory: Leading tokens that it shares with any cache in memory, and whether one goes on
            behind them.
        asked_disk: Whether there is a disk to ask.

    Returns:
        The reason; "" when it gets all.
    """
    if found >= limit:
        return ""
    has_answer = on_disk.reason in _OF_THE_DISK or on_disk.reason.startswith(STORED_OTHERWISE)
    if asked_disk and not has_answer:
        return on_disk.reason
    if on_disk.num_tokens > found:
        return FEW_MORE
    if found < max(on_disk.common_tokens, in_memory[0]):
        return NO_CHECKPOINT
    if found == 0:
        return on_disk.reason
    shared, goes_on = in_memory
    goes_on = (goes_on and shared == found) or (
        on_disk.reason == DIVERGES and on_disk.common_tokens == found
    )
    return DIVERGES if goes_on else ENDS
