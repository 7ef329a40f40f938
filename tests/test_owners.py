"""What is in memory is found only for the weights that computed it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from persist_cache import PromptCache, Store
from persist_cache.cache.origin import Origin
from persist_cache.cache.owners import Owner, Owners
from persist_cache.fingerprint.identifier import Identifier
from persist_cache.fingerprint.loads import Unidentified
from persist_cache.fingerprint.model_files import ModelKey
from persist_cache.fingerprint.value import Fingerprint
from tests.fakes import fingerprint
from tests.live_fakes import MODEL, FakeCodec, FakeLayer


class Weights:
    """Weights of a model that may be replaced: an `identify` that is a plain callable."""

    def __init__(self) -> None:
        self.name: str | None = "w0"

    def __call__(self, model: Any) -> Fingerprint | None:
        return None if self.name is None else fingerprint(weights=self.name)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        yield store


@pytest.fixture
def weights() -> Weights:
    return Weights()


@pytest.fixture(params=["disk", "memory only"])
def cache(request: pytest.FixtureRequest, disk: Store, weights: Weights) -> Iterator[PromptCache]:
    store = disk if request.param == "disk" else None
    with PromptCache(store=store, identify=weights, idle_s=60, codec=FakeCodec()) as made:
        yield made


def insert(
    cache: PromptCache, tokens: Sequence[int], weights: str, tier: str = "assistant", **how: Any
) -> None:
    layers = [FakeLayer(tokens, weights=weights, **how)]
    cache.insert_cache(MODEL, list(tokens), layers, cache_type=tier)


def fetch(cache: PromptCache, tokens: Sequence[int], model: Any = MODEL) -> str | None:
    """The weights that computed what a fetch gives."""
    kv, rest = cache.fetch_nearest_cache(model, list(tokens))
    if kv is None:
        return None
    assert kv[0].tokens + list(rest) == list(tokens)
    return str(kv[0].weights)


def on_disk(store: Store, weights: str) -> set[int]:
    """Lengths of the entries of these weights."""
    hex_digest = fingerprint(weights=weights).hex
    return {entry.num_tokens for entry in store.entries() if entry.fingerprint == hex_digest}


@pytest.mark.parametrize("tier", ["system", "user", "assistant"])
def test_kv_of_replaced_weights_is_not_served(
    cache: PromptCache, weights: Weights, tier: str
) -> None:
    """Weights replaced in place, then a reload: KV of the old ones came out of memory."""
    insert(cache, range(50), "w0", tier)

    weights.name = "w1"

    assert cache.known_tokens(MODEL, range(60)) == 0
    assert fetch(cache, range(60)) is None
    insert(cache, range(60), "w1", tier)
    assert fetch(cache, range(70)) == "w1"


def test_weights_that_lose_their_identity_find_nothing_of_before(
    cache: PromptCache, weights: Weights
) -> None:
    insert(cache, range(50), "w0")

    weights.name = None

    assert fetch(cache, range(60)) is None


def test_former_weights_kv_goes_to_disk_under_its_own_identity(
    disk: Store, weights: Weights
) -> None:
    with PromptCache(store=disk, identify=weights, idle_s=60, codec=FakeCodec()) as cache:
        insert(cache, range(30), "w0", "system")
        insert(cache, range(50), "w0", "assistant")

        weights.name = "w1"
        fetch(cache, [7])

        assert len(cache) == 0
        cache.flush()
        assert (on_disk(disk, "w0"), on_disk(disk, "w1")) == ({30, 50}, set())
        weights.name = "w0"
        assert fetch(cache, range(60)) == "w0"
        assert cache.last_fetch.source == "disk"


def test_former_weights_kv_that_the_queue_refuses_waits_unseen_and_is_saved(
    disk: Store, weights: Weights
) -> None:
    options: dict[str, Any] = {"idle_s": 60, "queue_bytes": 1, "codec": FakeCodec()}
    with PromptCache(store=disk, identify=weights, **options) as cache:
        for base in range(8):
            insert(cache, [base, *range(20 + base)], "w0")

        weights.name = "w1"
        for base in range(8):
            assert fetch(cache, [base, *range(40)]) is None
        assert cache.flush()

        assert cache.stats().problems == {}
        assert on_disk(disk, "w0") == set(range(21, 29))
        assert len(cache) == 0


def test_save_that_was_queued_before_a_reload_keeps_its_identity(
    disk: Store, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, go_on = disk.put, threading.Event()

    def held_up(*arguments: Any, **options: Any) -> Any:
        assert go_on.wait(10)
        return put(*arguments, **options)

    monkeypatch.setattr(disk, "put", held_up)
    with PromptCache(store=disk, identify=weights, idle_s=60, codec=FakeCodec()) as cache:
        insert(cache, range(30), "w0", "system")
        weights.name = "w1"
        insert(cache, range(20), "w1", "system")
        go_on.set()

    assert (on_disk(disk, "w0"), on_disk(disk, "w1")) == ({30}, {20})


@pytest.mark.parametrize("tokens_more", [0, 10])
@pytest.mark.parametrize("found", [True, False])
def test_cache_begun_before_a_reload_is_nobody_s(
    cache: PromptCache, disk: Store, weights: Weights, found: bool, tokens_more: int
) -> None:
    if found:
        insert(cache, range(30), "w0")
        cache.flush()
    prompt = list(range(40))
    kv, _ = cache.fetch_nearest_cache(MODEL, prompt)
    assert (kv is not None) == found
    kv = kv or [FakeLayer([])]
    answer = prompt + [1000] * tokens_more
    kv[0].tokens += answer[len(kv[0].tokens) :]

    weights.name = "w1"
    cache.insert_cache(MODEL, answer, kv)
    cache.flush()

    assert fetch(cache, [*answer, 1]) is None
    assert on_disk(disk, "w1") == set()
    assert cache.stats().problems == {"computed_before_reload": 1}


def test_lent_cache_is_recognised_although_its_prompt_was_asked_for_again(
    cache: PromptCache, weights: Weights
) -> None:
    insert(cache, range(30), "w0", "system")
    kv, _ = cache.fetch_nearest_cache(MODEL, list(range(40)))

    weights.name = "w1"
    assert fetch(cache, range(40)) is None
    assert kv is not None
    kv[0].tokens += range(30, 40)
    cache.insert_cache(MODEL, list(range(40)), kv)

    assert fetch(cache, range(50)) is None


def test_what_other_threads_computed_before_a_reload_is_refused_there(
    cache: PromptCache, weights: Weights
) -> None:
    asked, loaded = threading.Event(), threading.Event()

    def request() -> None:
        fetch(cache, range(40))
        asked.set()
        assert loaded.wait(10)
        insert(cache, range(45), "w0")

    other = threading.Thread(target=request)
    other.start()
    assert asked.wait(10)
    weights.name = "w1"
    assert fetch(cache, range(40)) is None  # this thread's look-up of the same prompt is later
    loaded.set()
    other.join()

    assert fetch(cache, range(50)) is None
    insert(cache, range(45), "w1")
    assert fetch(cache, range(50)) == "w1"


def test_thread_that_asked_nothing_may_have_computed_for_any_look_up(
    cache: PromptCache, weights: Weights
) -> None:
    """A pool computes what an event loop asked for, and a later prompt begins in the same way."""

    def computed(by: str) -> None:
        thread = threading.Thread(target=insert, args=(cache, range(30), by, "system"))
        thread.start()
        thread.join()

    fetch(cache, range(40))
    weights.name = "w1"
    fetch(cache, [*range(30), 1000])

    computed("w0")
    assert fetch(cache, range(35)) is None
    assert cache.stats().problems == {"computed_before_reload": 1}

    insert(cache, range(45), "w1")  # this thread asked, under these weights
    assert fetch(cache, range(50)) == "w1"


def test_look_ups_of_other_threads_push_none_of_ours_out(
    cache: PromptCache, weights: Weights
) -> None:
    """A thread may be held up for as long as others take for hundreds of requests."""
    fetch(cache, range(40))

    def others() -> None:
        for base in range(500):
            fetch(cache, [base, *range(10)])

    thread = threading.Thread(target=others)
    thread.start()
    thread.join()
    weights.name = "w1"
    insert(cache, range(45), "w0")

    assert fetch(cache, range(50)) is None


def test_answer_that_ended_does_not_stand_in_the_way_of_the_next_load(
    cache: PromptCache, weights: Weights
) -> None:
    fetch(cache, range(40))
    insert(cache, range(30), "w0", "system")
    insert(cache, range(45), "w0")

    weights.name = "w1"
    insert(cache, range(40), "w1")  # as `warm` does: without a look-up

    assert fetch(cache, range(50)) == "w1"


def test_branch_point_is_that_of_the_weights(cache: PromptCache, weights: Weights) -> None:
    insert(cache, range(30), "w0", "system", trimmable=False)
    insert(cache, range(60), "w0", trimmable=False)
    prompt = [*range(45), 1000]
    assert cache.branch_point(MODEL, prompt) == 45

    weights.name = "w1"

    assert cache.branch_point(MODEL, prompt) == 0


def test_insert_that_names_its_look_up_belongs_to_the_weights_of_that(
    cache: PromptCache, weights: Weights
) -> None:
    """Two clients sent the same prompt, and the model was loaded again between their look-ups."""
    former, latter = Origin(), Origin()
    prompt = list(range(40))
    cache.look_up(MODEL, prompt, origin=former)
    weights.name = "w1"
    cache.look_up(MODEL, prompt, origin=latter)

    cache.insert_cache(MODEL, prompt, [FakeLayer(prompt, weights="w0")], origin=former)
    assert cache.known_tokens(MODEL, prompt) == 0
    cache.insert_cache(MODEL, prompt, [FakeLayer(prompt, weights="w1")], origin=latter)

    assert fetch(cache, range(50)) == "w1"
    assert cache.stats().problems["computed_before_reload"] == 1


@pytest.mark.parametrize(
    ("keep", "trimmable", "known"), [(30, True, 30), (30, False, 0), (0, True, 0), (70, True, 50)]
)
def test_no_more_is_kept_than_is_asked_for(
    cache: PromptCache, keep: int, trimmable: bool, known: int
) -> None:
    layers = [FakeLayer(range(50), weights="w0", trimmable=trimmable)]

    cache.insert_cache(MODEL, list(range(50)), layers, cache_type="user", keep_tokens=keep)

    assert cache.known_tokens(MODEL, range(50)) == known


def test_read_ahead_is_of_the_weights_that_are_loaded(disk: Store, weights: Weights) -> None:
    with PromptCache(store=disk, identify=weights, idle_s=60, codec=FakeCodec()) as cache:
        insert(cache, range(100), "w0", "system")
        cache.flush()
        cache.trim_to(n_sequences=0)
        assert cache.read_ahead(MODEL, range(110)) > 0

        weights.name = "w1"

        assert cache.read_ahead(MODEL, range(110)) == 0


# ---- with an Identifier ------------------------------------------------------------------------


def make_model(folder: Path, content: bytes) -> tuple[str, None, None]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    replacement = folder / "new"
    replacement.write_bytes(content)
    replacement.rename(folder / "model.safetensors")
    return str(folder), None, None


@pytest.fixture
def identifier(tmp_path: Path) -> Identifier:
    return Identifier(memo_path=tmp_path / "memo.json")


@pytest.mark.parametrize("persist", [True, False])
def test_program_that_loads_again_says_so(
    tmp_path: Path, disk: Store, identifier: Identifier, persist: bool
) -> None:
    model = make_model(tmp_path / "m", b"first")
    store = disk if persist else None
    with PromptCache(store=store, identify=identifier, idle_s=60, codec=FakeCodec()) as cache:
        first = cache.identify_now(model)
        cache.insert_cache(model, list(range(50)), [FakeLayer(range(50))])
        assert isinstance(cache.identify_now(model), Fingerprint)
        assert cache.known_tokens(model, range(60)) == 50, "the files are the same"

        make_model(tmp_path / "m", b"other")
        assert cache.known_tokens(model, range(60)) == 50, "nothing was loaded yet"
        second = cache.identify_now(model)

        assert isinstance(first, Fingerprint)
        assert isinstance(second, Fingerprint)
        assert first.digest != second.digest
        assert fetch(cache, range(60), model) is None


def test_program_is_told_why_a_model_has_no_identity(identifier: Identifier) -> None:
    with PromptCache(identify=identifier, codec=FakeCodec()) as cache:
        said = cache.identify_now(("/nowhere", None, None))

    assert isinstance(said, Unidentified)
    assert "no such folder" in said.reason


def test_identify_now_leaves_other_models_as_they_were_loaded(
    tmp_path: Path, disk: Store, identifier: Identifier
) -> None:
    """Their files may have changed since, their weights in memory have not."""
    one, other = make_model(tmp_path / "1", b"1"), make_model(tmp_path / "2", b"2")
    with PromptCache(store=disk, identify=identifier, idle_s=60, codec=FakeCodec()) as cache:
        before = cache.identify_now(one)
        make_model(tmp_path / "1", b"changed")

        cache.identify_now(other)

        assert identifier.look_up(one) == before


def test_swap_of_unchanged_models_still_hits_memory(tmp_path: Path, identifier: Identifier) -> None:
    one, other = make_model(tmp_path / "1", b"1"), make_model(tmp_path / "2", b"2")
    with PromptCache(identify=identifier, codec=FakeCodec()) as cache:
        for model in (one, other, one):
            identifier.forget()
            identifier(model)
            fetch(cache, [1, 2, 3], model)
            if len(cache) == 0:
                cache.insert_cache(model, list(range(50)), [FakeLayer(range(50))])

        assert fetch(cache, range(60), one) == "w0"


def test_unidentified_model_s_kv_lasts_as_long_as_its_load(identifier: Identifier) -> None:
    model = ("/nowhere", None, None)
    with PromptCache(identify=identifier, codec=FakeCodec()) as cache:
        cache.insert_cache(model, list(range(50)), [FakeLayer(range(50))])
        assert fetch(cache, range(60), model) == "w0"
        cache.insert_cache(model, list(range(50)), [FakeLayer(range(50))])

        identifier.forget()

        assert fetch(cache, range(60), model) is None
        assert len(cache) == 0


def test_memory_alone_reads_no_weights(tmp_path: Path) -> None:
    class Unread(Identifier):
        def look_up(self, model_key: ModelKey | None) -> Fingerprint | Unidentified:
            raise AssertionError("a model's files were read for the sake of memory")

    model = make_model(tmp_path / "m", b"weights")
    with PromptCache(identify=Unread(), codec=FakeCodec()) as cache:
        cache.insert_cache(model, list(range(50)), [FakeLayer(range(50))])

        assert fetch(cache, range(60), model) == "w0"
        assert cache.stats().problems == {}


def test_look_ups_by_the_side_read_no_weights(tmp_path: Path, disk: Store) -> None:
    class Unread(Identifier):
        def look_up(self, model_key: ModelKey | None) -> Fingerprint | Unidentified:
            raise AssertionError("a model's files were read in order to read ahead")

    model = make_model(tmp_path / "m", b"weights")
    with PromptCache(store=disk, identify=Unread(), idle_s=60, codec=FakeCodec()) as cache:
        assert cache.read_ahead(model, range(60)) == 0


def test_thread_that_was_overtaken_by_a_load_keeps_nothing_of_the_old_one(
    disk: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PromptCache(store=disk, idle_s=60, codec=FakeCodec()) as cache:
        old, new = (
            Owner(MODEL, fp.digest, fp, "", load)
            for load, fp in enumerate([fingerprint(weights="w0"), fingerprint(weights="w1")])
        )
        answers: list[Owner] = [new, new, old, new]
        monkeypatch.setattr(Owners, "of", lambda *_, **__: answers.pop(0))
        fetch(cache, [1])
        insert(cache, range(40), "w1")

        insert(cache, range(50), "w0")

        assert fetch(cache, range(60)) == "w1"
        monkeypatch.undo()
    assert (on_disk(disk, "w0"), on_disk(disk, "w1")) == ({50}, {40})


def test_identity_that_changes_while_it_is_asked_for_is_asked_again() -> None:
    class Reloading:
        loads = 0

        def load_number(self, model: Any) -> int:
            return self.loads

        def __call__(self, model: Any) -> Fingerprint:
            answer = fingerprint(weights=f"w{self.loads}")
            self.loads = 1  # a load comes in between, the first time
            return answer

    owner = Owners(Reloading()).of(MODEL, may_read=True)

    assert (owner.load, owner.identity) == (1, fingerprint(weights="w1").digest)
