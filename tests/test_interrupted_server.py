"""A server keeps what it computed for clients that leave, and when it is ended or killed.

In a process of its own, over HTTP. Its model is held up in the midst of a prefill, so that
something happens there; what it computes is counted at its calls.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from persist_cache import Store
from persist_cache.entry import PARTIAL_LABEL
from tests.computed import Told, told
from tests.held_server import HeldServer
from tests.holding import STEP
from tests.loops import words
from tests.torture.tiny import KINDS, write_model
from tests.waiting import until

CUT = 3 * STEP
FLAGS = ("--prefill-step-size", str(STEP))
KV_BITS = ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0")
LENGTH = 248
"""Of a prompt."""
WAYS: dict[str, dict[str, Any]] = {"batched": {}, "alone": {"seed": 1}}
EAGER = {"PATIENCE_S": 0.0, "SAVE_EVERY_S": 0.0, "_SAVE_EVERY_SHARE": 0.0, "LEAST_SAVED_BYTES": 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / name, KINDS[name], 0) for name in ("plain", "hybrid")}


def text(number: int, **more: Any) -> dict[str, Any]:
    """A request whose prompt begins with a token that those of other numbers do not begin with."""
    return {"prompt": words(number, LENGTH), "max_tokens": 4, "temperature": 0, **more}


@contextmanager
def connected(
    server: HeldServer, body: dict[str, Any], path: str = "/v1/completions"
) -> Iterator[socket.socket]:
    """A client that has sent a request; it leaves at the end of the block at the latest."""
    said = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(said)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + said)
        yield client


def end(server: HeldServer, logged: str) -> None:
    """Have a server end whose prefill is held up until it has logged that."""
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    until(lambda: logged in server.log.read_text())
    server.release()
    assert server.process.wait(60) == 0


def ask(server: HeldServer, body: dict[str, Any]) -> Told:
    answer = server.request("POST", "/v1/completions", json=body)
    return told(answer)


@pytest.fixture(scope="module")
def running(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HeldServer]:
    folder = tmp_path_factory.mktemp("server")
    with HeldServer(
        models["plain"],
        folder / "store",
        folder / "logs",
        patched={"PATIENCE_S": 0.0},
        flags=FLAGS,
        min_free_bytes=0,
    ) as server:
        ask(server, text(0, max_tokens=1))
        yield server


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_client_that_gives_up_goes_on_where_it_left(
    running: HeldServer, way: str, stream: bool
) -> None:
    number = 1 + 2 * stream + (way == "alone")
    body = text(number, **WAYS[way])
    running.prefilled()
    with running.held_up(CUT), connected(running, {**body, "stream": stream}):
        computed = running.wait_for(CUT)
    again = ask(running, body)

    assert again.prompt_tokens == LENGTH
    assert again.source == "memory"
    assert CUT <= again.cached_tokens < LENGTH - 1
    assert computed + sum(map(len, running.prefilled())) == LENGTH - 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_server_that_is_told_to_end_keeps_what_it_computes(
    models: dict[str, Path], tmp_path: Path, kind: str, way: str
) -> None:
    """After the grace; the client is told so, and the next server goes on from there."""
    body = text(1, **WAYS[way])
    options: dict[str, Any] = {"flags": FLAGS, "min_free_bytes": 0, "grace_s": 0.2}
    store, logs = tmp_path / "store", tmp_path / "logs"
    with HeldServer(models[kind], store, logs, refusing_s=0.3, **options) as server:
        ask(server, text(0, max_tokens=1))
        server.prefilled()
        with server.held_up(CUT), connected(server, body) as client:
            computed = server.wait_for(CUT)
            end(server, "were cut")
            said = client.makefile("rb").read()
        computed += sum(map(len, server.prefilled()))

    assert b" 503 " in said
    assert b"The server is stopping; ask again when it is back." in said
    assert computed < LENGTH - 1
    with HeldServer(models[kind], store, logs, **options) as server:
        again = ask(server, body)
        assert again.source == "disk"
        assert again.cached_tokens == computed
        assert computed + sum(map(len, server.prefilled())) == LENGTH - 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": words(1, LENGTH)}]}),
        ("/v1/responses", {"input": words(1, LENGTH)}),
    ],
    ids=["messages", "responses"],
)
def test_clients_of_all_protocols_are_told_that_the_server_ends(
    models: dict[str, Path], tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    """Also where that takes a while."""
    options: dict[str, Any] = {"flags": FLAGS, "min_free_bytes": 0, "grace_s": 0.2}
    limit = "max_tokens" if "messages" in body else "max_output_tokens"
    body = {"model": "default_model", limit: 16, **body}
    with HeldServer(
        models["plain"], tmp_path / "store", tmp_path / "logs", refusing_s=0.3, **options
    ) as server:
        ask(server, text(0, max_tokens=1))
        server.prefilled()
        with server.held_up(CUT), connected(server, body, path) as client:
            server.wait_for(CUT)
            end(server, "were cut")
            said = client.makefile("rb").read()

    assert b" 503 " in said
    assert b"The server is stopping; ask again when it is back." in said


@pytest.mark.parametrize("flags", [(), KV_BITS], ids=["batched", "alone"])
def test_end_waits_for_no_prompt_that_is_warmed(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """What is computed of it is kept, and who asked for it is told."""
    model = write_model(tmp_path / "model", KINDS["plain"], 0, head_dim=32)
    prompt = text(1)["prompt"]
    options: dict[str, Any] = {"flags": (*FLAGS, *flags), "min_free_bytes": 0, "grace_s": 5}
    with (
        HeldServer(model, tmp_path / "store", tmp_path / "logs", **options) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        ask(server, text(0, max_tokens=1))
        server.prefilled()
        with server.held_up(CUT):
            warming = pool.submit(server.request, "POST", "/v1/cache/warm", json={"prompt": prompt})
            computed = server.wait_for(CUT)
            end(server, "stopping: waiting")
        computed += sum(map(len, server.prefilled()))
        assert "were cut" not in server.log.read_text()

    assert warming.result().status_code == 503
    assert "The server is stopping" in warming.result().text
    with Store.open(tmp_path / "store", read_only=True) as opened:
        assert partial_tokens(opened) == computed < LENGTH - 1


@pytest.mark.parametrize("way", WAYS)
def test_server_that_is_killed_loses_the_last_of_a_prefill_only(
    models: dict[str, Path], tmp_path: Path, way: str
) -> None:
    body = text(1, **WAYS[way])
    options: dict[str, Any] = {"flags": FLAGS, "min_free_bytes": 0, "patched": EAGER}
    store = tmp_path / "store"
    with HeldServer(models["plain"], store, tmp_path / "logs", **options) as server:
        ask(server, text(0, max_tokens=1))
        server.prefilled()
        with server.held_up(CUT), connected(server, body):
            server.wait_for(CUT)
            with Store.open(store, read_only=True) as opened:
                until(lambda: partial_tokens(opened) >= CUT - STEP)
            server.kill()
    with HeldServer(models["plain"], store, tmp_path / "logs", **options) as server:
        again = ask(server, body)
        assert again.source == "disk"
        assert again.cached_tokens in (CUT - STEP, CUT)
        assert server.stop() == 0
    with Store.open(store, min_free_bytes=0) as opened:
        assert partial_tokens(opened) == 0
        assert opened.check(read_data=True) == []


def partial_tokens(store: Store) -> int:
    """Length of what was saved on the way to a longer prompt."""
    return max((one.num_tokens for one in store.entries() if one.label == PARTIAL_LABEL), default=0)
