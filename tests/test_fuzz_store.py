"""Nonsense in files and records: clear errors, no crash, no unbounded allocation, no escape."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from persist_cache.blobs.header import ALIGNMENT, seal
from persist_cache.blobs.reader import BlobReader
from persist_cache.bundle import export
from persist_cache.errors import CorruptBlobError, StoreError, StoreFormatError
from persist_cache.queries.details import details_of
from persist_cache.queries.totals import Survey
from persist_cache.store.store import Store
from persist_cache.tokens import TOKEN_BYTES
from tests import forge
from tests.examples import examples
from tests.fakes import Clock, blob_files, fetched, fingerprint, put
from tests.memory import fast_folder

BOUNDED = settings(
    max_examples=examples(40, 150),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TABLES = (
    "meta",
    "namespaces",
    "edges",
    "parents",
    "tokens",
    "blobs",
    "names",
    "entries",
    "recency",
    "expiry",
    "trash",
    "pending",
    "quarantine",
    "departed",
)
PROMPT = list(range(20))
U32 = st.integers(0, (1 << 32) - 1)
NUMBERS = st.one_of(st.integers(-3, 300), st.sampled_from([2**31, 2**53, 2**60, 2**63, -(2**60)]))
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.just("1" * 5000)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def good() -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder, and the header of a sound blob."""
    with fast_folder() as folder:
        with Store.open(folder / "store", min_free_bytes=0, run_tokens=8) as store:
            put(store, [1, 2, 3])
            (path,) = blob_files(store.root)
            raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        yield folder, json.loads(raw[8 : 8 + size])


def read(path: Path, header: bytes, data: bytes = b"") -> None:
    """Open a file with `header` as far as it goes; it may be refused, and nothing else."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    tracemalloc.start()
    try:
        with BlobReader(path) as reader:
            for info in reader.header.tensors.values():
                assert info.offset >= 0
                assert info.offset + info.nbytes <= reader.nbytes
            reader.verify()
    except (CorruptBlobError, StoreFormatError):
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 << 20, f"{peak} bytes for a file of {path.stat().st_size}"


@given(raw=st.binary(max_size=400))
@example(raw=b"{" * 300)
@example(raw=b"[" * 100_000)
@example(raw=b'{"__metadata__":' * 1000)
@BOUNDED
def test_any_bytes_as_a_header(good: tuple[Path, dict[str, Any]], raw: bytes) -> None:
    read(good[0] / "fuzz.safetensors", raw)


@given(size=st.integers(0, 2**64 - 1))
@example(size=1 << 60)
@BOUNDED
def test_any_claimed_length(good: tuple[Path, dict[str, Any]], size: int) -> None:
    path = good[0] / "fuzz.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + b"{}" * 50)

    if size != 100:
        with pytest.raises(CorruptBlobError):
            BlobReader(path)


@given(data=st.data())
@BOUNDED
def test_any_change_to_what_a_sealed_header_says(
    good: tuple[Path, dict[str, Any]], data: st.DataObject
) -> None:
    """Even a header whose seal fits is believed in nothing that its file contradicts."""
    folder, header = good
    table = json.loads(json.dumps(header))
    metadata = table["__metadata__"]
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(["metadata", "tensor", "more"]))
        if where == "metadata":
            name = data.draw(st.sampled_from(sorted(metadata)))
            metadata[name] = data.draw(
                st.one_of(
                    st.text(max_size=20),
                    st.sampled_from(
                        ["-1", "9" * 30, "1e999", "nan", "../../x", "{}", '{"tokens": 5}', "[]"]
                    ),
                )
            )
        elif where == "tensor":
            name = data.draw(st.sampled_from(["tokens", "layers.0.keys"]))
            field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            table[name] = {**table.get(name, {}), field: data.draw(VALUES)}
        else:
            table[data.draw(st.text(max_size=10))] = data.draw(VALUES)
    sealed = {name: value for name, value in table.items() if name != "__metadata__"}
    try:
        metadata["seal"] = seal(metadata, sealed)
    except (TypeError, msgspec.EncodeError, OverflowError):
        return
    raw = msgspec.json.encode({**sealed, "__metadata__": metadata})
    read(folder / "fuzz.safetensors", raw, b"\0" * 500)


def test_hundred_thousand_tensors_are_read_in_bounded_memory(
    good: tuple[Path, dict[str, Any]],
) -> None:
    folder, header = good
    metadata = dict(header["__metadata__"])
    table = {f"t{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)}
    metadata["seal"] = seal(metadata, table)
    raw = msgspec.json.encode({"__metadata__": metadata, **table})
    path = folder / "many.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)

    with pytest.raises(CorruptBlobError):
        BlobReader(path)


# ---- records of the index ------------------------------------------------------------------------


def scribble(store: Store, table: str, key: bytes | None, value: bytes) -> None:
    """Overwrite the record at or behind `key`, or add one."""

    def change(txn: Any) -> None:
        there = forge.records(txn, table.encode())
        where = there[0][0] if key is None and there else key
        forge.put(txn, table.encode(), where or b"\0" * 8, value)

    forge.change(store, change)


@given(data=st.data(), table=st.sampled_from(TABLES))
@settings(BOUNDED, max_examples=examples(15, 40))
def test_any_bytes_as_a_record(data: st.DataObject, table: str) -> None:
    """Nothing but announced errors, never other bytes than asked for, and a repair mends it."""
    with (
        fast_folder() as folder,
        Store.open(folder / "s", min_free_bytes=0, run_tokens=8, clock=Clock()) as store,
    ):
        put(store, PROMPT, tier="system")
        put(store, [*PROMPT[:9], 50, 51], complete=False, model="w1")
        key = data.draw(st.one_of(st.none(), st.binary(min_size=1, max_size=40)))
        value = data.draw(st.one_of(st.binary(max_size=90), st.just(b"")))
        if key is None and data.draw(st.booleans()):
            value = b"\x01" + value  # a version that is known
        scribble(store, table, key, value)

        for act in (
            lambda: fetched(store, PROMPT),
            lambda: fetched(store, [*PROMPT[:9], 50, 51, 52], model="w1"),
            lambda: store.entries(),
            lambda: store.stats(),
            lambda: put(store, [*PROMPT[:5], 77]),
            lambda: store.check(read_data=True),
            lambda: store.check(read_data=True, repair=True),
        ):
            with contextlib.suppress(StoreError):
                act()
        store.check(read_data=True, repair=True)
        assert store.check(read_data=True) == []
        assert fetched(store, PROMPT) in range(21)
        put(store, [5, 6, 7])
        assert fetched(store, [5, 6, 7]) == 3


KINDS = ("delete", "flip", "clear", "swap", "move", "repeat", "cut")
INJURIES = st.lists(
    st.tuples(st.sampled_from(TABLES[1:10]), st.sampled_from(KINDS), U32, U32),
    min_size=1,
    max_size=4,
)


def injure(txn: Any, table: str, kind: str, which: int, bit: int) -> None:
    """Do to a sound record what a bad disk, or a bug, may do to it."""
    name = table.encode()
    records = forge.records(txn, name)
    if not records:
        return

    def flipped(raw: bytes) -> bytes:
        place = bit % (8 * len(raw) or 1)
        return (int.from_bytes(raw, "little") ^ 1 << place).to_bytes(len(raw) + 1, "little")[:-1]

    key, value = records[which % len(records)]
    other, instead = records[bit % len(records)]
    if kind in ("delete", "move"):
        forge.delete(txn, name, key)
    if kind in ("move", "repeat"):
        forge.put(txn, name, flipped(key), value)
    if kind == "swap":
        forge.put(txn, name, other, value)
        forge.put(txn, name, key, instead)
    changed = {
        "flip": flipped(value),
        "clear": value[:1] + bytes(len(value))[1:],
        "cut": value[:-1],
    }
    if kind in changed:
        forge.put(txn, name, key, changed[kind])


ORDERS = st.permutations(range(9))


@given(injuries=INJURIES, order=ORDERS)
@settings(BOUNDED, max_examples=examples(20, 60))
def test_any_damage_to_sound_records(injuries: list[Any], order: list[int]) -> None:
    """As above; besides, whoever refuses to read an index sees `check` complain of it, too."""
    damage_and_mend(injuries, order)


@pytest.mark.long
@given(injuries=INJURIES, order=ORDERS)
@settings(BOUNDED, max_examples=examples(80, 400))
def test_any_damage_to_sound_records_at_length(injuries: list[Any], order: list[int]) -> None:
    damage_and_mend(injuries, order)


def damage_and_mend(injuries: list[Any], order: list[int]) -> None:
    talk = [*PROMPT, 30, 31]
    with (
        fast_folder() as folder,
        Store.open(folder / "s", min_free_bytes=0, run_tokens=8, clock=Clock()) as store,
    ):
        put(store, PROMPT, tier="system", expires=2e9)
        put(store, talk)
        put(store, [*PROMPT[:9], 50, 51], complete=False, label="a state")
        put(store, PROMPT, model="w1", pinned=True)
        ids = [entry.id for entry in store.entries()]

        def change(txn: Any) -> None:
            for injury in injuries:
                injure(txn, *injury)

        forge.change(store, change)
        problems = store.check()
        try:
            survey = Survey(store)
            survey.removal(survey.ids)
            totals = survey.by_tier, survey.by_model, survey.entries
            assert all(totals)
        except StoreError:
            assert problems

        acts = (
            lambda: fetched(store, [*talk, 99]),
            lambda: fetched(store, PROMPT, model="w1"),
            lambda: put(store, [*PROMPT[:5], 77]),
            lambda: [details_of(store, one) for one in ids],
            lambda: store.evict(ids[:2]),
            lambda: store.pin(ids[2]),
            lambda: export(store, ids[2:], folder / "bundle", force=True),
            lambda: store.gc(),
            lambda: store.merge_runs(),
        )
        for place in order:
            with contextlib.suppress(StoreError, KeyError):
                acts[place]()
        store.check(read_data=True, repair=True)
        assert store.check(read_data=True) == []
        assert fetched(store, talk) in range(23)


def test_index_that_confuses_prompts_serves_none_of_them(store: Store) -> None:
    """The index has no checksums: a bit in its tokens must not serve another prompt's KV."""
    put(store, PROMPT)
    asked = [PROMPT[0], 4711, *PROMPT[2:]]

    def confuse(txn: Any) -> None:
        number, _ = next(iter(txn.blobs()))
        packed = bytearray(txn.tokens(number, 0, 100))
        packed[TOKEN_BYTES : 2 * TOKEN_BYTES] = (4711).to_bytes(8, "little")
        txn.put_tokens(number, bytes(packed))

    forge.change(store, confuse)
    assert store.match(fingerprint(), asked).num_tokens > 2, "the index does say so"

    assert fetched(store, asked) == 1, "the first token is the same"
    assert fetched(store, PROMPT) == len(PROMPT)
    assert store.stats().counters.get("quarantined", 0) == 0


def test_blob_of_another_model_is_not_served(store: Store) -> None:
    put(store, PROMPT)
    put(store, PROMPT, model="w1")

    def swap(txn: Any) -> None:
        (one, first), (other, second), *_ = [
            item for item in txn.blobs() if item[1].start == 0 and item[1].num_tokens == 8
        ]
        txn.put_blob(one, first._replace(name=second.name, digest=second.digest))
        txn.put_blob(other, second._replace(name=first.name, digest=first.digest))

    forge.change(store, swap)

    def models(runs: Any, checkpoint: Any, num_tokens: int) -> set[str]:
        return {reader.header.fingerprint for reader, _ in runs}

    for model in (fingerprint(), fingerprint(weights="w1")):
        found = store.fetch(model, PROMPT, models)
        assert found is not None
        assert found[0] == {model.hex}
    assert store.check(read_data=True) == []


@given(name=st.text(max_size=60) | st.text("0123456789abcdef/.\n", min_size=31, max_size=33))
@example(name="../../../etc/passwd")
@example(name="/etc/passwd")
@example(name="0" * 32)
@BOUNDED
def test_no_name_leads_out_of_the_store(name: str) -> None:
    """Names of files come from 16 bytes in hex, so no record can spell a path."""
    from persist_cache.blobs.folder import SUFFIX, BlobFolder, is_blob_file

    root = Path("/store")
    if is_blob_file(name + SUFFIX):
        path = BlobFolder(root).path(name)
        assert path.resolve().is_relative_to(root)
        assert path.suffix == ".safetensors"
    assert ALIGNMENT == 16 * 1024


def test_parent_named_by_a_blob_is_only_looked_up(tmp_path: Path) -> None:
    """A header's `parent` is compared with names that a scan found; nothing is opened by it."""
    root = tmp_path / "store"
    with Store.open(root, min_free_bytes=0, run_tokens=8) as store:
        put(store, PROMPT)
    for path in blob_files(root):
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8 : 8 + size])
        metadata = table.pop("__metadata__")
        if metadata["parent"]:
            metadata["parent"] = "../../../../etc/passwd"
        metadata["seal"] = seal(metadata, table)
        new = msgspec.json.encode({"__metadata__": metadata, **table}).ljust(size)
        path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + size :])
    (root / "data.mdb").unlink()

    with Store.open(root, min_free_bytes=0, run_tokens=8) as store:
        assert fetched(store, PROMPT) == 8, "only the first run can prove where it belongs"


# ---- what the codec reads back -------------------------------------------------------------------


@given(text=st.one_of(st.text(max_size=60), VALUES.map(json.dumps)))
@example(text='[{"class": "os.system"}]')
@example(text='[{"class": "KVCache"}, {"class": "__import__", "scalars": {"x": 1}}]')
@example(text='[{"class": "CacheList", "members": [{"class": "eval"}]}]')
@example(text='[{"class": "RotatingKVCache", "scalars": {"max_size": 1152921504606846976}}]')
@BOUNDED
def test_any_layout_from_a_file_names_no_class_but_ours(text: str) -> None:
    """Classes are an allow-list: nothing is looked up in a module by a name from a file."""
    from persist_cache.blobs.layout import layout_leaves
    from persist_cache.tensors.layers import decode_layout, kind_named

    try:
        layouts = decode_layout(text)
    except (ValueError, msgspec.MsgspecError):
        return
    for _, layout in layout_leaves(layouts):
        cls = kind_named(layout.class_name).cls
        assert (cls.__name__, cls.__module__) == (layout.class_name, "mlx_lm.models.cache")
