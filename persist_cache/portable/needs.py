"""What a store lacks of an entry that is to be put into it."""

from __future__ import annotations

from dataclasses import dataclass

from persist_cache.errors import StoreError
from persist_cache.index import tree
from persist_cache.index.records import NO_ENTRY
from persist_cache.index.transaction import Reader
from persist_cache.tokens import TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class Need:
    """What a store lacks of an entry.

    Attributes:
        is_there: It has an entry of exactly these tokens.
        common: Leading tokens whose rows are stored.
        nodes: Those on the way, whose entries must stay.
    """

    is_there: bool
    common: int
    nodes: frozenset[int]


def need_of(txn: Reader, namespace: bytes, packed: bytes, *, has_state: bool, what: str) -> Need:
    """Compare an entry with what is stored.

    Args:
        txn: One look at the index.
        namespace: Key of its model and layout.
        packed: Its tokens.
        has_state: It brings a state of its own.
        what: It, at the beginning of a sentence.

    Raises:
        StoreError: It cannot be resumed from what is stored, and brings no state of its own.
    """
    found = txn.namespaces(namespace)
    path = tree.walk(txn, found[0][1].root if found else tree.NO_ROOT, packed)
    nodes = {step.edge.node for step in path.steps}
    if path.steps:
        below = txn.entry(tree.carrier(txn, path.steps[-1].edge))
        if below is not None:
            nodes.add(below.node)
    ends = path.common == len(packed) // TOKEN_BYTES and path.node is not None
    is_there = ends and path.steps[-1].edge.entry != NO_ENTRY
    if not is_there and not has_state and path.complete_tokens < path.common:
        raise StoreError(
            f"{what} cannot be added: the store has its tokens with the rows of only some layers. "
            "Evict those entries first."
        )
    return Need(is_there, path.common, frozenset(nodes))
