"""What canonical operations cost, counted without a clock: bytes, files, look-ups, copies.

A slower machine does not fail these; a second reading of the same bytes does.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache
from mlx_lm.server import ResponseGenerator

from persist_cache import PromptCache, Store, fs, tensors
from persist_cache.blobs.header import ALIGNMENT
from persist_cache.index import tree
from persist_cache.index.environment import Index
from persist_cache.index.transaction import Reader
from persist_cache.server.admin import Admin
from persist_cache.server.guard import Request
from persist_cache.server.ticket import Ticket, TicketedCache
from persist_cache.server.upstream.generator import Generator
from persist_cache.server.upstream.provider import Spare
from persist_cache.server.upstream.requests import TicketedRequest
from persist_cache.store.trail import Trail
from persist_cache.tokens import TOKEN_BYTES, pack_tokens
from tests.cli import Run, runner
from tests.fakes import FakeSource, fingerprint, put
from tests.live_fakes import MODEL, TokenCodec

HEADS, DIM, LAYERS = 2, 64, 3
BYTES_PER_TOKEN = HEADS * DIM * 2 * 2 * LAYERS


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", min_free_bytes=0) as opened:
        yield opened


def make_cache(num_tokens: int) -> list[Any]:
    """Layers of plain KV with room for a token more."""
    cache = []
    for _ in range(LAYERS):
        layer = KVCache()
        rows = mx.random.normal((1, HEADS, num_tokens, DIM)).astype(mx.bfloat16)
        layer.update_and_fetch(rows[:, :, :-1], rows[:, :, :-1])
        layer.update_and_fetch(rows[:, :, -1:], rows[:, :, -1:])
        mx.eval(layer.keys, layer.values)
        cache.append(layer)
    return cache


def append_token(cache: Sequence[Any]) -> None:
    row = mx.ones((1, HEADS, 1, DIM), mx.bfloat16)
    for layer in cache:
        layer.update_and_fetch(row, row)
    mx.eval([(layer.keys, layer.values) for layer in cache])


def put_turns(store: Store, num_tokens: int, num_turns: int) -> list[int]:
    """Store a conversation, a run each turn; returns its tokens."""
    tokens = list(range(num_tokens))
    source = tensors.source(make_cache(num_tokens), num_tokens)
    for turn in range(1, num_turns + 1):
        store.put(fingerprint(), tokens[: num_tokens * turn // num_turns], source)
    return tokens


def put_prompts(store: Store, number: int) -> list[str]:
    """Store short prompts that have nothing in common; returns their ids."""
    return [put(store, [1_000 + one, *range(9)]) for one in range(number)]


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(tmp_path / "store", capfd)


class Reads:
    """Every read of a file, by descriptor, and every file opened for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[Path] = []
        self.spans: dict[Path, list[tuple[int, int]]] = {}
        self._paths: dict[int, Path] = {}
        open_read, read_into = fs.open_read, fs.read_into

        def counted_open(path: Path) -> int:
            fd = open_read(path)
            self.opened.append(path)
            self._paths[fd] = path
            return fd

        def counted_read(fd: int, offset: int, buffers: Sequence[memoryview]) -> int:
            count = read_into(fd, offset, buffers)
            self.spans.setdefault(self._paths[fd], []).append((offset, offset + count))
            return count

        monkeypatch.setattr(fs, "open_read", counted_open)
        monkeypatch.setattr(fs, "read_into", counted_read)


class LookUps:
    """Calls of the index's reader by name, and the bytes of tokens that they returned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.token_bytes = 0
        for name in ("edge", "tokens", "blob", "children", "entry", "parent_key"):
            monkeypatch.setattr(Reader, name, self._counted(name, getattr(Reader, name)))

    def _counted(self, name: str, method: Any) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            result = method(*arguments, **named)
            self.calls[name] += 1
            if name == "tokens":
                self.token_bytes += len(result)
            return result

        return counted


class Transactions:
    """Transactions of the index that were begun, reading and writing ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: Counter[str] = Counter()
        for name in ("read", "update"):
            monkeypatch.setattr(Index, name, self._counted(name, getattr(Index, name)))

    def _counted(self, name: str, method: Any) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.begun[name] += 1
            return method(*arguments, **named)

        return counted


@pytest.mark.parametrize("others", [0, 40])
def test_match_reads_each_run_of_the_prompt_once_whatever_else_is_stored(
    store: Store, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    tokens = list(range(30_000))
    for end in (10_000, 20_000, 30_000):
        store.put(fingerprint(), tokens[:end], FakeSource(tokens[:end]))
    for number in range(others):
        other = [*tokens[: 7 * number], -number - 1]
        store.put(fingerprint(), other, FakeSource(other))
    prompt = pack_tokens([*tokens, 99_999])
    looked = LookUps(monkeypatch)

    match = store.match(fingerprint(), prompt)

    assert match.num_tokens == 30_000
    # Three runs of 4,096 tokens or less for each 10,000, and a half more for each branch.
    edges = looked.calls["edge"] - 1
    assert edges == looked.calls["tokens"] == 9 + others - (others > 0)
    assert looked.token_bytes == 30_000 * TOKEN_BYTES
    assert looked.calls["blob"] <= edges
    # Whether anything goes on where the prompt leaves: it is why the match is no longer.
    assert looked.calls["children"] == 1
    assert looked.calls["parent_key"] == 0


def test_a_miss_looks_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(fingerprint(), [1, 2, 3], FakeSource([1, 2, 3]))
    looked = LookUps(monkeypatch)

    assert store.match(fingerprint(), list(range(9, 30_000))).num_tokens == 0
    assert looked.calls == {"edge": 1, "children": 1}
    assert looked.token_bytes == 0


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the length of the prompt at each walk through the tree of the index."""
    walked: list[int] = []
    walk = tree.walk

    def counted(txn: Reader, root: int, packed: bytes) -> tree.Walk:
        walked.append(len(packed) // TOKEN_BYTES)
        return walk(txn, root, packed)

    monkeypatch.setattr(tree, "walk", counted)
    return walked


@pytest.fixture
def cache(store: Store) -> Iterator[PromptCache]:
    """A cache as a server has it, over a store that nothing is saved to meanwhile."""
    with PromptCache(
        store=store,
        identify=lambda _: fingerprint(),
        codec=TokenCodec(),
        leave_tokens=1,
        idle_s=60,
    ) as made:
        yield made


def test_a_fetch_from_disk_walks_the_index_once(
    store: Store, cache: PromptCache, walks: list[int]
) -> None:
    put(store, range(100))
    walks.clear()

    kv, _ = cache.fetch_nearest_cache(MODEL, list(range(110)))

    assert kv is not None
    assert cache.last_fetch.source == "disk"
    assert walks == [110]


class Rendered(Generator):
    """A server's generator without its loop and its model: requests are prompts."""

    def __init__(self, cache: PromptCache) -> None:
        self.cache = cache
        self._alone = None
        self._is_distributed = False
        self.is_ending = False
        self._changed = threading.Condition()
        self._tickets = weakref.WeakSet()
        self._in_flight = 2
        self._tokenizing = threading.Lock()
        self._reader = ThreadPoolExecutor(1)
        self.model_provider = SimpleNamespace(
            model_key=MODEL,
            spare=Spare(object(), SimpleNamespace(has_thinking=False)),
            draft_model=None,
            is_batchable=True,
            cli_args=SimpleNamespace(chat_template_args={}, kv_bits=None),
        )

    def receive(self, request: Any) -> tuple[list[Any] | None, Sequence[int]]:
        """What is done with a request that waits for others."""
        args = SimpleNamespace(
            model=SimpleNamespace(model=MODEL[0]),
            chat_template_kwargs=None,
            max_tokens=4,
            seed=None,
            sampling=SimpleNamespace(top_k=0),
        )
        self.tokenize_ahead(request, args)
        self.load_ahead(request, args)
        self._reader.shutdown()
        prompt = self._tokenize(self.model_provider.spare.of, request, args)[0]
        return TicketedCache(self.cache, self).fetch_nearest_cache(MODEL, prompt)


@pytest.fixture
def generator(cache: PromptCache, monkeypatch: pytest.MonkeyPatch) -> Rendered:
    def tokenize(self: Any, tokenizer: Any, request: Any, args: Any) -> Any:
        return request.prompt, [request.prompt], ["user"], "normal", None

    monkeypatch.setattr(ResponseGenerator, "_tokenize", tokenize)
    return Rendered(cache)


def request(prompt: Sequence[int]) -> Any:
    return TicketedRequest("text", list(prompt), [], None, None, Ticket())


def test_a_request_of_a_server_walks_the_index_once(
    store: Store, generator: Rendered, walks: list[int]
) -> None:
    put(store, range(100))
    asked = request(range(110))
    walks.clear()

    kv, rest = generator.receive(asked)

    assert kv is not None
    assert (len(kv[0].tokens), rest) == (100, list(range(100, 110)))
    assert asked.ticket.fetch.source == "disk"
    assert generator.cache.stats().read_ahead_bytes > 0
    assert walks == [110]


def test_a_request_walks_again_when_something_was_committed(
    store: Store, generator: Rendered, walks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, range(100))
    asked = request(range(210))
    branch_point = PromptCache.branch_point

    def then_commit(*arguments: Any, **named: Any) -> int:
        point = branch_point(*arguments, **named)
        put(store, range(200))
        walks.clear()
        return point

    monkeypatch.setattr(PromptCache, "branch_point", then_commit)
    kv, rest = generator.receive(asked)

    assert kv is not None
    assert (len(kv[0].tokens), rest) == (200, list(range(200, 210)))
    assert walks == [210]


def test_a_trail_is_believed_of_nothing_but_what_it_was_found_for(
    store: Store, tmp_path: Path
) -> None:
    trail = Trail()
    for number in range(3):
        put(store, [number, *range(50)], model="w0")
        put(store, [number, *range(40)], model="w1")
    with Store.open(tmp_path / "other", min_free_bytes=0) as other:
        for number in range(3):
            put(other, [number, *range(30)], model="w0")
            put(other, [number, *range(20)], model="w1")
        looks = [
            (place, model, first, limit)
            for place in (store, other)
            for model in ("w0", "w1")
            for first in range(3)
            for limit in (None, 7)
        ]
        random.Random(0).shuffle(looks)
        for place, model, first, limit in looks * 2:
            prompt = [first, *range(60)]
            identity = fingerprint(weights=model)

            found = place.match(identity, prompt, limit=limit, trail=trail)

            assert found == place.match(identity, prompt, limit=limit)
        assert other.commit_id() == store.commit_id()


def test_a_trail_of_a_store_that_was_lost_is_not_believed(tmp_path: Path) -> None:
    """Its successor counts its commits from the start."""
    root, trail = tmp_path / "lost", Trail()
    with Store.open(root, min_free_bytes=0) as lost:
        put(lost, range(100))
        assert lost.match(fingerprint(), list(range(110)), trail=trail).num_tokens == 100
        before = lost.commit_id()
        shutil.rmtree(root)
        assert lost.is_lost
        lost.reopen()
        put(lost, range(50))
        assert lost.commit_id() == before

        assert lost.match(fingerprint(), list(range(110)), trail=trail).num_tokens == 50


@pytest.mark.parametrize("turns", [1, 7])
def test_restore_opens_each_blob_once_and_reads_each_byte_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    tokens = put_turns(store, 700, turns)
    reads = Reads(monkeypatch)

    found = store.fetch(fingerprint(), tokens, tensors.restore)

    assert found is not None
    assert len(reads.opened) == len(set(reads.opened)) == turns
    data_bytes = 0
    for spans in reads.spans.values():
        spans.sort()
        # The header, the tokens, and all small tensors in one call.
        assert len(spans) == 3
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        data_bytes += sum(end - start for start, end in spans if start >= ALIGNMENT)
    assert data_bytes == 700 * (BYTES_PER_TOKEN + TOKEN_BYTES)


def test_the_first_token_after_a_restore_copies_nothing(store: Store) -> None:
    tokens = put_turns(store, 2_000, 3)
    found = store.fetch(fingerprint(), tokens, tensors.restore)
    assert found is not None
    before = mx.get_active_memory()
    mx.reset_peak_memory()

    append_token(found[0])

    assert mx.get_peak_memory() - before < 2_000 * BYTES_PER_TOKEN // 20


def test_restoring_takes_no_memory_besides_the_buffers(store: Store) -> None:
    tokens = put_turns(store, 2_000, 8)
    before = mx.get_active_memory()
    mx.reset_peak_memory()

    found = store.fetch(fingerprint(), tokens, tensors.restore)

    assert found is not None
    assert mx.get_peak_memory() - before <= 2_048 * BYTES_PER_TOKEN + 64 * LAYERS * 1024


def test_insert_copies_nothing_and_a_lent_cache_goes_on_in_place(tmp_path: Path) -> None:
    tokens = list(range(2_000))
    limit = 2_000 * BYTES_PER_TOKEN // 20
    with PromptCache(store=tmp_path / "s", identify=lambda _: fingerprint(), idle_s=60) as cache:
        kv = make_cache(2_000)
        before = mx.get_active_memory()
        mx.reset_peak_memory()

        cache.insert_cache(MODEL, tokens, kv, cache_type="user")
        del kv
        assert cache.flush()
        found, _ = cache.fetch_nearest_cache(MODEL, [*tokens, 7])
        assert found is not None
        append_token(found)

        assert cache.last_fetch.source == "memory"
        assert mx.get_peak_memory() - before < limit


def test_a_second_turn_writes_its_own_rows_and_nothing_else(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = list(range(1_000))
    source = tensors.source(make_cache(1_000), 1_000)
    store.put(fingerprint(), tokens[:900], source)
    written: list[int] = []
    write_all = fs.write_all

    def counted(fd: int, buffers: Sequence[memoryview]) -> int:
        count = write_all(fd, buffers)
        written.append(count)
        return count

    monkeypatch.setattr(fs, "write_all", counted)

    store.put(fingerprint(), tokens, source)

    assert len(written) == 1
    assert 0 <= written[0] - 100 * (BYTES_PER_TOKEN + TOKEN_BYTES) <= ALIGNMENT


def test_put_of_what_is_stored_writes_no_file(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tensors.source(make_cache(100), 100)
    store.put(fingerprint(), list(range(100)), source)
    files = sorted(os.listdir(store.root / "blobs"))

    def refused(path: Path) -> int:
        raise AssertionError(f"{path} is written")

    monkeypatch.setattr(fs, "create", refused)

    assert store.put(fingerprint(), list(range(100)), source).nbytes == 0
    assert sorted(os.listdir(store.root / "blobs")) == files


@pytest.mark.parametrize("number", [2, 200])
def test_evicting_many_entries_takes_no_more_transactions_than_evicting_two(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    ids = put_prompts(store, number + 2)[:number]
    transactions = Transactions(monkeypatch)

    store.evict(ids)

    assert store.stats().entries == 2
    # What goes and what is struck off the trash; what is in the trash before, after and in the
    # end, and whether the ballast is there.
    assert transactions.begun["update"] == 2
    assert transactions.begun["read"] <= 4


@pytest.mark.parametrize("number", [2, 200])
def test_evict_command_takes_no_more_transactions_for_many_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, number: int
) -> None:
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        ids = put_prompts(store, number + 2)[:number]
    assert run("list").status == 0
    transactions = Transactions(monkeypatch)

    assert run("evict", *ids, "--yes", "--json").status == 0

    assert transactions.begun["update"] <= 4
    assert transactions.begun["read"] <= 20


def test_evicting_what_is_below_an_entry_over_http_takes_a_handful_of_transactions(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = put(store, [1, 2, 3], tier="system")
    for number in range(60):
        put(store, [1, 2, 3, 100 + number])
    with PromptCache(store=store, leave_tokens=1) as cache:
        transactions = Transactions(monkeypatch)

        answer = Admin(cache, token="").answer(
            Request("DELETE", f"/v1/cache/entries/{stem}?below=true", Message())
        )

        assert answer.status == 200
        assert transactions.begun["update"] == 2
        assert transactions.begun["read"] <= 10
    assert store.entries() == []


def test_evict_command_does_not_begin_again_for_each_entry_when_one_went_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        put_prompts(store, 40)
    evict = Store.evict

    def evict_later(self: Store, ids: Sequence[str], **options: Any) -> int:
        if len(ids) == 40:
            evict(self, [ids[7]])
        return evict(self, ids, **options)

    monkeypatch.setattr(Store, "evict", evict_later)
    transactions = Transactions(monkeypatch)

    assert run("evict", "--all", "--yes").status == 0

    with Store.open(tmp_path / "store", min_free_bytes=0) as store:
        assert store.entries() == []
    assert transactions.begun["update"] <= 8
