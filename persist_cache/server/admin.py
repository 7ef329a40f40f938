"""The admin API: look at what is stored, pin, evict, warm and explain, as JSON over HTTP.

Requests in, responses out; sockets are the server's, and `access` says who may ask.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.entry import TIER_LABELS, Entry
from persist_cache.errors import PersistCacheError, StoreError
from persist_cache.queries.as_json import (
    details_json,
    entry_json,
    explanation_json,
    mark_json,
    removal_json,
    store_json,
    warm_json,
)
from persist_cache.queries.conversations import Branches
from persist_cache.queries.details import details_of, tokens_of
from persist_cache.queries.explain import explain, with_memory
from persist_cache.queries.ids import (
    find_departed,
    find_ids,
    short_entry_ids,
    short_id,
    short_model_names,
)
from persist_cache.queries.select import SORT_KEYS, Filters, order
from persist_cache.queries.totals import Survey, left_in_trash, quarantined
from persist_cache.server import metrics
from persist_cache.server.guard import API_PATH, METRICS_PATH, PAGE_PATH, Guard, Request
from persist_cache.server.model import LoadedModel
from persist_cache.server.rendering import read_request, system_only
from persist_cache.server.validation import RefusedError, check_names, check_prompt, decode_object
from persist_cache.server.view import server_json
from persist_cache.store.store import Store

log = logging.getLogger(__name__)

DEFAULT_LIMIT = 100
MAX_LIMIT = 1000
MAX_LABEL = 200
_ID = re.compile("[0-9a-f]{1,16}")
_FLUSH_S = 60.0
_SETTLE_S = 30.0
_RECENT = 20
_SHAPING = (
    "model",
    "draft_model",
    "adapters",
    "messages",
    "prompt",
    "tools",
    "role_mapping",
    "chat_template_kwargs",
)
"""What of a body chooses the model and shapes the prompt."""
_LOADING_RARELY = 20
"""Statistics may be as old as this many times what loading the index took."""


@dataclass(frozen=True, slots=True)
class Response:
    """What to send back; there are never CORS headers."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


Ask = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]
"""Answers a chat request as if it had come from outside: status and decoded answer."""


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    # Not msgspec: counters may be larger than the 64 bits it knows.
    return Response(status, json.dumps(value, allow_nan=False).encode(), headers=headers or {})


def refusal_response(refusal: RefusedError) -> Response:
    said: Any = str(refusal)
    if refusal.code:
        said = {
            "message": said,
            "type": "invalid_request_error",
            "param": None,
            "code": refusal.code,
        }
    return json_response({"error": said}, refusal.status, refusal.headers)


class Admin:
    """The admin API of one server.

    Thread safety: `answer` may be called from many threads at once. What is kept between
    requests is replaced as a whole, never changed.
    """

    def __init__(
        self,
        cache: PromptCache,
        *,
        token: str | Callable[[], str] | None = None,
        host: str = "127.0.0.1",
        generator: Any = None,
    ) -> None:
        """Answer for `cache`.

        Args:
            cache: What the server serves from.
            token: Secret to ask for, or what tells it; None lets nobody in.
            host: Name or address that the server was bound to.
            generator: The server's `ResponseGenerator`, for what needs its model.
        """
        self._cache = cache
        secret = secrets.token_urlsafe(32) if token is None else token
        self._guard = Guard(secret if callable(secret) else lambda: secret, host)
        self._generator = generator
        self._view: _View | None = None
        self._tokenizer: tuple[Any, Any] | None = None

    def check(self, request: Request) -> None:
        """Decide whether a request may be answered, before its body is read.

        Raises:
            RefusedError: It may not.
        """
        self._guard.check(request)

    # ---- answers -----------------------------------------------------------------------------

    def answer(self, request: Request, ask: Ask | None = None) -> Response:
        """Answer a request that passed `check`; never raises.

        Args:
            request: With its body.
            ask: Runs a chat request, for `warm`.
        """
        try:
            return self._route(request, ask)
        except RefusedError as refusal:
            return refusal_response(refusal)
        except StoreError as error:
            return json_response({"error": str(error)}, 503)
        except PersistCacheError as error:
            return json_response({"error": str(error)}, 409)
        except Exception as error:
            # The message may quote a prompt.
            log.error("the admin API failed: %s", type(error).__name__)
            log.debug("the failure", exc_info=True)
            return json_response({"error": "This could not be answered; the log says more."}, 500)

    def _route(self, request: Request, ask: Ask | None) -> Response:
        path = request.path
        if path == PAGE_PATH:
            _only(request, "GET")
            return page_response()
        if path == METRICS_PATH:
            _only(request, "GET")
            collector = metrics.CacheCollector(self._cache.stats, self._is_healthy)
            return Response(200, metrics.exposition(collector), metrics.CONTENT_TYPE)
        match path.removeprefix(API_PATH).split("/")[1:]:
            case ["entries"]:
                _only(request, "GET")
                return self._list(request)
            case ["entries", entry]:
                _only(request, "GET", "DELETE")
                if request.method == "GET":
                    return self._show(entry, _query(request, {"text"}))
                return self._evict(entry, _query(request, {"below", "dry_run"}))
            case ["entries", entry, "pin"]:
                _only(request, "PUT", "DELETE")
                return self._pin(entry, request.method == "PUT")
            case ["tree"]:
                _only(request, "GET")
                return self._tree(request)
            case ["stats"]:
                _only(request, "GET")
                return json_response(self._stats())
            case ["flush"]:
                _only(request, "POST")
                return self._flush()
            case ["explain"]:
                _only(request, "POST")
                return self._explain(request)
            case ["warm"]:
                _only(request, "POST")
                return self._warm(request, ask)
        raise RefusedError(404, "The admin API has no such path.")

    def _store(self) -> Store:
        store = self._cache._store
        if store is None:
            raise RefusedError(503, f"There is no store: {self._cache.disk_off or 'it is off'}.")
        return store

    def _now(self) -> _View:
        """The store as of now; loaded anew only when something was committed since."""
        store = self._store()
        version = store.commit_id()
        view = self._view
        if view is None or view.version != version:
            view = self._view = _View(version, store)
        return view

    def _lately(self) -> _View:
        """The store as of now or a little earlier: a large one must not be loaded all the time.

        The page asks for statistics every few seconds, beside a decode loop that commits.
        """
        view = self._view
        return view if view is not None and time.monotonic() < view.good_until else self._now()

    def _is_healthy(self) -> bool:
        return self._generator is None or bool(self._generator.is_healthy)

    # ---- entries -----------------------------------------------------------------------------

    def _list(self, request: Request) -> Response:
        query = _query(
            request, {"tier", "model", "label", "pinned", "sort", "limit", "offset", "parent"}
        )
        filters = Filters(
            tiers=(tier,) if (tier := _choice(query, "tier", TIER_LABELS)) else (),
            models=(query["model"],) if "model" in query else (),
            label=query.get("label"),
            pinned=_flag(query, "pinned") if "pinned" in query else None,
        )
        sort = _choice(query, "sort", SORT_KEYS) or "used"
        limit = _number(query, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
        offset = _number(query, "offset", 0, 0, 1 << 53)
        view = self._now()
        if unchanged := view.unchanged(request):
            return unchanged
        rows = filters.rows(view.survey, time.time())
        if "parent" in query:
            parent = None if query["parent"] == "none" else self._resolve(query["parent"])
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

    def _tree(self, request: Request) -> Response:
        """One level of the tree: the roots, or what is in and behind one branch."""
        query = _query(request, {"branch", "limit", "offset"})
        limit = _number(query, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
        offset = _number(query, "offset", 0, 0, 1 << 53)
        view = self._now()
        if unchanged := view.unchanged(request):
            return unchanged
        tree = view.branches
        said: dict[str, Any] = {"branch": None, "entries": []}
        parent = None
        if "branch" in query:
            first = self._resolve(query["branch"])
            try:
                chain = tree.branch(first).entries
            except KeyError:
                raise self._gone(first) from None
            parent = chain[-1].id
            said["branch"] = first
            said["entries"] = [
                {
                    **view.entry_json(entry),
                    "added_bytes": tree.added_bytes[entry.id],
                }
                for entry in chain
            ]
        below = tree.under(parent)
        said["branches"] = [
            self._branch_json(view, entry.id) for entry in below[offset : offset + limit]
        ]
        said |= {"total": len(below), "offset": offset, "limit": limit}
        return json_response(said, headers={"ETag": view.tag})

    def _branch_json(self, view: _View, first: str) -> dict[str, Any]:
        branch = view.branches.branch(first)
        last, totals = branch.entries[-1], branch.totals
        return {
            **view.entry_json(branch.entries[0]),
            "model_name": view.names.get(last.fingerprint, ""),
            "labels": list(dict.fromkeys(one.label for one in branch.entries if one.label))[:3],
            "last": last.id,
            "last_pinned": last.pinned,
            "last_tier": last.tier.label,
            "last_tokens": last.num_tokens,
            "num_entries": len(branch.entries),
            "num_branches": branch.num_branches,
            "below": {
                "entries": totals.entries,
                "bytes": totals.nbytes,
                "hits": totals.hits,
                "saved_s": totals.saved_s,
                "last_use": totals.last_use,
                "pinned": totals.pinned,
            },
        }

    def _resolve(self, given: str) -> str:
        """The full id that `given` begins.

        Raises:
            RefusedError: It is no id, or names no entry, or several.
        """
        prefix = given.lower()
        if not _ID.fullmatch(prefix):
            raise RefusedError(400, "An entry id is made of up to 16 hex digits.")
        store = self._store()
        found = find_ids(store, prefix, limit=2)
        if len(found) > 1:
            raise RefusedError(409, f"Several entries have an id that begins with {prefix}.")
        if not found:
            raise self._gone(prefix)
        return found[0]

    def _gone(self, prefix: str) -> RefusedError:
        departed = find_departed(self._store(), prefix)
        if departed is not None:
            return RefusedError(404, f"Entry {departed.id} is no longer there: {departed.reason}.")
        return RefusedError(404, f"No entry has an id that begins with {prefix}.")

    def _entry(self, view: _View, given: str) -> Entry:
        full = self._resolve(given)
        entry = next((one for one in view.survey.entries if one.id == full), None)
        if entry is None:
            raise self._gone(full)
        return entry

    def _show(self, given: str, query: Mapping[str, str]) -> Response:
        full, store = self._resolve(given), self._store()
        details = details_of(store, full)
        if details is None:
            raise self._gone(full)
        said = details_json(details, short_id(store, full))
        if _flag(query, "text"):
            said["text"] = self._text(details.entry)
        return json_response(said)

    def _text(self, entry: Entry) -> str:
        model = self._model({})
        if model.fingerprint is None or model.fingerprint.hex[:64] != entry.fingerprint:
            raise RefusedError(409, "The tokenizer of this entry's model is not loaded.")
        try:
            tokens = tokens_of(self._store(), entry.id)
        except KeyError:
            raise self._gone(entry.id) from None
        return model.decode(tokens)

    def _pin(self, given: str, pinned: bool) -> Response:
        full = self._resolve(given)
        try:
            self._store().pin(full, pinned)
        except KeyError:
            raise self._gone(full) from None
        return json_response(mark_json(full, self._now().short.get(full, full), pinned=pinned))

    def _evict(self, given: str, query: Mapping[str, str]) -> Response:
        view = self._now()
        entry = self._entry(view, given)
        dry_run = _flag(query, "dry_run")
        chosen, skipped = [entry], []
        if _flag(query, "below"):
            chosen = view.branches.below(entry.id)
            # As on the command line: what is pinned goes only when it is named itself.
            skipped = [one for one in chosen if one.pinned and one.id != entry.id]
            chosen = [one for one in chosen if not one.pinned or one.id == entry.id]
        removal = view.survey.removal([one.id for one in chosen])
        freed, stuck = removal.freed_bytes, 0
        if not dry_run:
            try:
                freed = self._store().evict([one.id for one in chosen])
                stuck = left_in_trash(self._store(), removal.freed_bytes - freed)
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
            )
        )

    # ---- the whole ---------------------------------------------------------------------------

    def _stats(self) -> dict[str, Any]:
        stats = self._cache.stats()
        said: dict[str, Any] = {
            "version": None,
            "time": time.time(),
            "healthy": self._is_healthy(),
            "model": None,
            "texts": True,  # there was a time without a token, and without texts then
            "server": server_json(
                stats, max_size=self._cache.max_size, max_bytes=self._cache.max_bytes
            ),
            "recent": [
                {
                    "source": recent.fetch.source,
                    "num_tokens": recent.fetch.num_tokens,
                    "prompt_tokens": recent.num_tokens,
                    "reason": recent.fetch.reason,
                    "seconds": recent.fetch.seconds,
                    "nbytes": recent.fetch.nbytes,
                }
                for recent in reversed(self._cache.recent_fetches()[-_RECENT:])
            ],
            "store": None,
        }
        key = getattr(getattr(self._generator, "model_provider", None), "model_key", None)
        if key is not None:
            said["model"] = key[0]
        # A store that was lost or fails is one of the things to be seen here.
        with contextlib.suppress(StoreError):
            if stats.store is not None:
                view = self._lately()
                said["store"] = store_json(
                    stats.store, view.survey, quarantined(self._store()), disk_off=stats.disk_off
                )
                said["version"] = view.tag
        return said

    def _flush(self) -> Response:
        done = self._cache.flush(_FLUSH_S)
        stats = self._cache.stats()
        if not done:
            why = stats.disk_off or f"{stats.queued_jobs} saves are still waiting"
            raise RefusedError(503, f"Not everything is on disk yet: {why.rstrip('.')}.")
        return json_response({"flushed": True, "saves": stats.saves, "disk_off": stats.disk_off})

    # ---- what needs the model ----------------------------------------------------------------

    def _model(self, body: Mapping[str, Any]) -> LoadedModel:
        """The model that a request would be answered by, if that is the one that is loaded.

        Raises:
            RefusedError: None is loaded, or another one.
        """
        provider = getattr(self._generator, "model_provider", None)
        key = getattr(provider, "model_key", None)
        tokenizer = getattr(provider, "tokenizer", None)
        if provider is None or key is None or tokenizer is None:
            raise RefusedError(409, "No model is loaded yet; send a chat request first.")
        wanted = body.get("model")
        if wanted is None or wanted == "default_model":
            wanted = provider.cli_args.model or key[0]
        if wanted != key[0]:
            raise RefusedError(409, f"Another model is loaded: {key[0]}.")
        named = body.get("model") or "default_model"
        # By upstream's maps: the adapter of a request counts only if it names the model, too.
        adapter = getattr(provider, "_adapter_map", {}).get(named, body.get("adapters"))
        draft = body.get("draft_model") or "default_model"
        draft = getattr(provider, "_draft_model_map", {}).get(draft, draft)
        if (adapter, draft) != (key[1], key[2]):
            raise RefusedError(409, "The model is loaded with another adapter or draft model.")
        if self._tokenizer is None or self._tokenizer[0] is not tokenizer:
            # The generation thread uses the other one; not all tokenizers bear company.
            self._tokenizer = (tokenizer, copy.deepcopy(tokenizer))
        identify = getattr(provider, "identifier", None)
        fingerprint = None if identify is None else identify(key)
        why = "" if fingerprint is not None or identify is None else str(identify.reason(key))
        return LoadedModel(self._generator, key, self._tokenizer[1], fingerprint, why)

    def _explain(self, request: Request) -> Response:
        body = decode_object(request.body)
        check_prompt(body)
        store = self._store()
        model = self._model(body)
        if model.fingerprint is None:
            raise RefusedError(409, f"The model cannot be identified: {model.why}")
        prompt = model.render(body)
        found = explain(store, model.fingerprint, prompt.tokens, system_tokens=prompt.system_tokens)
        now, in_memory = self._cache.outlook(model.key, prompt.tokens)
        found = with_memory(found, now_tokens=now, memory_tokens=in_memory)
        known = self._cache.known_tokens(model.key, prompt.tokens[:-1])
        return json_response(
            {
                **explanation_json(found, model.decode, show_stored=True),
                # Memory included, which the command line cannot see.
                "known_tokens": known,
            }
        )

    def _warm(self, request: Request, ask: Ask | None) -> Response:
        body = decode_object(request.body)
        marks = _Marks.of(body.pop("cache", None))
        whole = not system_only(read_request(body))
        check_names(body)
        if ask is None:
            raise RefusedError(409, "This server cannot run a model.")
        # How an answer would be sampled, and how long it would be, does not matter here.
        body = {name: body[name] for name in _SHAPING if body.get(name) is not None}
        if not whole:
            # Only what precedes the user message is wanted; nobody else says the same.
            message = {"role": "user", "content": secrets.token_hex(8)}
            body["messages"] = [*body["messages"], message]
        before = self._cache.stats()
        started = time.monotonic()
        with self._generator.keeping_only("prompt" if whole else "system"):
            status, answer = ask({**body, "stream": False, "max_tokens": 1})
        if status != 200:
            raise RefusedError(status, str(answer.get("error", "The model refused this prompt.")))
        spent = time.monotonic() - started
        usage = answer.get("usage", {})
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        model = self._model(body)
        prompt = model.render(body)
        # A request computes its last token itself.
        wanted = prompt.tokens[:-1] if whole else prompt.tokens[: prompt.system_tokens]
        if not wanted:
            raise RefusedError(
                409,
                "This model's chat template puts nothing before the user message; "
                "there is no system part to store.",
            )
        entry = self._settle(model, wanted)
        if entry is not None:
            marks.apply(self._store(), entry.id)
        known = self._cache.known_tokens(model.key, wanted)
        after = self._cache.stats()
        return json_response(
            {
                **warm_json(
                    entry=None if entry is None else entry.id,
                    model=str(model.key[0]),
                    label=marks.label,
                    tier=("user" if whole else "system") if entry is None else entry.tier.label,
                    num_tokens=len(wanted),
                    found_tokens=min(int(cached), len(wanted)),
                    missing_tokens=max(0, len(wanted) - known),
                    written_bytes=after.written_bytes - before.written_bytes,
                    prefill_s=spent,
                ),
                "disk_off": after.disk_off,
            }
        )

    def _settle(self, model: LoadedModel, wanted: list[int]) -> Entry | None:
        """Wait until `wanted` is on disk; None when it does not get there."""
        store = self._cache._store
        if store is None or model.fingerprint is None:
            return None
        deadline = time.monotonic() + _SETTLE_S
        while True:
            match = store.match(model.fingerprint, wanted)
            if match.num_tokens == len(wanted) and match.entries:
                return store.get(match.entries[-1])
            self._cache.flush(_SETTLE_S)
            if time.monotonic() > deadline or self._cache.disk_off:
                return None
            time.sleep(0.05)


class _View:
    """The store as of one commit, and what is worked out from it when somebody asks."""

    def __init__(self, version: int, store: Store) -> None:
        started = time.monotonic()
        self.version = version
        self.survey = Survey(store)
        self.short = short_entry_ids(self.survey)
        self.names = short_model_names(self.survey.models)
        ended = time.monotonic()
        self.good_until = ended + _LOADING_RARELY * (ended - started)
        # Another store may be behind the same address tomorrow.
        self.tag = f'"{_SESSION}-{version}"'
        self._branches: Branches | None = None

    def entry_json(self, entry: Entry) -> dict[str, Any]:
        return entry_json(entry, self.survey.model_of(entry), self.short[entry.id])

    @property
    def branches(self) -> Branches:
        if self._branches is None:
            self._branches = Branches(self.survey)
        return self._branches

    def unchanged(self, request: Request) -> Response | None:
        """The answer to a client that has seen this version already."""
        if request.headers.get("If-None-Match") == self.tag:
            return Response(304, b"", headers={"ETag": self.tag})
        return None


_SESSION = secrets.token_hex(4)


class _Marks(msgspec.Struct, forbid_unknown_fields=True):
    """What a request to warm may say about the entry: its member `cache`."""

    pin: bool = False
    label: str = ""
    ttl_s: float | None = None

    @classmethod
    def of(cls, value: Any) -> _Marks:
        try:
            marks = msgspec.convert(value if value is not None else {}, cls)
        except msgspec.ValidationError:
            raise RefusedError(
                400, "cache must be an object with pin (true or false), label (text), ttl_s."
            ) from None
        if len(marks.label) > MAX_LABEL or not marks.label.isprintable():
            raise RefusedError(400, f"label must be one line of at most {MAX_LABEL} characters.")
        if marks.ttl_s is not None and not 0 < marks.ttl_s < 100 * 366 * 86400:
            raise RefusedError(400, "ttl_s must be a number of seconds, at most 100 years.")
        return marks

    def apply(self, store: Store, entry: str) -> None:
        if self.pin:
            store.pin(entry)
        if self.label:
            store.set_label(entry, self.label)
        if self.ttl_s is not None:
            store.expire_at(entry, store.clock() + self.ttl_s)


# ---- the page ----------------------------------------------------------------------------------


@cache
def _page() -> str:
    return resources.files("persist_cache.server").joinpath("page.html").read_text(encoding="utf-8")


def page_response() -> Response:
    """The page, with a nonce that only its own style and script know."""
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Response(
        200,
        _page().replace("{{nonce}}", nonce).encode(),
        "text/html; charset=utf-8",
        {
            "Content-Security-Policy": policy,
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
        },
    )


# ---- reading requests --------------------------------------------------------------------------


def _only(request: Request, *methods: str) -> None:
    if request.method not in methods:
        raise RefusedError(405, f"Use {' or '.join(methods)} here.", {"Allow": ", ".join(methods)})


def _query(request: Request, known: set[str]) -> dict[str, str]:
    text = request.target.partition("?")[2]
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=20, errors="strict")
    except ValueError:
        raise RefusedError(400, "The query cannot be understood.") from None
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RefusedError(400, "The query names a parameter twice.")
    if not found.keys() <= known:
        allowed = ", ".join(sorted(known))
        raise RefusedError(400, f"The query has an unknown parameter; it may have {allowed}.")
    return found


def _choice(query: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str | None:
    value = query.get(name)
    if value is not None and value not in allowed:
        raise RefusedError(400, f"{name} must be one of {', '.join(allowed)}.")
    return value


def _number(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    value = query.get(name)
    if value is None:
        return default
    known = value.isascii() and value.isdigit() and len(value) <= 16
    if not known or not low <= int(value) <= high:
        raise RefusedError(400, f"{name} must be a whole number from {low} to {high}.")
    return int(value)


def _flag(query: Mapping[str, str], name: str) -> bool:
    value = query.get(name, "false").lower()
    if value not in ("true", "false", "1", "0"):
        raise RefusedError(400, f"{name} must be true or false.")
    return value in ("true", "1")
