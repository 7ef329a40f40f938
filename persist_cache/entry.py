"""The plain values the rest of the package speaks in: tiers, entries, matches.

Nothing here touches a disk or a model.
"""

from __future__ import annotations

import enum

from msgspec import Struct


class Tier(enum.IntEnum):
    """Role class of an entry; a higher tier is kept longer (mlx-lm's `cache_type`)."""

    ASSISTANT = 0
    USER = 1
    SYSTEM = 2

    @classmethod
    def parse(cls, name: str | Tier) -> Tier:
        """Return the tier called `name`.

        Raises:
            ValueError: `name` is not one of `assistant`, `user`, `system`.
        """
        if isinstance(name, Tier):
            return name
        try:
            return cls[name.upper()]
        except (KeyError, AttributeError):
            raise ValueError(f"unknown tier {name!r}: use one of assistant, user, system") from None

    @property
    def label(self) -> str:
        return TIER_LABELS[self]


TIER_LABELS = tuple(tier.name.lower() for tier in Tier)
"""`("assistant", "user", "system")`: eviction order, as in mlx-lm's `CacheOrder`."""


PARTIAL_LABEL = "(partial)"
"""Label of an entry whose prefill was interrupted, or is not at its end yet. It goes when a longer
one is stored whose beginning it is."""


SOURCES = ("memory", "disk", "remote")
"""Where a hit may come from. What a remote had was put on the disk for it, and read from there."""


NO_GROUP = ""
"""Stands, among the groups of an entry, for requests that name none."""
MAX_GROUP = 256
"""Characters of a group's name."""


def check_group(group: str) -> None:
    """Check the name of a group.

    Raises:
        ValueError: It is too long, or not one line of characters that can be printed.
    """
    if len(group) > MAX_GROUP or not group.isprintable():
        raise ValueError(f"a group is one line of at most {MAX_GROUP} printable characters")


class MissReason(enum.Enum):
    """Why no more of a prompt was found; `store.reasons` puts it into words.

    The values are the labels of `/metrics`.
    """

    NOTHING_STORED = "nothing_stored"
    OTHER_IDENTITY = "other_identity"
    """The model's prompts were stored by another version of it, or with other options."""
    OTHER_PROMPT = "other_prompt"
    UNKNOWN_PROMPT = "unknown_prompt"
    NO_CHECKPOINT = "no_checkpoint"
    """More is shared, but cannot be resumed where the prompts part."""
    ENDS = "ends"
    DIVERGES = "diverges"
    FEW_MORE = "few_more"
    """Memory serves it, though the disk has a little more."""
    UNIDENTIFIED_MODEL = "unidentified_model"
    NO_STORE = "no_store"
    LOOK_UP_FAILED = "look_up_failed"
    UNREADABLE = "unreadable"
    CHANGED_IN_MEMORY = "changed_in_memory"
    """In counters of earlier versions only."""
    DISK_ERROR = "disk_error"
    """The sentence is that of an error from the store, or says why there is none."""


class Entry(Struct, frozen=True):
    """One stored prompt prefix that can be resumed.

    Attributes:
        id: 16 hex digits, a digest of namespace and tokens: stable over restarts.
        fingerprint: Hex digest of the model identity it belongs to.
        tier: Role class.
        num_tokens: Length of the prefix.
        own_bytes: Bytes of files that only this entry needs.
        shared_bytes: Bytes of files that it shares with other entries.
        created: UTC seconds.
        last_use: UTC seconds; survives restarts.
        hits: Requests that it served, from disk or out of memory.
        saved_s: Seconds of prefill that those hits saved, less what reading took; estimated.
        prefill_s: Seconds that computing all of it took; 0 when nobody measured.
        pinned: Exempt from eviction.
        expires: UTC seconds after which it is evicted first, or None.
        label: Name given by the user, or "".
        parent: Id of the nearest entry that is a prefix of this one, or None.
        keep_s: Seconds behind each use in which it goes after others of its tier.
        groups: That use it, oldest first; among several, "" stands for requests of no group.
    """

    id: str
    fingerprint: str
    tier: Tier
    num_tokens: int
    own_bytes: int
    shared_bytes: int
    created: float
    last_use: float
    hits: int = 0
    saved_s: float = 0.0
    prefill_s: float = 0.0
    pinned: bool = False
    expires: float | None = None
    label: str = ""
    parent: str | None = None
    keep_s: int = 0
    groups: tuple[str, ...] = ()


class Run(Struct, frozen=True):
    """The leading rows of one blob, as a part of a path.

    Attributes:
        blob: Name of the blob (32 hex digits).
        start: Position of the blob's first token in the prompt.
        num_tokens: Tokens used, counted from `start`; at most the blob's own length.
    """

    blob: str
    start: int
    num_tokens: int


class Match(Struct, frozen=True):
    """The longest stored prefix of a prompt that can be resumed.

    Attributes:
        num_tokens: Tokens that need not be computed; 0 is a miss.
        runs: Blobs to read, in order; together they cover `num_tokens`.
        checkpoint: Blob that holds the state at `num_tokens`, or None when rows suffice.
        common_tokens: Tokens shared with any stored path, resumable or not.
        entries: Entries on the path, shallowest first, that this match uses.
        nbytes: Bytes that reading it takes.
        saved_s: Seconds that computing its tokens takes, 0 when nobody measured.
        reason: Why it is no longer, in words for `explain` and `stats`.
        why: The same for programs; None when it is as long as it may be.
    """

    num_tokens: int
    runs: tuple[Run, ...] = ()
    checkpoint: str | None = None
    common_tokens: int = 0
    entries: tuple[str, ...] = ()
    nbytes: int = 0
    saved_s: float = 0.0
    reason: str = ""
    why: MissReason | None = None
