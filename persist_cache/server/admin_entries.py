"""The admin API's entries: list them, show one, pin it, evict it; and the tree they make."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import UNSET, Struct
from msgspec.structs import asdict

from persist_cache.entry import TIER_LABELS, Entry
from persist_cache.queries.as_json import details_json
from persist_cache.queries.details import details_of, tokens_of
from persist_cache.queries.ids import find_departed, find_ids, short_id
from persist_cache.queries.schema import EntryJson
from persist_cache.queries.select import SORT_KEYS, Filters, order
from persist_cache.server.answers import Response, json_response
from persist_cache.server.guard import Request
from persist_cache.server.model import Models
from persist_cache.server.parameters import choice, flag, number, query_of
from persist_cache.server.validation import RefusedError
from persist_cache.server.view import View, Views

DEFAULT_LIMIT = 100
MAX_LIMIT = 1000
_ID = re.compile("[0-9a-f]{1,16}")


FILTERS = frozenset({"tier", "model", "label", "group", "pinned"})
"""Parameters that choose entries."""


def filters_of(query: Mapping[str, str]) -> Filters:
    """What a query chooses entries by.

    Raises:
        RefusedError: It is malformed.
    """
    if query.get("group") == "":
        raise RefusedError(400, "An empty group is that of no request.")
    return Filters(
        tiers=(tier,) if (tier := choice(query, "tier", TIER_LABELS)) else (),
        models=(query["model"],) if "model" in query else (),
        label=query.get("label"),
        group=query.get("group"),
        pinned=flag(query, "pinned") if "pinned" in query else None,
    )


class _ChainedJson(EntryJson, frozen=True, kw_only=True):
    """An entry of a branch, and what it added to the one before."""

    added_bytes: int


class _BelowJson(Struct, frozen=True, kw_only=True):
    """Totals of a branch and of what goes on from it."""

    entries: int
    bytes: int
    hits: int
    saved_s: float
    last_use: float
    pinned: int


class _BranchJson(EntryJson, frozen=True, kw_only=True):
    """A branch of the tree of conversations: its first entry, and what it leads to."""

    model_name: str
    labels: Sequence[str]
    last: str
    last_pinned: bool
    last_tier: str
    last_tokens: int
    num_entries: int
    num_branches: int
    below: _BelowJson


class Entries:
    """Answers about entries. Thread safety: may be asked by many threads at once."""

    def __init__(self, views: Views, models: Models, *, texts: bool = True) -> None:
        self._views = views
        self._models = models
        self._texts = texts

    def list(self, request: Request) -> Response:
        query = query_of(
            request,
            {"tier", "model", "label", "group", "pinned", "sort", "limit", "offset", "parent"},
        )
        filters = filters_of(query)
        sort = choice(query, "sort", SORT_KEYS) or "used"
        limit = number(query, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
        offset = number(query, "offset", 0, 0, 1 << 53)
        view = self._views.now()
        if unchanged := view.unchanged(request):
            return unchanged
        rows = filters.rows(view.survey, time.time())
        if "parent" in query:
            parent = None if query["parent"] == "none" else self.resolve(query["parent"])
            rows = [row for row in rows if view.survey.entries[row].parent == parent]
        rows = order(view.survey, rows, sort, view.names)
        shown = view.survey.entries_at(rows[offset : offset + limit])
        return json_response(
            {
                "entries": [view.entry_json(entry) for entry in shown],
                "total": len(rows),
                "offset": offset,
                "limit": limit,
            },
            headers={"ETag": view.tag},
        )

    def tree(self, request: Request) -> Response:
        """One level of the tree: the roots, or what is in and behind one branch."""
        query = query_of(request, {"branch", "limit", "offset", "sort"})
        limit = number(query, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
        offset = number(query, "offset", 0, 0, 1 << 53)
        view = self._views.now()
        if unchanged := view.unchanged(request):
            return unchanged
        tree = view.branches
        said: dict[str, Any] = {"branch": None, "entries": []}
        parent = None
        if "branch" in query:
            first = self.resolve(query["branch"])
            try:
                chain = tree.branch(first).entries
            except KeyError:
                raise self.gone(first) from None
            parent = chain[-1].id
            said["branch"] = first
            said["entries"] = [
                _ChainedJson(
                    **asdict(view.entry_json(entry)), added_bytes=tree.added_bytes[entry.id]
                )
                for entry in chain
            ]
        below = tree.under(parent)
        if choice(query, "sort", ("used", "size")) == "size":
            below = sorted(below, key=lambda one: -tree.branch(one.id).totals.nbytes)
        said["branches"] = [
            self._branch_json(view, entry.id) for entry in below[offset : offset + limit]
        ]
        said |= {"total": len(below), "offset": offset, "limit": limit}
        return json_response(said, headers={"ETag": view.tag})

    def _branch_json(self, view: View, first: str) -> _BranchJson:
        branch = view.branches.branch(first)
        last, totals = branch.entries[-1], branch.totals
        return _BranchJson(
            **asdict(view.entry_json(branch.entries[0])),
            model_name=view.names.get(last.fingerprint, ""),
            labels=list(dict.fromkeys(one.label for one in branch.entries if one.label))[:3],
            last=last.id,
            last_pinned=last.pinned,
            last_tier=last.tier.label,
            last_tokens=last.num_tokens,
            num_entries=len(branch.entries),
            num_branches=branch.num_branches,
            below=_BelowJson(
                entries=totals.entries,
                bytes=totals.nbytes,
                hits=totals.hits,
                saved_s=totals.saved_s,
                last_use=totals.last_use,
                pinned=totals.pinned,
            ),
        )

    def resolve(self, given: str) -> str:
        """The full id that `given` begins.

        Raises:
            RefusedError: It is no id, or names no entry, or several.
        """
        prefix = given.lower()
        if not _ID.fullmatch(prefix):
            raise RefusedError(400, "An entry id is made of up to 16 hex digits.")
        store = self._views.store()
        found = find_ids(store, prefix, limit=2)
        if len(found) > 1:
            raise RefusedError(409, f"Several entries have an id that begins with {prefix}.")
        if not found:
            raise self.gone(prefix)
        return found[0]

    def named(self, request: Request) -> Sequence[str]:
        """The full ids that a request names: `ids`, separated by commas, or a `group`.

        Raises:
            RefusedError: It names none, or both, or what is not there.
        """
        query = query_of(request, {"ids", "group"})
        if len(query) != 1:
            raise RefusedError(400, "Name the entries by ids, separated by commas, or by a group.")
        if "ids" in query:
            return list(dict.fromkeys(map(self.resolve, query["ids"].split(","))))
        survey = self._views.now().survey
        rows = filters_of(query).rows(survey, time.time())
        found = [survey.ids[row] for row in rows]
        if not found:
            raise RefusedError(404, "No entry is of this group.")
        return found

    def gone(self, prefix: str) -> RefusedError:
        """The refusal of an entry that is not there, and why, if that is known."""
        departed = find_departed(self._views.store(), prefix)
        if departed is not None:
            return RefusedError(404, f"Entry {departed.id} is no longer there: {departed.reason}.")
        return RefusedError(404, f"No entry has an id that begins with {prefix}.")

    def entry(self, view: View, given: str) -> Entry:
        full = self.resolve(given)
        entry = next((one for one in view.survey.entries if one.id == full), None)
        if entry is None:
            raise self.gone(full)
        return entry

    def show(self, given: str, query: Mapping[str, str]) -> Response:
        full, store = self.resolve(given), self._views.store()
        details = details_of(store, full)
        if details is None:
            raise self.gone(full)
        wants_text = flag(query, "text")
        if wants_text and not self._texts:
            raise RefusedError(403, "This server was started with --no-text: it shows no prompts.")
        text = self._text(details.entry) if wants_text else UNSET
        return json_response(details_json(details, short_id(store, full), text=text))

    def _text(self, entry: Entry) -> str:
        model = self._models.loaded({})
        if model.fingerprint is None or model.fingerprint.hex[:64] != entry.fingerprint:
            raise RefusedError(409, "The tokenizer of this entry's model is not loaded.")
        try:
            tokens = tokens_of(self._views.store(), entry.id)
        except KeyError:
            raise self.gone(entry.id) from None
        return model.decode(tokens)
