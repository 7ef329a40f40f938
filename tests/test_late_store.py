"""A store that cannot be opened at first: tried again in the background, and used as a whole."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from persist_cache import PromptCache
from persist_cache.errors import StoreAccessError, StoreFullError, StoreInUseError
from persist_cache.store.store import Store
from tests.fakes import fingerprint
from tests.live_fakes import MODEL, FakeCodec, FakeLayer
from tests.waiting import until

PROMPT = list(range(50))


class Opener:
    """Opens a store as soon as nothing is in the way."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.failure: Exception | None = StoreAccessError("It is not there.")
        self.threads: set[int] = set()

    def __call__(self) -> Store:
        self.threads.add(threading.get_ident())
        if self.failure is not None:
            raise self.failure
        return Store.open(self.root, min_free_bytes=0)


@pytest.fixture
def opener(tmp_path: Path) -> Opener:
    return Opener(tmp_path / "store")


def cache_of(opener: Opener, **options: Any) -> PromptCache:
    options = {"open_store": opener, "idle_s": 60, "disk_off": "It is not there.", **options}
    return PromptCache(identify=lambda model: fingerprint(), codec=FakeCodec(), **options)


def insert(cache: PromptCache, tokens: list[int], kind: str) -> None:
    cache.insert_cache(MODEL, tokens, [FakeLayer(tokens)], cache_type=kind)


def can_be_opened(root: Path) -> bool:
    """Whether nothing in this process has the store open."""
    try:
        Store.open(root).close()
    except StoreInUseError:
        return False
    return True


def stored(opener: Opener) -> set[int]:
    with Store.open(opener.root, read_only=True) as store:
        assert store.check(read_data=True) == []
        return {entry.num_tokens for entry in store.entries()}


def test_what_memory_holds_is_saved_once_the_store_opens(opener: Opener) -> None:
    with cache_of(opener, persist=["system", "assistant"]) as cache:
        insert(cache, PROMPT, "system")
        insert(cache, [7] * 20, "user")
        insert(cache, [8] * 60, "assistant")
        assert not cache.flush()
        assert cache.disk_off == "It is not there."

        opener.failure = None
        assert cache.flush()

        assert cache.disk_off == ""
        assert cache.outlook(MODEL, [*PROMPT, 9]) == (50, 50)

    assert stored(opener) == {50, 60}
    assert threading.get_ident() not in opener.threads


def test_store_is_tried_while_idle_and_the_reason_is_the_latest(opener: Opener) -> None:
    with cache_of(opener, idle_s=0.01) as cache:
        opener.failure = StoreFullError("The disk is full.")
        until(lambda: cache.disk_off == "The disk is full.")
        assert cache.fetch_nearest_cache(MODEL, PROMPT)[0] is None
        assert cache.last_fetch.reason == "The disk is full."
        opener.failure = OSError(5, "made up")
        until(lambda: "Input/output error" in cache.disk_off)
        assert cache.stats().disk_off == cache.disk_off

        opener.failure = None
        until(lambda: cache.disk_off == "")

        assert cache.stats().store is not None


def test_store_is_tried_by_a_process_that_is_never_idle(opener: Opener) -> None:
    opener.failure = None
    with cache_of(opener) as cache:
        insert(cache, PROMPT, "user")

        until(lambda: cache.disk_off == "")
        assert cache.flush()

    assert stored(opener) == {50}


def test_what_follows_the_store_is_told_before_it_is_used(opener: Opener) -> None:
    seen: list[str] = []
    with cache_of(opener) as cache:
        cache.on_disk = lambda: seen.append(cache.disk_off)
        opener.failure = None
        assert cache.flush()

    assert seen == ["It is not there."]


def test_store_that_opens_when_the_cache_is_closed_already_is_closed(opener: Opener) -> None:
    asked, goes_on = threading.Event(), threading.Event()
    late: list[Store] = []

    def slow() -> Store:
        asked.set()
        goes_on.wait(60)
        late.append(Store.open(opener.root, min_free_bytes=0))
        return late[0]

    cache = cache_of(opener, idle_s=0.01, open_store=slow)
    assert asked.wait(30)
    cache.close(0)
    goes_on.set()

    until(lambda: bool(late) and can_be_opened(opener.root))
    assert cache.stats().store is None


def test_several_ranks_never_open_it(opener: Opener) -> None:
    opener.failure = None
    codec = FakeCodec()
    codec.ranks = 2
    with PromptCache(open_store=opener, codec=codec, idle_s=0.01) as cache:
        assert cache.flush()
        assert "several ranks" in cache.disk_off

    assert opener.threads == set()
