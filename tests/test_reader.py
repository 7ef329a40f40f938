"""A second reader, made from the documents alone, agrees with the product: `tests.reader`."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from msgspec.structs import replace

from persist_cache import tensors
from persist_cache.blobs.header import BlobHeader
from persist_cache.blobs.layout import Shapes
from persist_cache.bundle import Bundle, export
from persist_cache.codec import Tensor
from persist_cache.errors import StoreError
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.store.store import Store
from tests import forge, test_testimony
from tests.bundles import Parts
from tests.fakes import fingerprint, put
from tests.reader import (
    Damaged,
    canonical,
    check_layout,
    pack,
    problems,
    read_blob,
    read_bundle,
    rebuild,
    write_blob,
    xxh3_128,
)
from tests.tiny_caches import CACHES, feed, new_cache

MODELS = [Fingerprint.from_fields({"weights": weights}) for weights in "vw"]
LAYOUTS = [
    '[{"class":"KVCache"}]',
    '[{"class":"RotatingKVCache","scalars":{"keep":0,"max_size":4}}]',
]
TIERS = ("assistant", "user", "system")

# ---- stores made anew from blobs alone -----------------------------------------------------------


def name(dice: random.Random) -> str:
    return dice.randbytes(16).hex()


class Maker:
    """Writes a made-up set of blobs: a tree of runs, and much that is wrong about it."""

    def __init__(self, dice: random.Random, root: Path) -> None:
        self.dice = dice
        self.root = root
        self.made: list[tuple[str, dict[str, str], list[int]]] = []
        """Name, metadata and prompt of each."""

    def make(self) -> None:
        dice = self.dice
        names = [name(dice) for _ in range(dice.randint(1, 9))]
        for each in names:
            above = dice.choice([None, *self.made]) if self.made else None
            if above is not None and dice.random() < 0.15:
                self.write(each, self.again(above), above[2])
            else:
                self.write(each, *self.grown(above))
        self.spoil()

    def grown(self, above: Any) -> tuple[dict[str, str], list[int]]:
        """A run, or a checkpoint, that hangs on another one somewhere, or nowhere."""
        dice = self.dice
        prompt: list[int] = []
        parent, model, layout = "", dice.choice(MODELS), dice.choice(LAYOUTS)
        if above is not None and above[1]["kind"] == "run":
            start, end = int(above[1]["start"]), int(above[1]["end"])
            cut = end if dice.random() < 0.6 else dice.randint(start + 1, end)
            prompt, parent = above[2][:cut], above[0]
            layout = above[1]["layout"]
            model = next(one for one in MODELS if one.hex == above[1]["fingerprint"])
        is_state = bool(prompt) and dice.random() < 0.25
        own = [] if is_state else [dice.randint(1, 2) for _ in range(dice.randint(1, 4))]
        metadata = {
            "format": "persist-cache",
            "version": "1",
            "kind": "checkpoint" if is_state else "run",
            "complete": "0" if is_state else str(int(dice.random() < 0.8)),
            "fingerprint": model.hex,
            "identity": model.to_json().decode(),
            "layout": layout,
            "detail": "{}",
            "start": str(len(prompt)),
            "end": str(len(prompt) + len(own)),
            "prefix": xxh3_128(pack(prompt)),
            "parent": parent,
            "tier": dice.choice(TIERS),
            "entry": str(int(dice.random() < 0.5)),
            "created": str(1_700_000_000.5 + dice.randint(0, 99)),
        }
        if len(own) > 1 and dice.random() < 0.2:
            end = dice.randint(len(prompt), len(prompt) + len(own))
            metadata["inner_entries"] = json.dumps([[end, dice.choice(TIERS), 1_700_000_000.0]])
        return metadata, [*prompt, *own]

    def again(self, other: Any) -> dict[str, str]:
        """A blob that was made of another one, which may be gone then."""
        metadata = {**other[1], "tier": self.dice.choice(TIERS)}
        metadata["replaces"] = " ".join([*other[1].get("replaces", "").split(), other[0]])
        return metadata

    def write(self, each: str, metadata: dict[str, str], prompt: list[int]) -> None:
        dice = self.dice
        own = prompt[int(metadata["start"]) : int(metadata["end"])]
        held: dict[str, tuple[str, list[int], bytes]] = {}
        if metadata["kind"] == "run":
            held["tokens"] = "I64", [len(own)], pack(own)
        held["layers.0.keys"] = "U8", [1, 1, len(own), 1], dice.randbytes(len(own))
        write_blob(self.path(each), metadata, held)
        self.made.append((each, metadata, prompt))

    def path(self, each: str) -> Path:
        return self.root / "blobs" / each[:2] / f"{each}.safetensors"

    def spoil(self) -> None:
        """Lose, damage, move and contradict some of them."""
        dice = self.dice
        for each, metadata, prompt in self.made:
            luck = dice.random()
            path = self.path(each)
            if luck < 0.08:
                path.unlink()
            elif luck < 0.12:
                raw = bytearray(path.read_bytes())
                raw[dice.randrange(len(raw.rstrip(b" ")) if luck < 0.1 else 700)] ^= 1
                path.write_bytes(raw)
            elif luck < 0.14:
                path.write_bytes(path.read_bytes()[: dice.randint(0, 20_000)])
            elif luck < 0.16:
                self.write(each, {**metadata, "prefix": "0" * 32}, prompt)
            elif luck < 0.18:
                self.write(each, {**metadata, "tier": "boss"}, prompt)
            elif luck < 0.20:
                self.write(each, {**metadata, "version": "2"}, prompt)
            elif luck < 0.22:
                path.rename(path.with_name(f"{name(dice)}.safetensors"))


def compare(root: Path, made: Maker, dice: random.Random) -> int:
    """Rebuild in both, and look for the same; returns how many entries there are."""
    mine = rebuild(root)
    with Store.open(root, min_free_bytes=0) as store:
        assert {problem.kind for problem in store.check()} <= {"orphan"}
        assert {one.kind for one in store.check(read_data=True)} <= {"orphan", "damaged"}
        with store.read() as txn:
            entries = {
                number: (
                    record.tier.label,
                    record.num_tokens,
                    txn.blob(record.checkpoint).name.hex() if record.checkpoint else "",  # type: ignore[union-attr]
                )
                for number, record in txn.entries()
            }
            blobs = {record.name.hex() for _, record in txn.blobs()}
        assert entries == mine.entries()
        assert blobs == mine.placed
        for _ in range(6):
            prompt = dice.choice(made.made)[2][: dice.randint(1, 12)]
            prompt = [*prompt, *(dice.randint(1, 2) for _ in range(dice.randint(0, 3)))]
            limit = dice.randint(0, len(prompt))
            model = dice.choice(MODELS)
            theirs = store.match(model, prompt, limit=limit)
            best = max(
                mine.find(key, prompt, limit).num_tokens
                for key in (model.digest + layout_digest(text) for text in LAYOUTS)
            )
            assert theirs.num_tokens == best
            found = [
                one
                for one in (
                    mine.find(model.digest + layout_digest(text), prompt, limit) for text in LAYOUTS
                )
                if one.num_tokens == best
            ]
            runs = [(run.blob, run.num_tokens) for run in theirs.runs]
            assert best == 0 or (runs, theirs.checkpoint) in [
                (one.runs, one.checkpoint) for one in found
            ]
    return len(entries)


def layout_digest(text: str) -> bytes:
    return xxhash.xxh3_128(text.encode()).digest()


def rebuild_alike(first: int, count: int, folder: Path) -> int:
    """Try so many sets of blobs; returns how many entries they have together."""
    total = 0
    for seed in range(first, first + count):
        dice = random.Random(seed)
        root = folder / str(seed)
        made = Maker(dice, root)
        made.make()
        os.chmod(root, 0o700)
        try:
            total += compare(root, made, dice)
        except AssertionError as error:
            raise AssertionError(f"set {seed}: {error}") from error
    return total


def test_sets_of_blobs_are_rebuilt_alike(tmp_path: Path) -> None:
    assert rebuild_alike(0, 150, tmp_path) > 150


@pytest.mark.long
def test_thousands_of_sets_of_blobs_are_rebuilt_alike(tmp_path: Path) -> None:
    assert rebuild_alike(1000, 3000, tmp_path) > 3000


# ---- an index that is wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (test_testimony.wrong_middle_token, {"tokens", "number"}),
        (test_testimony.wrong_first_token, {"tokens", "number"}),
        (test_testimony.wrong_digest, {"digest"}),
        (test_testimony.wrong_complete, {"complete", "resumable"}),
        (test_testimony.too_complete, {"complete"}),
        (test_testimony.wrong_layout, {"layout"}),
        (test_testimony.wrong_number, {"number"}),
        (test_testimony.lost_state, {"resumable"}),
        (test_testimony.small_generator("next_node"), {"next_node"}),
        (test_testimony.small_generator("next_blob"), {"next_blob"}),
        (test_testimony.small_generator("next_namespace"), {"next_namespace"}),
    ],
)
def test_both_see_what_an_index_has_wrong(tmp_path: Path, damage: Any, found: set[str]) -> None:
    root = tmp_path / "store"
    with Store.open(root, min_free_bytes=0, run_tokens=8) as store:
        put(store, test_testimony.FIRST[:11])
        put(store, test_testimony.FIRST)
        put(store, test_testimony.STATE, complete=False)
    assert problems(root) == set()

    with Store.open(root, min_free_bytes=0) as store:
        forge.change(store, damage)
        assert store.check(read_data=True)
    assert problems(root) == found

    with Store.open(root, min_free_bytes=0) as store:
        store.check(read_data=True, repair=True)
        assert store.check(read_data=True) == []
    assert problems(root) == set()


# ---- bundles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CACHES)
def test_both_take_every_layout_that_is_written(tmp_path: Path, kind: str) -> None:
    with Store.open(tmp_path / "store", min_free_bytes=0, run_tokens=16) as store:
        specs, chunks = CACHES[kind]
        cache = new_cache(specs)
        for seed, chunk in enumerate(chunks):
            feed(cache, specs, chunk, seed)
        tokens = list(range(sum(chunks)))
        length = tensors.prepare(cache, len(tokens))
        entry = store.put(fingerprint(), tokens, tensors.source(cache, length)).entry
        assert entry is not None
        export(store, [entry], tmp_path / "agent.tar")
        for path in (tmp_path / "store").glob("blobs/*/*"):
            with store.open_blob(path.stem) as reader:
                Shapes(reader.header.layout).check(reader.header)
            check_layout(read_blob(path))

    assert read_bundle(tmp_path / "agent.tar") == [entry]
    with Bundle(tmp_path / "agent.tar") as bundle:
        assert [one.id for one in bundle.entries] == [entry]


SPECS = {
    "kv": CACHES["kv-latent"],
    "lag": CACHES["draft-one-behind"],
    "quantized": CACHES["quantized-4"],
    "rotating": CACHES["rotating-wrapped-by-steps-keep-4"],
    "chunked": CACHES["chunked-slid"],
    "arrays": CACHES["list-of-arrays-and-kv"],
    "filling": CACHES["rotating-filling-by-chunks"],
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle of one entry for each kind of cache, of several runs."""
    folder = tmp_path_factory.mktemp("bundles")
    found = {}
    for kind, (specs, chunks) in SPECS.items():
        with Store.open(folder / kind, min_free_bytes=0, run_tokens=16) as store:
            cache = new_cache(specs)
            for seed, chunk in enumerate(chunks):
                feed(cache, specs, chunk, seed)
            tokens = list(range(500, 500 + sum(chunks)))
            length = tensors.prepare(cache, len(tokens))
            entry = store.put(fingerprint(), tokens, tensors.source(cache, length)).entry
            assert entry is not None
            found[kind] = folder / f"{kind}.tar"
            export(store, [entry], found[kind])
    return found


Change = Callable[[Parts, Path], None]


def layout(change: Callable[[list[Any]], Any]) -> Change:
    """Give all blobs and the manifest another layout, and everything else that follows from it."""

    def forge(parts: Parts, folder: Path) -> None:
        old = json.loads(parts.manifest["models"][0]["layout"])
        new = change(old)
        text = new if isinstance(new, str) else canonical(old).decode()
        parts.manifest["models"][0]["layout"] = text
        for each in parts.blobs:
            parts.rewrite_header(each, folder, layout=text)
        renumber(parts, folder)

    return forge


def renumber(parts: Parts, folder: Path) -> None:
    """Let the entry have the number of its tokens and its layout."""
    (entry,) = parts.manifest["entries"]
    tokens: list[int] = []
    for each in entry["runs"]:
        path = folder / f"{each}.safetensors"
        path.write_bytes(parts.blobs[each])
        tokens += read_blob(path).tokens
        path.unlink()
    key = fingerprint().digest + layout_digest(parts.manifest["models"][0]["layout"])
    number = xxhash.xxh3_64(key + pack(tokens)).intdigest() or 1
    entry["id"] = f"{number:016x}"


def leaf(index: int, **changes: Any) -> Change:
    """Change one layer of the layout; `...` takes a member away."""

    def change(layers: list[Any]) -> None:
        for key, value in changes.items():
            if value is ...:
                layers[index].pop(key.rstrip("_"))
            else:
                layers[index][key.rstrip("_")] = value

    return layout(change)


def geometry(index: int, buffer: str, **changes: Any) -> Change:
    return layout(lambda layers: layers[index]["rows"][buffer].update(changes))


def header(place: int, **changes: Any) -> Change:
    """Change what a run (by its place) or the checkpoint (-1) says, with a right seal."""

    def forge(parts: Parts, folder: Path) -> None:
        parts.rewrite_header(blob_at(parts, place), folder, **changes)

    return forge


def detail(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change the checkpoint's detail."""

    def forge(parts: Parts, folder: Path) -> None:
        each = blob_at(parts, -1)

        def forged(old: BlobHeader, held: list[Tensor]) -> tuple[BlobHeader, list[Tensor]]:
            said = json.loads(old.detail)
            change(said["states"])
            return replace(old, detail=json.dumps(said)), held

        parts.rewrite(each, folder, forged)

    return forge


def held(place: int, change: Callable[[list[Tensor]], list[Tensor]]) -> Change:
    """Change a blob's tensors, with right checksums and a right seal."""

    def forge(parts: Parts, folder: Path) -> None:
        parts.rewrite(blob_at(parts, place), folder, lambda old, tensors: (old, change(tensors)))

    return forge


def without(ending: str) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda tensors: [one for one in tensors if not one.name.endswith(ending)]


def added(tensors: list[Tensor]) -> list[Tensor]:
    return [*tensors, Tensor("layers.7.keys", "U8", (1, 1, 1, 1), [memoryview(b"x")])]


def retyped(tensors: list[Tensor]) -> list[Tensor]:
    """The same bytes as another type."""
    last = tensors[-1]
    return [*tensors[:-1], Tensor(last.name, "I16", last.shape, last.pieces)]


def turned(tensors: list[Tensor]) -> list[Tensor]:
    """The same bytes in another shape."""
    last = tensors[-1]
    batch, heads, rows, dim = last.shape
    return [*tensors[:-1], Tensor(last.name, last.dtype, (heads, batch, dim, rows), last.pieces)]


def blob_at(parts: Parts, place: int) -> str:
    (entry,) = parts.manifest["entries"]
    return str(entry["checkpoint"] if place == -1 else entry["runs"][place])


def unsealed(key: str, value: str) -> Change:
    """Change what a blob says, and the digest in the manifest, but not the seal."""

    def forge(parts: Parts, folder: Path) -> None:
        each = blob_at(parts, 0)
        raw = parts.blobs[each]
        size = int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8 : 8 + size])
        assert table["__metadata__"][key] != value
        table["__metadata__"][key] = value
        text = json.dumps(table, separators=(",", ":")).encode()
        parts.blobs[each] = raw[:8] + text.ljust(size) + raw[8 + size :]

    return forge


def flipped(parts: Parts, folder: Path) -> None:
    each = blob_at(parts, 0)
    raw = bytearray(parts.blobs[each])
    raw[-1] ^= 1
    parts.blobs[each] = bytes(raw)


ROWS = "has no rows of layer"
MUTATIONS: list[tuple[str, Change, str]] = [
    *((kind, unsealed("tier", "system"), "seal") for kind in SPECS),
    *((kind, unsealed("created", "1.5"), "seal") for kind in SPECS),
    *((kind, unsealed("seal", "0" * 32), "seal") for kind in SPECS),
    ("kv", header(0, tier="boss"), "tier"),
    ("kv", header(0, created=1e12), "no date"),
    ("kv", header(0, created=-1.0), "no date"),
    *((kind, flipped, "checksum of tensor") for kind in SPECS),
    *((kind, leaf(0, class_="BatchKVCache"), "unknown cache class") for kind in SPECS),
    *((kind, leaf(0, extra=1), "malformed") for kind in SPECS),
    *((kind, layout(lambda _: "[]"), "no layers") for kind in SPECS),
    *((kind, layout(lambda layers: json.dumps(layers)), "canonical") for kind in SPECS),
    *((kind, layout(lambda _: '{"a":1}'), "malformed") for kind in SPECS),
    *((kind, held(0, added), "which its layout does not") for kind in ("kv", "lag", "quantized")),
    *((kind, held(0, without("keys")), "lacks tensor") for kind in ("kv", "lag")),
    *((kind, held(1, retyped), "instead of") for kind in ("kv", "lag", "chunked")),
    *((kind, held(1, turned), "instead of") for kind in ("kv", "lag", "quantized")),
    *((kind, geometry(0, "keys", dtype="F16"), "instead of") for kind in ("kv", "lag")),
    *((kind, geometry(0, "keys", dtype="F8_E4M3"), "unknown type") for kind in ("kv", "lag")),
    *((kind, geometry(0, "keys", dtype="F64"), "instead of") for kind in ("kv", "lag")),
    *((kind, geometry(0, "values", heads=9), "instead of") for kind in ("kv", "lag")),
    *((kind, geometry(0, "values", batch=2), "instead of") for kind in ("kv", "lag")),
    *((kind, geometry(0, "keys", dim=3), "instead of") for kind in ("kv", "lag")),
    *((kind, geometry(0, "keys", heads=-1), "cannot be") for kind in ("kv", "lag")),
    *((kind, leaf(0, lag=17), "tokens behind") for kind in ("kv", "lag")),
    *((kind, leaf(0, lag=-1), "tokens behind") for kind in ("kv", "lag")),
    *((kind, leaf(0, lag=1), "instead of") for kind in ("kv", "lag")),
    *((kind, leaf(0, scalars={"bits": 4}), "other numbers") for kind in ("kv", "lag")),
    *((kind, leaf(0, rows=...), "which its layout does not") for kind in ("kv", "lag")),
    ("lag", leaf(1, lag=...), "instead of"),
    ("lag", leaf(1, lag=2), "instead of"),
    ("quantized", leaf(0, scalars=...), "other numbers"),
    ("quantized", layout(lambda layers: layers[0]["rows"].pop("keys.w")), "other buffers"),
    ("quantized", held(0, without("keys.scales")), "lacks tensor"),
    ("kv", leaf(0, members=[{"class": "KVCache"}]), "other buffers"),
    ("rotating", header(0, complete=True), "complete"),
    ("chunked", header(0, complete=True), "complete"),
    ("arrays", header(0, complete=True), "complete"),
    ("chunked", held(0, lambda tensors: tensors[:1]), ROWS),
    ("chunked", held(0, without("1.values")), "lacks tensor"),
    ("rotating", leaf(0, scalars={"keep": 4}), "other numbers"),
    ("rotating", detail(lambda states: states.clear()), "lacks the state of layer 0"),
    ("rotating", detail(lambda states: states["0"].update(offset=3)), "another token"),
    ("rotating", detail(lambda states: states["0"].update(index=999)), "does not fit"),
    ("rotating", detail(lambda states: states["0"].update(index=-1)), "does not fit"),
    ("rotating", detail(lambda states: states["0"].pop("index")), "other numbers"),
    ("rotating", detail(lambda states: states["0"].update(more=1)), "other numbers"),
    ("rotating", detail(lambda states: states.update({"3": {}})), "has a state of layer 3"),
    ("rotating", header(-1, detail="[]"), "not a checkpoint"),
    ("rotating", header(-1, detail="{}"), "malformed"),
    ("rotating", held(-1, without("keys")), "lacks"),
    ("rotating", held(-1, retyped), "instead of"),
    ("rotating", held(-1, added), "which its layout does not"),
    ("chunked", detail(lambda states: states["0"].update(start=0)), "does not fit"),
    ("chunked", detail(lambda states: states["0"].update(offset=1)), "another token"),
    ("chunked", detail(lambda states: states.update({"1": {}})), "has a state of layer 1"),
    ("chunked", detail(lambda states: states.clear()), "lacks the state of layer 0"),
    ("arrays", detail(lambda states: states.pop("0.0")), "lacks the state of layer 0.0"),
    ("arrays", detail(lambda states: states["0.0"].update(offset=1)), "other numbers"),
    ("arrays", held(-1, added), "which its layout does not"),
    (
        "arrays",
        layout(lambda layers: layers[0]["members"][0].update(scalars={"slots": 1})),
        "has tensor",
    ),
    ("arrays", layout(lambda layers: layers[0].update(lag=1)), "not one of CacheList"),
]


def test_there_are_enough_mutations() -> None:
    assert len(MUTATIONS) >= 100


@pytest.mark.parametrize(("kind", "change", "reason"), MUTATIONS)
def test_both_refuse_a_mutated_bundle_for_the_right_reason(
    bundles: dict[str, Path], tmp_path: Path, kind: str, change: Change, reason: str
) -> None:
    parts = Parts.of(bundles[kind])
    before = copy.deepcopy(parts)
    change(parts, tmp_path)
    parts.seal()
    assert (parts.manifest, parts.blobs) != (before.manifest, before.blobs)
    file = parts.write(tmp_path / "forged.tar")

    with pytest.raises(StoreError, match=reason):
        Bundle(file)
    with pytest.raises(Damaged):
        read_bundle(file)
