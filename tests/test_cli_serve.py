"""Commands work on the store of a running server: no error, no wrong answer."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from persist_cache import Store
from tests import prepared
from tests.cli import SCRIPT, prepared_script, script
from tests.server_process import ServerProcess, sentence_in
from tests.tiny_models import build_model_dir
from tests.waiting import until

SYSTEMS = [
    f"You are assistant number {number}. Answer in a short sentence. " * 12 for number in range(4)
]
QUESTIONS = ["Who are you?", "Tell me a story about dragons.", "What is the capital of France?"]
Asked = tuple[int, int]
ALL = [(system, question) for system in range(len(SYSTEMS)) for question in range(len(QUESTIONS))]


class Serve(ServerProcess):
    """`persist-cache serve`."""

    def __init__(self, model: Path, store: Path, folder: Path, *options: str) -> None:
        super().__init__(model, store, folder)
        self.words = ["serve", "--store", str(store), "--model", str(model)]
        self.words += ["--port", str(self.port), "--min-free", "0", *options]

    def launch(self) -> prepared.Program | subprocess.Popen[bytes]:
        return prepared.start("persist_cache_cli", self.words, self.log)

    def answer(self, asked: Asked) -> tuple[str, int, str]:
        """The greedy answer, the tokens that were cached, and where."""
        system, question = asked
        done = self.chat(
            ("system", SYSTEMS[system]),
            ("user", QUESTIONS[question]),
            max_tokens=8,
            temperature=0.0,
        )
        assert done.status_code == 200, done.text
        body: dict[str, Any] = done.json()
        cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
        header = done.headers["x-persist-cache"]
        return str(body["choices"][0]["message"]["content"]), int(cached), header.split(";")[0]


class Installed(Serve):
    """The script that was installed, started as users do."""

    def launch(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen([SCRIPT, *self.words], stdout=log, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Asked, str]:
    """What a server answers that stores nothing and keeps nothing."""
    folder = tmp_path_factory.mktemp("cold")
    options = "--persist", "none", "--memory-bytes", "0"
    with Installed(model, folder / "store", folder, *options) as cold:
        answers = {asked: cold.answer(asked) for asked in ALL}
    assert {cached for _, cached, _ in answers.values()} == {0}
    return {asked: text for asked, (text, _, _) in answers.items()}


@contextmanager
def asking(server: Serve, expected: dict[Asked, str]) -> Iterator[list[tuple[str, int, str]]]:
    """Two clients that ask on and on, and compare; yields the answers they got so far."""
    answers: list[tuple[str, int, str]] = []
    enough = threading.Event()

    def ask(first: int) -> None:
        turn = first
        while not enough.is_set():
            asked = ALL[turn % len(ALL)]
            answer = server.answer(asked)
            assert answer[0] == expected[asked], (asked, answer)
            answers.append(answer)
            turn += 5

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(ask, first) for first in (0, 7)]
        try:
            yield answers
        finally:
            enough.set()
        for client in clients:
            client.result()


def sound(server: Serve, store: Path) -> Mapping[str, int]:
    """Stop the server and look at what it leaves; returns the store's counters."""
    assert server.stop() == 0
    log = server.log.read_text()
    assert "Traceback" not in log, log[-4000:]
    checked = script(store, "check", "--read-data")
    assert checked.status == 0, checked.out
    with Store.open(store) as opened:
        counters = opened.stats().counters
    assert counters.get("quarantined", 0) == counters.get("read_errors", 0) == 0, counters
    return counters


def test_warm_while_a_server_serves_from_the_same_store(
    model: Path, expected: dict[Asked, str], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    manifest = tmp_path / "prompts.toml"
    manifest.write_text(
        "".join(
            f'[[prompt]]\nmodel = "{model}"\nlabel = "s{number}"\nsystem = "{text}"\n'
            for number, text in enumerate(SYSTEMS)
        )
    )
    # Nothing stays in memory, so that every answer looks at the store.
    with Serve(model, store, tmp_path, "--memory-bytes", "0", "--persist", "system") as server:
        with asking(server, expected) as answers:
            until(lambda: server.get("/v1/cache/stats")["store"]["entries"] >= len(SYSTEMS))
            warmed = prepared_script(store, "warm", "--manifest", manifest, "--json")
            asked = len(answers)
        found = {asked: server.answer(asked) for asked in ALL}
        sound(server, store)

    assert warmed.status == 0, warmed.err
    assert len(warmed.json) == len(SYSTEMS)
    assert all(report["found_tokens"] > 100 for report in warmed.json)
    assert asked > 5, "they were served meanwhile"
    for (system, _), (text, cached, where) in found.items():
        assert where == "disk"
        assert cached >= warmed.json[system]["found_tokens"]
        assert text
    assert {asked: text for asked, (text, _, _) in found.items()} == expected


def _has_grown(answers: Sequence[Any], before: int) -> bool:
    return len(answers) >= before + 3


def _evict_one_by_one(store: Store, answers: Sequence[Any], before: int) -> bool:
    """Evict each entry; True when enough was answered meanwhile."""
    for entry in store.entries():
        with contextlib.suppress(KeyError):  # gone with another
            store.evict([entry.id])
    return len(answers) >= before + 30


def test_evict_of_what_a_server_is_reading(
    model: Path, expected: dict[Asked, str], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    statuses = []
    with Serve(model, store, tmp_path, "--memory-bytes", "0") as server:
        with asking(server, expected) as answers:
            for turn in range(8):
                # All at once, some of it, or the oldest, while others put them back.
                which = (["--all"], ["--tier", "system"], ["--to", "200KB"])[turn % 3]
                until(partial(_has_grown, answers, len(answers)))
                statuses.append(script(store, "evict", *which, "--yes").status)
            with Store.open(store, min_free_bytes=0) as beside:
                until(partial(_evict_one_by_one, beside, answers, len(answers)))
        final = {asked: server.answer(asked)[0] for asked in ALL}
        counters = sound(server, store)

    assert set(statuses) <= {0, 3}
    assert 0 in statuses
    assert "disk" in {where for _, _, where in answers}
    assert counters["evicted"] > 10
    assert final == expected


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nonsense"], "--nonsense"),
        (["--port", "abc"], "--port"),
        (["--store", ""], "--store"),
        (["--disk-bytes", "lots"], "--disk-bytes"),
        (["--persist", "tool"], "--persist"),
        (["--stabilize", "dats"], "did you mean 'date'?"),
        (["--stabilize", "none,env"], "stands alone"),
    ],
)
def test_wrong_flags_are_one_sentence(words: list[str], says: str, tmp_path: Path) -> None:
    done = prepared_script(tmp_path / "store", "serve", *words)

    assert done.status == 2
    assert says in done.sentence
    assert done.out == ""
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("is_usable", [True, False])
def test_one_line_at_the_start_says_what_the_cache_may_take(
    model: Path, tmp_path: Path, is_usable: bool
) -> None:
    store = tmp_path / "store"
    if not is_usable:
        store.write_text("somebody else's")
    flags = ("--disk-bytes", "2GiB", "--persist", "system", "--stabilize", "date")
    with Serve(model, store, tmp_path, *flags) as server:
        assert server.request("GET", "/health").status_code == 200
        head = {"role": "system", "content": "You help.\nToday's date is 2026-11-25."}
        asked = {"messages": [head, {"role": "user", "content": "Hello"}], "max_tokens": 1}
        told = server.request("POST", "/v1/chat/completions", json=asked)
        assert told.headers["x-persist-cache"].endswith("; repaired=date")
        assert server.stop() == 0

    (line,) = [one for one in server.log.read_text().splitlines() if "prompt cache: " in one]
    wanted = f"disk {store}, at most 2.00 GiB, 0.00 GiB left free, tiers system"
    assert (wanted if is_usable else "disk off: ") in line
    assert is_usable or str(store) in line


def test_log_level_is_that_of_upstream(model: Path, tmp_path: Path) -> None:
    flags = ("--log-level", "ERROR")
    with Serve(model, tmp_path / "store", tmp_path, *flags) as server:
        assert server.stop() == 0

    assert "prompt cache: " not in server.log.read_text()


@pytest.mark.parametrize("is_there", [True, False])
def test_model_that_cannot_be_loaded_ends_it_with_one_sentence(
    tmp_path: Path, is_there: bool
) -> None:
    model = tmp_path / "model"
    if is_there:
        model.mkdir()
        (model / "config.json").write_text('{"model_type": "no_such_architecture"}')
    words = ["serve", "--model", model, "--port", "0", "--log-level", "ERROR"]

    done = prepared_script(tmp_path / "store", *words, env={"HF_HUB_OFFLINE": "1"}, timeout=60)

    assert done.status == 1
    (sentence,) = [line for line in done.err.splitlines() if str(model) in line]
    assert sentence.startswith("Error: ")
    assert "Traceback" not in done.err


def test_a_file_that_nobody_holds_is_said_before_anything_is_loaded(
    model: Path, tmp_path: Path
) -> None:
    needed = tmp_path / "needed"
    needed.touch()

    words = ("serve", "--model", model, "--port", 0, "--while-locked", needed)
    done = prepared_script(tmp_path / "store", *words)

    assert done.status == 1
    assert f"No process holds {needed} locked" in done.sentence
    assert not (tmp_path / "store").exists()


def test_model_of_a_request_that_is_nowhere_is_one_sentence(model: Path, tmp_path: Path) -> None:
    with Serve(model, tmp_path / "store", tmp_path) as server:
        done = server.chat(("user", "Hello!"), model=str(tmp_path / "nowhere"))
        assert done.status_code == 404
        said = sentence_in(done.json())
        assert "is no folder here" in said
        assert "\n" not in said
        assert server.chat(("user", "Are you there?"), max_tokens=2).status_code == 200
