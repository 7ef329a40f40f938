"""Threads on one `PromptCache`: whatever they do at once, what is fetched is the prompt's.

Caches are arrays whose every row tells the tokens before it and the model that computed it, so
each fetch is checked by itself: the length and `rest` make up the prompt, and the rows are right.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from persist_cache.cache.prompt_cache import PromptCache
from persist_cache.codec import Blob, Payload, Tensor
from persist_cache.errors import CorruptBlobError
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.store.store import Store
from persist_cache.store.trail import Trail
from tests.fakes import fingerprint
from tests.torture import broken

MODEL = ("model", None, None)
_SWITCH_S = 1e-5
_EPISODE_S = 0.6
_WORKERS = 4
_MODELS = 3


def rows_of(tokens: Sequence[int], model: int) -> np.ndarray:
    """One row for each token; it depends on all tokens up to there, and on the model."""
    return np.cumsum(np.asarray(tokens, dtype=np.int64)) * 64 + model


class Layer:
    """A KV cache; `complete` when any prefix of it can be had by trimming."""

    def __init__(self, rows: np.ndarray, *, complete: bool) -> None:
        self.rows = rows
        self.complete = complete

    def append(self, tokens: Sequence[int], model: int) -> None:
        """Compute on, as a model does: from what is there, right or wrong."""
        before = int(self.rows[-1]) // 64 if len(self.rows) else 0
        more = rows_of([before, *tokens], model)[1:]
        self.rows = np.concatenate([self.rows, more])


@dataclass
class _Source:
    rows_: np.ndarray
    complete: bool
    layout: str = '{"torture":1}'

    def rows(self, start: int, end: int) -> Payload:
        return Payload([_tensor("rows", self.rows_[start:end])])

    def checkpoint(self) -> Payload | None:
        return None if self.complete else Payload([_tensor("state", self.rows_)])


def _tensor(name: str, rows: np.ndarray) -> Tensor:
    data = np.ascontiguousarray(rows)
    return Tensor(name, "I64", (1, 1, len(data), 1), [data.data.cast("B")])


class Codec:
    """The contract of `persist_cache.tensors`, for lists of one `Layer`."""

    def group_size(self) -> int:
        return 1

    def prepare(self, cache: Sequence[Layer], num_tokens: int) -> int:
        return min(num_tokens, len(cache[0].rows))

    def source(self, cache: Sequence[Layer], num_tokens: int) -> _Source:
        return _Source(cache[0].rows[:num_tokens], cache[0].complete)

    def restore(
        self,
        runs: Sequence[tuple[Blob, int]],
        checkpoint: Blob | None,
        num_tokens: int,
    ) -> list[Layer]:
        if checkpoint is not None:
            return [Layer(_read(checkpoint, "state"), complete=False)]
        rows = np.concatenate([_read(reader, "rows")[:used] for reader, used in runs])
        if len(rows) != num_tokens:
            raise CorruptBlobError(runs[-1][0].path, "its rows do not cover the match")
        return [Layer(rows, complete=True)]

    def can_trim(self, cache: Sequence[Layer]) -> bool:
        return cache[0].complete

    def trim(self, cache: Sequence[Layer], num_tokens: int) -> int:
        layer = cache[0]
        layer.rows = layer.rows[: len(layer.rows) - num_tokens]
        return num_tokens

    def nbytes(self, cache: Sequence[Layer]) -> int:
        return cache[0].rows.nbytes

    def copy_cache(self, cache: Sequence[Layer]) -> list[Layer]:
        return [Layer(cache[0].rows.copy(), complete=cache[0].complete)]

    def num_tokens(self, cache: Sequence[Layer]) -> int | None:
        return len(cache[0].rows)

    def witness(self, cache: Sequence[Layer]) -> _Witness:
        return _Witness(cache[0].rows)


@dataclass(frozen=True)
class _Witness:
    """Tells whether a cache still has the array that it was handed over with."""

    rows: np.ndarray

    def fits(self, cache: Sequence[Layer]) -> bool:
        return cache[0].rows is self.rows


def _read(reader: Blob, name: str) -> np.ndarray:
    data = np.empty(reader.header.tensors[name].shape, dtype=np.int64)
    reader.read(name, [data.data.cast("B")])
    return data.reshape(-1)


@dataclass
class Checked:
    """Sums over the episodes."""

    episodes: int = 0
    fetches: int = 0
    served: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


class Loaded:
    """The model in memory, and what an `Identifier` would say of it.

    Thread safety: may be shared; `_turn` guards it.
    """

    def __init__(self, *, identified: bool) -> None:
        self.number = 0
        self._identified = identified
        self.loads = 0
        self._turn = threading.Condition()
        self._computing = 0
        self._wanted = False

    def __call__(self, model: Any) -> Fingerprint | None:
        return fingerprint(weights=f"w{self.number}") if self._identified else None

    def reason(self, model: Any) -> str:
        return "" if self._identified else "nobody knows it"

    def settled(self, model: Any) -> Fingerprint | None:
        return self(model)

    def load_number(self, model: Any) -> int:
        return self.loads

    @contextlib.contextmanager
    def computing(self) -> Iterator[tuple[int, int]]:
        """Hold the model for a request; gives its number, and that of its load."""
        with self._turn:
            self._turn.wait_for(lambda: not self._wanted)
            self._computing += 1
            held = self.number, self.loads
        try:
            yield held
        finally:
            with self._turn:
                self._computing -= 1
                self._turn.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody computes; new requests wait until this ends."""
        with self._turn:
            self._turn.wait_for(lambda: not self._wanted)
            self._wanted = True
            self._turn.wait_for(lambda: self._computing == 0)
        try:
            yield
        finally:
            with self._turn:
                self._wanted = False
                self._turn.notify_all()

    def replace(self, number: int) -> None:
        """Load another model under the same name."""
        with self._turn:
            self.loads += 1
            self.number = number
            self.loads += 1


class Episode:
    """One store, a few caches over it one after the other, and all threads."""

    def __init__(self, folder: Path, seed: int, checked: Checked) -> None:
        self._folder = folder
        self._seed = seed
        self._dice = random.Random(seed)
        self._checked = checked
        self._lock = threading.Lock()
        self._loaded = Loaded(identified=self._dice.random() < 0.8)
        self._end = 0.0
        self._max_size = self._dice.choice((2, 5, 20))
        self._complete = self._dice.choice((1.0, 1.0, 0.5, 0.0))
        self._on_disk = self._dice.random() < 0.5
        self._store: Store | None = None
        self._inserted: Layer | None = None
        self._cache: PromptCache

    def run(self, seconds: float) -> None:
        """All threads, for so long."""
        before = sys.getswitchinterval()
        with contextlib.ExitStack() as opened:
            if self._on_disk:
                self._store = opened.enter_context(
                    Store.open(self._folder, min_free_bytes=0, run_tokens=16)
                )
            self._cache = self._made()
            self._end = time.monotonic() + seconds
            steps = [*[self._serve] * _WORKERS, self._tidy, self._change, self._meddle]
            threads = [
                threading.Thread(target=self._guarded, args=(step, self._seed * 100 + number))
                for number, step in enumerate(steps)
            ]
            sys.setswitchinterval(_SWITCH_S)
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            finally:
                sys.setswitchinterval(before)
            self._cache.close()
            self._read_back()
        self._checked.episodes += 1

    def _made(self) -> PromptCache:
        return PromptCache(
            self._max_size,
            store=self._store,
            identify=self._loaded,
            codec=Codec(),
            leave_tokens=self._dice.choice((0, 1)),
            idle_s=self._dice.choice((0.01, 60.0)),
        )

    def _guarded(self, step: Callable[[random.Random], None], seed: int) -> None:
        dice = random.Random(seed)
        while time.monotonic() < self._end and len(self._checked.findings) < 5:
            try:
                step(dice)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                self._find(f"{error!r} came out of {where.name}")

    def _find(self, finding: str) -> None:
        with self._lock:
            self._checked.findings.append(f"threads, seed {self._seed}: {finding}")

    def _count(self, what: str) -> None:
        with self._lock:
            self._checked.calls[what] += 1

    def _read_back(self) -> None:
        """What is on the disk now is served to the next process."""
        dice = random.Random(self._seed)
        self._cache = self._made()
        for number in range(_MODELS):
            self._loaded.replace(number)
            for _ in range(20):
                prompt = self._prompt(dice)
                kv, rest = self._cache.fetch_nearest_cache(MODEL, prompt)
                self._verified(kv, list(rest), prompt, number)
        self._cache.close()
        if self._store is not None:
            for problem in self._store.check(read_data=True):
                self._find(f"check: {problem}")

    # ---- threads -----------------------------------------------------------------------------

    def _prompt(self, dice: random.Random) -> list[int]:
        """Prompts that share beginnings of all lengths."""
        talk = random.Random(dice.randrange(3))
        tokens = [talk.randrange(1, 1000) for _ in range(40)]
        kept = dice.randrange(1, 40)
        fork = random.Random(dice.randrange(4))
        return [*tokens[:kept], *(fork.randrange(1, 1000) for _ in range(dice.randrange(12)))]

    def _serve(self, dice: random.Random) -> None:
        """A request: look up, compute the rest, hand over; sometimes it is aborted."""
        prompt = self._prompt(dice)
        with self._loaded.computing() as (model, loads):
            cache = self._cache  # another one would not know what was asked of this one
            trail = Trail()
            if len(prompt) % 2:
                # As a server does; others commit in between, and weights may be replaced.
                cache.read_ahead(MODEL, prompt, trail=trail)
                cache.branch_point(MODEL, prompt, trail=trail)
            kv, rest, _ = cache.look_up(MODEL, prompt, trail=trail)
            if self._loaded.loads != loads:
                return  # loaded in between: who knows which model was asked for
            layer = self._verified(kv, list(rest), prompt, model)
            if dice.random() < 0.1:
                return
            first = dice.randrange(len(rest)) if len(rest) > 1 and dice.random() < 0.3 else 0
            if first:
                layer.append(rest[:first], model)
                begun = prompt[: len(prompt) - len(rest) + first]
                copied = Layer(layer.rows.copy(), complete=layer.complete)
                cache.insert_cache(MODEL, begun, [copied], cache_type="system")
            layer.append(rest[first:], model)
            tier = dice.choice(("system", "user", *["assistant"] * 6))
            cache.insert_cache(MODEL, prompt, [layer], cache_type=tier)
            if dice.random() < 0.1:
                self._inserted = layer

    def _verified(
        self, kv: list[Layer] | None, rest: list[int], prompt: list[int], model: int
    ) -> Layer:
        """What was fetched, or right rows in its place once it was found to be wrong."""
        used = len(prompt) - len(rest)
        with self._lock:
            self._checked.fetches += 1
            self._checked.served["a cache" if kv is not None else "nothing"] += 1
        right = rows_of(prompt[:used], model)
        complete = random.Random(sum(prompt)).random() < self._complete
        if kv is None:
            if used:
                self._find(f"no cache, and {used} of {len(prompt)} tokens are said to be in it")
            return Layer(rows_of([], model), complete=complete)
        layer = kv[0]
        if rest != prompt[used:]:
            self._find("what is left to compute is not the end of the prompt")
        elif len(layer.rows) != used:
            self._find(f"the cache has {len(layer.rows)} tokens, {used} are said to be in it")
        elif not np.array_equal(layer.rows, right):
            other = bool(np.any(layer.rows % 64 != model))
            self._find("rows of another " + ("model" if other else "prompt") + " were handed out")
        else:
            return layer
        return Layer(right, complete=complete)

    def _tidy(self, dice: random.Random) -> None:
        """What a server does beside its requests, now and then a restart."""
        what = dice.choice(("trim", "trim", "flush", "look", "look", "restart"))
        prompt = self._prompt(dice)
        if what == "trim":
            self._cache.trim_to(n_sequences=dice.randrange(4))
        elif what == "flush":
            self._cache.flush(0.05)
        elif what == "look":
            known = self._cache.known_tokens(MODEL, prompt)
            branch = self._cache.branch_point(MODEL, prompt)
            self._cache.read_ahead(MODEL, prompt)
            self._cache.stats()
            if not (0 <= known <= len(prompt) and 0 <= branch <= len(prompt)):
                self._find(f"{known} and {branch} of {len(prompt)} tokens are said to be known")
        elif dice.random() < 0.2:
            before, self._cache = self._cache, self._made()
            before.close()
        self._count(what)
        threading.Event().wait(dice.choice((0.0, 0.002)))

    def _change(self, dice: random.Random) -> None:
        """Another model under the same name, and soon the first one again."""
        threading.Event().wait(dice.choice((0.001, 0.01, 0.03)))
        with self._loaded.alone() if dice.random() < 0.7 else contextlib.nullcontext():
            self._loaded.replace(dice.randrange(_MODELS))
        self._count("model replaced")

    def _meddle(self, dice: random.Random) -> None:
        """A caller cuts a cache that is no longer his, and computes other tokens to its length."""
        threading.Event().wait(dice.choice((0.001, 0.01)))
        layer, self._inserted = self._inserted, None
        if layer is None or len(layer.rows) < 2:
            return
        with self._loaded.alone():
            kept = dice.randrange(len(layer.rows))
            others = [dice.randrange(1000, 2000) for _ in range(len(layer.rows) - kept)]
            changed = Layer(layer.rows[:kept], complete=layer.complete)
            changed.append(others, self._loaded.number)
            layer.rows = changed.rows
        self._count("cache refilled by its former owner")


def run(folder: Path, seed: int, seconds: float, breaks: str = "") -> Checked:
    """Episodes for so long, each with a store of its own; a broken build's end with a finding."""
    broken.install(breaks)
    checked = Checked()
    end = time.monotonic() + seconds
    number = 0
    while (left := end - time.monotonic()) > 0 and not (breaks and checked.findings):
        number += 1
        Episode(folder / f"store-{number}", seed * 1000 + number, checked).run(
            min(_EPISODE_S, left)
        )
        if len(checked.findings) >= 5:
            break
    return checked
