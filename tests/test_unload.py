"""A server that nobody asks lets go of its model, and answers the next request as before."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import server as upstream

from persist_cache import Store
from persist_cache.errors import ModelError, StoreError
from persist_cache.server.model import Models
from persist_cache.server.ticket import Ticket
from tests.loops import Answered, Loop, words
from tests.server_process import ServerProcess
from tests.torture.tiny import KINDS, write_model
from tests.waiting import until

CHAT = [{"role": "system", "content": words(3, 60)}, {"role": "user", "content": words(1, 40)}]
OTHER = [{"role": "system", "content": words(5, 60)}, {"role": "user", "content": words(2, 40)}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models, by the name of their kind; with `-1` behind it, of another seed."""
    folder = tmp_path_factory.mktemp("models")

    def made(name: str) -> Path:
        if not (folder / name).exists():
            kind, _, seed = name.partition("-")
            write_model(folder / name, KINDS[kind], int(seed or 0))
        return folder / name

    return made


@contextmanager
def loop_of(model: Path, store: Path, **options: Any) -> Iterator[Loop]:
    with Store.open(store, min_free_bytes=0) as opened, Loop(model, opened, **options) as loop:
        yield loop


def unload(loop: Loop) -> None:
    """Have it idle for long enough, and wait until its loop has begun again."""
    loop.generator.unload_after_s = 0.0
    until(lambda: is_unloaded(loop), "the model was not unloaded")
    loop.generator.unload_after_s = None


def is_unloaded(loop: Loop) -> bool:
    return loop.provider.asleep is not None and loop.provider.model is None and len(loop.cache) == 0


def threads() -> int:
    """Threads of this process, those of MLX included."""
    tasks = Path("/proc/self/task")
    return len(os.listdir(tasks)) if tasks.exists() else threading.active_count()


@pytest.mark.parametrize("sampling", [{}, {"seed": 1}])
def test_weights_and_caches_leave_memory_after_they_were_saved(
    sampling: dict[str, Any], model: Callable[[str], Path], tmp_path: Path
) -> None:
    with loop_of(model("plain"), tmp_path / "store") as loop:
        loop.ask(CHAT, **sampling)
        weights = weakref.ref(loop.provider.model)
        tokenizer = weakref.ref(loop.provider.tokenizer)

        unload(loop)

        gc.collect()
        assert weights() is None
        assert tokenizer() is None
        assert loop.provider.spare is None
        assert loop.cache.nbytes == 0
        assert loop.cache.store is not None
        assert len(loop.cache.store.entries()) > 0


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "sliding",
        pytest.param("hybrid", marks=pytest.mark.long(reason="30 s of compiling kernels")),
        pytest.param("convolutions", marks=pytest.mark.long(reason="compiles kernels")),
    ],
)
def test_the_next_request_is_answered_from_the_disk_with_the_same_tokens(
    kind: str, model: Callable[[str], Path], tmp_path: Path
) -> None:
    with loop_of(model(kind), tmp_path / "store") as loop:
        before = loop.ask(CHAT)
        again = loop.ask(CHAT)
        unload(loop)

        after = loop.ask(CHAT)

        assert after.prompt == before.prompt
        assert after.reply == again.reply == before.reply
        assert after.ticket.fetch is not None
        assert after.ticket.fetch.source == "disk"
        assert after.cached == again.cached


@pytest.mark.parametrize("sampling", [{"seed": 1}, {"repetition_penalty": 1.2}])
def test_requests_that_are_answered_alone_wake_it_as_well(
    sampling: dict[str, Any], model: Callable[[str], Path], tmp_path: Path
) -> None:
    with loop_of(model("plain"), tmp_path / "store") as loop:
        before = loop.ask(CHAT, **sampling)
        unload(loop)

        assert loop.ask(CHAT, **sampling).reply == before.reply


@pytest.mark.parametrize("options", [{"kv_bits": 8}, {"draft": True}])
def test_quantized_caches_and_draft_models_come_back(
    options: dict[str, Any], model: Callable[[str], Path], tmp_path: Path
) -> None:
    if "draft" in options:
        options = {"draft": model("draft-1")}
    with loop_of(
        model("draft" if "draft" in options else "quantized"), tmp_path / "store", **options
    ) as loop:
        before = loop.ask(CHAT)
        drafts = weakref.ref(loop.provider.draft_model) if loop.provider.draft_model else None
        unload(loop)
        gc.collect()

        assert drafts is None or drafts() is None
        assert loop.ask(CHAT).reply == before.reply
        assert (loop.provider.draft_model is not None) == ("draft" in options)


def test_the_model_that_was_asked_last_is_the_one_that_comes_back(
    model: Callable[[str], Path], tmp_path: Path, loaded: list[str]
) -> None:
    with loop_of(model("plain"), tmp_path / "store") as loop:
        own = loop.ask(CHAT)
        other = loop.ask(CHAT, model=str(model("plain-1")))
        assert own.reply != other.reply
        unload(loop)

        loaded.clear()
        assert loop.ask(CHAT, model=str(model("plain-1"))).reply == other.reply
        assert loaded == [str(model("plain-1"))]

        unload(loop)
        assert loop.ask(CHAT).reply == own.reply
        assert loaded == [str(model("plain-1")), str(model("plain"))]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that mlx-lm loads, in order."""
    names: list[str] = []
    load = upstream.load

    def noted(name: str, *args: Any, **options: Any) -> Any:
        names.append(name)
        return load(name, *args, **options)

    monkeypatch.setattr(upstream, "load", noted)
    return names


def test_requests_that_wake_it_together_compute_what_they_share_once(
    model: Callable[[str], Path], tmp_path: Path, loaded: list[str]
) -> None:
    long = [{"role": "user", "content": words(7, 600)}]
    with loop_of(model("plain"), tmp_path / "store") as loop:
        loop.ask(OTHER)
        unload(loop)
        loaded.clear()
        together = threading.Barrier(4)

        def ask() -> Answered:
            together.wait()
            return loop.ask(long)

        with ThreadPoolExecutor(4) as pool:
            answered = [one.result() for one in [pool.submit(ask) for _ in range(4)]]

        assert len({tuple(one.reply) for one in answered}) == 1
        assert loaded == [str(model("plain"))]
        computed = sum(len(one.prompt) - one.cached for one in answered)
        assert computed < 1.3 * len(answered[0].prompt)


def test_a_request_that_comes_while_it_goes_is_answered(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    with loop_of(model("plain"), tmp_path / "store") as loop:
        before = loop.ask(CHAT)
        leaving, go = threading.Event(), threading.Event()
        doze = loop.provider.doze

        def held() -> None:
            doze()
            leaving.set()
            assert go.wait(60)

        loop.provider.doze = held  # type: ignore[method-assign]
        loop.generator.unload_after_s = 0.0
        assert leaving.wait(60)
        loop.generator.unload_after_s = None
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(loop.ask, CHAT) for _ in range(2)]
            until(lambda: loop.generator.requests.qsize() > 0, "none arrived")
            go.set()

            assert [one.result(60).reply for one in asked] == [before.reply] * 2


def test_nothing_goes_while_a_request_is_answered(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    with loop_of(model("plain"), tmp_path / "store") as loop, loop.generator.in_flight():
        loop.generator.unload_after_s = 0.0
        before = loop.provider.model
        polls = 0
        empty = loop.generator.requests.empty

        def counted() -> bool:
            nonlocal polls
            polls += 1
            return bool(empty())

        loop.generator.requests.empty = counted
        until(lambda: polls > 2, "it does not look for requests")
        assert loop.provider.model is before is not None
        loop.generator.unload_after_s = None


def test_a_load_that_fails_costs_its_request_and_no_other(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model("plain"), folder)
    with loop_of(folder, tmp_path / "store") as loop:
        before = loop.ask(CHAT)
        unload(loop)
        folder.rename(tmp_path / "elsewhere")

        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(loop.ask, CHAT) for _ in range(3)]
            errors = [one.exception(60) for one in asked]
        assert all(isinstance(error, ModelError) for error in errors), errors

        (tmp_path / "elsewhere").rename(folder)
        assert loop.ask(CHAT).reply == before.reply


def test_what_cannot_be_saved_stays_in_memory(
    model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise StoreError("no room")

    with loop_of(model("plain"), tmp_path / "store") as loop:
        monkeypatch.setattr(Store, "put", fails)
        before = loop.ask(CHAT)
        loop.generator.unload_after_s = 0.0
        until(lambda: loop.provider.asleep is not None and loop.provider.model is None)
        loop.generator.unload_after_s = None
        kept = len(loop.cache)
        monkeypatch.undo()

        after = loop.ask(CHAT)

        assert kept > 0
        assert loop.cache.flush(60)
        assert after.reply == before.reply
        assert after.ticket.fetch is not None
        assert after.ticket.fetch.source == "memory"


def test_counting_and_explaining_have_it_loaded_again(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    with loop_of(model("plain"), tmp_path / "store") as loop:
        loop.ask(CHAT)
        unload(loop)

        found = Models(loop.generator).loaded({})

        assert found.key == loop.provider.model_key
        assert loop.provider.asleep is None


@pytest.mark.parametrize(
    "cycles",
    [6, pytest.param(50, marks=pytest.mark.long(reason="50 loads of a model, 15 s"))],
)
def test_threads_stay_as_many_however_often_it_goes_and_comes(
    cycles: int, model: Callable[[str], Path], tmp_path: Path
) -> None:
    with loop_of(model("plain"), tmp_path / "store") as loop:
        replies, counts = set(), []
        for _ in range(cycles):
            replies.add(tuple(loop.ask(CHAT, ticket=Ticket()).reply))
            unload(loop)
            counts.append(threads())

        assert len(replies) == 1
        assert len(set(counts[1:])) == 1, counts


@pytest.mark.long(reason="50 loads of a model by a server")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux's /proc")
def test_a_server_stays_as_large_however_often_its_model_goes_and_comes(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    said = [(one["role"], one["content"]) for one in CHAT]
    texts: set[str] = set()
    sizes: list[int] = []
    counts: list[int] = []
    with ServerProcess(
        model("plain"), tmp_path / "store", tmp_path, unload_after_s=0.2, min_free_bytes=0
    ) as server:
        assert server.process is not None
        process = Path(f"/proc/{server.process.pid}")
        for cycle in range(50):
            answer = server.chat(*said, max_tokens=8, temperature=0)
            texts.add(answer.json()["choices"][0]["message"]["content"])
            until(lambda: server.get("/health")["weights"] == "unloaded", "it was not unloaded")
            if cycle > 5:  # what has answered is over in a moment
                until(lambda: len(os.listdir(process / "task")) <= max(counts), "more threads")
            counts.append(len(os.listdir(process / "task")))
            pages = int((process / "statm").read_text().split()[1])
            sizes.append(pages * os.sysconf("SC_PAGE_SIZE"))

    assert len(texts) == 1
    assert max(sizes[25:]) - max(sizes[5:25]) < 2 << 20, sizes
