"""The documents are true.

`tests.reader` reads a store by docs/format.md alone, with none of the library's own code. What it
finds is compared with what `Store` says.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
import xxhash
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from persist_cache import Fingerprint, Store, tensors
from persist_cache.filenames import TOKEN_FILE
from persist_cache_cli.demo.openblas import preload_env
from tests.fakes import any_dead_rows
from tests.reader import (
    TIERS,
    Blob,
    FormatReader,
    canonical,
    pack,
    pack_texts,
    unpack,
    xxh3_128,
)
from tests.tiny_caches import Layer, Spec, feed, new_cache
from tests.tiny_models import build_model_dir

ROOT = Path(__file__).resolve().parent.parent
STORE = (ROOT / "docs" / "store.md").read_text(encoding="utf-8")
LIBRARY = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
FORMAT = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")


def live_rows(array: Any, first: int, last: int) -> np.ndarray:
    """The same of a live cache's array."""
    rows: Any = mx.contiguous(array[:, :, first:last])
    mx.eval(rows)
    raw = bytes(memoryview(rows).cast("B"))
    return np.frombuffer(raw, np.uint8).reshape(*rows.shape[:3], -1)


# ---- a store with a little of everything ---------------------------------------------------------

NOW = 1_790_000_000.25
IMAGE = -(1 << 60) + 7
SYSTEM = [*range(100, 129), IMAGE]
FIRST = [*SYSTEM, *range(200, 221)]
SECOND = [*SYSTEM[:20], *range(300, 316)]
ROWS: tuple[Spec, ...] = (
    Layer(KVCache),
    Layer(KVCache, heads=1, lag=1),
    Layer(
        lambda: QuantizedKVCache(group_size=32, bits=8), key_dim=64, value_dim=32, dtype=mx.float32
    ),
)
MIXED: tuple[Spec, ...] = (
    Layer(KVCache),
    Layer(lambda: RotatingKVCache(24)),
    Layer(lambda: ChunkedKVCache(16)),
    Layer(lambda: ArraysCache(3)),
    (Layer(KVCache), Layer(lambda: RotatingKVCache(64, 4))),
)
PLAIN_MODEL = Fingerprint.from_fields({"weights": "w", "name": 'é"\n\x01'}, {"name": "plain"})
MIXED_MODEL = Fingerprint.from_fields({"weights": "x", "draft": None, "scale": 0.5, "moe": True})


@dataclass
class Sample:
    """A closed store, and the live caches that it was made from."""

    root: Path
    caches: dict[str, list[Any]]
    entries: list[Any]
    matches: list[tuple[Fingerprint, list[int], int, Any]]


def put(store: Store, model: Fingerprint, tokens: list[int], cache: list[Any], tier: str) -> str:
    length = tensors.prepare(cache, len(tokens))
    assert length == len(tokens)
    entry = store.put(model, tokens, tensors.source(cache, length), tier=tier, prefill_s=1.5).entry
    assert entry is not None
    return entry


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    root = tmp_path_factory.mktemp("format") / "store"
    caches: dict[str, list[Any]] = {}
    with Store.open(
        root, max_bytes=1 << 30, min_free_bytes=0, run_tokens=16, clock=lambda: NOW
    ) as store:
        plain = new_cache(ROWS)
        feed(plain, ROWS, 30, seed=1)
        caches["system"] = copy.deepcopy(plain)
        second = copy.deepcopy(plain)
        feed(plain, ROWS, 21, seed=2)
        caches["first"] = copy.deepcopy(plain)
        tensors.trim(second, 10)
        feed(second, ROWS, 16, seed=3)
        caches["second"] = copy.deepcopy(second)
        system = put(store, PLAIN_MODEL, SYSTEM, caches["system"], "system")
        longer = put(store, PLAIN_MODEL, [*FIRST, *range(7)], _longer(plain, 7), "user")
        put(store, PLAIN_MODEL, FIRST, caches["first"], "assistant")
        put(store, PLAIN_MODEL, SECOND, caches["second"], "user")
        gone = put(store, PLAIN_MODEL, [9, 8, 7], _short(3), "assistant")
        mixed = new_cache(MIXED)
        feed(mixed, MIXED, 20, seed=4)
        caches["mixed-20"] = copy.deepcopy(mixed)
        put(store, MIXED_MODEL, FIRST[:20], caches["mixed-20"], "system")
        for seed in range(5, 9):
            feed(mixed, MIXED, 5, seed=seed)
        caches["mixed-40"] = mixed
        put(store, MIXED_MODEL, FIRST[:40], mixed, "user")
        store.pin(system)
        store.set_label(system, "Grüße")
        store.expire_at(system, NOW + 60)
        store.evict([gone, longer])
        with mock.patch("persist_cache.store.compact.is_mostly_dead", any_dead_rows):
            assert store.gc().compacted == 1
        store.touch(store.match(PLAIN_MODEL, [*FIRST, 1]))
        matches = [
            (model, prompt, limit, store.match(model, prompt, limit=limit))
            for model in (PLAIN_MODEL, MIXED_MODEL)
            for prompt in ([*FIRST, 1], SECOND, FIRST[:45], SYSTEM[:7], [5], [])
            for limit in (len(prompt), 25)
        ]
        store.flush()
        assert store.check(read_data=True) == []
        entries = store.entries()
    return Sample(root, caches, entries, matches)


def _longer(cache: list[Any], num_tokens: int) -> list[Any]:
    cache = copy.deepcopy(cache)
    feed(cache, ROWS, num_tokens, seed=10)
    return cache


def _short(num_tokens: int) -> list[Any]:
    cache = new_cache(ROWS)
    feed(cache, ROWS, num_tokens, seed=9)
    return cache


def blob_paths(root: Path) -> Iterator[Path]:
    return (root / "blobs").glob("??/*.safetensors")


# ---- docs/format.md ------------------------------------------------------------------------------


def test_a_second_implementation_reads_every_blob(sample: Sample) -> None:
    blobs = [Blob.read(path) for path in blob_paths(sample.root)]

    (anew,) = (blob.metadata for blob in blobs if "replaces" in blob.metadata)
    assert re.fullmatch("[0-9a-f]{32}", anew["replaces"])
    assert (anew["end"], anew["entry"], anew["tier"]) == (str(len(FIRST)), "1", "assistant")
    assert {blob.metadata["kind"] for blob in blobs} == {"run", "checkpoint"}
    for blob in blobs:
        identity = json.loads(blob.metadata["identity"])
        texts = [text for item in sorted(identity["fields"].items()) for text in item]
        digest = hashlib.blake2b(
            pack_texts(texts), digest_size=32, person=b"persist-cache.fp"
        ).hexdigest()
        assert blob.metadata["fingerprint"] == digest
        assert digest in (PLAIN_MODEL.hex, MIXED_MODEL.hex)
        layout = json.loads(blob.metadata["layout"])
        assert canonical(layout).decode() == blob.metadata["layout"]
        prompt = FIRST
        if blob.metadata["kind"] == "run":
            assert next(iter(blob.data)) == "tokens"
            if pack(prompt[blob.start : blob.end]) != blob.data["tokens"]:
                prompt = SECOND
            assert pack(prompt[blob.start : blob.end]) == blob.data["tokens"]
            assert blob.metadata["detail"] == "{}"
        else:
            assert blob.start == blob.end
            assert blob.metadata["complete"] == "0"
        assert blob.metadata["prefix"] == xxh3_128(pack(prompt[: blob.start]))
        assert bool(blob.metadata["parent"]) == (blob.start > 0)
        assert float(blob.metadata["created"]) == NOW


def test_a_second_implementation_finds_what_match_finds(sample: Sample) -> None:
    reader = FormatReader(sample.root)

    for model, prompt, limit, match in sample.matches:
        keys = [key for key in reader.namespaces() if key[:32] == model.digest]
        found = max(
            (reader.find(key, prompt, limit) for key in keys),
            key=lambda one: (one.num_tokens, one.common),
        )
        assert found.num_tokens == match.num_tokens
        assert found.common == match.common_tokens
        assert found.runs == [(run.blob, run.num_tokens) for run in match.runs]
        assert found.checkpoint == match.checkpoint
    assert {match.num_tokens for *_, match in sample.matches} >= {0, 7, 20, 25, 36, 45, 51}


@pytest.mark.parametrize(
    ("name", "prompt", "model"),
    [
        ("system", SYSTEM, PLAIN_MODEL),
        ("first", FIRST, PLAIN_MODEL),
        ("second", SECOND, PLAIN_MODEL),
        ("mixed-20", FIRST[:20], MIXED_MODEL),
        ("mixed-40", FIRST[:40], MIXED_MODEL),
    ],
)
def test_a_second_implementation_restores_the_same_bytes(
    sample: Sample, name: str, prompt: list[int], model: Fingerprint
) -> None:
    reader = FormatReader(sample.root)
    (key,) = [key for key in reader.namespaces() if key[:32] == model.digest]
    found = reader.find(key, prompt, len(prompt))
    states = {}
    if found.checkpoint is not None:
        states = json.loads(reader.blob(found.checkpoint).metadata["detail"])["states"]

    assert found.num_tokens == len(prompt)
    for place, layer in _places(sample.caches[name]):
        state = states.get(place)
        if isinstance(layer, ArraysCache):
            assert found.checkpoint is not None
            blob = reader.blob(found.checkpoint)
            slots = {slot: a for slot, a in enumerate(layer.cache) if a is not None}
            prefix = f"layers.{place}.state."
            assert {one for one in blob.data if one.startswith(prefix)} == {
                f"{prefix}{slot}" for slot in slots
            }
            for slot, array in slots.items():
                assert blob.data[f"{prefix}{slot}"] == bytes(memoryview(array).cast("B"))
            continue
        first, last = (0, layer.offset) if state is None else _state_rows(layer, state)
        for buffer, array in _buffers(layer).items():
            stored = reader.tensor(found, place, buffer)
            assert np.array_equal(stored, live_rows(array, first, last)), (place, buffer)


def _places(cache: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for index, layer in enumerate(cache):
        if isinstance(layer, CacheList):
            yield from ((f"{index}.{inner}", member) for inner, member in _places(layer.caches))
        else:
            yield str(index), layer


def _state_rows(layer: Any, state: dict[str, int]) -> tuple[int, int]:
    """The rows of a live layer that section 4 wants in a checkpoint."""
    assert state["offset"] == layer.offset
    if isinstance(layer, ChunkedKVCache):
        assert state["start"] == layer.start_position
        return 0, layer.offset - layer.start_position
    if layer.offset < layer.max_size:
        assert state["index"] == layer.offset
        return 0, layer.offset
    last = layer.keys.shape[2]
    first = last - layer.max_size if layer.keep == 0 and layer._idx == last else 0
    assert state["index"] == layer._idx - first
    return first, last


def _buffers(layer: Any) -> dict[str, Any]:
    if isinstance(layer, QuantizedKVCache):
        return {
            f"{side}.{part}": array
            for side, arrays in (("keys", layer.keys), ("values", layer.values))
            for part, array in zip(("w", "scales", "biases"), arrays, strict=True)
        }
    return {"keys": layer.keys, "values": layer.values}


def test_a_second_implementation_lists_the_same_entries(sample: Sample) -> None:
    reader = FormatReader(sample.root)
    by_number = {space["number"]: key for key, space in reader.namespaces().items()}
    records = reader.records("entries", "entry")

    assert sorted(f"{number:016x}" for number in records) == [one.id for one in sample.entries]
    for entry in sample.entries:
        record = records[int(entry.id, 16)]
        key = by_number[record["namespace"]]
        assert key[:32].hex() == entry.fingerprint
        prompt = next(
            one
            for one in (SYSTEM, FIRST, SECOND, FIRST[:20], FIRST[:40])
            if len(one) == record["num_tokens"]
        )
        assert xxhash.xxh3_64(key + pack(prompt)).intdigest() == int(entry.id, 16)
        assert TIERS[record["tier"]] == entry.tier.label
        assert record["num_tokens"] == entry.num_tokens
        assert bool(record["pinned"]) == entry.pinned
        assert (record["expires"] or None) == entry.expires
        assert record["label"] == entry.label
        assert record["hits"] == entry.hits
        assert record["prefill_s"] == entry.prefill_s == 1.5
        assert record["last_use_us"] / 1e6 == entry.last_use
    assert {entry.label for entry in sample.entries} == {"", "Grüße"}
    assert sum(entry.hits for entry in sample.entries) == 1


def test_the_index_has_the_order_and_the_sums_that_are_documented(sample: Sample) -> None:
    reader = FormatReader(sample.root)
    entries = reader.records("entries", "entry")
    blobs = reader.records("blobs", "blob")

    assert set(reader.tables["recency"]) == {
        struct.pack(">BQQ", one["tier"], one["last_use_us"], number)
        for number, one in entries.items()
    }
    assert set(reader.tables["expiry"]) == {
        struct.pack(">QQ", int(one["expires"] * 1e6), number)
        for number, one in entries.items()
        if one["expires"]
    }
    assert {name.hex() for name in reader.tables["names"]} == {
        path.stem for path in blob_paths(sample.root)
    }
    for number, record in blobs.items():
        assert reader.tables["names"][record["name"]] == struct.pack(">Q", number)
        blob = Blob.read(reader.path_of(number))
        assert blob.digest == record["digest"]
        assert blob.nbytes == record["nbytes"]
        assert ("run", "checkpoint")[record["kind"]] == blob.metadata["kind"]
        assert blob.start == record["start"]
        tokens = reader.tables["tokens"].get(struct.pack(">Q", number), b"")
        assert tokens == blob.data.get("tokens", b"")
        assert record["num_tokens"] * 8 == len(tokens)
    assert reader.counter("blob_bytes") == sum(one["disk_bytes"] for one in blobs.values())
    assert reader.counter("schema") == 1
    assert len(reader.tables["meta"][b"store_id"]) == 16
    edges = [unpack("edge", raw) for raw in reader.tables["edges"].values()]
    for number, record in blobs.items():
        uses = sum(edge["blob"] == number for edge in edges)
        uses += sum(entry["checkpoint"] == number for entry in entries.values())
        assert record["references"] == uses
    for key, raw in reader.tables["edges"].items():
        assert reader.tables["parents"][struct.pack(">Q", unpack("edge", raw)["node"])] == key
    departed, _ = [unpack("sized", raw) for raw in reader.tables["departed"].values()]
    assert departed["note"] == "evicted by request"
    assert departed["since"] == NOW


def test_every_table_and_every_key_is_documented(sample: Sample) -> None:
    reader = FormatReader(sample.root)
    documented = set(re.findall(r"`([^`\s]+)`", FORMAT))

    assert set(reader.tables) <= documented
    for name in reader.tables["meta"]:
        text = re.sub(r"^written:.*", "written:YYYY-MM-DD", name.decode())
        text = re.sub(r"^(count|quota|ttl):.*", r"\1:<what>", text)
        assert re.sub(r"^space:.*", "space:<number>", text) in documented
    for path in blob_paths(sample.root):
        assert Blob.read(path).metadata.keys() <= documented


@pytest.mark.parametrize("document", [STORE, FORMAT], ids=["store", "format"])
def test_the_drawn_folder_is_the_real_one(document: str, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", min_free_bytes=0):
        names = {path.name for path in (tmp_path / "store").iterdir()}
    drawn = set(re.findall(r"^[├└]─ ([\w.]+)", document, re.MULTILINE))

    # A server leaves its token there, which is no part of the format.
    assert drawn == names | ({TOKEN_FILE} if document is STORE else set())


# ---- the program -------------------------------------------------------------------------------


def program() -> str:
    (found,) = re.findall(r"```python\n(.*?)```", LIBRARY, re.DOTALL)
    return str(found)


def check_program(model: Path, tmp_path: Path) -> list[str]:
    """The library's program restores its prompt when it is run again; returns what it answers."""
    code, count = re.subn(r'(?m)^MODEL = ".*"$', f"MODEL = {str(model)!r}", program())
    env = os.environ | preload_env() | {"PERSIST_CACHE_HOME": str(tmp_path / "store")}

    def run() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()

    first, second = run(), run()

    assert count == 1
    assert len(program().splitlines()) <= 15
    (total,) = re.findall(r"0 of (\d+) prompt tokens restored", first[-1])
    assert second[-1] == f"{int(total) - 1} of {total} prompt tokens restored"
    assert first[:-1] == second[:-1]
    return first[:-1]


def test_the_program_restores_its_prompt(tmp_path: Path) -> None:
    assert check_program(build_model_dir(tmp_path / "model"), tmp_path)


@pytest.mark.long
def test_the_program_answers_the_same_with_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    assert check_program(smollm2, tmp_path) == ["The capital of France is Paris."]


def anchors(text: str) -> set[str]:
    """What a link may name in a document, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCUMENTS], ids=lambda path: path.name)
def test_documents_link_to_what_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", text):
        if target.startswith("https://"):
            continue
        there = path.parent / target if target else path
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), f"{target}#{anchor}"
    for script in re.findall(r"`((?:scripts|tests)/[\w./]+)`", text):
        assert (ROOT / script).exists(), script


def test_readme_is_short_and_leads_to_every_document() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    assert len(text.splitlines()) <= 130
    assert text.count("![") == 2
    for path in DOCUMENTS:
        assert f"](docs/{path.name})" in text, path.name


# ---- scripts -------------------------------------------------------------------------------------


@pytest.mark.long
def test_bytes_written_shows_what_it_promises() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bytes_written"), "--tiny", "--turns", "2"],
        env=os.environ | preload_env(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILS" not in done.stdout
    assert done.stdout.count("holds") == 5
