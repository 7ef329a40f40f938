"""Why no more of a prompt was found: the sentences of `MissReason`, and which reason is true.

Programs decide by the enum; people, `x-persist-cache` and counters get the sentence. Counters of
stores are keyed by the sentence up to its colon, so `reason_of` reads those of earlier versions.
"""

from __future__ import annotations

from persist_cache.entry import Match, MissReason

_SENTENCES = {
    MissReason.NOTHING_STORED: "nothing is stored for this model",
    MissReason.OTHER_IDENTITY: "stored under another {}",
    MissReason.OTHER_PROMPT: "no stored prompt begins with the first token",
    MissReason.UNKNOWN_PROMPT: "nothing is known of this prompt",
    MissReason.NO_CHECKPOINT: "no checkpoint there: this model's cache cannot be trimmed",
    MissReason.ENDS: "what is stored ends here",
    MissReason.DIVERGES: "what is stored goes on differently",
    MissReason.FEW_MORE: (
        "the disk has a few tokens more: computing them is faster than reading them"
    ),
    MissReason.UNIDENTIFIED_MODEL: "this model is kept in memory only: {}",
    MissReason.NO_STORE: "no store was given",
    MissReason.LOOK_UP_FAILED: "the look-up failed",
    MissReason.UNREADABLE: "what was stored could not be read",
    MissReason.CHANGED_IN_MEMORY: "the cache in memory was changed",
    MissReason.DISK_ERROR: "{}",
}
_BEGINNINGS = {
    said.partition(":")[0].removesuffix("{}").rstrip(): why
    for why, said in _SENTENCES.items()
    if said != "{}"
} | {"no stored prompt begins with": MissReason.OTHER_PROMPT}
_ANSWERS_OF_THE_DISK = (
    None,
    MissReason.NOTHING_STORED,
    MissReason.OTHER_IDENTITY,
    MissReason.OTHER_PROMPT,
    MissReason.NO_CHECKPOINT,
    MissReason.ENDS,
    MissReason.DIVERGES,
)


def sentence(why: MissReason | None, detail: str = "") -> str:
    """A reason in words; "" when there is none.

    Args:
        why: The reason.
        detail: For `OTHER_IDENTITY` the fields, for `UNIDENTIFIED_MODEL` why it is none, for
            `DISK_ERROR` the sentence of the error.
    """
    return "" if why is None else _SENTENCES[why].format(detail)


def reason_of(said: str) -> MissReason:
    """The reason behind a sentence, or behind the part of it that counters are keyed by."""
    for beginning, why in _BEGINNINGS.items():
        if said.startswith(beginning):
            return why
    return MissReason.DISK_ERROR


def kind_of_reason(said: str) -> str:
    """The part of a sentence that is the same for all of its kind, to count by."""
    return said.partition(":")[0] or sentence(MissReason.UNKNOWN_PROMPT)


def nothing(why: MissReason, detail: str = "") -> Match:
    """A match of no tokens, for a reason; `detail` as for `sentence`."""
    return Match(0, reason=sentence(why, detail), why=why)


def why_no_more(
    found: int, limit: int, on_disk: Match, in_memory: tuple[int, bool], *, asked_disk: bool
) -> tuple[MissReason | None, str]:
    """Say why a request gets `found` tokens and not `limit`.

    Args:
        found: Tokens that it gets, from wherever.
        limit: Tokens that it could get at most.
        on_disk: What the disk has; its reason is an error's if it could not be read.
        in_memory: Leading tokens that it shares with any cache in memory, and whether one goes on
            after them.
        asked_disk: Whether there is a disk to ask.

    Returns:
        The reason and its sentence; None and "" when it gets all.
    """
    if found >= limit:
        return None, ""
    the_disk = on_disk.why, on_disk.reason
    if asked_disk and on_disk.why not in _ANSWERS_OF_THE_DISK:
        return the_disk
    if on_disk.num_tokens > found:
        why = MissReason.FEW_MORE
    elif found < max(on_disk.common_tokens, in_memory[0]):
        why = MissReason.NO_CHECKPOINT
    elif found == 0:
        return the_disk
    else:
        shared, goes_on = in_memory
        goes_on = (goes_on and shared == found) or (
            on_disk.why is MissReason.DIVERGES and on_disk.common_tokens == found
        )
        why = MissReason.DIVERGES if goes_on else MissReason.ENDS
    return why, sentence(why)
