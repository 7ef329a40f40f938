"""The admin API: look at what is stored, pin, evict, warm and explain, as JSON over HTTP.

Requests in, responses out; sockets are the server's, and `access` says who may ask.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.errors import PersistCacheError, StoreError
from persist_cache.queries.as_json import (
    store_json,
)
from persist_cache.queries.schema import BroughtJson
from persist_cache.queries.totals import quarantined
from persist_cache.server.admin_changes import EntryMarks, Removals
from persist_cache.server.admin_entries import Entries
from persist_cache.server.admin_history import History
from persist_cache.server.admin_prompts import Ask, Prompts
from persist_cache.server.admin_requests import Requests
from persist_cache.server.admin_store import Upkeep
from persist_cache.server.answers import Response, json_response, refusal_response
from persist_cache.server.guard import API_PATH, METRICS_PATH, PAGE_PATH, Guard, Request
from persist_cache.server.model import Models
from persist_cache.server.page import page_response
from persist_cache.server.parameters import only, query_of
from persist_cache.server.previews import MAX_IDS, Previews
from persist_cache.server.residence import residence
from persist_cache.server.validation import RefusedError
from persist_cache.server.view import Views, server_json
from persist_cache.sharing.as_json import RemoteJson, brought_json, remote_json

log = logging.getLogger(__name__)

_FLUSH_S = 60.0
_RECENT = 20
_HEX = frozenset("0123456789abcdef")


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
        texts: bool = True,
        default_store: bool = False,
    ) -> None:
        """Answer for `cache`.

        Args:
            cache: What the server serves from.
            token: Secret to ask for, or what tells it; None lets nobody in.
            host: Name or address that the server was bound to.
            generator: The server's `ResponseGenerator`, for what needs its model.
            texts: Whether prompts may be shown as text.
            default_store: Whether commands use its store without being told.
        """
        self._cache = cache
        self._default_store = default_store
        secret = secrets.token_urlsafe(32) if token is None else token
        self._guard = Guard(secret if callable(secret) else lambda: secret, host)
        self._generator = generator
        self._views = Views(cache)
        models = Models(generator)
        self._texts = texts
        self._entries = Entries(self._views, models, texts=texts)
        self._removals = Removals(self._views, self._entries)
        self._entry_marks = EntryMarks(self._views, self._entries)
        self._upkeep = Upkeep(self._views, models)
        self._prompts = Prompts(
            cache, self._views, models, texts=texts, remote_said=self._remote_said
        )
        self._requests = Requests(generator, self._views, texts=texts)
        self._previews = Previews(self._views, models, texts=texts)
        self.history = History(self._views, generator)

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
        except RecursionError:  # of a repair, a copy or a template
            return json_response({"error": "The body is nested too deeply."}, 400)
        except Exception as error:
            # The message may quote a prompt.
            log.error("the admin API failed: %s", type(error).__name__)
            log.debug("the failure", exc_info=True)
            return json_response({"error": "This could not be answered; the log says more."}, 500)

    def _route(self, request: Request, ask: Ask | None) -> Response:
        path = request.path
        if path == PAGE_PATH:
            only(request, "GET")
            return page_response()
        if path == METRICS_PATH:
            from persist_cache.server import metrics  # of prometheus-client, for who scrapes

            only(request, "GET")
            collector = metrics.CacheCollector(
                self._cache.stats, self._is_healthy, remote=self._remote
            )
            return Response(200, metrics.exposition(collector), metrics.CONTENT_TYPE)
        match path.removeprefix(API_PATH).split("/")[1:]:
            case ["entries"]:
                only(request, "GET", "POST", "DELETE")
                if request.method == "POST":
                    return self._prompts.warm(request, ask)
                if request.method == "DELETE":
                    return self._removals.evict_all(request)
                return self._entries.list(request)
            case ["entries", entry]:
                only(request, "GET", "DELETE")
                if request.method == "GET":
                    return self._entries.show(entry, query_of(request, {"text"}))
                return self._removals.evict(entry, query_of(request, {"below", "dry_run"}))
            case ["entries", entry, "pin" | "label" | "ttl" as mark]:
                only(request, "PUT", "DELETE")
                return self._entry_marks.of_entry(entry, mark, request)
            case ["groups", group, "pin" | "label" | "ttl" as mark]:
                only(request, "PUT", "DELETE")
                return self._entry_marks.of_group(unquote(group), mark, request)
            case ["tree"]:
                only(request, "GET")
                return self._entries.tree(request)
            case ["requests"]:
                only(request, "GET")
                return self._requests.list(request)
            case ["requests", id]:
                only(request, "GET")
                return self._requests.show(id, request)
            case ["ps"]:
                only(request, "GET")
                return json_response(residence(self._generator, self._cache))
            case ["requests", id, "warm"]:
                only(request, "POST")
                return self._prompts.warm_again(request, *self._requests.replayed(id), ask)
            case ["history"]:
                only(request, "GET")
                return self.history.show(request)
            case ["previews"]:
                only(request, "GET")
                return self._preview(request)
            case ["stats"]:
                only(request, "GET")
                return json_response(self._stats())
            case ["flush"]:
                only(request, "POST")
                return self._flush()
            case ["gc" | "compact"]:
                only(request, "POST")
                return self._upkeep.gc(request)
            case ["check"]:
                only(request, "POST")
                return self._upkeep.check(request)
            case ["export"]:
                only(request, "GET")
                return self._upkeep.export(self._entries.named(request))
            case ["import"]:
                only(request, "POST")
                return self._upkeep.import_(request)
            case ["explain"]:
                only(request, "POST")
                return self._prompts.explain(request)
            case ["warm"]:
                only(request, "POST")
                return self._prompts.warm(request, ask)
        raise RefusedError(404, "The admin API has no such path.")

    def _preview(self, request: Request) -> Response:
        ids = [one for one in query_of(request, {"ids"}).get("ids", "").split(",") if one]
        if not 0 < len(ids) <= MAX_IDS:
            raise RefusedError(400, f"Name one to {MAX_IDS} entries by ids, separated by commas.")
        if not all(len(id) == 16 and set(id) <= _HEX for id in ids):
            raise RefusedError(400, "A preview needs whole ids, of 16 hex digits.")
        return json_response(self._previews.of(ids))

    def _model_state(self) -> str:
        """`ready`, `loading`, `none` where no model was named, or `failed`."""
        if self._generator is None:
            return "none"
        if not self._is_healthy():
            return "failed"
        provider = getattr(self._generator, "model_provider", None)
        if getattr(provider, "model_key", None) is not None:
            return "ready"
        args = getattr(self._generator, "cli_args", None)
        return "loading" if getattr(args, "model", None) else "none"

    def _is_healthy(self) -> bool:
        return self._generator is None or bool(self._generator.is_healthy)

    # ---- the whole ---------------------------------------------------------------------------

    def _stats(self) -> dict[str, Any]:
        stats = self._cache.stats()
        said: dict[str, Any] = {
            "version": None,
            "time": time.time(),
            "healthy": self._is_healthy(),
            "model": None,
            "texts": self._texts,
            "stabilize": sorted(getattr(self._generator, "stabilize", ())),
            "model_state": self._model_state(),
            "server": server_json(
                stats, max_size=self._cache.max_size, max_bytes=self._cache.max_bytes
            ),
            "remote": self._remote(),
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
            "default_store": self._default_store,
        }
        key = getattr(getattr(self._generator, "model_provider", None), "model_key", None)
        if key is not None:
            said["model"] = key[0]
        # A store that was lost or fails is one of the things to be seen here.
        with contextlib.suppress(StoreError):
            if stats.store is not None:
                view = self._views.lately()
                said["store"] = store_json(
                    stats.store,
                    view.survey,
                    quarantined(self._views.store()),
                    disk_off=stats.disk_off,
                )
                said["version"] = view.tag
        return said

    def _remote(self) -> RemoteJson | None:
        """The remote as this server sees it; None without one."""
        sharing = getattr(self._generator, "sharing", None)
        return None if sharing is None else remote_json(sharing.status(), sharing.trouble)

    def _remote_said(self, tokens: Sequence[int]) -> BroughtJson | None:
        """What the remote said when it was asked for a prompt last; None if it is not known."""
        sharing = getattr(self._generator, "sharing", None)
        shown = None if sharing is None else sharing.shown(tokens)
        return None if shown is None else brought_json(shown.brought, at=shown.at)

    def _flush(self) -> Response:
        done = self._cache.flush(_FLUSH_S)
        stats = self._cache.stats()
        if not done:
            why = stats.disk_off or f"{stats.queued_jobs} saves are still waiting"
            raise RefusedError(503, f"Not everything is on disk yet: {why.rstrip('.')}.")
        return json_response({"flushed": True, "saves": stats.saves, "disk_off": stats.disk_off})
