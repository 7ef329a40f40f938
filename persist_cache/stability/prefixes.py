"""Which beginnings are shared by prompts, and worth to be kept for those to come."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_TOKENS = 256
"""A shorter beginning is computed faster than it is found."""
_BEGUN_TOKENS = 16
"""What a prompt ends in that the next one need not repeat: the beginning of an answer."""
_NEAR_TOKENS = 64
"""Two places that are no further apart are one: what the user says may begin alike."""


@dataclass(frozen=True, slots=True)
class Known:
    """A prompt that was sent.

    Attributes:
        tokens: Token ids.
        head: How many of them stand before what the user says.
    """

    tokens: Sequence[int]
    head: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """A beginning that is worth to be kept.

    Attributes:
        prompt: Index of a prompt that begins so.
        num_tokens: Its length.
        is_head: It ends before what the user says.
        prompts: How many prompts begin so.
    """

    prompt: int
    num_tokens: int
    is_head: bool
    prompts: int


def worth_keeping(known: Sequence[Known], *, least_tokens: int = LEAST_TOKENS) -> list[Prefix]:
    """Find the beginnings that later prompts will share with these.

    These are the heads: what stands before the user's message is the same in all conversations of a
    client. And there are the places where prompts part that begin alike, such as conversations
    that begin with the same context. A prompt that only continues another one parts nowhere.

    Args:
        known: Prompts, in any order.
        least_tokens: Shorter ones are left out.

    Returns:
        The beginnings, shorter ones before the longer ones that continue them.
    """
    order = sorted(range(len(known)), key=lambda at: list(known[at].tokens))
    heads: dict[tuple[int, ...], int] = {}
    for at in order:
        head = tuple(known[at].tokens[: known[at].head])
        if len(head) >= least_tokens:
            heads.setdefault(head, at)
    places: dict[tuple[int, ...], int] = dict(heads)
    for a, b in itertools.pairwise(order):
        shared = shared_tokens(known[a].tokens, known[b].tokens)
        if shared < least_tokens or shared >= len(known[a].tokens) - _BEGUN_TOKENS:
            continue  # too short, or the one continues the other
        if any(abs(shared - known[one].head) <= _NEAR_TOKENS for one in (a, b)):
            continue  # they part where the head of one of them ends anyway
        places.setdefault(tuple(known[a].tokens[:shared]), a)
    found = []
    for tokens, at in places.items():
        length = len(tokens)
        prompts = sum(tuple(one.tokens[:length]) == tokens for one in known)
        found.append(Prefix(at, length, length <= known[at].head, prompts))
    return sorted(found, key=lambda one: list(known[one.prompt].tokens[: one.num_tokens]))


def shared_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts have in common at their beginning."""
    length = min(len(a), len(b))
    return next((at for at in range(length) if a[at] != b[at]), length)
