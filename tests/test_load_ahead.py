"""What a waiting request needs of the disk is read before its turn, counted, and let go of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from persist_cache import PromptCache, Store
from persist_cache.fingerprint.value import Fingerprint
from tests.fakes import fingerprint
from tests.live_fakes import MODEL, FakeCodec, FakeLayer

LONG = range(200)


class Weights:
    """Weights of a model that may be replaced."""

    name = "w0"

    def __call__(self, _model: Any) -> Fingerprint:
        return fingerprint(weights=self.name)


@pytest.fixture
def weights() -> Weights:
    return Weights()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        yield store


Make = Callable[..., PromptCache]


@pytest.fixture
def make(disk: Store, weights: Weights) -> Iterator[Make]:
    made: list[PromptCache] = []

    def new(**options: Any) -> PromptCache:
        defaults = {"store": disk, "identify": weights, "idle_s": 60, "codec": FakeCodec()}
        made.append(PromptCache(**{**defaults, **options}))
        return made[-1]

    yield new
    for cache in made:
        cache.close()


@pytest.fixture
def cache(make: Make) -> PromptCache:
    """A cache whose disk has 200 tokens, and whose memory is empty."""
    with make() as first:
        insert(first, LONG)
        first.flush()
    return make()


def insert(cache: PromptCache, tokens: Sequence[int], weights: str = "w0") -> None:
    cache.insert_cache(MODEL, list(tokens), [FakeLayer(tokens, weights=weights)], cache_type="user")


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads on which caches are restored."""
    threads: list[str] = []
    restore = FakeCodec.restore

    def noted(self: Any, *arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return restore(self, *arguments)

    monkeypatch.setattr(FakeCodec, "restore", noted)
    return threads


def ahead_of(cache: PromptCache, tokens: Sequence[int], **options: Any) -> Any:
    """What another thread reads ahead for a prompt."""
    read: list[Any] = []

    def load() -> None:
        read.append(cache.load_ahead(MODEL, list(tokens), **options))

    thread = threading.Thread(target=load, name="reader")
    thread.start()
    thread.join()
    return read[0]


@pytest.mark.parametrize("to_copy", [True, False])
def test_what_was_read_ahead_is_handed_over_and_told_as_read_from_the_disk(
    cache: PromptCache, reading: list[str], to_copy: bool
) -> None:
    ahead = ahead_of(cache, range(210), to_copy=to_copy)

    kv, rest, fetch = cache.look_up(MODEL, list(range(210)), to_copy=to_copy, ahead=ahead)

    assert kv is not None
    assert kv[0].tokens == list(LONG)
    assert list(rest) == list(range(200, 210))
    assert (fetch.source, fetch.num_tokens) == ("disk", 200)
    assert fetch.nbytes == ahead.match.nbytes > 0
    assert fetch.seconds >= ahead.seconds > 0
    assert reading == ["reader"]
    stats = cache.stats()
    assert (stats.hits, stats.restored_bytes) == ({"disk": 1}, fetch.nbytes)


def test_it_counts_as_memory_until_it_is_released(cache: PromptCache) -> None:
    assert cache.nbytes == 0

    ahead = ahead_of(cache, range(210))

    assert cache.nbytes == ahead.held.nbytes > 0
    cache.release(ahead)
    assert cache.nbytes == 0
    assert len(cache) == 0


def test_a_request_that_has_it_keeps_it_when_it_is_released(cache: PromptCache) -> None:
    ahead = ahead_of(cache, range(210), to_copy=True)
    cache.look_up(MODEL, list(range(210)), to_copy=True, ahead=ahead)

    cache.release(ahead)

    assert len(cache) == 1


def test_weights_that_were_replaced_meanwhile_do_not_get_it(
    cache: PromptCache, weights: Weights
) -> None:
    ahead = ahead_of(cache, range(210))

    weights.name = "w1"
    kv, rest, fetch = cache.look_up(MODEL, list(range(210)), ahead=ahead)

    assert kv is None
    assert len(rest) == 210
    assert fetch.source == "miss"


def test_what_went_for_room_is_read_again(
    make: Make, cache: PromptCache, reading: list[str]
) -> None:
    small = make(max_size=1)
    ahead = ahead_of(small, range(210))
    insert(small, range(500, 600))

    kv, _, fetch = small.look_up(MODEL, list(range(210)), ahead=ahead)

    assert kv is not None
    assert kv[0].tokens == list(LONG)
    assert fetch.source == "disk"
    assert reading == ["reader", threading.current_thread().name]


def test_what_memory_serves_is_not_read(cache: PromptCache, reading: list[str]) -> None:
    insert(cache, range(190))

    assert ahead_of(cache, range(210)) is None
    assert ahead_of(cache, range(300, 310)) is None
    assert reading == []


def test_what_memory_may_not_hold_is_left_to_the_system(
    make: Make, cache: PromptCache, reading: list[str]
) -> None:
    small = make(max_bytes=100)

    assert ahead_of(small, range(210)) is None

    assert reading == []
    assert small.nbytes == 0
    assert small.stats().read_ahead_bytes > 0


def test_a_longer_cache_in_memory_is_used_instead(cache: PromptCache) -> None:
    """Another request with the same beginning ended while this one waited."""
    ahead = ahead_of(cache, range(260))
    insert(cache, range(250))

    kv, _, fetch = cache.look_up(MODEL, list(range(260)), ahead=ahead)

    assert kv is not None
    assert kv[0].tokens == list(range(250))
    assert fetch.source == "memory"


def test_tokens_that_are_to_be_left_are_left(cache: PromptCache) -> None:
    ahead = ahead_of(cache, LONG, leave_tokens=20)

    kv, rest, fetch = cache.look_up(MODEL, list(LONG), leave_tokens=20, ahead=ahead)

    assert kv is not None
    assert kv[0].tokens == list(range(180))
    assert list(rest) == list(range(180, 200))
    assert fetch.source == "disk"
