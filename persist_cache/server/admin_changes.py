"""What the admin API changes of entries: pins, labels and lifetimes, and what is to go."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from persist_cache.queries.as_json import removal_json
from persist_cache.queries.schema import MarkJson
from persist_cache.queries.select import Filters, split_shared
from persist_cache.queries.totals import left_in_trash
from persist_cache.server.admin_entries import FILTERS, Entries, filters_of
from persist_cache.server.answers import Response, json_response
from persist_cache.server.guard import Request
from persist_cache.server.parameters import flag, number, query_of
from persist_cache.server.validation import RefusedError, decode_object
from persist_cache.server.view import View, Views
from persist_cache.store.store import Store

MAX_LABEL = 200
MAX_TTL_S = 100 * 366 * 86400
_MAX_NUMBER = 1 << 53


def checked_label(label: Any) -> str:
    """A label that a request gives.

    Raises:
        RefusedError: It can be none.
    """
    if not isinstance(label, str) or len(label) > MAX_LABEL or not label.isprintable():
        raise RefusedError(400, f"label must be one line of at most {MAX_LABEL} characters.")
    return label


def checked_ttl(ttl_s: Any) -> float:
    """Seconds from now that a request gives.

    Raises:
        RefusedError: They can be none.
    """
    is_number = isinstance(ttl_s, int | float) and not isinstance(ttl_s, bool)
    if not is_number or not 0 < ttl_s < MAX_TTL_S:
        raise RefusedError(400, "ttl_s must be a number of seconds, at most 100 years.")
    return float(ttl_s)


class EntryMarks:
    """Marks entries. Thread safety: may be asked by many threads at once."""

    def __init__(self, views: Views, entries: Entries) -> None:
        self._views = views
        self._entries = entries

    def of_entry(self, given: str, mark: str, request: Request) -> Response:
        """Mark one entry, or take its mark away."""
        change, said = self._read(mark, request)
        full = self._entries.resolve(given)
        try:
            change(self._views.store(), full)
        except KeyError:
            raise self._entries.gone(full) from None
        return json_response(self._marked(full, said))

    def of_group(self, group: str, mark: str, request: Request) -> Response:
        """Mark what only one group uses."""
        change, said = self._read(mark, request)
        view, store = self._views.now(), self._views.store()
        rows = filters_of({"group": group}).rows(view.survey, time.time())
        alone, shared = split_shared(view.survey, rows, group)
        if not rows:
            raise RefusedError(404, "No entry is of this group.")
        changed = []
        for row in alone:
            with contextlib.suppress(KeyError):  # it was evicted meanwhile
                change(store, view.survey.ids[row])
                changed.append(self._marked(view.survey.ids[row], said))
        shared_ids = [view.survey.ids[row] for row in shared]
        return json_response({"entries": changed, "skipped_shared": shared_ids})

    def _read(
        self, mark: str, request: Request
    ) -> tuple[Callable[[Store, str], None], dict[str, Any]]:
        """What a request changes, and how that is said."""
        query_of(request, set())
        sets = request.method == "PUT"
        if mark == "pin":
            return lambda store, one: store.pin(one, sets), {"pinned": sets}
        body = _members(request, "label" if mark == "label" else "ttl_s") if sets else {}
        if mark == "label":
            label = checked_label(body["label"]) if sets else ""
            return lambda store, one: store.set_label(one, label), {"label": label}
        when = self._views.store().clock() + checked_ttl(body["ttl_s"]) if sets else None
        return lambda store, one: store.expire_at(one, when), {"expires": when}

    def _marked(self, full: str, said: Mapping[str, Any]) -> MarkJson:
        return MarkJson(id=full, short_id=self._views.now().short.get(full, full), **said)


def _members(request: Request, name: str) -> dict[str, Any]:
    """The body of a request that has one member, of this name."""
    body = decode_object(request.body)
    if body.keys() != {name}:
        raise RefusedError(400, f"The body must be an object with {name} and nothing else.")
    return body


class Removals:
    """Evicts entries. Thread safety: may be asked by many threads at once."""

    def __init__(self, views: Views, entries: Entries) -> None:
        self._views = views
        self._entries = entries

    def evict(self, given: str, query: Mapping[str, str]) -> Response:
        """Evict one entry, or all that goes on from it as well."""
        view = self._views.now()
        entry = self._entries.entry(view, given)
        chosen, skipped = [entry], []
        if flag(query, "below"):
            chosen = view.branches.below(entry.id)
            # As on the command line: what is pinned goes only when it is named itself.
            skipped = [one for one in chosen if one.pinned and one.id != entry.id]
            chosen = [one for one in chosen if not one.pinned or one.id == entry.id]
        return self._evicted(view, chosen, skipped, dry_run=flag(query, "dry_run"))

    def evict_all(self, request: Request) -> Response:
        """Evict the entries that the query chooses, as the command does."""
        own = {"older_than_s", "larger_than", "all", "dry_run"}
        query = query_of(request, {*FILTERS, *own} - {"pinned"})
        filters = filters_of(query)
        if "older_than_s" in query:
            unused_s = number(query, "older_than_s", 0, 0, _MAX_NUMBER)
            filters = msgspec.structs.replace(filters, unused_s=unused_s)
        if "larger_than" in query:
            least = number(query, "larger_than", 0, 0, _MAX_NUMBER)
            filters = msgspec.structs.replace(filters, larger_than=least)
        everything, chooses = flag(query, "all"), filters != Filters()
        if everything == chooses or query.get("model") == "":
            raise RefusedError(400, "Say which entries: by what they are, or all=true.")
        view, shared = self._views.now(), list[int]()
        rows = filters.rows(view.survey, time.time())
        pinned = set() if everything else _pinned(view, rows)
        skipped = [row for row in rows if row in pinned]
        rows = [row for row in rows if row not in pinned]
        if filters.group is not None:
            rows, shared = split_shared(view.survey, rows, filters.group)
        dry_run = flag(query, "dry_run")
        if filters.group is not None and not dry_run:
            for row in shared:
                with contextlib.suppress(KeyError):
                    self._views.store().leave_group(view.survey.ids[row], filters.group)
        at = view.survey.entries_at
        return self._evicted(view, at(rows), at(skipped), at(shared), dry_run=dry_run)

    def _evicted(
        self,
        view: View,
        chosen: Sequence[Any],
        skipped: Sequence[Any],
        shared: Sequence[Any] = (),
        *,
        dry_run: bool,
    ) -> Response:
        removal = view.survey.removal([one.id for one in chosen])
        freed, stuck = removal.freed_bytes, 0
        if not dry_run and chosen:
            try:
                freed = self._views.store().evict([one.id for one in chosen])
                stuck = left_in_trash(self._views.store(), removal.freed_bytes - freed)
            except KeyError:
                raise RefusedError(
                    409, "Some of these entries went meanwhile; look again."
                ) from None
        return json_response(
            removal_json(
                view.survey,
                chosen,
                removal,
                dry_run=dry_run,
                freed_bytes=freed,
                unremoved_bytes=stuck,
                skipped=skipped,
                shared=shared,
            )
        )


def _pinned(view: View, rows: Sequence[int]) -> set[int]:
    table = view.survey.catalog.table
    return {row for row in rows if table.pinned[row]}
