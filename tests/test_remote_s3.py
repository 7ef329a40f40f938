"""A real S3 server behind real servers and stores: SeaweedFS, as docs/sharing.md sets it up."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests

from persist_cache import Store
from persist_cache.remote import PublishOutcome, Remote, RemoteError, RemoteSettings, Why
from persist_cache_cli.demo.openblas import preload_env
from tests import weed
from tests.cli import prepared_script
from tests.command_server import CommandServer
from tests.fakes import fetched
from tests.proxy import Proxy
from tests.remotes import LONG, bring, machine, put_real, secret_file
from tests.test_caching_server import CHAT, body_of, used
from tests.tiny_models import build_model_dir
from tests.waiting import until

pytestmark = pytest.mark.long  # a server of some 100 MB that takes seconds to start

PROMPT = (
    "You are the assistant of a small library. Answer politely and briefly, name the shelf where "
    "a book stands, and say so when you do not know. Never invent a title. "
) * 57


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s3")


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[weed.Weed]:
    (folder / "weed").mkdir()
    with weed.running(folder / "weed") as server:
        yield server


@pytest.fixture(autouse=True)
def _access(s3: weed.Weed, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, s3)


def enter(
    monkeypatch: pytest.MonkeyPatch, s3: weed.Weed, name: str = "team", url: str = ""
) -> None:
    """Have this process, and those that it starts, reach the bucket so."""
    for variable, value in weed.access(s3, name, url).items():
        monkeypatch.setenv(variable, value)


@pytest.fixture
def settings(tmp_path: Path, request: pytest.FixtureRequest) -> RemoteSettings:
    """A prefix of the test's own."""
    name = "".join(one for one in request.node.name if one.isalnum())
    return RemoteSettings(
        url=f"s3://{weed.BUCKET}/{name}", secret_file=secret_file(tmp_path), publish_plain=True
    )


# ---- stores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["w0", "w1"], ids=["rows", "states"])
def test_what_is_published_is_found_bit_for_bit_and_nothing_is_listed(
    settings: RemoteSettings, tmp_path: Path, model: str
) -> None:
    with machine(tmp_path, "first", settings) as (store, remote):
        entry = put_real(store, LONG, model=model, complete=model == "w0")
        assert remote.publish(entry).outcome == PublishOutcome.SENT
        assert remote.publish(entry).outcome == PublishOutcome.THERE_ALREADY
        sent = remote.status().counters

    with machine(tmp_path, "second", settings) as (store, remote):
        found = bring(remote, LONG, model=model, ends=[len(LONG)])
        assert (found.why, found.num_tokens) == (Why.BROUGHT, len(LONG))
        assert fetched(store, LONG, model=model) == len(LONG)
        got = remote.status().counters

    assert sent["requests"] == sent["requests_get"] + sent["requests_create"]
    assert got["requests"] == got["requests_get"]


def test_of_those_who_create_one_name_at_once_one_succeeds(
    settings: RemoteSettings, tmp_path: Path
) -> None:
    with machine(tmp_path, "first", settings) as (_, remote):
        probe = remote.probe()

    assert (probe.reachable, probe.may_read, probe.may_create) == (True, True, True)
    assert probe.create_is_exclusive is True
    assert probe.message == ""


def test_a_reader_may_read_and_is_told_that_it_may_not_publish(
    settings: RemoteSettings, s3: weed.Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(tmp_path, "first", settings) as (store, remote):
        remote.publish(put_real(store, LONG))
    enter(monkeypatch, s3, "reader")

    with machine(tmp_path, "second", settings) as (store, remote):
        assert bring(remote, LONG).why is Why.BROUGHT
        probe = remote.probe()
        with pytest.raises(RemoteError, match=r"(?i)refused|rights|403|denied"):
            remote.publish(put_real(store, [3, *LONG]))

    assert (probe.may_read, probe.may_create) == (True, False)


def test_who_is_not_let_in_is_told_that_it_is_the_credentials(
    settings: RemoteSettings, s3: weed.Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, s3, "nobody")

    with machine(tmp_path, "second", settings) as (_, remote):
        assert bring(remote, LONG).why in (Why.FAILED, Why.REFUSED)
        state = remote.status()

    assert "credential" in state.last_error.lower()


PUBLISHER = """
import json, sys
from pathlib import Path
import msgspec
from persist_cache import Store
from persist_cache.remote import Remote, RemoteSettings
from tests.remotes import LONG, put_real

settings = msgspec.json.decode(sys.argv[2], type=RemoteSettings)
with Store.open(Path(sys.argv[1]), min_free_bytes=0, run_tokens=64) as store:
    entry = put_real(store, LONG)
    remote = Remote.open(store, settings)
    print("ready", flush=True)
    sys.stdin.readline()
    done = remote.publish(entry)
    print(json.dumps([done.outcome.value, done.requests, done.nbytes]))
    remote.close()
"""


def test_twenty_processes_that_publish_one_prompt_at_once_leave_one_set_of_objects(
    settings: RemoteSettings, tmp_path: Path
) -> None:
    alone = msgspec.structs.replace(settings, url=settings.url + "-alone")
    with machine(tmp_path, "alone", alone) as (store, remote):
        once = remote.publish(put_real(store, LONG))
        wanted = remote.status().counters["requests_create"]

    said = msgspec.json.encode(settings).decode()
    publishers = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, str(tmp_path / f"machine-{number}"), said],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        for number in range(20)
    ]
    for one in publishers:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in publishers:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    outcomes = [json.loads(one.communicate(timeout=120)[0]) for one in publishers]

    kinds = [outcome for outcome, _, _ in outcomes]
    assert kinds.count("sent") == 1, kinds
    assert set(kinds) <= {"sent", "claimed", "there_already"}
    assert sum(nbytes for _, _, nbytes in outcomes) <= once.nbytes * 1.1
    assert sum(count for _, count, _ in outcomes) <= once.requests * 20
    assert wanted >= once.blobs
    with machine(tmp_path, "second", settings) as (store, remote):
        assert bring(remote, LONG).why is Why.BROUGHT
        assert fetched(store, LONG) == len(LONG)


# ---- servers -------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(
    model: Path, folder: Path, settings: RemoteSettings, *flags: str, home: str
) -> Iterator[CommandServer]:
    """A machine: a server with a store and a home of its own."""
    place = folder / home
    place.mkdir(parents=True, exist_ok=True)
    shared = ("--remote", settings.url, "--remote-secret-file", settings.secret_file)
    with CommandServer(model, place / "store", place, "--min-free", "0", *shared, *flags) as server:
        yield server
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


def ask(server: CommandServer, question: str, system: str = PROMPT) -> requests.Response:
    body = body_of(CHAT, question, system=system)
    said = {**body, "temperature": 0, "max_tokens": 8}
    return server.request("POST", CHAT, json=said, timeout=300)


def state_of(server: CommandServer) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/v1/cache/stats")["remote"]
    return found


def published(server: CommandServer) -> int:
    return int(state_of(server)["counters"].get("published", 0))


def test_another_machine_answers_its_first_long_request_from_the_bucket(
    smollm2: Path, settings: RemoteSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in preload_env().items():
        monkeypatch.setenv(name, value)
    with serving(smollm2, tmp_path, settings, "--publish-plain", home="first") as first:
        computed = ask(first, "Where do the atlases stand?")
        for question in ("Two?", "Three?"):
            ask(first, question)
            first.request("POST", "/v1/cache/flush")
        until(lambda: published(first))

    monkeypatch.setenv("PERSIST_CACHE_HOME", str(tmp_path / "elsewhere"))
    with serving(smollm2, tmp_path, settings, home="second") as second:
        found = ask(second, "Where do the atlases stand?")

    usage = used(CHAT, found)
    assert usage.prompt > 2000
    assert found.headers["x-persist-cache"].startswith(f"remote; tokens={usage.cached}")
    assert usage.cached > usage.prompt - 40
    assert found.json()["choices"] == computed.json()["choices"]


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Path:
    return build_model_dir(folder / "tiny", model_type="llama")


@pytest.fixture(scope="module")
def windowed(folder: Path) -> Path:
    """A model that can be resumed only where its state was kept."""
    options: Any = {"sliding_window": 32, "sliding_window_pattern": 2}
    return build_model_dir(folder / "windowed", model_type="gemma3_text", **options)


@pytest.fixture(scope="module")
def recurrent(folder: Path) -> Path:
    return build_model_dir(
        folder / "recurrent",
        model_type="mamba",
        state_size=16,
        conv_kernel=4,
        use_bias=False,
        use_conv_bias=True,
        time_step_rank=4,
    )


@pytest.mark.parametrize("kind", ["tiny", "windowed", "recurrent"])
def test_every_kind_of_model_is_found_by_its_system_part(
    kind: str,
    settings: RemoteSettings,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    model = request.getfixturevalue(kind)
    with serving(model, tmp_path, settings, "--publish-plain", home="first") as first:
        computed = ask(first, "One?")
        for question in ("Two?", "Three?", "Four?"):
            first.request("POST", "/v1/cache/flush")
            ask(first, question)
        until(lambda: published(first))

    with serving(model, tmp_path, settings, home="second") as second:
        found = ask(second, "One?")

    assert found.headers["x-persist-cache"].startswith("remote")
    assert used(CHAT, found).cached > 300
    assert found.json()["choices"] == computed.json()["choices"]


def test_answers_go_on_while_the_bucket_is_frozen_killed_and_back(
    tiny: Path, settings: RemoteSettings, s3: weed.Weed, tmp_path: Path
) -> None:
    with serving(tiny, tmp_path, settings, home="machine") as server:
        assert "miss" in ask(server, "One?", f"First. {PROMPT}").headers["x-persist-cache"]
        assert state_of(server)["breaker"] == "closed"
        s3.freeze()
        try:
            assert ask(server, "One?", f"Second. {PROMPT}").status_code == 200
            assert state_of(server)["breaker"] == "open"
            asked = state_of(server)["counters"]["requests"]
            assert ask(server, "One?", f"Third. {PROMPT}").status_code == 200
            assert state_of(server)["counters"]["requests"] == asked
        finally:
            s3.thaw()
        s3.kill()
        try:
            assert ask(server, "One?", f"Fourth. {PROMPT}").status_code == 200
        finally:
            s3.start()

        numbers = itertools.count(1000)

        def is_back() -> bool:
            # It is tried again beside a request, after half a minute.
            assert ask(server, "One?", f"{next(numbers)}. {PROMPT[:2000]}").status_code == 200
            return bool(state_of(server)["breaker"] == "closed")

        until(is_back, timeout_s=120)
        assert server.get("/v1/cache/stats")["server"]["disk_off"] == ""


def test_a_slow_line_that_is_cut_costs_a_pull_and_nothing_else(
    tiny: Path,
    settings: RemoteSettings,
    s3: weed.Weed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with machine(tmp_path, "first", settings) as (store, remote):
        remote.publish(put_real(store, LONG))

    with Proxy(s3.port) as proxy:
        # Requests are signed for the server's own address, which the proxy hands on.
        enter(monkeypatch, s3, url=proxy.url)
        with machine(tmp_path, "slow", settings) as (store, remote):
            proxy.delay_s, proxy.cut_after = 0.05, 4000
            found = bring(remote, LONG)
            assert not found.is_hit
            assert store.entries() == []
            assert store.check(read_data=True) == []
            assert list((store.root / "tmp").iterdir()) == []


def test_many_requests_at_once_make_one_pull(
    tiny: Path, settings: RemoteSettings, tmp_path: Path
) -> None:
    with serving(tiny, tmp_path, settings, "--publish-plain", home="first") as first:
        for question in ("One?", "Two?", "Three?", "Four?"):
            ask(first, question)
            first.request("POST", "/v1/cache/flush")
        until(lambda: published(first))

    with serving(tiny, tmp_path, settings, home="second") as second:
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda n: ask(second, f"Question {n}?"), range(20)))
        counters = state_of(second)["counters"]

    assert all(used(CHAT, one).cached > 300 for one in answers)
    assert counters["pulled"] == 1


# ---- the set-up of the documents -----------------------------------------------------------------


def test_the_documented_commands_work(
    tiny: Path, s3: weed.Weed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    first, second = tmp_path / "a", tmp_path / "b"
    url = f"s3://{weed.BUCKET}/v1"

    made = prepared_script(first, "remote", "add", url, "--new-secret", "--publish-plain", "--json")
    secret = made.json["secret_file"]
    of_prompt = ("--model", tiny, "--system", PROMPT)
    assert prepared_script(first, "warm", *of_prompt, "--publish").status == 0
    assert prepared_script(second, "remote", "add", url, "--secret-file", secret).status == 0
    status = prepared_script(second, "remote", "status")
    pulled = prepared_script(second, "remote", "pull", *of_prompt)
    doctor = prepared_script(first, "doctor", "--json")

    assert (status.status, pulled.status) == (0, 0), pulled.err
    assert "came from the remote" in pulled.out
    assert doctor.json["remote"]["probe"]["create_is_exclusive"] is True
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in json.dumps(
        [made.out, status.out, pulled.out, doctor.out]
    )
    with (
        Store.open(second) as store,
        contextlib.closing(
            Remote.open(store, RemoteSettings(url=url, secret_file=secret))
        ) as remote,
    ):
        assert remote.why_not_publish
