"""Why the reuse of a prompt ends, as header, counters and `stats` say; and what it was worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persist_cache import PromptCache, Store
from persist_cache.cache.stats import Fetch
from persist_cache.entry import Match, MissReason
from persist_cache.server.metrics import CacheCollector, exposition
from persist_cache.server.ticket import cache_header
from persist_cache.store.reasons import kind_of_reason, nothing, reason_of, sentence, why_no_more
from tests.cli import runner
from tests.fakes import blob_files, fingerprint
from tests.live_fakes import MODEL, FakeCodec, FakeLayer

Make = Callable[..., PromptCache]
STORED = list(range(100))
DIVERGES = sentence(MissReason.DIVERGES)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        yield store


@pytest.fixture
def make(disk: Store) -> Iterator[Make]:
    """Make caches over one store, as processes one after the other would."""
    made: list[PromptCache] = []

    def build(**options: Any) -> PromptCache:
        options = {"store": disk, "identify": lambda model: fingerprint(), "idle_s": 60, **options}
        made.append(PromptCache(codec=FakeCodec(), leave_tokens=1, **options))
        return made[-1]

    yield build
    for cache in made:
        cache.close()


def insert(cache: PromptCache, tokens: Sequence[int], *, trimmable: bool = True) -> None:
    layers = [FakeLayer(tokens, trimmable)]
    cache.insert_cache(MODEL, list(tokens), layers, cache_type="user")


def hit(num_tokens: int, common_tokens: int, why: MissReason | None) -> Match:
    reason = sentence(why)
    return Match(num_tokens, common_tokens=common_tokens, reason=reason, why=why)


def look(cache: PromptCache, tokens: Sequence[int]) -> tuple[str, int, str]:
    _, rest, fetch = cache.look_up(MODEL, list(tokens))
    assert len(rest) == len(tokens) - fetch.num_tokens
    assert fetch.why is (reason_of(fetch.reason) if fetch.reason else None)
    return fetch.source, fetch.num_tokens, fetch.reason


@pytest.mark.parametrize("source", ["memory", "disk"])
def test_reuse_ends_for_the_reason_that_is_true(make: Make, source: str) -> None:
    cache = make()
    insert(cache, STORED)
    if source == "disk":
        cache.close()
        cache = make()

    assert look(cache, [*STORED[:60], 7, 7]) == (source, 60, DIVERGES)
    assert look(cache, [*STORED, 7, 7]) == (source, 100, sentence(MissReason.ENDS))


@pytest.mark.parametrize("source", ["memory", "disk"])
def test_reuse_up_to_the_last_token_has_no_reason(make: Make, source: str) -> None:
    cache = make()
    insert(cache, STORED)
    if source == "disk":
        cache.close()
        cache = make()

    assert look(cache, STORED[:60]) == (source, 59, "")
    assert look(cache, [*STORED, 7]) == (source, 100, "")


@pytest.mark.parametrize("source", ["memory", "disk"])
def test_missing_checkpoint_is_the_reason_wherever_more_is_shared(make: Make, source: str) -> None:
    cache = make()
    insert(cache, STORED[:40], trimmable=False)
    insert(cache, STORED, trimmable=False)
    if source == "disk":
        cache.close()
        cache = make()

    assert look(cache, [*STORED[:60], 7, 7]) == (source, 40, sentence(MissReason.NO_CHECKPOINT))


def test_memory_alone_says_why_reuse_ends_not_why_there_is_no_disk(make: Make) -> None:
    cache = make(store=None)
    insert(cache, STORED)

    assert look(cache, [*STORED[:60], 7, 7]) == ("memory", 60, DIVERGES)
    assert look(cache, [7, 7, 7])[2] == "no store was given"


def test_few_more_tokens_on_disk_are_told(make: Make) -> None:
    with make() as before:
        insert(before, STORED)
    cache = make()
    insert(cache, STORED[:90])

    assert look(cache, [*STORED, 7, 7]) == ("memory", 90, sentence(MissReason.FEW_MORE))


def test_unreadable_disk_is_told_though_memory_has_a_part(make: Make, disk: Store) -> None:
    with make() as before:
        insert(before, STORED)
    cache = make(persist=())
    insert(cache, STORED[:20])
    for path in blob_files(disk.root):
        path.write_bytes(path.read_bytes()[:-1])

    assert look(cache, [*STORED, 7, 7]) == ("memory", 20, sentence(MissReason.UNREADABLE))


def test_requests_partial_hits_and_tokens_are_counted_once(make: Make, disk: Store) -> None:
    cache = make()
    insert(cache, STORED)
    look(cache, [*STORED[:3], *range(200, 1123)])  # 3 of 926
    look(cache, STORED)
    look(cache, [7, 7])
    cache.look_up(MODEL, STORED, counted=False)
    stats, counters = cache.stats(), disk.stats().counters

    assert (sum(stats.hits.values()), sum(stats.misses.values())) == (2, 1)
    assert stats.partial == {DIVERGES: 1}
    assert (sum(stats.tokens.values()), stats.asked) == (3 + 99, 926 + 100 + 2)
    assert counters["hits_memory"] == 2
    assert counters[f"partial:{DIVERGES}"] == 1
    assert (counters["tokens_reused"], counters["tokens_asked"]) == (102, 1028)
    text = exposition(CacheCollector(lambda: stats)).decode()
    assert 'persist_cache_partial_hits_total{reason="diverges"} 1.0' in text
    assert "persist_cache_tokens_asked_total 1028.0" in text


def test_look_up_that_is_not_counted_is_no_use_of_an_entry(make: Make, disk: Store) -> None:
    with make() as before:
        insert(before, STORED)
    (stored,) = disk.entries()
    cache = make()

    assert cache.look_up(MODEL, STORED, counted=False)[2].source == "disk"
    disk.flush()

    (entry,) = disk.entries()
    assert (entry.hits, entry.last_use) == (stored.hits, stored.last_use)
    assert cache.recent_fetches() == []


@pytest.mark.parametrize(
    ("found", "on_disk", "in_memory", "asked_disk", "why"),
    [
        (9, nothing(MissReason.NOTHING_STORED), (9, False), True, None),
        (5, nothing(MissReason.NOTHING_STORED), (5, False), True, MissReason.ENDS),
        (5, nothing(MissReason.OTHER_IDENTITY, "salt"), (5, False), True, MissReason.ENDS),
        (5, nothing(MissReason.OTHER_PROMPT), (5, True), True, MissReason.DIVERGES),
        (5, nothing(MissReason.DISK_ERROR, "it burns"), (5, True), True, MissReason.DISK_ERROR),
        (5, nothing(MissReason.NO_STORE), (5, True), False, MissReason.DIVERGES),
        (0, nothing(MissReason.NO_STORE), (0, False), False, MissReason.NO_STORE),
        (0, nothing(MissReason.NO_STORE), (4, True), False, MissReason.NO_CHECKPOINT),
        (5, hit(5, 5, MissReason.ENDS), (3, True), True, MissReason.ENDS),
        (5, hit(5, 5, MissReason.ENDS), (5, True), True, MissReason.DIVERGES),
        (5, hit(3, 3, MissReason.DIVERGES), (5, False), True, MissReason.ENDS),
        (5, hit(7, 7, MissReason.ENDS), (5, False), True, MissReason.FEW_MORE),
        (5, hit(5, 8, None), (5, False), True, MissReason.NO_CHECKPOINT),
    ],
)
def test_one_reason_for_memory_and_disk(
    found: int,
    on_disk: Match,
    in_memory: tuple[int, bool],
    asked_disk: bool,
    why: MissReason | None,
) -> None:
    answer, said = why_no_more(found, 9, on_disk, in_memory, asked_disk=asked_disk)

    assert answer is why
    assert said == ("it burns" if why is MissReason.DISK_ERROR else sentence(why))


@pytest.mark.parametrize("why", list(MissReason))
def test_each_reason_is_read_back_from_its_sentence_and_its_counter(why: MissReason) -> None:
    said = sentence(why, "of: some detail")

    assert reason_of(said) is why
    assert reason_of(kind_of_reason(said)) is why


OLD_COUNTERS = {
    "nothing is stored for this model": "nothing_stored",
    "stored under another mlx-lm": "other_identity",
    "stored under another salt and kv_bits": "other_identity",
    "no stored prompt begins with the first token": "other_prompt",
    "nothing is known of this prompt": "unknown_prompt",
    "no checkpoint there": "no_checkpoint",
    "what is stored ends here": "ends",
    "what is stored goes on differently": "diverges",
    "the disk has a few tokens more": "few_more",
    "this model is kept in memory only": "unidentified_model",
    "no store was given": "no_store",
    "the look-up failed": "look_up_failed",
    "what was stored could not be read": "unreadable",
    "the cache in memory was changed": "changed_in_memory",
    "The folder /Volumes/Models/store was removed.": "disk_error",
}
"""Reasons as the builds before `MissReason` counted them, and their labels in `/metrics`."""


def test_counters_of_an_older_store_are_read_by_their_sentences(
    tmp_path: Path, disk: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, said in enumerate(OLD_COUNTERS, 1):
        disk.count(f"misses:{said}", number)
        disk.count(f"partial:{said}", 100 + number)
    disk.close()

    told = runner(tmp_path / "store", capfd)("stats", "--json").json

    numbers = {said: number for number, said in enumerate(OLD_COUNTERS, 1)}
    assert told["miss_reasons"] == numbers
    assert told["partial_reasons"] == {said: 100 + one for said, one in numbers.items()}
    assert {said: reason_of(said).value for said in told["miss_reasons"]} == OLD_COUNTERS


def test_reasons_are_counted_under_the_names_of_older_stores(make: Make, disk: Store) -> None:
    cache = make()
    look(cache, STORED)
    insert(cache, STORED[:40], trimmable=False)
    look(cache, [*STORED[:20], 7, 7])
    look(cache, [*STORED[:40], 7, 7])
    cache.flush()

    counters = disk.stats().counters
    kept = {name: one for name, one in counters.items() if name.startswith(("misses:", "partial:"))}
    assert kept == {
        "misses:nothing is stored for this model": 1,
        "misses:no checkpoint there": 1,
        "partial:what is stored ends here": 1,
    }


@pytest.mark.parametrize(("said", "label"), OLD_COUNTERS.items())
def test_metrics_label_the_reasons_of_old_and_new_counters(
    make: Make, said: str, label: str
) -> None:
    stats = replace(make().stats(), misses={said: 7})

    text = exposition(CacheCollector(lambda: stats)).decode()

    assert f'persist_cache_misses_total{{reason="{label}"}} 7.0' in text


def test_header_of_a_partial_hit_tells_the_reason() -> None:
    fetch = Fetch("disk", 1904, DIVERGES)

    assert cache_header(fetch) == f'disk; tokens=1904; reason="{DIVERGES}"'
    assert cache_header(replace(fetch, reason="")) == "disk; tokens=1904"


def test_stats_shows_tokens_reused_beside_the_hits(
    tmp_path: Path, make: Make, disk: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three of 926 tokens are a hit, and no 100 %."""
    cache = make()
    insert(cache, STORED)
    look(cache, [*STORED[:3], *range(200, 1123)])
    cache.close()
    disk.close()
    run = runner(tmp_path / "store", capfd)

    said, text = run("stats", "--json").json, run("stats").out

    assert (said["tokens_reused"], said["tokens_asked"]) == (3, 926)
    assert said["partial_reasons"] == {DIVERGES: 1}
    assert "1 of 1 request " in text
    assert "3 of 926 prompt tokens (0.3%)" in text
    assert DIVERGES in text


def test_stats_of_an_older_store_gives_no_share_of_tokens(
    tmp_path: Path, disk: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    """It has counted what was saved since it was made, and never what was asked for."""
    disk.count("hits_disk", 5)
    disk.count("tokens_saved", 9000)
    disk.close()
    run = runner(tmp_path / "store", capfd)

    said, text = run("stats", "--json").json, run("stats").out

    assert (said["tokens_saved"], said["tokens_reused"], said["tokens_asked"]) == (9000, 0, 0)
    assert "5 of 5 requests" in text
    assert "not counted yet" in text
    assert "%)" not in text
