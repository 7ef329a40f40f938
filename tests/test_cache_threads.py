"""Threads on one PromptCache: what is given is what is reported, and it is the prompt's."""

from __future__ import annotations

import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from persist_cache import PromptCache, Store
from persist_cache.cache import prompt_cache
from persist_cache.fingerprint.value import Fingerprint
from tests.fakes import fingerprint, put
from tests.live_fakes import MODEL, FakeCodec, FakeLayer, TokenCodec

THREADS, TURNS = 6, 250


@pytest.fixture
def _eager_switches() -> Iterator[None]:
    """Let threads take turns every 10 µs, so that they meet between any two steps."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Machine:
    """A model whose weights are replaced now and then, with the cache that is kept of it."""

    def __init__(self, disk: Store | Path | None) -> None:
        self.loads = 0
        self._next_load = itertools.count(1)
        self.codec = FakeCodec()
        self.cache = PromptCache(
            max_size=6,
            max_bytes=64 * 400,
            store=disk,
            identify=lambda model: fingerprint(weights=self.weights),
            leave_tokens=1,
            idle_s=0.02,
            queue_bytes=64 * 500,
            codec=self.codec,
        )
        self.wrong: list[str] = []
        self.fetches = 0

    @property
    def weights(self) -> str:
        return f"w{self.loads % 2}"

    def run(self, seed: int) -> None:
        dice = random.Random(seed)
        try:
            for _ in range(TURNS):
                self.turn(dice)
        except BaseException as error:
            self.wrong.append(repr(error))

    def turn(self, dice: random.Random) -> None:
        match dice.randrange(40):
            case 0:
                self.cache.trim_to(n_sequences=dice.randrange(4))
            case 1:
                self.cache.flush(0.05)
            case 2:
                self.cache.read_ahead(MODEL, prompt(dice))
            case 3:
                self.cache.branch_point(MODEL, prompt(dice))
            case 4:
                self.loads = next(self._next_load)
            case _:
                self.request(dice)

    def request(self, dice: random.Random) -> None:
        tokens, loads = prompt(dice), self.loads
        weights = f"w{loads % 2}"
        kv, rest = self.cache.fetch_nearest_cache(MODEL, tokens)
        last = self.cache.last_fetch
        self.fetches += 1
        trimmable = tokens[0] % 2 == 0
        layer = FakeLayer([], trimmable, weights) if kv is None else kv[0]
        if layer.tokens + list(rest) != tokens:
            self.wrong.append(f"{len(layer.tokens)} + {len(rest)} of {len(tokens)}: {last}")
        if last.num_tokens != len(layer.tokens):
            self.wrong.append(f"{last} of {len(layer.tokens)} tokens")
        if self.loads != loads:
            return  # loaded again in between: who knows which weights the look-up saw
        if layer.weights != weights:
            self.wrong.append(f"KV of {layer.weights} for {weights}")
        end = dice.choice([len(tokens), len(tokens), max(1, len(tokens) // 2)])
        if len(layer.tokens) <= end:
            tier = dice.choice(["system", "user", "assistant"])
            layer.tokens += tokens[len(layer.tokens) : end]
            self.cache.insert_cache(MODEL, tokens[:end], [layer], cache_type=tier)


def prompt(dice: random.Random) -> list[int]:
    """A prompt that shares more or less with others; the first token says whether it trims."""
    base = dice.randrange(4)
    return [
        base,
        *range(dice.choice([1, 20, 60, 61, 100])),
        *[dice.randrange(2)] * dice.randrange(9),
    ]


@pytest.mark.usefixtures("_eager_switches")
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("kept_in", ["store", "own store", "memory"])
def test_offset_and_rest_make_up_the_prompt_whatever_happens_at_once(
    tmp_path: Path, seed: int, kept_in: str
) -> None:
    path = tmp_path / "store"
    with Store.open(path, min_free_bytes=0) as disk:
        if kept_in == "own store":
            disk.close()  # the cache opens it, and closes it while others go on
        stores: dict[str, Store | Path | None] = {"store": disk, "own store": path, "memory": None}
        machine = Machine(stores[kept_in])
        threads = [
            threading.Thread(target=machine.run, args=(seed * 100 + number,))
            for number in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        threads[0].join()
        machine.cache.close()  # while others go on
        for thread in threads:
            thread.join()

    assert machine.wrong == []
    assert machine.fetches > THREADS * TURNS // 2
    problems = set(machine.cache.stats().problems)
    assert problems <= {"dropped_queue_full", "computed_before_reload", "too_large_for_memory"}
    with Store.open(path) as disk:
        assert (disk.entries() != []) == (kept_in != "memory")
        for entry in disk.entries():
            assert_owned(disk, entry.fingerprint)
        assert disk.check(read_data=True) == []


def assert_owned(disk: Store, hex_digest: str) -> None:
    """Check that what is stored under an identity was computed by its weights."""
    with disk.read() as txn:
        for _, namespace in txn.namespaces(bytes.fromhex(hex_digest)):
            identity = Fingerprint.from_json(namespace.identity.encode())
            assert f'"{identity.fields["weights"]}"' in namespace.layout


class Busy:
    """A lock of which others make use whenever it is let go."""

    def __init__(self, others: Callable[[], object]) -> None:
        self._lock = threading.RLock()
        self._others = others
        self._depth = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        self._lock.release()
        if self._depth == 0:
            self._depth = 1  # what the others do lets it go, too
            self._others()
            self._depth = 0


def test_cache_that_is_chosen_is_the_one_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread inserted a longer prompt between the two looks of one fetch."""
    others: list[Callable[[], object]] = []
    busy = Busy(lambda: [act() for act in others])
    monkeypatch.setattr(prompt_cache, "RLock", lambda: busy)
    with PromptCache(codec=FakeCodec()) as cache:
        lengths = itertools.count(50)

        def insert() -> None:
            tokens = list(range(next(lengths)))
            cache.insert_cache(MODEL, tokens, [FakeLayer(tokens)], cache_type="system")

        insert()
        others.append(insert)
        kv, rest = cache.fetch_nearest_cache(MODEL, list(range(100)))
        others.clear()

    assert kv is not None
    assert kv[0].tokens + list(rest) == list(range(100))
    assert cache.last_fetch.num_tokens == len(kv[0].tokens)


def test_blob_that_is_bad_leaves_the_shorter_hit_and_its_length(tmp_path: Path) -> None:
    """What is reported is what was loaded, not what the first look found."""
    with Store.open(tmp_path / "store", min_free_bytes=0) as disk:
        put(disk, range(100))
        put(disk, range(200))
        (tail,) = (run.blob for run in disk.match(fingerprint(), list(range(200))).runs[1:])
        path = next((tmp_path / "store" / "blobs").rglob(f"{tail}*"))
        path.write_bytes(bytes(path.stat().st_size))

        with PromptCache(
            store=disk, identify=lambda model: fingerprint(), codec=TokenCodec()
        ) as cache:
            kv, rest = cache.fetch_nearest_cache(MODEL, list(range(210)))

            assert kv is not None
            assert (len(kv[0].tokens), len(rest)) == (100, 110)
            assert cache.last_fetch.num_tokens == 100
