"""PromptCache over a store, with caches that are lists of tokens: no MLX, all decisions visible."""

from __future__ import annotations

import os
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from persist_cache import PromptCache, Store, fs
from persist_cache.cache.origin import Origin
from persist_cache.cache.stats import FromRemote
from persist_cache.cache.write_behind import WriteBehind
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.tokens import pack_tokens, prompt_digest
from tests.fakes import fingerprint
from tests.live_fakes import MODEL, FakeCodec, FakeLayer
from tests.waiting import until


@pytest.fixture
def codec() -> FakeCodec:
    return FakeCodec()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        yield store


@pytest.fixture
def make(disk: Store, codec: FakeCodec) -> Iterator[Callable[..., PromptCache]]:
    """Make caches over one store, as processes one after the other would."""
    made: list[PromptCache] = []

    def build(**options: Any) -> PromptCache:
        options = {"store": disk, "identify": lambda model: fingerprint(), "idle_s": 60, **options}
        cache = PromptCache(codec=codec, **options)
        made.append(cache)
        return cache

    yield build
    for cache in made:
        cache.close()


def insert(cache: PromptCache, tokens: Sequence[int], tier: str, *, trimmable: bool = True) -> None:
    cache.insert_cache(MODEL, tokens, [FakeLayer(tokens, trimmable)], cache_type=tier)


def fetch(cache: PromptCache, tokens: Sequence[int]) -> list[int] | None:
    """Fetch, check that cache and rest make up the prompt, and return what the cache has seen."""
    kv, rest = cache.fetch_nearest_cache(MODEL, list(tokens))
    if kv is None:
        assert list(rest) == list(tokens)
        return None
    assert kv[0].tokens + list(rest) == list(tokens)
    assert isinstance(kv[0].tokens, list)
    return list(kv[0].tokens)


def test_prompt_survives_the_process(make: Callable[..., PromptCache]) -> None:
    system = list(range(100))
    with make() as first:
        insert(first, system, "system")

    second = make()

    assert fetch(second, [*system, 7, 8]) == system
    assert second.last_fetch.source == "disk"
    assert second.stats().tokens == {"disk": 100}


def test_system_and_user_are_on_disk_without_flush(
    make: Callable[..., PromptCache], disk: Store
) -> None:
    cache = make()

    insert(cache, range(50), "system")
    insert(cache, range(80), "user")
    insert(cache, range(90), "assistant")

    until(lambda: {entry.tier.label for entry in disk.entries()} == {"system", "user"})
    until(lambda: cache.stats().queued_jobs == 0)
    assert {entry.tier.label for entry in disk.entries()} == {"system", "user"}


def test_assistant_is_saved_at_flush_close_idle_and_when_it_leaves_memory(
    make: Callable[..., PromptCache], disk: Store
) -> None:
    def on_disk() -> set[int]:
        return {entry.num_tokens for entry in disk.entries()}

    flushed = make()
    insert(flushed, [1] * 10, "assistant")
    assert on_disk() == set()
    assert flushed.flush()
    assert on_disk() == {10}

    with make() as closed:
        insert(closed, [2] * 20, "assistant")
    assert on_disk() == {10, 20}

    idle = make(idle_s=0.02)
    insert(idle, [3] * 30, "assistant")
    until(lambda: 30 in on_disk())

    small = make(max_size=1)
    insert(small, [4] * 40, "assistant")
    insert(small, [5] * 50, "assistant")
    until(lambda: 40 in on_disk())
    assert 50 not in on_disk()


def test_tiers_not_to_be_persisted_stay_in_memory(
    make: Callable[..., PromptCache], disk: Store
) -> None:
    with make(persist=["system"]) as cache:
        insert(cache, range(10), "system")
        insert(cache, range(20), "user")
        insert(cache, range(30), "assistant")

    assert [entry.num_tokens for entry in disk.entries()] == [10]


def test_system_entry_survives_the_conversation_that_extends_it(
    make: Callable[..., PromptCache], disk: Store
) -> None:
    """mlx-lm 0.32.2: `pop_prefixes` deletes the system entry when the reply is stored."""
    system, reply = list(range(60)), [*range(60), 1, 2, 3]
    with make() as cache:
        insert(cache, system, "system")
        insert(cache, reply, "assistant")
    assistants = [entry.id for entry in disk.entries() if entry.tier.label == "assistant"]

    disk.evict(assistants)

    assert fetch(make(), [*system, 9]) == system


def test_cache_on_disk_is_lent_and_an_aborted_request_costs_a_reload(
    make: Callable[..., PromptCache], codec: FakeCodec
) -> None:
    cache = make()
    insert(cache, range(40), "assistant")
    cache.flush()

    assert fetch(cache, range(50)) == list(range(40))
    assert (cache.last_fetch.source, codec.copies, len(cache)) == ("memory", 0, 0)
    assert fetch(cache, range(50)) == list(range(40))
    assert cache.last_fetch.source == "disk"


def test_cache_not_yet_on_disk_is_copied(
    make: Callable[..., PromptCache], codec: FakeCodec
) -> None:
    cache = make()
    insert(cache, range(40), "assistant")

    assert fetch(cache, range(50)) == list(range(40))
    assert (codec.copies, len(cache)) == (1, 1)


def test_system_cache_is_copied_even_when_on_disk(
    make: Callable[..., PromptCache], codec: FakeCodec
) -> None:
    cache = make()
    insert(cache, range(40), "system")
    cache.flush()

    assert fetch(cache, [*range(40), 5]) == list(range(40))
    assert (codec.copies, len(cache)) == (1, 1)


def test_longer_of_memory_and_disk_wins(make: Callable[..., PromptCache], disk: Store) -> None:
    with make() as other:
        insert(other, range(200), "user")
    cache = make()
    insert(cache, range(100), "assistant")

    assert fetch(cache, range(300)) == list(range(200))
    assert cache.last_fetch.source == "disk"


def test_few_more_tokens_on_disk_are_not_worth_reading(make: Callable[..., PromptCache]) -> None:
    with make() as other:
        insert(other, range(105), "user")
    cache = make()
    insert(cache, range(100), "assistant")

    assert fetch(cache, range(300)) == list(range(100))
    assert cache.last_fetch.source == "memory"


def test_resent_prompt_leaves_a_token_to_compute(make: Callable[..., PromptCache]) -> None:
    """mlx-lm #1215, #1887: an exact hit leaves nothing to compute and kills the server."""
    prompt = list(range(50))
    cache = make(leave_tokens=1)
    insert(cache, prompt, "assistant")
    assert fetch(cache, prompt) == prompt[:49]

    cache.close()

    assert fetch(make(leave_tokens=1), prompt) == prompt[:49]
    assert fetch(make(leave_tokens=0), prompt) == prompt


def test_resent_prompt_falls_back_to_a_shorter_checkpoint_when_it_cannot_be_trimmed(
    make: Callable[..., PromptCache],
) -> None:
    prompt = list(range(50))
    cache = make(leave_tokens=1)
    insert(cache, prompt[:30], "user", trimmable=False)
    insert(cache, prompt, "assistant", trimmable=False)
    assert fetch(cache, prompt) == prompt[:30]

    cache.close()

    assert fetch(make(leave_tokens=1), prompt) == prompt[:30]


def test_divergence_within_a_checkpoint_only_prompt_uses_the_last_checkpoint(
    make: Callable[..., PromptCache],
) -> None:
    with make() as cache:
        insert(cache, range(30), "system", trimmable=False)
        insert(cache, range(60), "assistant", trimmable=False)
    second = make()

    assert fetch(second, [*range(45), 1000]) == list(range(30))
    assert "cannot be trimmed" in second.last_fetch.reason


def test_branch_point_is_where_a_checkpoint_would_help(make: Callable[..., PromptCache]) -> None:
    cache = make()
    insert(cache, range(30), "system", trimmable=False)
    insert(cache, range(60), "assistant", trimmable=False)
    prompt = [*range(45), 1000]

    assert cache.branch_point(MODEL, prompt) == 45
    assert cache.branch_point(MODEL, prompt, min_gain_tokens=16) == 0
    assert cache.branch_point(MODEL, range(61)) == 0


def test_unidentified_model_stays_in_memory_and_stats_say_so(
    make: Callable[..., PromptCache], disk: Store
) -> None:
    cache = make(identify=lambda model: None)
    insert(cache, range(10), "system")
    cache.flush()

    assert fetch(cache, range(12)) == list(range(10))
    assert disk.entries() == []
    assert "memory only" in cache.stats().disk_off


def test_several_ranks_keep_the_disk_off_and_say_so(
    make: Callable[..., PromptCache], codec: FakeCodec, disk: Store
) -> None:
    codec.ranks = 2
    with make() as cache:
        insert(cache, range(10), "system")
        assert "several ranks" in cache.stats().disk_off

    assert disk.entries() == []


def test_user_entry_that_waits_is_saved_although_the_reply_replaces_it_in_memory(
    make: Callable[..., PromptCache], disk: Store
) -> None:
    with make(persist=["system", "user"], queue_bytes=1) as cache:
        insert(cache, [9] * 5000, "system")
        insert(cache, range(50), "user")
        insert(cache, range(60), "assistant")

    assert {entry.num_tokens for entry in disk.entries()} == {5000, 50}


def test_unknown_cache_class_is_refused_by_name_and_counted(
    make: Callable[..., PromptCache], codec: FakeCodec, disk: Store
) -> None:
    cache = make()
    codec.unsupported = True

    insert(cache, range(10), "system")

    assert cache.stats().problems == {"unsupported:LayerCache": 1}
    assert disk.entries() == []


@pytest.mark.parametrize(
    "field", ["weights", "config", "adapter.weights", "kv_bits", "mlx_lm", "layout", "salt"]
)
def test_any_single_field_that_changes_is_a_miss_and_restoring_it_gives_the_hit_back(
    make: Callable[..., PromptCache], field: str
) -> None:
    """vllm-mlx, llama.cpp, MemOS #2300: same tokens, other model, and a hit."""
    fields = dict.fromkeys(
        ["weights", "config", "adapter.weights", "kv_bits", "mlx_lm", "layout", "salt"], "as it was"
    )
    original = Fingerprint.from_fields(fields)
    changed = Fingerprint.from_fields({**fields, field: "changed"})
    with make(identify=lambda model: original) as cache:
        insert(cache, range(50), "system")

    assert fetch(make(identify=lambda model: changed), range(60)) is None
    assert fetch(make(identify=lambda model: original), range(60)) == list(range(50))


@pytest.mark.parametrize("bad", [[1.5, 2], ["a"], [1 << 70]])
def test_nothing_raises_into_the_generation_thread(
    make: Callable[..., PromptCache], bad: list[Any]
) -> None:
    cache = make()

    assert cache.fetch_nearest_cache(MODEL, bad) == (None, bad)
    cache.insert_cache(MODEL, bad, [FakeLayer([1, 2, 3])])
    cache.insert_cache(MODEL, [1, 2], [FakeLayer([1, 2])], cache_type="narrator")

    problems = cache.stats().problems
    assert problems == {"fetch_failed:ValueError": 1, "insert_failed:ValueError": 2}


def test_failing_identify_is_a_miss(make: Callable[..., PromptCache]) -> None:
    def broken(model: Any) -> Fingerprint:
        raise OSError("no such model")

    cache = make(identify=broken)

    assert fetch(cache, [1, 2, 3]) is None
    assert cache.stats().problems == {"fetch_failed:OSError": 1}


def test_full_disk_keeps_the_prompt_in_memory_and_says_why(
    tmp_path: Path, make: Callable[..., PromptCache]
) -> None:
    with Store.open(tmp_path / "tiny", max_bytes=400_000, min_free_bytes=0) as tiny:
        cache = make(store=tiny)
        big = list(range(10_000))
        insert(cache, big, "system")
        assert not cache.flush()

        assert fetch(cache, [*big, 1]) == big
        assert "larger than the budget" in cache.stats().disk_off
        cache.close()


def test_lost_folder_answers_from_memory_and_writing_resumes(
    tmp_path: Path, make: Callable[..., PromptCache]
) -> None:
    with Store.open(tmp_path / "gone", min_free_bytes=0) as store:
        cache = make(store=store)
        insert(cache, range(100), "system")
        cache.flush()

        shutil.rmtree(tmp_path / "gone")
        assert fetch(cache, range(110)) == list(range(100))
        insert(cache, [7] * 50, "system")
        assert cache.flush()

        assert {entry.num_tokens for entry in store.entries()} == {100, 50}
        assert cache.disk_off == ""
        assert store.check(read_data=True) == []
        cache.close()


def test_full_disk_that_is_freed_is_used_again(
    tmp_path: Path, make: Callable[..., PromptCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(tmp_path / "full", min_free_bytes=1000) as store:
        cache = make(store=store)
        monkeypatch.setattr(fs, "free_bytes", lambda path: 0)
        insert(cache, range(100), "system")
        assert not cache.flush()
        assert cache.disk_off != ""
        assert fetch(cache, range(110)) == list(range(100))

        monkeypatch.undo()
        assert cache.flush()

        assert [entry.num_tokens for entry in store.entries()] == [100]
        assert cache.disk_off == ""
        cache.close()


def test_flush_is_not_misled_by_what_comes_meanwhile(
    make: Callable[..., PromptCache], disk: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make()
    insert(cache, [1] * 50, "assistant")
    drain, newcomers = WriteBehind.drain, [[2] * 50]

    def busy(writer: WriteBehind, timeout_s: float | None = None) -> bool:
        done = drain(writer, timeout_s)
        if disk.entries() and newcomers:
            insert(cache, newcomers.pop(), "assistant")
        return done

    monkeypatch.setattr(WriteBehind, "drain", busy)

    assert cache.flush()
    assert len(disk.entries()) == 2


def test_full_queue_refuses_and_loses_nothing_at_close(
    make: Callable[..., PromptCache], disk: Store
) -> None:
    """vllm-mlx, omlx #1736: queue full, write silently dropped, or memory blow-up."""
    with make(queue_bytes=1) as cache:
        for base in range(20):
            insert(cache, [base, *range(30)], "user")

    assert len(disk.entries()) == 20 - cache.stats().problems.get("dropped_queue_full", 0)
    assert len(disk.entries()) >= 10


def test_higher_tier_is_kept_when_the_prompt_comes_again(
    make: Callable[..., PromptCache],
) -> None:
    cache = make()
    insert(cache, range(10), "system")
    insert(cache, range(10), "assistant")

    assert cache.stats_by_type()["system"]["n_sequences"] == 1
    assert cache.stats_by_type()["assistant"]["n_sequences"] == 0


def test_oversized_entry_does_not_flush_the_others(make: Callable[..., PromptCache]) -> None:
    cache = make(max_bytes=64 * 100, store=None)
    insert(cache, [1] * 10, "assistant")

    insert(cache, [2] * 101, "assistant")

    assert fetch(cache, [1] * 12) == [1] * 10
    assert cache.nbytes == 640


def test_cache_that_its_former_owner_changed_is_not_served(
    make: Callable[..., PromptCache],
) -> None:
    cache = make(store=None)
    layer = FakeLayer(range(10))
    cache.insert_cache(MODEL, list(range(10)), [layer])

    layer.tokens.append(99)

    assert fetch(cache, range(12)) is None
    assert cache.stats().problems == {"changed_after_insert": 1}


def test_key_longer_than_the_cache_is_cut_to_it(make: Callable[..., PromptCache]) -> None:
    cache = make()

    cache.insert_cache(MODEL, list(range(12)), [FakeLayer(range(10))])

    assert fetch(cache, range(12)) == list(range(10))


@pytest.mark.parametrize("prompt", [[], [5], [-(1 << 59), (1 << 60) - 1, -1]])
def test_short_and_strange_prompts(make: Callable[..., PromptCache], prompt: list[int]) -> None:
    with make() as cache:
        insert(cache, prompt, "system")

    assert fetch(make(), [*prompt, 3]) == (prompt or None)


def test_closing_twice_and_using_a_closed_cache_is_harmless(
    make: Callable[..., PromptCache],
) -> None:
    cache = make()
    insert(cache, range(10), "system")
    cache.close()
    cache.close()

    insert(cache, range(20), "system")

    assert fetch(cache, range(20)) == list(range(20))


def test_folder_as_store_is_opened_and_closed(tmp_path: Path, codec: FakeCodec) -> None:
    options: dict[str, Any] = {"identify": lambda model: fingerprint(), "codec": codec}
    for _ in range(2):
        with PromptCache(store=tmp_path / "own", **options) as cache:
            insert(cache, range(10), "system")

    with PromptCache(store=tmp_path / "own", **options) as cache:
        assert fetch(cache, range(11)) == list(range(10))


def test_seconds_of_prefill_are_measured_and_credited_to_hits(
    make: Callable[..., PromptCache], disk: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make() as cache:
        fetch(cache, range(110))
        started = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: started + 10)
        insert(cache, range(100), "system")
        monkeypatch.undo()
    (entry,) = disk.entries()
    assert entry.prefill_s == pytest.approx(10, abs=1)

    again = make()
    fetch(again, range(60))
    again.close()

    (entry,) = disk.entries()
    assert entry.hits == 1
    assert entry.saved_s == pytest.approx(6, abs=0.6)


def test_threads_may_share_a_cache(make: Callable[..., PromptCache]) -> None:
    cache = make(max_size=4)
    errors: list[BaseException] = []

    def work(base: int) -> None:
        try:
            for turn in range(1, 15):
                tokens = [base, *range(10 * turn)]
                seen = fetch(cache, tokens)
                assert seen is None or seen == tokens[: len(seen)]
                insert(cache, tokens, ["assistant", "user", "system"][turn % 3])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(base,)) for base in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert cache.stats().problems == {}


def test_prompts_that_were_answered_are_remembered_without_their_tokens(
    make: Callable[..., PromptCache],
) -> None:
    """64 prompts of 30,000 tokens took 93 MB, for the sake of a header."""
    cache = make(store=None)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()

    for base in range(64):
        cache.fetch_nearest_cache(MODEL, [base << 32, *range(5_000)])
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(cache.recent_fetches()) == 64
    assert after - before < 64 * 5_000  # a byte per token


def test_list_that_its_owner_extends_is_remembered_as_it_was_asked_for(
    make: Callable[..., PromptCache],
) -> None:
    """mlx_lm.server appends what it generates to the very list that it asked for."""
    cache = make(store=None)
    asked = [1, 2, 3]

    cache.fetch_nearest_cache(MODEL, asked)
    asked.append(4)

    (recent,) = cache.recent_fetches()
    assert (recent.num_tokens, recent.digest) == (3, prompt_digest(pack_tokens([1, 2, 3])))


def test_last_fetch_is_that_of_the_thread_that_asks(make: Callable[..., PromptCache]) -> None:
    cache = make(store=None)
    insert(cache, range(10), "assistant")
    fetch(cache, range(12))

    def miss() -> str:
        fetch(cache, [77])
        return cache.last_fetch.source

    with ThreadPoolExecutor(1) as other:
        assert other.submit(miss).result() == "miss"
        assert other.submit(lambda: cache.last_fetch.source).result() == "miss"
    assert cache.last_fetch.source == "memory"
    with ThreadPoolExecutor(1) as newcomer:
        assert newcomer.submit(lambda: cache.last_fetch.source).result() == "miss"


@pytest.mark.parametrize(
    "options", [{"max_size": -1}, {"leave_tokens": -1}, {"persist": ["narrator"]}]
)
def test_bad_options_are_refused(options: dict[str, Any], codec: FakeCodec) -> None:
    with pytest.raises(ValueError, match=r"negative|narrator"):
        PromptCache(codec=codec, **options)


def test_read_ahead_advises_the_files_of_a_fetch_and_nothing_else(
    make: Callable[..., PromptCache], disk: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make()
    insert(first, range(100), "system")
    first.flush()
    second = make()
    advised: list[str] = []
    read_ahead = fs.read_ahead

    def noted(path: Path) -> int:
        advised.append(path.stem)
        return read_ahead(path)

    monkeypatch.setattr(fs, "read_ahead", noted)
    nbytes = second.read_ahead(MODEL, range(110))
    of_another_prompt = second.read_ahead(MODEL, range(50, 150))
    in_memory = first.read_ahead(MODEL, range(110))

    runs = disk.match(fingerprint(), list(range(110))).runs
    assert advised == [run.blob for run in runs]
    assert second.stats().read_ahead_bytes == nbytes > 0
    assert of_another_prompt == in_memory == 0
    assert second.stats().hits == {}
    assert fetch(second, range(110)) == list(range(100))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="macOS takes another advice")
def test_advice_covers_a_whole_file_in_pieces_that_linux_heeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(300_000))
    spans: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, n, kind: spans.append((start, n)))

    assert fs.read_ahead(path) == 300_000

    assert all(size <= 128 << 10 for _, size in spans)
    assert [start for start, _ in spans] == [sum(n for _, n in spans[:k]) for k in range(3)]
    assert sum(size for _, size in spans) >= 300_000


# ---- for a remote ----------------------------------------------------------------------------


def test_what_was_brought_for_a_request_counts_as_the_remotes(
    make: Callable[..., PromptCache], disk: Store
) -> None:
    with make() as elsewhere:
        insert(elsewhere, range(100), "system")
    cache = make()

    _, rest, brought = cache.look_up(MODEL, list(range(120)), remote=FromRemote(40, 100, 2.0))
    _, _, known = cache.look_up(MODEL, list(range(120)), remote=FromRemote(40, 0, 2.0))

    assert (brought.source, brought.num_tokens, len(rest)) == ("remote", 100, 20)
    assert brought.seconds >= 2 > known.seconds
    assert known.source in ("memory", "disk")
    assert cache.stats().hits["remote"] == 1
    assert cache.stats().tokens["remote"] == 100
    assert cache.flush()
    assert disk.stats().counters["hits_remote"] == 1


def test_what_is_known_of_a_prompt_is_told_with_its_identity(
    make: Callable[..., PromptCache],
) -> None:
    cache = make(leave_tokens=1)
    insert(cache, range(50), "system")

    known = cache.known_of(MODEL, list(range(60)))

    assert known is not None
    assert (known.fingerprint, known.num_tokens, known.limit) == (fingerprint(), 50, 59)
    assert known.packed == pack_tokens(list(range(60)))


def test_nothing_could_be_added_to_what_is_known_without_disk_or_identity(
    make: Callable[..., PromptCache],
) -> None:
    assert make(store=None).known_of(MODEL, [1, 2]) is None
    assert make(identify=lambda model: None).known_of(MODEL, [1, 2]) is None


def test_uses_of_entries_are_told_from_memory_and_disk_but_not_private_ones(
    make: Callable[..., PromptCache], disk: Store
) -> None:
    with make() as elsewhere:
        insert(elsewhere, range(100), "system")
    (entry,) = disk.entries()
    cache, told = make(), list[Sequence[str]]()
    cache.on_use = told.append

    fetch(cache, range(120))
    insert(cache, range(100), "system")
    fetch(cache, range(130))
    assert [list(one) for one in told] == [[entry.id]] * 2

    cache.look_up(MODEL, list(range(140)), origin=Origin(keeps_nothing=True))
    cache.look_up(MODEL, list(range(140)), counted=False)
    assert len(told) == 2


def test_uses_of_a_salted_prompt_are_told_to_nobody(
    make: Callable[..., PromptCache], disk: Store
) -> None:
    salt = "5a17" * 8
    with make() as elsewhere:
        insert(elsewhere, range(100), "system")
        _, _, _ = elsewhere.look_up(MODEL, list(range(80)), origin=(mine := Origin(salt=salt)))
        elsewhere.insert_cache(
            MODEL, range(80), [FakeLayer(range(80), True)], cache_type="system", origin=mine
        )
    cache, told = make(), list[Sequence[str]]()
    cache.on_use = told.append

    _, _, found = cache.look_up(MODEL, list(range(120)), origin=Origin(salt=salt))

    assert found.num_tokens == 80
    assert told == []
