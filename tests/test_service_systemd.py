"""A service under a real systemd: killed, it comes back, and answers from the disk."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.cli import script
from tests.server_process import free_port
from tests.systemd_session import user_systemd
from tests.torture.tiny import KINDS, write_model
from tests.waiting import until

pytestmark = pytest.mark.long(reason="starts a systemd, and a server twice")

PROMPT = "The quick brown fox jumps over the lazy dog. " * 20


def test_a_killed_service_comes_back_and_answers_from_the_disk(tmp_path: Path) -> None:
    model, store, port = tmp_path / "model", tmp_path / "store", free_port()
    write_model(model, KINDS["plain"], 0)
    with user_systemd(tmp_path) as variables:
        run = partial(script, store, env=variables | {"PERSIST_CACHE_CONFIG": ""})
        done = run("service", "install", "--model", model, "--port", port, "--min-free", "0")
        assert done.status == 0, done.err
        before = asked(port)
        until(lambda: run("list", "--json").json, "nothing was stored")
        killed = main_pid(variables)

        subprocess.run(["kill", "-KILL", str(killed)], check=True)
        until(lambda: main_pid(variables) not in (0, killed), "it was not started again")
        after = asked(port)

        assert after["choices"] == before["choices"]
        assert after["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        # systemd is told once a second.
        until(lambda: "Ready, " in run("service", "status").out)
        status = run("service", "status")
        assert status.status == 0
        assert "active (running)" in status.out

        done = run("service", "uninstall")

        assert done.status == 0, done.err
        assert main_pid(variables) == 0
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://127.0.0.1:{port}/health", timeout=10)
        assert run("service", "status").status == 3


def asked(port: int) -> Any:
    """The answer to one prompt, once it listens."""

    def answer() -> Any:
        try:
            body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
            return requests.post(
                f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60
            ).json()
        except requests.ConnectionError:
            return None

    return until(answer, "it does not listen")


def main_pid(variables: dict[str, str]) -> int:
    said = subprocess.run(
        ["systemctl", "--user", "show", "--property=MainPID", "--value", "persist-cache.service"],
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(said.stdout)
