"""Entries as a tree of conversations: what continues what, unbranched stretches put together.

One pass over a survey; the admin page shows a store of any size with it, a level at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct, field

from persist_cache.entry import Entry, Tier
from persist_cache.queries.totals import Survey

MAX_CHAIN = 100
"""Entries of one branch; what follows in a longer conversation is a branch of its own."""


class Totals(Struct):
    """An entry together with everything that continues it.

    Attributes:
        entries: Number of them.
        nbytes: Bytes of files that nothing else needs.
        hits: Requests that one of them served, from disk or out of memory.
        saved_s: Seconds of prefill that saved, less what reading took.
        last_use: Latest use, UTC seconds.
        pinned: How many are pinned.
    """

    entries: int = 0
    nbytes: int = 0
    hits: int = 0
    saved_s: float = 0.0
    last_use: float = 0.0
    pinned: int = 0


class Branch(Struct, frozen=True):
    """Entries that continue each other without a fork; a system prompt stands by itself.

    Attributes:
        entries: In order, at least one.
        num_branches: Branches that go on behind the last one.
        totals: Of all of them, and of what continues them.
    """

    entries: tuple[Entry, ...]
    num_branches: int
    totals: Totals = field(default_factory=Totals)


class Branches:
    """The tree of one survey."""

    def __init__(self, survey: Survey) -> None:
        self._entries = {entry.id: entry for entry in survey.entries}
        self._totals = {entry.id: Totals() for entry in survey.entries}
        self._children: dict[str | None, list[Entry]] = {}
        self.added_bytes = _added_bytes(survey)
        """Per entry the bytes of what it has beyond the entry that it continues."""
        exclusive = _exclusive_bytes(survey)
        # What continues an entry has more tokens, so every sum is complete when it is passed up.
        for entry in sorted(survey.entries, key=lambda one: -one.num_tokens):
            totals = self._totals[entry.id]
            totals.entries += 1
            totals.nbytes = exclusive[entry.id]
            totals.hits += entry.hits
            totals.saved_s += entry.saved_s
            totals.last_use = max(totals.last_use, entry.last_use)
            totals.pinned += entry.pinned
            above = self._totals.get(entry.parent or "")
            if above is not None:
                above.entries += totals.entries
                above.hits += totals.hits
                above.saved_s += totals.saved_s
                above.last_use = max(above.last_use, totals.last_use)
                above.pinned += totals.pinned
            self._children.setdefault(entry.parent, []).append(entry)
        for below in self._children.values():
            below.sort(key=lambda one: (-self._totals[one.id].last_use, one.id))

    def under(self, parent: str | None) -> Sequence[Entry]:
        """First entries of the branches behind `parent`, the latest used first; None: the roots."""
        return self._children.get(parent, [])

    def branch(self, first: str) -> Branch:
        """The branch that begins with the entry `first`.

        Raises:
            KeyError: There is no such entry.
        """
        chain = [self._entries[first]]
        while len(chain) < MAX_CHAIN:
            below = self.under(chain[-1].id)
            if len(below) != 1 or below[0].tier < chain[-1].tier == Tier.SYSTEM:
                break
            chain.append(below[0])
        return Branch(tuple(chain), len(self.under(chain[-1].id)), self._totals[first])

    def below(self, first: str) -> list[Entry]:
        """The entry `first` and all that continue it."""
        found = []
        pending = [self._entries[first]]
        while pending:
            entry = pending.pop()
            found.append(entry)
            pending += self.under(entry.id)
        return found


def _exclusive_bytes(survey: Survey) -> dict[str, int]:
    """Per entry the bytes of files that only it and what continues it need."""
    catalog = survey.catalog
    table = catalog.table
    amounts = list(catalog.shares)
    checkpoints = catalog.checkpoint_bytes(table.checkpoints)
    for node, nbytes in zip(table.nodes, checkpoints, strict=True):
        amounts[catalog.places[node]] += nbytes
    below = catalog.sum_upwards(amounts)
    found = {}
    for entry, node in zip(survey.entries, table.nodes, strict=True):
        place = catalog.places[node]
        nbytes, users = below[place], catalog.users[place]
        place = catalog.above[place]
        while place >= catalog.first and catalog.users[place] == users:
            nbytes += catalog.shares[place]
            place = catalog.above[place]
        found[entry.id] = nbytes
    return found


def _added_bytes(survey: Survey) -> dict[str, int]:
    """Per entry the bytes of its rows behind the entry above it, and of its checkpoint."""
    return {entry.id: survey.added_bytes(entry) for entry in survey.entries}
