"""Long chains of short runs become few files, and nobody can tell but by their number."""

from __future__ import annotations

import math
import mmap
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from persist_cache import PromptCache, fs, tensors
from persist_cache.entry import Tier
from persist_cache.index import tree
from persist_cache.index.environment import Index
from persist_cache.index.records import Edge
from persist_cache.index.transaction import Reader
from persist_cache.store import compact
from persist_cache.store.evict import Evictor
from persist_cache.store.rewrite import LivingRun, rewrite
from persist_cache.store.session import Disk
from persist_cache.store.store import Store
from tests import forge
from tests.fakes import Clock, blob_files, disk_usage, fetched, fingerprint, meanwhile, put, restore
from tests.live_fakes import MODEL, FakeCodec, FakeLayer
from tests.test_tensors import held
from tests.tiny_caches import CACHES, feed, new_cache
from tests.waiting import until

TURNS = compact.LONG_CHAIN + 12
SYSTEM = list(range(1, 11))


@pytest.fixture
def store(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(fs, "sync", lambda fd: None)
    with open_store(tmp_path / "store", clock) as opened:
        yield opened


def open_store(root: Path, clock: Clock | None = None, **options: Any) -> Store:
    return Store.open(
        root, **{"max_bytes": 1 << 30, "min_free_bytes": 0, "clock": clock or Clock(), **options}
    )


def turn(number: int) -> list[int]:
    """The tokens of one turn, three of them."""
    return [1000 + number, 7, 2000 + number]


def conversation(num_turns: int) -> list[int]:
    return [*SYSTEM, *(token for number in range(num_turns) for token in turn(number))]


def talk(store: Store, first: int = 0, last: int = TURNS, **options: Any) -> list[str]:
    """Put every turn of a conversation; returns the entries."""
    ids = []
    for number in range(first, last):
        tier = ("user", "assistant")[number % 2]
        prompt = conversation(number + 1)
        ids.append(put(store, prompt, **{"tier": tier, "prefill_s": 0.5, **options}))
    return ids


def files_on_the_way(store: Store, tokens: list[int], **model: str) -> int:
    return len(store.match(fingerprint(**model), tokens).runs)


def sound(store: Store) -> bool:
    return store.check(read_data=True) == [] and store.stats().usage.total == disk_usage(store.root)


def test_conversation_becomes_few_files_and_keeps_its_entries(store: Store) -> None:
    put(store, SYSTEM, tier="system")
    talk(store)
    before = store.entries()
    size = disk_usage(store.root)

    collected = store.gc()

    assert collected.merged == TURNS - 1
    assert len(blob_files(store.root)) == 3, "system prompt, conversation, last turn"
    assert disk_usage(store.root) < size
    assert sound(store)
    kept = {one.id: (one.tier, one.num_tokens, one.created, one.prefill_s) for one in before}
    assert kept == {
        one.id: (one.tier, one.num_tokens, one.created, one.prefill_s) for one in store.entries()
    }
    for number in (0, 1, 30, TURNS):
        prompt = conversation(number)
        assert fetched(store, [*prompt, 5]) == len(prompt)
        assert fetched(store, [*prompt[:-1], 5]) == len(prompt) - 1
    assert store.stats().counters["merged"] == collected.merged
    assert store.gc().merged == 0


def test_twenty_turns_with_an_answer_each_are_written_once(store: Store) -> None:
    put(store, SYSTEM, tier="system")
    talk(store, last=40)
    files = blob_files(store.root)

    assert store.merge_runs() == 0
    assert store.gc().merged == 0

    assert blob_files(store.root) == files


def test_twenty_turns_behind_a_long_document_are_written_once(tmp_path: Path) -> None:
    """Its runs are as long as runs may be: they do not make the way long."""
    document = list(range(5000, 6500))
    with open_store(tmp_path / "store", run_tokens=30) as store:
        for number in range(41):
            prompt = [*document, *conversation(number)]
            put(store, prompt, tier="user")
        assert files_on_the_way(store, prompt) > compact.LONG_CHAIN + 40

        assert store.merge_runs() == store.gc().merged == 0


def test_two_runs_that_fill_a_file_are_merged(tmp_path: Path) -> None:
    with open_store(tmp_path / "store", run_tokens=50) as store:
        prompt: list[int] = []
        for number in range(TURNS):
            prompt = [*prompt, *range(1000 * number, 1000 * number + 20)]
            put(store, prompt, tier="user")

        assert store.gc().merged == TURNS - 2

        assert files_on_the_way(store, prompt) == TURNS // 2 + 1
        assert sound(store)
        assert fetched(store, prompt) == len(prompt)


def test_merging_while_idle_needs_no_look_at_the_rest_of_the_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk(store)
    put(store, [5, 5, 5])
    scans: list[str] = []
    monkeypatch.setattr(
        "persist_cache.index.transaction.Reader.edges", lambda _: scans.append("edges")
    )
    monkeypatch.setattr(
        "persist_cache.index.transaction.Reader.entries", lambda _: scans.append("entries")
    )

    assert store.merge_runs() == TURNS - 1
    assert store.merge_runs() == 0, "it is told of each entry once"

    assert scans == []


def test_rows_are_written_again_when_a_chain_has_tripled_not_each_turn(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, most = 250, 0
    copied: list[int] = []

    def counted(disk: Disk, evictor: Evictor, runs: Sequence[LivingRun]) -> None:
        copied.append(sum(run.num_tokens for run in runs))
        rewrite(disk, evictor, runs)

    monkeypatch.setattr(compact, "rewrite", counted)
    for number in range(turns):
        talk(store, number, number + 1)
        store.merge_runs()
        if number > compact.LONG_CHAIN:
            most = max(most, files_on_the_way(store, conversation(number + 1)))

    times_tripled = math.log(turns / compact.FURTHER_RUNS, 3)
    assert compact.FURTHER_RUNS < most <= compact.FURTHER_RUNS + 2 * times_tripled + 1
    assert len(copied) <= turns / (compact.FURTHER_RUNS - 1)
    assert sum(copied) <= len(conversation(turns)) * times_tripled
    assert sound(store)


@pytest.mark.parametrize("line", ["pinned", "expires", "system", "branch", "other model"])
def test_no_file_gets_rows_from_both_sides_of_a_line(
    store: Store, clock: Clock, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else evicting what is below it would free nothing."""
    monkeypatch.setattr(compact, "LONG_CHAIN", 4)
    half = conversation(20)
    drawn: dict[str, dict[str, Any]] = {
        "pinned": {"pinned": True},
        "expires": {"expires": clock() + 1e6},
        "system": {"tier": "system"},
    }
    options = drawn.get(line, {})
    talk(store, 0, 19)
    kept = put(store, half, **options)
    if line == "branch":
        kept = put(store, [*half, 1, 1], tier="user")
    if line == "other model":
        put(store, half, model="w1")
    talk(store, 20, 40)

    store.gc()

    starts = {run.start for run in store.match(fingerprint(), conversation(40)).runs}
    assert (len(half) in starts) == (line != "other model")
    assert len(starts) <= 4
    assert sound(store)
    size = disk_usage(store.root)
    store.evict([one.id for one in store.entries() if one.num_tokens > len(half) + 2])
    if line != "other model":
        assert disk_usage(store.root) < size
    assert store.get(kept).num_tokens <= len(half) + 2
    assert fetched(store, conversation(40)) == len(half)


@pytest.mark.parametrize("answered", ["at once", "later"])
def test_replies_that_nobody_went_on_from_are_no_line(store: Store, answered: str) -> None:
    """A reply in other tokens than the next request has it in hangs beside the way."""
    replies = []
    for number in range(TURNS):
        prompt = conversation(number + 1)
        put(store, prompt, tier="user")
        replies.append([*prompt[:-1], 3, 4] if number % 2 else [*prompt, 3, 4])
        if answered == "at once":
            put(store, replies[-1])
    for reply in replies if answered == "later" else ():
        put(store, reply)
    put(store, conversation(TURNS + 1), tier="user")

    merged = store.merge_runs()

    assert merged >= compact.LONG_CHAIN
    assert sound(store)
    assert files_on_the_way(store, conversation(TURNS + 1)) <= TURNS + 2 - merged
    for reply in replies:
        assert fetched(store, [*reply, 1]) == len(reply)
    size = disk_usage(store.root)
    store.evict([one.id for one in store.entries() if one.tier == Tier.ASSISTANT])
    assert disk_usage(store.root) < size
    assert fetched(store, conversation(TURNS + 1)) == len(conversation(TURNS + 1))


def test_replies_that_differ_in_their_middle_now_and_then_do_not_keep_the_rest_apart(
    store: Store,
) -> None:
    """A part of such a reply's file is on the way, and the rest beside it."""
    talked: list[int] = []
    for number in range(TURNS):
        talked = [*talked, *turn(number)]
        if number % 10 == 5:
            put(store, [*talked, 5, 6, 7])
            talked = [*talked, 5, 6]
        put(store, talked, tier="user")
    before = files_on_the_way(store, talked)

    assert store.merge_runs() >= compact.LONG_CHAIN

    assert files_on_the_way(store, talked) < before / 3
    assert sound(store)
    assert fetched(store, talked) == len(talked)
    assert fetched(store, [*conversation(6)[len(SYSTEM) :], 5, 6, 7]) == 21


def test_nodes_that_nothing_needs_any_more_go(store: Store) -> None:
    """A run that was cut for its length, or whose entry went, leaves a node without entry."""
    ids = talk(store)
    store.evict(ids[:30:2])

    assert store.gc().merged == TURNS - 1

    assert sound(store)
    assert len(store.entries()) == TURNS - 15
    with store.read() as txn:
        assert sum(1 for _ in txn.edges()) == TURNS - 15


@pytest.mark.parametrize("complete", [True, False])
def test_runs_without_rows_of_all_layers_keep_their_states(store: Store, complete: bool) -> None:
    talk(store, complete=complete)

    assert store.gc().merged == TURNS - 1

    assert sound(store)
    for number in (1, 30, TURNS):
        prompt = conversation(number)
        assert fetched(store, [*prompt, 5]) == len(prompt)


def test_runs_of_both_kinds_are_not_mixed(store: Store) -> None:
    talk(store, 0, TURNS)
    talk(store, TURNS, 2 * TURNS, complete=False)

    assert store.gc().merged == 2 * TURNS - 1

    assert files_on_the_way(store, conversation(2 * TURNS)) == 3
    assert sound(store)
    assert fetched(store, conversation(2 * TURNS)) == len(conversation(2 * TURNS))


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("others", ["gone", "all there", "some there"])
def test_new_index_has_all_entries_again(
    store: Store, tmp_path: Path, complete: bool, others: str
) -> None:
    """Also when a power cut brought back files whose place the merged one took."""
    put(store, SYSTEM, tier="system", complete=complete)
    talk(store, complete=complete)
    before = {(one.id, one.tier, one.num_tokens) for one in store.entries()}
    saved = tmp_path / "saved"
    shutil.copytree(store.root, saved)
    old = {path.name: path for path in blob_files(saved)}
    store.gc()
    put(store, [*conversation(TURNS), 9, 9], complete=complete)
    before |= {(one.id, one.tier, one.num_tokens) for one in store.entries()}
    store.close()
    (store.root / "data.mdb").unlink()
    for index, name in enumerate(sorted(old)):
        if others == "all there" or (others == "some there" and index % 3):
            target = store.root / "blobs" / name[:2] / name
            target.parent.mkdir(exist_ok=True)
            shutil.copy(old[name], target)

    with open_store(store.root) as again:
        after = {(one.id, one.tier, one.num_tokens) for one in again.entries()}
        assert after == before
        for number in (1, 30, TURNS):
            prompt = conversation(number)
            assert fetched(again, [*prompt, 5]) == len(prompt)
        again.gc()
        assert again.check(read_data=True) == []
        assert {(one.id, one.tier, one.num_tokens) for one in again.entries()} == before


def test_old_files_that_a_power_cut_brings_back_do_not_beat_the_merged_one(
    store: Store, tmp_path: Path
) -> None:
    """Nothing hangs on the merged one any more, while the old ones hang on each other."""
    ids = talk(store)
    saved = tmp_path / "saved"
    shutil.copytree(store.root, saved)
    first = [run.blob for run in store.match(fingerprint(), conversation(TURNS)).runs[:3]]
    store.gc()
    store.evict(ids[-1:])
    before = {(one.id, one.tier, one.num_tokens) for one in store.entries()}
    store.close()
    (store.root / "data.mdb").unlink()
    for name in first:
        target = store.root / "blobs" / name[:2] / f"{name}.safetensors"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(saved / "blobs" / name[:2] / target.name, target)

    with open_store(store.root) as again:
        assert {(one.id, one.tier, one.num_tokens) for one in again.entries()} == before
        assert fetched(again, conversation(TURNS)) == len(conversation(TURNS - 1))
        again.gc()
        assert again.check(read_data=True) == []


def test_full_files_do_not_have_the_tail_written_again_at_each_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fs, "sync", lambda fd: None)
    monkeypatch.setattr(compact, "LONG_CHAIN", 8)
    prompt = list(range(1, 401))
    with open_store(tmp_path / "store", run_tokens=40) as store:
        put(store, prompt, tier="user")
        merges = 0
        for number in range(20):
            prompt = [*prompt, 1000 + number]
            put(store, prompt, tier="user")
            merges += store.merge_runs() > 0
        assert merges <= 20 // 7
        assert fetched(store, prompt) == len(prompt)


def test_budget_holds_while_the_old_files_are_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large store the commit copies a page of the index for each record that it changes."""
    monkeypatch.setattr(fs, "sync", lambda fd: None)
    root = tmp_path / "store"
    with open_store(root) as store:
        for number in range(TURNS):
            put(store, conversation(number + 1), tier="user")
            put(store, [-1 - number])
        before = disk_usage(root) - store.stats().usage.ballast
        leaf = max(store.entries(), key=lambda one: one.num_tokens).id
    samples: list[int] = []
    empty_trash = Evictor.empty_trash

    def sampled(evictor: Evictor) -> bool:
        samples.append(disk_usage(root))
        return empty_trash(evictor)

    monkeypatch.setattr(Evictor, "empty_trash", sampled)
    merged = 0
    for room in range(100_000, 3_000_000, 200_000):
        with open_store(root, max_bytes=before + room) as store:
            forge.grow(store, leaf)
            samples.clear()
            merged = store.merge_runs()
            assert max(samples) <= before + room
        if merged:
            break
    assert merged == TURNS - 1, "with enough room it is done"
    assert room > 4 * (TURNS - 1) * mmap.PAGESIZE, "there is room for those pages"


def test_replies_beside_the_way_are_not_looked_at_each(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(TURNS):
        put(store, conversation(number + 1), tier="user")
        put(store, [*conversation(number + 1), 3, 4])
    put(store, conversation(TURNS + 1), tier="user")
    looked: list[int] = []
    path_of = tree.path_of

    def counted(txn: Reader, node: int) -> list[tuple[bytes, Edge]]:
        found = path_of(txn, node)
        looked.append(len(found))
        return found

    monkeypatch.setattr("persist_cache.index.tree.path_of", counted)
    assert store.merge_runs(keep_on=lambda: False) == 0
    assert looked == []
    assert store.merge_runs() == TURNS
    assert len(looked) == 1, "the way itself"


def test_branch_that_came_meanwhile_hangs_on_the_merged_file(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk(store)
    branches = [[*conversation(20), 8, 8], [*conversation(21)[:-1], 9], conversation(7)[:-2]]
    meanwhile(monkeypatch, lambda: [put(store, branch) for branch in branches])

    assert store.gc().merged == TURNS - 1

    assert sound(store)
    for branch in branches:
        assert fetched(store, [*branch, 1]) == len(branch)


@pytest.mark.parametrize("what", ["end", "all", "index"])
def test_chain_that_is_not_the_same_any_more_is_left_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    ids = talk(store)
    left = {"end": 5, "all": 0, "index": TURNS}[what]

    def act() -> None:
        if what == "index":
            put(store, [9])
            store.rebuild_index()
        store.evict(ids[left:][::-1])

    meanwhile(monkeypatch, act)

    assert store.gc().merged == 0

    assert sound(store)
    assert store.stats().usage.pending == 0
    assert list((store.root / "tmp").iterdir()) == []
    assert fetched(store, conversation(TURNS)) == (len(conversation(left)) if left else 0)


def test_damaged_run_is_put_aside_and_the_rest_stays(store: Store) -> None:
    talk(store)
    name = store.match(fingerprint(), conversation(TURNS)).runs[30].blob
    path = store.blob_path(name)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    assert store.gc().merged == 0

    assert [one.name for one in (store.root / "quarantine").iterdir()] == [path.name]
    assert fetched(store, conversation(TURNS)) == len(conversation(30))
    assert store.check(read_data=True) == []


def test_nothing_goes_for_a_merged_file_and_the_budget_holds(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as store:
        talk(store, pinned=False)
        tight = disk_usage(store.root) + 40_000
    with open_store(tmp_path / "store", max_bytes=tight, daily_write_bytes=1) as store:
        before = store.entries()
        assert store.gc().merged == 0
        assert [one.id for one in store.entries()] == [one.id for one in before]
        assert store.stats().usage.pending == 0


def test_bytes_of_a_day_are_for_what_is_new(tmp_path: Path) -> None:
    with open_store(tmp_path / "store", daily_write_bytes=1 << 30) as store:
        talk(store)
        written = store.stats().written_today
        assert store.merge_runs() == 0
        assert store.stats().written_today == written
        assert store.gc().merged == TURNS - 1, "who asks for it gets it"
        assert store.stats().written_today > written


def test_work_ends_when_somebody_needs_the_machine(store: Store) -> None:
    talk(store)

    assert store.merge_runs(keep_on=lambda: False) == 0
    assert store.merge_runs() == TURNS - 1


def test_long_runs_are_the_limit_of_a_file(tmp_path: Path) -> None:
    with open_store(tmp_path / "store", run_tokens=30) as store:
        talk(store)
        assert store.gc().merged == TURNS - 1
        with store.read() as txn:
            assert max(blob.num_tokens for _, blob in txn.blobs()) == 30
        assert fetched(store, conversation(TURNS)) == len(conversation(TURNS))
        assert sound(store)


def test_reader_of_the_old_files_reads_on(store: Store) -> None:
    talk(store)
    merged: list[int] = []

    def merge_meanwhile(runs: Any, checkpoint: Any, num_tokens: int) -> Any:
        merged.append(store.gc().merged)
        return restore(runs, checkpoint, num_tokens)

    found = store.fetch(fingerprint(), conversation(TURNS), merge_meanwhile)

    assert merged == [TURNS - 1]
    assert found is not None
    assert found[0].equals(conversation(TURNS))


def test_prompt_stored_meanwhile_hangs_on_the_merged_file(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The put has written its file, which names the old one, when the old one goes."""
    talk(store)
    update = Index.update
    turns = iter(range(100))

    def merge_first(index: Index, change: Any) -> Any:
        if next(turns) == 1:
            monkeypatch.undo()
            assert store.gc().merged == TURNS - 1
        return update(index, change)

    monkeypatch.setattr(Index, "update", merge_first)
    branch = [*conversation(12), 3, 3]
    put(store, branch)

    assert fetched(store, branch) == len(branch)
    assert store.check(read_data=True) == []
    store.close()
    (store.root / "data.mdb").unlink()
    with open_store(store.root) as again:
        assert fetched(again, branch) == len(branch)


@pytest.mark.parametrize("name", CACHES)
def test_real_caches_are_restored_bit_for_bit(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(compact, "LONG_CHAIN", 3)
    monkeypatch.setattr(compact, "FURTHER_RUNS", 3)
    specs, chunks = CACHES[name]
    cache = new_cache(specs)
    tokens: list[int] = []
    for seed, num_tokens in enumerate((*chunks, 1, 2, 1, 5, 1)):
        feed(cache, specs, num_tokens, seed)
        tokens += range(1000 * seed, 1000 * seed + num_tokens)
        kept = tensors.prepare(cache, len(tokens))
        store.put(fingerprint(), tokens[:kept], tensors.source(cache, kept))
    before = files_on_the_way(store, tokens)
    old = store.fetch(fingerprint(), tokens, tensors.restore)

    merged = store.gc().merged

    new = store.fetch(fingerprint(), tokens, tensors.restore)
    assert old is not None
    assert new is not None
    assert old[1].num_tokens == new[1].num_tokens == len(tokens)
    assert held(new[0]) == held(old[0])
    assert store.check(read_data=True) == []
    if before > 4 and "rotating" not in name and "chunked" not in name:
        assert merged >= 3
        assert files_on_the_way(store, tokens) < before
    mx.clear_cache()


def test_an_answer_that_takes_longer_is_no_idle_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "LONG_CHAIN", 4)
    rounds: list[int] = []
    merge = store.merge_runs

    def counted(go_on: Callable[[], bool]) -> int:
        rounds.append(merge(go_on))
        return rounds[-1]

    monkeypatch.setattr(store, "merge_runs", counted)
    with PromptCache(
        store=store, identify=lambda model: fingerprint(), codec=FakeCodec(), idle_s=0.05
    ) as cache:
        cache.fetch_nearest_cache(MODEL, conversation(13))
        talk(store, last=12)
        rounds.clear()
        until(lambda: len(rounds) > 2)
        assert not any(rounds)
        assert "merged" not in store.stats().counters
        reply = [*conversation(13), 5]
        cache.insert_cache(MODEL, reply, [FakeLayer(reply)])
        until(lambda: "merged" in store.stats().counters)
    assert sound(store)


def test_server_merges_while_it_is_idle(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "LONG_CHAIN", 4)
    asked: list[bool] = []

    def is_busy() -> bool:
        asked.append(len(asked) < 3)
        return asked[-1]

    with PromptCache(
        store=store, identify=lambda model: fingerprint(), codec=FakeCodec(), idle_s=0.05
    ) as cache:
        cache.is_busy = is_busy
        for number in range(12):
            prompt = conversation(number + 1)
            cache.insert_cache(MODEL, prompt, [FakeLayer(prompt)], cache_type="user")
        cache.flush()
        until(lambda: store.stats().counters.get("merged"))
        kv, rest = cache.fetch_nearest_cache(MODEL, [*conversation(12), 1])
        assert kv is not None
        assert rest == [1]
    assert asked[:4] == [True, True, True, False], "it waits for answers to end"
    assert len(blob_files(store.root)) <= 4
    assert sound(store)
    assert {one.tier for one in store.entries()} == {Tier.USER}
