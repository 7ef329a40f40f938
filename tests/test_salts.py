"""Requests of different salts never meet: what one finds does not depend on the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persist_cache import PromptCache, Store
from persist_cache.cache.origin import Origin
from persist_cache.fingerprint.value import Fingerprint, salt_digest
from persist_cache.index.transaction import Reader
from persist_cache.queries.explain import explain
from tests.fakes import Clock
from tests.live_fakes import FakeCodec, FakeLayer

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=12)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["", "x", "y"]),
        st.sampled_from(["m1", "m2"]),
        TOKENS,
        st.booleans(),
    ),
    min_size=1,
    max_size=20,
)


def identify(model: Any) -> Fingerprint:
    return Fingerprint.from_fields({"weights": "w", "kv_bits": model}, {"name": "model"})


@contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """How often each look-up of the index is called."""
    counts: Counter[str] = Counter()
    names = ("namespaces", "relatives", "edge", "children", "entry", "blob", "tokens", "counter")
    before = {name: getattr(Reader, name) for name in names}

    def counting(name: str) -> Any:
        def look(self: Reader, *args: Any, **options: Any) -> Any:
            found = before[name](self, *args, **options)
            counts[name] += len(found) if name in ("namespaces", "relatives") else 1
            return found

        return look

    for name in names:
        setattr(Reader, name, counting(name))
    try:
        yield counts
    finally:
        for name, look in before.items():
            setattr(Reader, name, look)


def told(folder: Path, steps: list[tuple[str, str, list[int], bool]], whose: str) -> list[Any]:
    """What the requests of one salt get, while all of these are made."""
    found: list[Any] = []
    with (
        Store.open(folder, min_free_bytes=0, clock=Clock()) as store,
        PromptCache(
            1000, store=store, identify=identify, leave_tokens=1, codec=FakeCodec(), idle_s=3600
        ) as cache,
    ):
        for salt, model, tokens, restarts in steps:
            origin = Origin(salt=salt_digest(salt))
            match_counts: Counter[str] = Counter()
            if salt == whose:
                salted = identify(model).salted(origin.salt)
                with counted_reads() as match_counts:
                    match = store.match(salted, tokens)
                found += [match.num_tokens, match.why, match.reason, dict(match_counts)]
                found.append(explain(store, salted, tokens).message)
            known = cache.known_tokens(model, tokens, salt=origin.salt)
            held, rest, fetch = cache.look_up(model, tokens, origin=origin)
            if salt == whose:
                found += [known, len(rest), fetch.num_tokens, fetch.reason, fetch.why]
            if held is not None:
                assert held[0].weights == (salt or "none")  # whose KV it is
            done = [FakeLayer(tokens, weights=salt or "none")]
            cache.insert_cache(model, tokens, done, cache_type="user", origin=origin)
            cache.flush()  # what the disk has is not to depend on how fast it is
            if restarts:
                cache.trim_to(n_sequences=0)
    return found


@settings(max_examples=12)
@given(steps=STEPS)
def test_what_one_salt_gets_is_independent_of_all_others(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, list[int], bool]]
) -> None:
    for whose in ("", "x", "y"):
        folder = tmp_path_factory.mktemp("salts")
        alone = [
            (salt, model, tokens, restarts) if salt == whose else None
            for salt, model, tokens, restarts in steps
        ]
        assert told(folder / "all", steps, whose) == told(
            folder / "alone", [one for one in alone if one is not None], whose
        )
