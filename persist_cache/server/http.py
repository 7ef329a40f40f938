"""What stands before `mlx_lm.server`'s HTTP handler: checks, the admin API, errors as JSON.

A mix-in: it answers for the admin API, the metrics and the page itself, and hands on what is sound
of the rest. A request that cannot be understood gets one sentence, and no thread dies of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from email.message import Message
from http.server import BaseHTTPRequestHandler
from typing import Any

from persist_cache.server import admin, answers
from persist_cache.server.guard import ModelGuard, Request, owns
from persist_cache.server.ticket import Part
from persist_cache.server.validation import (
    MAX_BODY_BYTES,
    RefusedError,
    body_length,
    check_chat,
    check_completion,
    decode_object,
    read_body,
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


class Front(BaseHTTPRequestHandler):
    """To be mixed in before upstream's handler, whose methods answer what is handed on.

    The generator that upstream's handler holds may have an `admin`, the `Admin` to ask, and a
    `guard`, the `ModelGuard` of everything else. Without an `admin` nobody may ask that.
    """

    timeout = 60
    """Seconds that a request may take to arrive."""
    response_generator: Any
    body_as_read = b""
    """The body of the request that is answered, as the client sent it."""
    keeps: Part = ""
    """What a request of our own leaves in the cache; see `Ticket`."""
    _headers_buffer: list[bytes]
    _sent = False
    _body_left = False

    def do_GET(self) -> None:
        self._dispatch(super().do_GET)  # type: ignore[misc]

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
        self._sent = False
        self._body_left = self.headers.get("Content-Length", "0") != "0"
        try:
            if owns(self.path):
                self._answer_admin()
                return
            self._guard().check(self._request())
            if otherwise is None:
                raise RefusedError(405, "This path knows no such method.", {"Allow": "GET, POST"})
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

    def _checked_post(self) -> None:
        """Hand a request to upstream once it is known to be sound."""
        if self.path not in _CHECKS:
            raise RefusedError(404, "There is no such path.")
        self.body_as_read = self._read_body()
        body = decode_object(self.body_as_read)
        _CHECKS[self.path](body, vocabulary=self._vocabulary(body))
        self._post(body)

    def _vocabulary(self, body: dict[str, Any]) -> int | None:
        """Token ids of the model that will answer, if it is the one that is loaded."""
        provider = self.response_generator.model_provider
        key, tokenizer = provider.model_key, provider.tokenizer
        wanted = body.get("model", "default_model")
        if wanted == "default_model":
            wanted = provider.cli_args.model
        if key is None or tokenizer is None or wanted != key[0]:
            return None
        return len(tokenizer)

    def _post(self, body: dict[str, Any]) -> None:
        """Let upstream answer a request with this body."""
        raw = json.dumps(body).encode()
        del self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(raw))
        stream, self.rfile = self.rfile, io.BufferedReader(io.BytesIO(raw))
        try:
            super().do_POST()  # type: ignore[misc]
        finally:
            self.rfile = stream

    def _read_body(self) -> bytes:
        raw = read_body(self.rfile, body_length(self.headers))
        self._body_left = False
        # From here on the answer may take as long as it takes.
        self.connection.settimeout(None)
        return raw

    def _answer_admin(self) -> None:
        """Answer for the admin API, whose answers must not be readable by other sites' pages."""
        api, request = self._admin(), self._request()
        api.check(request)
        if self.command == "POST" and self._body_left:
            request = replace(request, body=self._read_body())
        self._send(api.answer(request, self._ask))

    def _request(self) -> Request:
        here = self.connection.getsockname()[0]
        return Request(self.command, self.path, self.headers, here)

    def _guard(self) -> ModelGuard:
        found: ModelGuard | None = vars(self.response_generator).get("guard")
        return _DEFAULT_GUARD if found is None else found

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

    def _ask(self, body: dict[str, Any], keeps: Part) -> tuple[int, dict[str, Any]]:
        """Answer a request of our own as if it had come from outside.

        It leaves no more than `keeps` in the cache, and is not counted among the clients'.
        """
        outside = self.path, self.wfile, self.headers
        self.keeps = keeps
        kind = "chat/completions" if "messages" in body else "completions"
        self.path, self.headers = f"/v1/{kind}", Message()
        answer = io.BytesIO()
        self.wfile = answer
        try:
            self._post(body)
        finally:
            self.path, self.wfile, self.headers = outside
            self.keeps = ""
            self._headers_buffer = []
            self._sent = False
        head, _, raw = answer.getvalue().partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(raw)

    def _refuse(self, refusal: RefusedError) -> None:
        """Send a refusal, in the form of the API that was asked."""
        self._send(answers.refusal_response(refusal))

    def _send(self, response: answers.Response) -> None:
        """Send a whole answer, dropping headers of an unfinished one."""
        self._headers_buffer = []
        try:
            self.send_response(response.status)
            self.send_header("Content-Type", response.content_type)
            self.send_header("Content-Length", str(len(response.body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            for name, value in response.headers.items():
                self.send_header(name, value)
            if not owns(getattr(self, "path", "")) and hasattr(self, "headers"):
                # Upstream's clients may be pages of other sites; they should see what is wrong.
                self._set_cors_headers()
            self.end_headers()
            self.wfile.write(response.body)
            self.wfile.flush()
            if self._body_left:
                self._drain()
        except OSError as error:
            self.close_connection = True
            log.debug("a client went away: %s", error)

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
