"""What was kept on the way to a longer entry goes when that is there, and nothing else does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persist_cache import PromptCache, Store
from persist_cache.cache.owners import Owner
from persist_cache.cache.promised import Promised
from persist_cache.entry import PARTIAL_LABEL
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.store.evict import REPLACED
from persist_cache.store.put import PutResult
from tests.fakes import FakeSource, blob_files, fetched, fingerprint
from tests.live_fakes import MODEL, FakeCodec, FakeLayer

PROMPT = list(range(10, 50))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", min_free_bytes=0) as opened:
        yield opened


def put(
    store: Store, num_tokens: int, *, label: str = "", complete: bool = True, pinned: bool = False
) -> PutResult:
    tokens = PROMPT[:num_tokens]
    source = FakeSource(tokens, complete=complete)
    return store.put(fingerprint(), tokens, source, tier="user", label=label, pinned=pinned)


def lengths(store: Store) -> dict[int, str]:
    return {entry.num_tokens: entry.label for entry in store.entries()}


@pytest.mark.parametrize("complete", [True, False], ids=["rows", "states"])
def test_longer_entry_takes_the_place_of_what_was_kept_on_its_way(
    store: Store, complete: bool
) -> None:
    put(store, 5, complete=complete)
    put(store, 20, label=PARTIAL_LABEL, complete=complete)
    files = len(blob_files(store.root))

    put(store, 40, complete=complete)

    assert lengths(store) == {5: "", 40: ""}
    assert fetched(store, PROMPT) == 40
    assert store.check(read_data=True) == []
    # The rows of the first ones are still those of the path; a state goes with its entry.
    assert len(blob_files(store.root)) == files + 1
    counters = store.stats().counters
    assert counters["replaced"] == 1
    assert "evicted" not in counters


def test_nothing_is_written_again_for_what_was_kept_on_the_way(store: Store) -> None:
    written = [put(store, end, label=PARTIAL_LABEL).new_tokens for end in (10, 20, 30)]
    written.append(put(store, 40).new_tokens)

    assert written == [10, 10, 10, 10]
    assert lengths(store) == {40: ""}


def test_each_partial_entry_takes_the_place_of_the_one_before(store: Store) -> None:
    for end in (10, 20, 30):
        put(store, end, label=PARTIAL_LABEL, complete=False)

    assert lengths(store) == {30: PARTIAL_LABEL}


def test_entry_that_was_there_before_stays_what_it_was(store: Store) -> None:
    put(store, 20)

    put(store, 20, label=PARTIAL_LABEL)
    assert lengths(store) == {20: ""}
    put(store, 40)

    assert lengths(store) == {20: "", 40: ""}


def test_name_that_somebody_gave_an_entry_stays(store: Store) -> None:
    put(store, 20, label="mine")

    put(store, 20, label=PARTIAL_LABEL)
    put(store, 40)

    assert lengths(store) == {20: "mine", 40: ""}


def test_partial_entry_that_turns_out_to_be_a_whole_prompt_is_one(store: Store) -> None:
    put(store, 20, label=PARTIAL_LABEL)

    put(store, 20)
    put(store, 40)

    assert lengths(store) == {20: "", 40: ""}


def test_partial_entry_that_is_pinned_or_dated_stays(store: Store) -> None:
    pinned = put(store, 10, label=PARTIAL_LABEL).entry
    assert pinned is not None
    store.pin(pinned)
    dated = put(store, 20, label=PARTIAL_LABEL).entry
    assert dated is not None
    store.expire_at(dated, 4e9)
    named = put(store, 30, label=PARTIAL_LABEL).entry
    assert named is not None
    store.set_label(named, "mine")

    put(store, 40)

    assert set(lengths(store)) == {10, 20, 30, 40}


def test_partial_entry_of_another_way_stays(store: Store) -> None:
    other = [*PROMPT[:15], 1, 2, 3]
    store.put(fingerprint(), other, FakeSource(other), tier="user", label=PARTIAL_LABEL)

    put(store, 40)

    assert lengths(store) == {18: PARTIAL_LABEL, 40: ""}


def test_entry_that_is_being_read_is_not_taken_away(store: Store) -> None:
    part = put(store, 20, label=PARTIAL_LABEL, complete=False).entry
    assert part is not None

    with store.serving([part]):
        put(store, 40, complete=False)
        assert set(lengths(store)) == {20, 40}
    put(store, 40, complete=False)

    assert set(lengths(store)) == {40}


def test_what_became_of_a_partial_entry_is_said(store: Store) -> None:
    part = put(store, 20, label=PARTIAL_LABEL, complete=False).entry
    put(store, 40, complete=False)

    assert part is not None
    with store.read() as txn:
        departed = txn.departed(int(part, 16))
    assert departed is not None
    assert departed.note == REPLACED


@pytest.mark.parametrize("trimmable", [True, False], ids=["rows", "states"])
def test_cache_lets_go_of_what_it_kept_on_the_way(store: Store, trimmable: bool) -> None:
    with PromptCache(store=store, identify=identified, idle_s=60, codec=FakeCodec()) as cache:
        keep(cache, 5, trimmable)
        for end in (10, 20):
            keep(cache, end, trimmable, partial=True)
            cache.flush()
        keep(cache, 40, trimmable)
        cache.flush()

        assert lengths(store) == {5: "", 40: ""}
        # One that can be cut serves its beginnings, too.
        assert len(cache) == (1 if trimmable else 2)


def test_cache_that_was_there_before_is_not_let_go_of(store: Store) -> None:
    with PromptCache(store=store, identify=identified, idle_s=60, codec=FakeCodec()) as cache:
        keep(cache, 20, trimmable=False)
        keep(cache, 20, trimmable=False, partial=True)
        keep(cache, 40, trimmable=False)
        cache.flush()

        assert lengths(store) == {20: "", 40: ""}
        assert len(cache) == 2


def test_nothing_is_saved_for_what_a_longer_one_has_passed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk gets the newest only."""
    put_one, begun, goes_on = Store.put, threading.Event(), threading.Event()

    def slow(self: Store, *arguments: Any, **options: Any) -> PutResult:
        begun.set()
        assert goes_on.wait(60)
        return put_one(self, *arguments, **options)

    monkeypatch.setattr(Store, "put", slow)
    with PromptCache(store=store, identify=identified, idle_s=60, codec=FakeCodec()) as cache:
        keep(cache, 5)
        assert begun.wait(60)
        for end in (10, 20, 30):
            keep(cache, end, partial=True)
        keep(cache, 40)
        goes_on.set()
        cache.flush()

        assert store.stats().counters["puts"] == 2
        assert lengths(store) == {5: "", 40: ""}


def test_the_disk_is_not_said_to_get_what_a_longer_one_has_passed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each is remembered for good, and counted as stored when everything was evicted."""
    put_one, goes_on, waiting = Store.put, threading.Event(), set[int]()

    def slow(self: Store, *arguments: Any, **options: Any) -> PutResult:
        assert goes_on.wait(60)
        return put_one(self, *arguments, **options)

    def add(self: Promised, owner: Owner, packed: bytes) -> None:
        waiting.add(len(packed))

    def ended(self: Promised, owner: Owner, packed: bytes, *, saved: bool) -> None:
        waiting.discard(len(packed))

    monkeypatch.setattr(Store, "put", slow)
    monkeypatch.setattr(Promised, "add", add)
    monkeypatch.setattr(Promised, "ended", ended)
    with PromptCache(store=store, identify=identified, idle_s=60, codec=FakeCodec()) as cache:
        for end in (5, 10, 20, 30):
            keep(cache, end, partial=True)
        keep(cache, 40)
        assert waiting
        goes_on.set()
        cache.flush()

        assert not waiting


def test_partial_cache_that_nothing_longer_follows_is_found_after_a_restart(store: Store) -> None:
    with PromptCache(store=store, identify=identified, idle_s=60, codec=FakeCodec()) as cache:
        keep(cache, 20, partial=True)
    with PromptCache(store=store, identify=identified, idle_s=60, codec=FakeCodec()) as cache:
        found, rest = cache.fetch_nearest_cache(MODEL, PROMPT)

        assert found is not None
        assert len(rest) == 20
        keep(cache, 40)
        cache.flush()

        assert lengths(store) == {40: ""}


def identified(model: Any) -> Fingerprint:
    return fingerprint()


def keep(
    cache: PromptCache, num_tokens: int, trimmable: bool = True, *, partial: bool = False
) -> None:
    tokens = PROMPT[:num_tokens]
    layers = [FakeLayer(tokens, trimmable)]
    cache.insert_cache(MODEL, tokens, layers, cache_type="user", partial=partial)
