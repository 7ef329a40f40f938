"""A server in a process of its own, and requests to it, timed to the first token."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from persist_cache.errors import PersistCacheError
from persist_cache.server.admin_token import stored_token
from persist_cache.system import endings

_START_S = 600.0
_SETTLE_S = 120.0
OURS, STOCK = "persist-cache", "mlx_lm.server"


class BenchError(PersistCacheError):
    """What was measured says nothing."""


class Timed:
    """One answer.

    Attributes:
        first_s: Seconds to its first token: all of it but decoding.
        total_s: Seconds in all.
        prompt_tokens: Of the prompt.
        cached_tokens: Of these, that were not computed.
        output_tokens: Of the answer.
    """

    def __init__(self, first_s: float, total_s: float, usage: Mapping[str, Any]) -> None:
        self.first_s, self.total_s = first_s, total_s
        self.prompt_tokens = int(usage["prompt_tokens"])
        details = usage.get("prompt_tokens_details") or {}
        self.cached_tokens = int(details.get("cached_tokens") or 0)
        self.output_tokens = int(usage["completion_tokens"])


class Process:
    """A server with a model; a context manager that ends it."""

    def __init__(self, name: str, model: str, folder: Path, flags: Sequence[str] = ()) -> None:
        """Prepare it.

        Args:
            name: `OURS` or `STOCK`.
            model: Folder or hub id.
            folder: For its store and its log.
            flags: Further flags.
        """
        self._port = _free_port()
        self._store, self._log = folder / "store", folder / "server.log"
        command = [sys.executable, "-P", "-m"]
        if name == OURS:
            command += ["persist_cache_cli", "--store", str(self._store), "serve", *flags]
        else:
            command += ["mlx_lm", "server"]
        self._is_ours = name == OURS
        self._command = [*command, "--model", model, "--port", str(self._port)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        from persist_cache_cli.demo.openblas import preload_env

        environment = {**os.environ, **preload_env(), "PERSIST_CACHE_CONFIG": ""}
        for name in ("PERSIST_CACHE_API_KEY", "PERSIST_CACHE_ADMIN_TOKEN"):
            environment.pop(name, None)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End it by SIGKILL."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def settle(self) -> None:
        """Wait until nothing waits for the disk any more."""
        if not self._is_ours:
            return
        headers = {"Authorization": f"Bearer {stored_token(self._store)}"}
        give_up = time.monotonic() + _SETTLE_S
        while time.monotonic() < give_up:
            connection = self._connection(10.0)
            connection.request("GET", "/v1/cache/ps", headers=headers)
            said = json.loads(connection.getresponse().read())
            connection.close()
            if not said["waiting_saves"]:
                return
            time.sleep(0.1)
        raise BenchError("what was computed did not reach the disk")

    def ask(self, body: Mapping[str, Any]) -> Timed:
        """Send a chat and read its answer as it comes.

        Raises:
            BenchError: It was refused, or ended early.
        """
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        connection = self._connection(None)
        started = time.monotonic()
        first: float | None = None
        usage: dict[str, Any] | None = None
        try:
            connection.request(
                "POST",
                "/v1/chat/completions",
                json.dumps(asked),
                {"Content-Type": "application/json"},
            )
            answer = connection.getresponse()
            if answer.status != 200:
                raise BenchError(f"a request was refused: {sentence_of(answer.read())}")
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                said = json.loads(line.removeprefix(b"data: "))
                if "error" in said:
                    raise BenchError(f"a request failed: {sentence_of(line[6:])}")
                if said.get("choices") and first is None:
                    first = time.monotonic() - started
                usage = said.get("usage") or usage
        except (OSError, http.client.HTTPException) as error:
            raise BenchError(f"a server ended early: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if first is None or usage is None:
            raise BenchError("an answer had no token, or said nothing of its tokens")
        return Timed(first, time.monotonic() - started, usage)

    def _connection(self, timeout_s: float | None) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout_s)

    def _wait(self) -> None:
        """Wait until the model answers."""
        assert self._process is not None
        give_up = time.monotonic() + _START_S
        while time.monotonic() < give_up and not endings.has_ended(self._process):
            try:
                connection = self._connection(5.0)
                connection.request("GET", "/health")
                connection.getresponse().read()
                connection.close()
            except (OSError, http.client.HTTPException):
                time.sleep(0.1)
                continue
            self.ask({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2})
            return
        lines = self._log.read_text(errors="replace").strip().splitlines()
        said = lines[-1] if lines else "nothing"
        raise BenchError(f"a server did not start; it said last: {said}")


def sentence_of(body: bytes) -> str:
    """What an answer says of an error, in whichever form."""
    try:
        said = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError):
        said = body.decode(errors="replace")
    if isinstance(said, dict):
        said = said.get("message", said)
    return " ".join(str(said).split())[:300] or "without a word"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
