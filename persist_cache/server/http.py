"""What stands before `mlx_lm.server`'s HTTP handler: checks, the admin API, errors as JSON.

A mix-in: it answers for the admin API, the metrics, the page and the list of models itself, and
hands on what is sound of the rest. A request that cannot be understood gets one sentence, and no
thread dies of it: as OpenAI's clients read it, or in the form of the admin API under its paths.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.message import Message
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

from msgspec.structs import replace

from persist_cache.errors import PersistCacheError
from persist_cache.prefill import loadable
from persist_cache.server import admin, answers, quiet
from persist_cache.server.bodies import MAX_BODY_BYTES, body_pieces, has_body, read_body
from persist_cache.server.guard import (
    HEALTH_PATH,
    IGNORED_HEADER,
    MODELS_PATH,
    STABILIZE_HEADER,
    ModelGuard,
    Request,
    owns,
    takes_upload,
)
from persist_cache.server.names import Names, names_of
from persist_cache.server.privacy import Privacy, Rules, privacy_of, wants_no_store
from persist_cache.server.protocols.asked import Asked
from persist_cache.server.protocols.openai import (
    asked_of_cache,
    error_body,
    ignored,
    lenient,
    refusal_of,
    served,
)
from persist_cache.server.recent.diagnosis import comparison_response
from persist_cache.server.ticket import Part
from persist_cache.server.validation import (
    RefusedError,
    check_chat,
    check_completion,
    check_names,
    decode_object,
    has_images,
    refuse_parts,
)

log = logging.getLogger(__name__)

_CHECKS: dict[str, Callable[..., None]] = {
    "/v1/completions": check_completion,
    "/v1/chat/completions": check_chat,
    "/chat/completions": check_chat,
}
_DEFAULT_GUARD = ModelGuard()
_MALFORMED = {
    414: "The request line is too long.",
    431: "The headers of the request are too long or too many.",
    501: "This server knows no such method.",
    505: "This server does not speak that version of HTTP.",
}


def _is_read(path: str) -> bool:
    return path in (HEALTH_PATH, MODELS_PATH) or path.startswith(f"{MODELS_PATH}/")


class Front(BaseHTTPRequestHandler):
    """To be mixed in before upstream's handler, whose methods answer what is handed on.

    The generator that upstream's handler holds may have an `admin`, the `Admin` to ask, a `guard`,
    the `ModelGuard` of everything else, the `names` of its models, and be `strict`: then it refuses
    what is else ignored. Without an `admin` nobody may ask that.
    """

    timeout = 60
    """Seconds that a request may take to arrive."""
    response_generator: Any
    created: int
    max_tokens: int
    body_as_read = b""
    """The body of the request that is answered, as the client sent it."""
    keeps: Part = ""
    """What a request of our own leaves in the cache; see `Ticket`."""
    privacy = Privacy()
    _is_quiet = False
    _headers_buffer: list[bytes]
    _sent = False
    _body_left = False
    _query = ""
    caching: Asked | None = None
    """What a chat or a text asks of the cache, with the messages that its marks are in."""
    until_answered: contextlib.ExitStack
    """What lasts until all of an answer, or of a refusal, is on its way to the client."""
    _ignored: list[str]
    """Fields of the request that are not done."""

    def do_GET(self) -> None:
        self._dispatch(self._get)

    def do_HEAD(self) -> None:
        self._dispatch(self._get)

    def do_POST(self) -> None:
        self._dispatch(self._checked_post)

    def do_PUT(self) -> None:
        self._dispatch(None)

    def do_DELETE(self) -> None:
        self._dispatch(None)

    def do_OPTIONS(self) -> None:
        self._dispatch(super().do_OPTIONS)  # type: ignore[misc]

    def _dispatch(self, otherwise: Callable[[], None] | None) -> None:
        """Answer, or let `otherwise` do it; whatever goes wrong costs this request only."""
        before = set(vars(self))
        try:
            # A refusal is an answer, too, which the end of the server has to wait for.
            with contextlib.ExitStack() as self.until_answered:
                self._answer_or_refuse(otherwise)
        finally:
            # What is known of a request ends with it, not with the connection.
            for name in set(vars(self)) - before:
                delattr(self, name)

    def _answer_or_refuse(self, otherwise: Callable[[], None] | None) -> None:
        self._sent = False
        self._ignored = []
        self._body_left = has_body(self.headers)
        try:
            if wants_no_store(self.headers):
                self._is_quiet = True
                quiet.begin()
            if owns(self.path):
                self._answer_admin()
                return
            # Some clients add a query to every path; hardly one of these has a use for it.
            self.path, _, self._query = self.path.partition("?")
            self._guard().check(self._request())
            if otherwise is None:
                raise self._no_such_method()
            otherwise()
        except RefusedError as refusal:
            self._refuse(refusal)
        except (ConnectionError, TimeoutError) as error:
            self.close_connection = True
            log.debug("a client went away: %s", error)
        except Exception as error:
            # The message may quote a prompt, and so may the traceback.
            log.error("a request failed: %s", type(error).__name__)
            log.debug("the failure", exc_info=True)
            self.close_connection = True
            if not self._sent:
                self._refuse(RefusedError(500, "The request failed; the server's log says more."))
        finally:
            if self._is_quiet:
                quiet.end()

    def _no_such_method(self) -> RefusedError:
        if self.path in _CHECKS:
            allowed = "POST"
        elif _is_read(self.path):
            allowed = "GET, HEAD"
        else:
            return RefusedError(404, "There is no such path.")
        return RefusedError(405, "This path knows no such method.", {"Allow": allowed})

    def _get(self) -> None:
        if not _is_read(self.path):
            raise self._no_such_method()
        if self.path == HEALTH_PATH:
            self.handle_health_check()  # type: ignore[attr-defined]
        else:
            self._send(answers.json_response(self._models()))

    def _models(self) -> dict[str, Any]:
        """The models that may be named, or one of them."""
        names, wanted = self._names(), unquote(self.path.removeprefix(MODELS_PATH)[1:])
        if wanted and not names.is_listed(wanted):
            raise RefusedError(
                404, f"The server lists no model {wanted!r}.", code="model_not_found", param="model"
            )
        at = datetime.fromtimestamp(self.created, UTC).isoformat()
        said: list[dict[str, Any]] = [
            {
                "id": name,
                "object": "model",
                "created": self.created,
                "owned_by": "local",
                "type": "model",
                "display_name": name,
                "created_at": at,  # Anthropic's
                **self._context_of(name),
            }
            for name in ([wanted] if wanted else names.listed())
        ]
        # One model is told as OpenAI does, and within a list, as upstream does.
        if wanted:
            return {**said[0], "data": said}
        ends = {"first_id": said[0]["id"], "last_id": said[-1]["id"]} if said else {}
        # Codex asks in this way, for a catalogue of its own form, in which no model here is.
        catalogue: dict[str, Any] = {"models": []} if "client_version=" in self._query else {}
        return {"object": "list", "data": said, "has_more": False, **ends, **catalogue}

    def _context_of(self, name: str) -> dict[str, int]:
        """How long prompt and answer may be, if that is known: of the model that is loaded."""
        provider = self.response_generator.model_provider
        if not provider.context or self._names().key(name) != provider.known_key:
            return {}
        return {"max_model_len": provider.context}

    def _checked_post(self) -> None:
        """Hand a request to upstream once it is known to be sound."""
        if self.path not in _CHECKS:
            raise self._no_such_method()
        self.body_as_read = self._read_body()
        body, is_chat = lenient(decode_object(self.body_as_read)), "chat" in self.path
        self.read_privacy(body)
        check_names(body)
        _CHECKS[self.path](body, vocabulary=self._vocabulary(body))
        if is_chat and has_images(body["messages"]) and not self._sees(body):
            # Before upstream fetches what is at their addresses.
            refuse_parts(body["messages"], why="this model reads text only")
        comparison_response(body)  # refuses what is malformed
        self._tell_ignored(ignored(body, is_chat=is_chat))
        self._post_read(body, is_chat=is_chat)

    def _post_read(self, body: dict[str, Any], *, is_chat: bool) -> None:
        """Let upstream answer a request that is known to be sound, with what it asks of the cache.

        Raises:
            RefusedError: What it asks of the cache is malformed.
        """
        self.caching = asked_of_cache(body, is_chat=is_chat)
        try:
            self._post(served(body, is_chat=is_chat))
        finally:
            self.caching = None

    def read_privacy(self, body: dict[str, Any]) -> None:
        """Note whether a request is to be kept, before anything else is read of it.

        Raises:
            RefusedError: That is not understood.
        """
        rules = vars(self.response_generator).get("rules", Rules())
        if self.keeps:
            rules = Rules()  # it asks for its prompt to be stored
        self.privacy = privacy_of(self.headers, body, rules)
        if self.privacy.no_store and not self._is_quiet:
            self._is_quiet = True
            quiet.begin()

    def _tell_ignored(self, names: list[str]) -> None:
        """Note what of a request is not done, for the headers of its answer.

        Raises:
            RefusedError: The server is strict.
        """
        self._ignored = names
        if self._ignored and vars(self.response_generator).get("strict"):
            raise RefusedError(
                400,
                f"This server does not do what is asked for by {', '.join(self._ignored)}, and was "
                "started with --strict; leave that out.",
                param=self._ignored[0],
            )

    def _vocabulary(self, body: dict[str, Any]) -> int | None:
        """Token ids of the model that will answer, if it is the one that is loaded."""
        provider = self.response_generator.model_provider
        key, tokenizer = provider.model_key, provider.tokenizer
        asleep = getattr(provider, "asleep", None)
        if asleep is not None and self._names().of(body) == asleep.key:
            return int(asleep.vocabulary)
        if key is None or tokenizer is None or self._names().of(body) != key:
            return None
        return len(tokenizer)

    def _sees(self, body: dict[str, Any]) -> bool:
        """Whether the model that will answer reads images."""
        key, provider = self._names().of(body), self.response_generator.model_provider
        if key == provider.model_key:
            return provider.processor is not None
        self._names().check(key)
        return loadable.reads_images(key.model)

    def _post(self, body: dict[str, Any]) -> None:
        """Let upstream answer a request with this body."""
        raw = json.dumps(body).encode()
        del self.headers["Content-Length"], self.headers["Transfer-Encoding"]
        self.headers["Content-Length"] = str(len(raw))
        stream, self.rfile = self.rfile, io.BufferedReader(io.BytesIO(raw))
        try:
            super().do_POST()  # type: ignore[misc]
        finally:
            self.rfile = stream

    def _read_body(self) -> bytes:
        raw = read_body(self.rfile, self.headers)
        self._body_left = False
        # From here on the answer may take as long as it takes.
        self.connection.settimeout(None)
        return raw

    def _answer_admin(self) -> None:
        """Answer for the admin API, whose answers must not be readable by other sites' pages."""
        api, request = self._admin(), self._request()
        api.check(request)
        if self.command == "HEAD":
            request = replace(request, method="GET")
        if self.command in ("POST", "PUT") and self._body_left:
            if takes_upload(request):
                request = replace(request, receive=self._receive)
            else:
                request = replace(request, body=self._read_body())
        self._send(api.answer(request, self._ask))

    def _receive(self, limit: int) -> Iterator[bytes]:
        """Read a body of at most `limit` bytes piece by piece."""
        yield from body_pieces(self.rfile, self.headers, limit=limit)
        self._body_left = False
        self.connection.settimeout(None)

    def _request(self) -> Request:
        here = self.connection.getsockname()[0]
        return Request(self.command, self.path, self.headers, here)

    def _guard(self) -> ModelGuard:
        found: ModelGuard | None = vars(self.response_generator).get("guard")
        return _DEFAULT_GUARD if found is None else found

    def _names(self) -> Names:
        found: Names | None = vars(self.response_generator).get("names")
        return names_of(self.response_generator.model_provider) if found is None else found

    # ---- what upstream's handler asks ----------------------------------------------------------

    def validate_model_parameters(self) -> None:
        """As upstream, which knows no answer of no tokens."""
        only_fills = self.max_tokens == 0
        if only_fills:
            self.max_tokens = 1
        super().validate_model_parameters()  # type: ignore[misc]
        if only_fills:
            self.max_tokens = 0

    def generate_response(
        self, text: str, finish_reason: str | None, *args: Any, **more: Any
    ) -> Any:
        """As upstream; an answer of no tokens ends because of its length."""
        if self.max_tokens == 0 and finish_reason is not None:
            finish_reason = "length"
        said = super().generate_response(text, finish_reason, *args, **more)  # type: ignore[misc]
        return self.with_cache(said)

    def completion_usage_response(self, *args: Any, **more: Any) -> Any:
        """As upstream."""
        return self.with_cache(super().completion_usage_response(*args, **more))  # type: ignore[misc]

    def with_cache(self, said: Any) -> Any:
        """A part of an answer, with the usage of the cache in it."""
        return said

    def _set_completion_headers(self, status_code: int = 200) -> None:
        error = sys.exception()
        if isinstance(error, ConnectionError):
            raise error
        if status_code >= 400 and error is not None:
            # Upstream is about to tell it in a form of its own.
            raise refusal_of(error, status_code) from error
        super()._set_completion_headers(status_code)  # type: ignore[misc]
        self._say_ignored(status_code)

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)  # type: ignore[misc]
        self._say_ignored(status_code)

    def _say_ignored(self, status_code: int) -> None:
        if status_code == 200 and self._ignored:
            self.send_header(IGNORED_HEADER, ", ".join(self._ignored))

    def _set_cors_headers(self) -> None:
        """Let pages read an answer, where they may ask; in place of upstream's."""
        headers = getattr(self, "headers", None)
        origin = None if headers is None else headers.get("Origin")
        for name, value in self._guard().cors_headers(origin).items():
            self.send_header(name, value)

    def _admin(self) -> admin.Admin:
        generator = self.response_generator
        found: admin.Admin | None = vars(generator).get("admin")
        if found is None:
            found = admin.Admin(
                generator.cache,
                host=generator.cli_args.host,
                generator=generator,
            )
            found = vars(generator).setdefault("admin", found)
        return found

    def _ask(self, body: dict[str, Any], keeps: Part, protocol: str) -> tuple[int, dict[str, Any]]:
        """Answer a request of our own as if it had come from outside.

        It leaves no more than `keeps` in the cache, and is not counted among the clients'. The end
        of the server waits until it is computed, but not until what becomes of it is told.
        """
        outside = self.path, self.wfile, self.headers
        self.keeps = keeps
        chosen = self.headers.get(STABILIZE_HEADER)
        self.headers = Message()
        if chosen is not None:
            self.headers[STABILIZE_HEADER] = chosen
        answer = io.BytesIO()
        self.wfile = answer
        whole = self.until_answered
        own = self.until_answered = contextlib.ExitStack()
        try:
            self._post_own(body, protocol)
        except BaseException:
            whole.enter_context(own.pop_all())  # the refusal is yet to be sent
            raise
        finally:
            own.close()
            self.until_answered = whole
            self.path, self.wfile, self.headers = outside
            self.keeps = ""
            self._headers_buffer = []
            self._sent = False
        head, _, raw = answer.getvalue().partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(raw)

    def _post_own(self, body: dict[str, Any], protocol: str) -> None:
        """Answer a request of our own that is of this protocol; sets the path that it is for."""
        kind = "chat/completions" if "messages" in body else "completions"
        self.path = f"/v1/{kind}"
        body = lenient(body)
        self.read_privacy(body)
        self._post_read(body, is_chat="messages" in body)

    def _refuse(self, refusal: RefusedError) -> None:
        """Send a refusal, in the form of the API that was asked."""
        if owns(getattr(self, "path", "")):
            self._send(answers.refusal_response(refusal))
        else:
            raw = error_body(refusal)
            self._send(answers.Response(refusal.status, raw, headers=refusal.headers))

    def _send(self, response: answers.Response) -> None:
        """Send a whole answer, dropping headers of an unfinished one."""
        self._headers_buffer = []
        try:
            self.send_response(response.status)
            self.send_header("Content-Type", response.content_type)
            self.send_header("Content-Length", str(response.length))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            for name, value in response.headers.items():
                self.send_header(name, value)
            if not owns(getattr(self, "path", "")) and hasattr(self, "headers"):
                # Upstream's clients may be pages of other sites; they should see what is wrong.
                self._set_cors_headers()
            self.end_headers()
            if self.command != "HEAD":
                self._write_body(response)
            self.wfile.flush()
            if self._body_left:
                self._drain()
        except OSError as error:
            self.close_connection = True
            log.debug("a client went away: %s", error)
        finally:
            if response.pieces is not None:
                response.pieces.close()

    def _write_body(self, response: answers.Response) -> None:
        """Send what follows the headers; its length tells the client if it is cut short."""
        if response.pieces is None:
            self.wfile.write(response.body)
            return
        try:
            for piece in response.pieces:
                self.wfile.write(piece)
        except PersistCacheError as error:
            self.close_connection = True
            log.error("an export was cut short: %s", error)

    def _drain(self) -> None:
        """Read what is still on its way: a client that cannot send all of it sees no answer."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(1)
        deadline, left = time.monotonic() + 5, MAX_BODY_BYTES
        with contextlib.suppress(OSError, ValueError):
            while left > 0 and time.monotonic() < deadline:
                got = len(self.rfile.read1(1 << 16))
                if not got:
                    break
                left -= got

    def flush_headers(self) -> None:
        super().flush_headers()
        self._sent = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that could not even be parsed; nothing of it is repeated."""
        self._body_left = True
        self.close_connection = True
        # Nobody speaks 0.9, which has no status line; it is what nonsense is taken for.
        self.request_version = self.protocol_version
        self._refuse(RefusedError(code, _MALFORMED.get(code, "The request cannot be understood.")))

    def handle(self) -> None:
        try:
            super().handle()
        except OSError as error:
            log.debug("a client went away: %s", error)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        # The page asks every few seconds, and queries may name labels.
        if not owns(getattr(self, "path", "")):
            super().log_request(code, size)
