"""A prompt's way through the index, found once for all looks of a request.

A server looks several times at what is stored of one prompt: to have it read ahead, to see where
it leaves what is known, and to fetch it. The way is the same as long as nothing was committed.
"""

from __future__ import annotations

from msgspec import Struct

from persist_cache.index import tree
from persist_cache.index.records import NamespaceRecord
from persist_cache.index.transaction import Reader

Ways = tuple[tuple[NamespaceRecord, tree.Walk], ...]


class _Found(Struct, frozen=True):
    """The ways of one prompt, and of what they are true."""

    opening: object
    commit_id: int
    digest: bytes
    packed: bytes
    ways: Ways


class Trail:
    """Remembers the way of the prompt that was looked for last.

    Make one for each request, and give it to each of its looks. It is never believed when
    anything may have changed: another commit, another prompt, model or store is looked up again.

    Thread safety: may be shared between threads; what is found is replaced as a whole.
    """

    def __init__(self) -> None:
        self._found: _Found | None = None

    def ways(self, txn: Reader, opening: object, digest: bytes, packed: bytes) -> Ways:
        """How far a prompt follows the tree of each namespace of a model.

        Args:
            txn: The index.
            opening: Stands for this opening of the index, whose commits are numbered by itself.
            digest: Of the model's fingerprint.
            packed: The prompt.
        """
        found, commit_id = self._found, txn.commit_id
        if (
            found is None
            or found.opening is not opening
            or found.commit_id != commit_id
            or found.digest != digest
            or found.packed != packed
        ):
            namespaces = [namespace for _, namespace in txn.namespaces(digest)]
            ways = tuple((one, tree.walk(txn, one.root, packed)) for one in namespaces)
            found = self._found = _Found(opening, commit_id, digest, packed, ways)
        return found.ways

    def forget(self) -> None:
        """Let go of the prompt: no look will follow."""
        self._found = None
