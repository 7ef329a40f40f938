"""Any sequence of operations leaves a sound store that agrees with a dictionary."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from persist_cache.entry import Tier
from persist_cache.errors import StoreFullError
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.index import tree
from persist_cache.store.store import Store
from persist_cache.tokens import unpack_tokens
from tests import forge
from tests.fakes import Clock, blob_files, disk_usage, eager_gc, fetched, fingerprint, put

IMAGE = -(1 << 59) - 7
TOKENS = st.sampled_from([1, 2, IMAGE])
PROMPTS = st.lists(TOKENS, min_size=1, max_size=14)
TURNS = st.lists(TOKENS, min_size=1, max_size=4)
OTHER = 3
ANY = st.integers(0, 1 << 20)
MODELS = st.sampled_from(["w0", "w1"])
SMALL, LARGE = 700_000, 1 << 30
Key = tuple[str, tuple[int, ...]]
T = TypeVar("T", bound=Any)


@dataclass
class Known:
    """What the model knows of an entry."""

    id: str
    tier: Tier
    last_use: float
    checkpoint: bool
    pinned: bool = False
    expires: float | None = None


def is_prefix(short: Key, long: Key) -> bool:
    return short != long and short[0] == long[0] and long[1][: len(short[1])] == short[1]


def chosen(items: Iterable[T], which: int) -> list[T]:
    """One of the items, or nothing where there is none.

    What Hypothesis draws must not depend on them: how many pages the index takes, and so what a
    small budget leaves, differs a little from run to run.
    """
    ordered = sorted(items)
    return ordered[which % len(ordered) :][:1] if ordered else []


class StoreMachine(RuleBasedStateMachine):
    """`self.known` is the plain dictionary that the store has to agree with."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="persist-cache-"))
        self.clock = Clock()
        self.known: dict[Key, Known] = {}
        self.store: Store | None = None
        self.steps = 0
        # Hypothesis replays a test, and must then meet the same names in the same order.
        names = (hashlib.md5(str(n).encode()).hexdigest() for n in itertools.count())
        self.names = mock.patch("persist_cache.blobs.writer.new_name", side_effect=names)
        self.names.start()
        self.eager = contextlib.ExitStack()
        self.eager.enter_context(eager_gc())

    @initialize(
        max_bytes=st.sampled_from([SMALL, LARGE]), turns=st.lists(TURNS, min_size=2, max_size=4)
    )
    def open(self, max_bytes: int, turns: list[list[int]]) -> None:
        self.max_bytes = max_bytes
        self.reopen_store()
        # Else most steps would be done to an empty store.
        self.talk("w0", turns, complete=True, forks=[], idle=False)

    def reopen_store(self) -> None:
        if self.store is not None:
            self.store.close()
        self.store = Store.open(
            self.folder / "store",
            max_bytes=self.max_bytes,
            min_free_bytes=0,
            run_tokens=5,
            clock=self.clock,
        )

    @property
    def opened(self) -> Store:
        assert self.store is not None
        return self.store

    # ---- rules -------------------------------------------------------------------------------

    @rule(
        model=MODELS,
        tokens=PROMPTS,
        tier=st.sampled_from(Tier),
        complete=st.sampled_from([True, True, False]),
        pinned=st.sampled_from([False, False, False, True]),
    )
    def put_new(
        self, model: str, tokens: list[int], tier: Tier, complete: bool, pinned: bool
    ) -> None:
        self.do_put(model, tokens, tier, complete, pinned)

    @rule(
        which=ANY,
        cut=ANY,
        more=PROMPTS,
        tier=st.sampled_from(Tier),
        complete=st.booleans(),
    )
    def put_longer(self, which: int, cut: int, more: list[int], tier: Tier, complete: bool) -> None:
        for model, tokens in chosen(self.known, which):
            self.do_put(model, [*tokens[: cut % len(tokens) + 1], *more], tier, complete, False)

    @rule(
        model=MODELS,
        turns=st.lists(TURNS, min_size=3, max_size=8),
        complete=st.booleans(),
        forks=st.lists(st.tuples(ANY, st.sampled_from(Tier)), max_size=2),
        idle=st.booleans(),
    )
    def talk(
        self,
        model: str,
        turns: list[list[int]],
        complete: bool,
        forks: list[tuple[int, Tier]],
        idle: bool,
    ) -> None:
        """A conversation whose turns leave a chain of short runs, with replies beside it."""
        talked = [
            [token for turn in turns[:end] for token in turn] for end in range(1, len(turns) + 1)
        ]
        for tokens in talked:
            self.do_put(model, tokens, Tier.USER, complete, False)
        for which, tier in forks:
            tokens = talked[which % len(talked)]
            self.do_put(model, [*tokens[:-1], OTHER], tier, complete, False)
        if idle:
            self.opened.merge_runs()

    def do_put(
        self, model: str, tokens: list[int], tier: Tier, complete: bool, pinned: bool
    ) -> None:
        self.clock.advance(1)
        key = (model, tuple(tokens))
        before = self.ids()
        try:
            entry = put(
                self.opened, tokens, model=model, tier=tier, complete=complete, pinned=pinned
            )
        except StoreFullError:
            assert self.max_bytes == SMALL
            assert self.ids() == before, "a refused put evicts nothing"
            return
        old = self.known.pop(key, None)
        self.drop_evicted(before - self.ids(), extending=key)
        now = self.clock()
        if old is None:
            self.known[key] = Known(entry, tier, now, False, pinned)
        else:
            old.tier, old.last_use = max(old.tier, tier), now
            old.pinned |= pinned
            self.known[key] = old
        # Whether a state was needed depends on the rows that were there before.
        self.known[key].checkpoint = self.has_checkpoint(key)

    def has_checkpoint(self, key: Key) -> bool:
        with self.opened.read() as txn:
            record = txn.entry(int(self.known[key].id, 16))
        assert record is not None
        return record.checkpoint != 0

    @rule(model=MODELS, tokens=PROMPTS)
    def fetch_any(self, model: str, tokens: list[int]) -> None:
        self.clock.advance(1)
        match = self.opened.match(fingerprint_of(model), tokens)
        assert fetched(self.opened, tokens, model=model) == match.num_tokens
        best = max(
            (len(key[1]) for key in self.known if key == (model, tuple(tokens[: len(key[1])]))),
            default=0,
        )
        assert match.num_tokens >= best, "the longest entry that is a prefix is found"
        assert (match.num_tokens > 0) == bool(match.entries)
        self.opened.touch(match)
        self.opened.flush()
        by_id = {known.id: known for known in self.known.values()}
        for entry in match.entries:
            by_id[entry].last_use = self.clock()

    @rule(which=ANY)
    def evict_one(self, which: int) -> None:
        for key in chosen(self.known, which):
            self.opened.evict([self.known.pop(key).id])

    @rule(share=st.integers(0, 10))
    def evict_to(self, share: int) -> None:
        before = self.ids()
        limit = self.opened.stats().usage.total * share // 10
        self.opened.evict_to(limit)
        self.drop_evicted(before - self.ids(), extending=None)

    @rule(which=ANY, pinned=st.booleans())
    def pin(self, which: int, pinned: bool) -> None:
        for key in chosen(self.known, which):
            self.opened.pin(self.known[key].id, pinned)
            self.known[key].pinned = pinned

    @rule(which=ANY, seconds=st.sampled_from([None, 1.0, 3.0, 1000.0]))
    def expire_at(self, which: int, seconds: float | None) -> None:
        for key in chosen(self.known, which):
            known = self.known[key]
            known.expires = None if seconds is None else self.clock() + seconds
            self.opened.expire_at(known.id, known.expires)

    @rule()
    def collect(self) -> None:
        before = self.ids()
        collected = self.opened.gc()
        if not collected.without_room:
            with self.opened.read() as txn:
                living = sum(edge.rows for _, edge in txn.edges())
                assert living == sum(blob.num_tokens for _, blob in txn.blobs()), "dead rows stay"
        gone = before - self.ids()
        assert gone >= {
            known.id for known in self.known.values() if self.is_expired(known) and not known.pinned
        }
        self.drop_evicted(gone, extending=None)

    @rule(seconds=st.integers(0, 5))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule(which=ANY, where=ANY)
    def flip_a_byte(self, which: int, where: int) -> None:
        for path in chosen(blob_files(self.folder / "store"), which):
            with path.open("r+b") as file:
                place = where % path.stat().st_size
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 0x10]))
            assert [problem.kind for problem in self.opened.check(read_data=True)] == ["damaged"]
            self.lose(path.stem)

    @rule(which=ANY)
    def delete_a_blob(self, which: int) -> None:
        for path in chosen(blob_files(self.folder / "store"), which):
            path.unlink()
            assert [problem.kind for problem in self.opened.check()] == ["missing"]
            self.lose(path.stem)

    def lose(self, blob: str) -> None:
        """Repair, and accept the loss of just those entries that used `blob`."""
        users = self.users_of(blob)
        before = self.ids()
        self.opened.check(read_data=True, repair=True)
        assert before - self.ids() == users
        self.known = {key: known for key, known in self.known.items() if known.id not in users}

    def users_of(self, blob: str) -> set[str]:
        users = set()
        for (model, tokens), known in self.known.items():
            match = self.opened.match(fingerprint_of(model), tokens)
            with self.opened.read() as txn:
                record = txn.entry(int(known.id, 16))
                number = txn.blob_number(bytes.fromhex(blob))
            assert record is not None
            if blob in {run.blob for run in match.runs} or record.checkpoint == number:
                users.add(known.id)
        return users

    @rule()
    def reopen(self) -> None:
        self.reopen_store()

    @rule(how=st.sampled_from(["missing", "garbage", "repair"]))
    def rebuild(self, how: str) -> None:
        """A new index finds all that the old one found; it forgets pins and uses."""
        matches = {
            key: self.opened.match(fingerprint_of(key[0]), key[1]).num_tokens for key in self.known
        }
        data = self.folder / "store" / "data.mdb"
        if how == "repair":
            pinned = {known.id for known in self.known.values() if known.pinned}
            forge.change(self.opened, lambda txn: txn.add("blob_bytes", 1))
            assert [problem.kind for problem in self.opened.check()] == ["index"]
            self.opened.check(repair=True)
            assert all(entry.pinned for entry in self.opened.entries() if entry.id in pinned)
        else:
            self.opened.close()
            if how == "missing":
                data.unlink()
            else:
                data.write_bytes(b"garbage" * 5000)
            self.reopen_store()
        for key, num_tokens in matches.items():
            found = self.opened.match(fingerprint_of(key[0]), key[1]).num_tokens
            assert found >= num_tokens, "a rebuilt index finds no less"
        # Entries that end within a run have no file of their own, and tails may come back to life.
        self.known = {
            key: Known(
                entry.id,
                entry.tier,
                entry.last_use,
                False,
                entry.pinned,
                entry.expires,
            )
            for entry in self.opened.entries()
            for key in [self.key_of(entry.id)]
        }
        for key in self.known:
            self.known[key].checkpoint = self.has_checkpoint(key)

    def key_of(self, entry: str) -> Key:
        with self.opened.read() as txn:
            record = txn.entry(int(entry, 16))
            assert record is not None
            tokens = unpack_tokens(tree.tokens_of(txn, record.node))
            (namespace,) = (key for key, one in txn.namespaces() if one.number == record.namespace)
        (model,) = (m for m in ("w0", "w1") if fingerprint_of(m).digest == namespace[:32])
        return model, tuple(tokens)

    # ---- what must hold ----------------------------------------------------------------------

    def ids(self) -> set[str]:
        return {entry.id for entry in self.opened.entries()}

    def is_expired(self, known: Known) -> bool:
        return known.expires is not None and known.expires <= self.clock()

    def drop_evicted(self, gone: set[str], extending: Key | None) -> None:
        """What went must be the first entries in the order of eviction."""
        gone = set(gone)
        left = dict(self.known)
        for key, known in self.known.items():
            if known.id in gone and self.is_expired(known) and not known.pinned:
                gone.remove(known.id)
                del left[key]
        while gone:
            candidates = [
                (known.tier, int(known.last_use * 1e6), int(known.id, 16), key)
                for key, known in left.items()
                if not known.pinned
                and not (extending and (is_prefix(key, extending) or key == extending))
                and (known.checkpoint or not any(is_prefix(key, other) for other in left))
            ]
            assert candidates, f"{gone} went although nothing might"
            ranked = sorted(candidates)
            # Whatever keeps the path alive that is being extended is passed over.
            spared = [key for *_, key in ranked if left[key].id not in gone]
            first = next(key for *_, key in ranked if left[key].id in gone)
            before = [key for key in spared if ranked_before(ranked, key, first)]
            assert all(extending and shares_a_token(key, extending) for key in before), (
                f"{first} went before {before}"
            )
            gone.remove(left.pop(first).id)
        self.known = left

    @invariant()
    def it_is_sound(self) -> None:
        if self.store is None:
            return
        self.steps += 1
        assert self.store.check(read_data=self.steps % 5 == 0) == []

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        if self.store is None:
            return
        entries = {entry.id: entry for entry in self.store.entries()}
        assert set(entries) == {known.id for known in self.known.values()}
        for (model, tokens), known in self.known.items():
            entry = entries[known.id]
            assert entry.num_tokens == len(tokens)
            assert (entry.tier, entry.pinned, entry.expires) == (
                known.tier,
                known.pinned,
                known.expires,
            )
            if self.steps % 3 == 0:
                assert fetched(self.store, tokens, model=model) == len(tokens)

    @invariant()
    def it_keeps_to_the_budget(self) -> None:
        if self.store is None:
            return
        usage = self.store.stats().usage
        du = disk_usage(self.folder / "store")
        assert usage.total == du
        assert du <= self.max_bytes
        assert usage.blobs == sum(
            path.stat().st_blocks * 512 for path in blob_files(self.folder / "store")
        )
        assert os.listdir(self.folder / "store" / "tmp") == []

    def teardown(self) -> None:
        if self.store is not None:
            self.store.close()
        self.names.stop()
        self.eager.close()
        shutil.rmtree(self.folder)


def ranked_before(ranked: list[tuple[Tier, int, int, Key]], a: Key, b: Key) -> bool:
    keys = [key for *_, key in ranked]
    return keys.index(a) < keys.index(b)


def shares_a_token(key: Key, other: Key) -> bool:
    return key[0] == other[0] and key[1][:1] == other[1][:1]


def fingerprint_of(model: str) -> Fingerprint:
    return fingerprint(weights=model)


class LongStoreMachine(StoreMachine):
    """The same, tried twenty times as often."""


COMMON = settings(deadline=None, suppress_health_check=list(HealthCheck))
StoreMachine.TestCase.settings = settings(COMMON, max_examples=7, stateful_step_count=30)
LongStoreMachine.TestCase.settings = settings(COMMON, max_examples=140, stateful_step_count=50)
TestStoreMachine = StoreMachine.TestCase
TestStoreMachineLong = pytest.mark.long(LongStoreMachine.TestCase)
