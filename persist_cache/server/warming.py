"""Prompts that a server computes when it starts, while it answers others.

Each is sent to the server itself, as any program could send it to `POST /v1/cache/entries`: so it
is rendered, cut, computed in a batch and stored as a client's request is.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct, field

from persist_cache.errors import PersistCacheError
from persist_cache.server.guard import API_PATH, STABILIZE_HEADER

log = logging.getLogger(__name__)


class WarmPrompt(Struct, frozen=True):
    """A prompt to be computed at the start.

    Attributes:
        name: For people.
        body: Of the request.
        protocol: Of the body, or "" to tell it by its shape.
        marks: What the entry gets: `pin`, `label`, `ttl_s`, `group`.
        stabilize: Names of the repairs that may be done, or "" for the server's own.
    """

    name: str
    body: Mapping[str, Any]
    protocol: str = ""
    marks: Mapping[str, Any] = field(default_factory=dict)
    stabilize: str = ""


class Warming:
    """Has a server compute prompts, one after the other, on a thread of its own.

    Thread safety: may be shared between threads; `_lock` guards what is told.
    """

    def __init__(self, prompts: Sequence[WarmPrompt]) -> None:
        """Compute nothing yet."""
        self._prompts = prompts
        self._lock = threading.Lock()
        self._done = 0
        self._failed: list[str] = []
        self._is_over = not prompts
        self._is_stopped = False
        self._connection: http.client.HTTPConnection | None = None

    @property
    def is_running(self) -> bool:
        """Whether some prompts are not computed yet."""
        return not self._is_over

    def told(self) -> dict[str, Any]:
        """How far it is: `state`, `done`, `total`, and a sentence for each that failed."""
        with self._lock:
            return {
                "state": "done" if self._is_over else "running",
                "done": self._done,
                "total": len(self._prompts),
                "failed": list(self._failed),
            }

    def start(self, url: str, token: str) -> None:
        """Begin.

        Args:
            url: Of the server, which listens.
            token: Of its admin API.
        """
        if self._prompts:
            run = threading.Thread(
                target=self._run, args=(url, token), name="persist-cache-warming", daemon=True
            )
            run.start()

    def stop(self) -> None:
        """Compute no more, and leave the one that is being computed."""
        with self._lock:
            self._is_stopped = True
            sock = None if self._connection is None else self._connection.sock
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _run(self, url: str, token: str) -> None:
        for prompt in self._prompts:
            if self._is_stopped:
                break
            try:
                said = self._ask(url, token, prompt)
            except PersistCacheError as error:
                if self._is_stopped:
                    break
                log.warning("not warm: %s: %s", prompt.name, error)
                with self._lock:
                    self._failed.append(f"{prompt.name}: {error}")
            else:
                log.info(
                    "warm: %s, %d tokens, %d of them known before, %.1f s",
                    prompt.name,
                    said["num_tokens"],
                    said["found_tokens"],
                    said["prefill_s"],
                )
            with self._lock:
                self._done += 1
        self._is_over = True

    def _ask(self, url: str, token: str, prompt: WarmPrompt) -> dict[str, Any]:
        """Have one prompt computed.

        Raises:
            PersistCacheError: The server refused it, or did not answer.
        """
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        if prompt.stabilize:
            headers[STABILIZE_HEADER] = prompt.stabilize
        query = f"?protocol={prompt.protocol}" if prompt.protocol else ""
        body = json.dumps({**prompt.body, "cache": dict(prompt.marks)})
        try:
            with self._lock:
                if self._is_stopped:
                    raise PersistCacheError("the server ends")
                connection.connect()
                self._connection = connection
            connection.request("POST", f"{API_PATH}/entries{query}", body, headers)
            answer = connection.getresponse()
            said = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise PersistCacheError(f"no answer ({type(error).__name__})") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise PersistCacheError(str(said.get("error", answer.status)))
        if said.get("missing_tokens"):
            why = said.get("disk_off") or "memory has no room for it"
            raise PersistCacheError(f"it was not kept ({str(why).rstrip('.')})")
        return dict(said)
