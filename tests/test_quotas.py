"""Quotas of models and salts: never exceeded, and nothing else is evicted for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persist_cache import Store
from persist_cache.errors import StoreFullError
from persist_cache.fingerprint.value import Fingerprint, salt_digest
from tests.fakes import Clock, FakeSource

MB = 1 << 20


def identity(model: str, salt: str = "") -> Fingerprint:
    fields = {"weights": model, "config": "c0"}
    return Fingerprint.from_fields(fields, {"name": f"org/{model}"}).salted(salt_digest(salt))


def put(store: Store, model: str, salt: str, tokens: list[int], **options: object) -> None:
    source = FakeSource(tokens, complete=True, has_state=True, real=False)
    store.put(identity(model, salt), tokens, source, **options)  # type: ignore[arg-type]


def taken(folder: Path, store: Store) -> dict[tuple[str, str], int]:
    """What the files of each model and salt take, by what the files themselves say."""
    found: dict[tuple[str, str], int] = {}
    for path in folder.glob("blobs/*/*.safetensors"):
        with store.open_blob(path.stem) as reader:
            said = Fingerprint.from_json(reader.header.identity.encode())
        key = (said.info["name"], said.fields.get("cache_salt", ""))
        found[key] = found.get(key, 0) + path.stat().st_blocks * 512
    return found


def opened(path: Path, **options: object) -> Store:
    return Store.open(path, min_free_bytes=0, clock=Clock(), **options)  # type: ignore[arg-type]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b"]),
        st.sampled_from(["", "x", "y"]),
        st.integers(0, 3),
        st.integers(1, 120),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=15)
@given(steps=STEPS)
def test_no_model_and_no_salt_takes_more_than_its_quota(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("quota") / "store"
    x = salt_digest("x")
    quotas = {"model:a": 160 << 10, "salt": 120 << 10, f"salt:{x}": 80 << 10}
    with opened(folder, quotas=quotas) as store:
        for model, salt, head, length in steps:
            tokens = [head, *range(100 * length, 101 * length)]
            try:
                put(store, model, salt, tokens)
            except StoreFullError:
                continue
            files = taken(folder, store)
            assert sum(n for (name, _), n in files.items() if name == "org/a") <= 160 << 10
            for salted in (salt_digest("x"), salt_digest("y")):
                own = sum(n for (_, one), n in files.items() if one == salted)
                assert own <= (80 if salted == x else 120) << 10
            for one in store.stats().quotas:
                assert one.nbytes <= one.max_bytes
        assert store.check() == []


def test_room_within_a_quota_is_made_among_what_it_bounds(tmp_path: Path) -> None:
    with opened(tmp_path / "store", quotas={"model:a": 100 << 10}) as store:
        for number in range(12):
            put(store, "b", "", [number, 1, 2])
        for number in range(12):
            put(store, "a", "", [number, 1, 2])

        found = [one.fingerprint for one in store.entries()]

        assert found.count(identity("b").hex) == 12
        assert 0 < found.count(identity("a").hex) < 12


def test_what_is_larger_than_its_quota_is_refused_and_evicts_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "store", quotas={"model": 100 << 10}) as store:
        put(store, "a", "", [1, 2, 3])
        before = store.entries()

        with pytest.raises(StoreFullError, match="quota of the model org/a"):
            put(store, "a", "", list(range(5_000)))

        assert store.entries() == before


def test_pinned_entries_stay_and_the_sentence_says_what_helps(tmp_path: Path) -> None:
    with opened(tmp_path / "store", quotas={"salt": 100 << 10}) as store:
        for number in range(3):
            put(store, "a", "s", [number], pinned=True)

        with pytest.raises(StoreFullError, match="raise the quota"):
            put(store, "a", "s", list(range(9_000, 9_900)), pinned=True)


def test_quotas_are_remembered_and_end_when_told_so(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with opened(path, quotas={"model": 100 << 10}):
        pass
    with opened(path) as store:
        assert store.quotas == {"model": 100 << 10}
    with opened(path, quotas={}) as store:
        assert store.quotas == {}


def test_a_smaller_quota_is_applied_at_once(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with opened(path) as store:
        for number in range(20):
            put(store, "a", "", [number])

    with opened(path, quotas={"model:a": 100 << 10}) as store:
        assert sum(taken(path, store).values()) <= 100 << 10


def test_a_store_that_knows_nothing_of_namespaces_is_counted(tmp_path: Path) -> None:
    from tests import forge

    path = tmp_path / "store"
    with opened(path) as store:
        for number in range(6):
            put(store, "a", "", [number])
            put(store, "b", "s", [number], tier="system")
        forge.change(store, lambda txn: txn.forget_spaces())  # as earlier versions leave it

    with opened(path, quotas={"model:a": MB}) as store:
        (used,) = store.stats().quotas
        assert used.nbytes == taken(path, store)["org/a", ""]


@pytest.mark.parametrize("rule", ["", "tier", "assistant", "model:", "salt:", "other:x"])
def test_a_rule_about_nothing_is_refused(tmp_path: Path, rule: str) -> None:
    with pytest.raises(ValueError, match="is not one of"):
        opened(tmp_path / "store", quotas={rule: 5})


def test_a_quota_that_is_nearly_used_up_is_told(tmp_path: Path) -> None:
    with opened(tmp_path / "store", quotas={"model": 100 << 10}) as store:
        assert store.stats().quotas == ()
        for number in range(10):
            put(store, "a", "", [number])

        (used,) = store.stats().quotas

        assert (used.kind, used.name) == ("model", "org/a")
        assert used.nbytes / used.max_bytes > 0.5
