"""Paths, prompts and names that nobody meant: a sentence or a right answer, nothing poisoned."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from persist_cache import PromptCache, fs
from persist_cache.errors import StoreAccessError
from persist_cache.store.store import Store
from tests.cli import runner
from tests.fakes import fetched, fingerprint, put
from tests.live_fakes import MODEL, FakeCodec, FakeLayer

DEEP = sys.getrecursionlimit() + 100


def test_store_in_a_folder_1500_levels_deep(tmp_path: Path) -> None:
    root = tmp_path.joinpath(*["d"] * 1500, "store")

    try:
        with Store.open(root, min_free_bytes=0) as store:
            put(store, [1, 2, 3])
            assert fetched(store, [1, 2, 3]) == 3
    finally:
        # Python's own way to remove a tree recurses, too.
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file", "{root}/file is not a folder."),
        ("file/store", "{root}/file is not a folder."),
        ("file/deep/store", "{root}/file is not a folder."),
        ("x" * 300, "File name too long"),
        ("d/" * 3000, "File name too long"),
    ],
)
def test_path_that_can_be_no_store_is_told_for_what_it_is(
    tmp_path: Path, place: str, said: str
) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(StoreAccessError) as caught:
        Store.open(tmp_path / place)

    assert said.format(root=tmp_path) in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED HERE: there is no /proc")
def test_file_system_that_takes_no_folders_is_told_for_what_it_is() -> None:
    with pytest.raises(StoreAccessError, match="takes no new folder"):
        Store.open("/proc/no/store")


def test_conversation_of_more_turns_than_python_nests(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fs, "sync", lambda fd: None)
    root = tmp_path / "store"
    run = runner(root, capfd)
    with Store.open(root, min_free_bytes=0) as store:
        for turn in range(DEEP, 0, -1):
            put(store, list(range(turn)), tier="user")
        assert fetched(store, list(range(DEEP))) == DEEP
        assert store.check() == []

    said = run("list", "--tree", "--json")
    flat = run("list", "--json").json
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20 * DEEP)
    try:
        tree = said.json
    finally:
        sys.setrecursionlimit(limit)

    depth, level = 0, tree
    while level:
        assert set(level[0]) >= set(flat[0])
        level, depth = level[0]["children"], depth + 1
    assert depth == DEEP
    for command in ("list --tree", "stats --json", "check --json", "gc --json"):
        assert run(*command.split()).status == 0
    assert run("evict", "--tier", "user", "--yes").status == 0


def test_long_and_odd_counter_names_spoil_no_later_put(store: Store) -> None:
    for name in ("n" * 600, "é" * 500, "\ud800", "", "a\0b"):
        store.count(name)
        store.count(name, 2)
    store.count("huge", 1 << 70)
    store.count("huge", 1 << 70)

    put(store, [1, 2, 3])

    counters = store.stats().counters
    assert sum(1 for name, count in counters.items() if count == 3) == 5
    assert counters["huge"] > 1 << 62
    assert store.check(read_data=True) == []


def test_odd_label_is_kept_as_well_as_it_can_be(store: Store) -> None:
    entry = put(store, [1, 2, 3], label="caf\udce9")

    store.set_label(entry, "x\ud800y")

    assert store.get(entry).label == "x?y"


@pytest.mark.parametrize(
    "make", [iter, tuple, deque, dict.fromkeys, lambda tokens: (one for one in tokens)]
)
@pytest.mark.parametrize("source", ["memory", "disk"])
def test_tokens_of_any_kind_are_found_again(
    tmp_path: Path, make: Callable[[list[int]], Any], source: str
) -> None:
    prompt = list(range(40))
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        options: dict[str, Any] = {"store": store, "identify": lambda model: fingerprint()}
        with PromptCache(codec=FakeCodec(), **options) as cache:
            cache.insert_cache(MODEL, make(prompt), [FakeLayer(prompt)], cache_type="user")
            assert cache.flush()
            if source == "disk":
                cache.trim_to(n_sequences=0)

            found, rest = cache.fetch_nearest_cache(MODEL, make([*prompt, 77, 78]))

            assert found is not None
            assert found[0].tokens == prompt
            assert list(rest) == [77, 78]
            assert cache.last_fetch.source == source
            assert cache.stats().problems == {}


@pytest.mark.parametrize("tokens", [None, 5, object(), [None], ["a"], [1 << 70], [1.5]])
def test_what_is_no_prompt_is_a_miss(tmp_path: Path, tokens: Any) -> None:
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        options: dict[str, Any] = {"store": store, "identify": lambda model: fingerprint()}
        with PromptCache(codec=FakeCodec(), **options) as cache:
            cache.insert_cache(MODEL, tokens, [FakeLayer([1])])

            assert cache.fetch_nearest_cache(MODEL, tokens) == (None, tokens)

            cache.insert_cache(MODEL, [1, 2, 3], [FakeLayer([1, 2, 3])])
            assert cache.flush()
            assert len(store.entries()) == 1


class Identify:
    """A program's own `identify`, one part of which can be made to fail."""

    broken = ""

    def __call__(self, model: Any) -> Any:
        return self._say("identify", fingerprint())

    def settled(self, model: Any) -> Any:
        return self._say("settled", fingerprint())

    def load_number(self, model: Any) -> Any:
        return self._say("load_number", 1)

    def _say(self, part: str, value: Any) -> Any:
        if part == self.broken:
            raise LookupError("made up")
        return value


@pytest.mark.parametrize("broken", ["identify", "settled", "load_number"])
def test_identify_that_raises_is_no_error_of_any_call(tmp_path: Path, broken: str) -> None:
    identify = Identify()
    prompt, other = list(range(50)), [7] * 50
    with (
        Store.open(tmp_path / "store", min_free_bytes=0) as store,
        PromptCache(store=store, identify=identify, codec=FakeCodec(), idle_s=60) as cache,
    ):
        cache.insert_cache(MODEL, prompt, [FakeLayer(prompt)], cache_type="system")
        assert cache.flush()
        identify.broken = broken
        still = 50 if broken == "settled" else 0  # looks that may read do not ask it

        assert cache.outlook(MODEL, [*prompt, 1]) == (still, still)
        assert cache.known_tokens(MODEL, [*prompt, 1]) == still
        assert cache.branch_point(MODEL, [*prompt, 1]) == 0
        assert cache.read_ahead(MODEL, [*prompt, 1]) == 0
        cache.insert_cache(MODEL, [3], [FakeLayer([3])], cache_type="user")
        assert len(cache.fetch_nearest_cache(MODEL, [*prompt, 1])[1]) == 51 - still
        assert "made up" in str(cache.identify_now(MODEL)) or still

        assert cache.stats().problems["look_up_failed"] > 0
        identify.broken = ""
        cache.insert_cache(MODEL, other, [FakeLayer(other)], cache_type="user")
        assert cache.known_tokens(MODEL, other) == 50


@pytest.mark.parametrize("tokens", [[1.5], ["a"], [1 << 70], iter([1, 2])])
def test_odd_tokens_are_no_error_of_any_look(tokens: Any) -> None:
    with PromptCache(identify=Identify(), codec=FakeCodec()) as cache:
        assert cache.outlook(MODEL, tokens) == (0, 0)
        assert cache.known_tokens(MODEL, tokens) == 0
        assert cache.branch_point(MODEL, tokens) == 0
        assert cache.read_ahead(MODEL, tokens) == 0
