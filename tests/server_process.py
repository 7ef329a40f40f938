"""A server of ours in a process of its own, with a tiny random model; stopped or killed at will.

Also run as `python -m tests.server_process JOB.json`, which is that process.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from tests import prepared

START_S = 60.0
STOP_S = 30.0


class ServerProcess:
    """`persist_cache.server.run.serve` on a free port; a context manager that stops it.

    Attributes:
        url: Where it answers.
        store: Folder of its store.
        log: File with all that it printed.
        process: The process, once started.
    """

    def __init__(
        self,
        model: Path | None,
        store: Path,
        folder: Path,
        *,
        flags: tuple[str, ...] = (),
        module: str = "tests.server_process",
        **options: Any,
    ) -> None:
        """Prepare a server.

        Args:
            model: Folder of the model; None for a server without one.
            store: Folder of its store.
            folder: Where the log and the job file go.
            flags: Further flags of `mlx_lm.server`.
            module: What the process runs, with the job's file as its argument.
            options: Further fields of `ServeOptions`.
        """
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.store = store
        self._token: str | None = options.get("admin_token")
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("server-*.log")))
        self.log = folder / f"server-{number}.log"
        self._job = folder / f"server-{number}.json"
        upstream = ["--host", "127.0.0.1", "--port", str(self.port), *flags]
        if model is not None:
            upstream += ["--model", str(model)]
        self._job.write_text(
            json.dumps({"flags": upstream, "options": {"store": str(store), **options}})
        )
        self._module = module
        self.process: prepared.Program | subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()

    def launch(self) -> prepared.Program | subprocess.Popen[bytes]:
        """Start the process."""
        return prepared.start(self._module, [str(self._job)], self.log)

    def start(self) -> None:
        """Start it and wait until it is healthy.

        Raises:
            RuntimeError: It ended, or is not healthy in time; with the end of its log.
        """
        self.process = self.launch()
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> int:
        """End it by SIGTERM; returns its exit status."""
        assert self.process is not None, "it was never started"
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """End it by SIGKILL."""
        assert self.process is not None, "it was never started"
        self.process.kill()
        self.process.wait()

    @property
    def token(self) -> str:
        """The secret of its admin API."""
        if self._token is None:
            # Not from the store's folder, which tests remove.
            printed = re.findall(r"^Page: \S+#token=(\S+)$", self.log.read_text(), re.MULTILINE)
            self._token = str(printed[-1])
        return self._token

    def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        with_token: bool = True,
        **more: Any,
    ) -> requests.Response:
        """Send a request; `more` goes to `requests`.

        Args:
            method: Such as `GET`.
            path: And query.
            headers: Of the request.
            with_token: Send the admin token where it is asked for.
        """
        more.setdefault("timeout", 60)
        said = dict(headers or {})
        if with_token and path.startswith("/v1/cache"):
            said = {"Authorization": f"Bearer {self.token}", **said}
        return requests.request(method, self.url + path, headers=said, **more)

    def get(self, path: str, **more: Any) -> Any:
        """The decoded answer to a GET that must succeed."""
        answer = self.request("GET", path, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def chat(self, *messages: tuple[str, str], **body: Any) -> requests.Response:
        """Send a chat request of `(role, text)` pairs."""
        said = [{"role": role, "content": text} for role, text in messages]
        return self.request(
            "POST", "/v1/chat/completions", json={"messages": said, "max_tokens": 4, **body}
        )


def sentence_in(body: Mapping[str, Any]) -> str:
    """What a decoded answer that refuses a request says, in either form of an error."""
    said = body["error"]
    return str(said["message"] if isinstance(said, dict) else said)


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    model: Path | None, store: Path, folder: Path, **options: Any
) -> Iterator[ServerProcess]:
    """A started server, stopped at the end."""
    with ServerProcess(model, store, folder, **options) as server:
        yield server


def main() -> None:
    from persist_cache.server.launch import ServeOptions
    from persist_cache.server.privacy import Rules
    from persist_cache.server.run import serve
    from persist_cache.sharing import RemoteChoice

    job = json.loads(Path(sys.argv[1]).read_text())
    options = job["options"]
    if "persist" in options:
        options["persist"] = tuple(options["persist"])
    if "stabilize" in options:
        options["stabilize"] = frozenset(options["stabilize"])
    if "remote" in options:
        options["remote"] = RemoteChoice(**options["remote"])
    if "rules" in options:
        options["rules"] = Rules(**options["rules"])
    serve(job["flags"], ServeOptions(**options))


if __name__ == "__main__":
    main()
