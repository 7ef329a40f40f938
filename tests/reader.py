"""A second reader: of stores and bundles, by docs/format.md and docs/bundle.md alone.

With struct, json, lmdb, xxhash and numpy, and none of the library's own code. It takes the record
layouts of the index from the document.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import xxhash

FORMAT = (Path(__file__).resolve().parent.parent / "docs" / "format.md").read_text(encoding="utf-8")

ELEMENT_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
ELEMENT_BYTES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
TIERS = ("assistant", "user", "system")


def canonical(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return text.encode()


def xxh3_128(data: bytes) -> str:
    return str(xxhash.xxh3_128(data).hexdigest())


def pack(tokens: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}q", *tokens)


def pack_texts(texts: Sequence[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(struct.pack("<Q", len(text)) + text for text in encoded)


def record_layouts() -> dict[str, tuple[struct.Struct, list[str], str | None]]:
    """The table of records in section 6: a struct, its names, and the text behind it."""
    block = re.search(r"```records\n(.*?)```", FORMAT, re.DOTALL)
    assert block is not None
    layouts = {}
    for line in block.group(1).splitlines():
        name, code, *fields = line.split()
        text = None
        if "+" in fields:
            fields, text = fields[: fields.index("+")], fields[-1]
        layouts[name] = struct.Struct(code), fields, text
    return layouts


RECORDS = record_layouts()


def unpack(name: str, raw: bytes) -> dict[str, Any]:
    """One record, by the table in the document."""
    layout, fields, text = RECORDS[name]
    values = layout.unpack_from(raw)
    record = {field: value for field, value in zip(fields, values, strict=True) if field != "-"}
    if text is not None:
        record[text] = raw[layout.size :].decode()
    else:
        assert len(raw) == layout.size
    assert record.pop("version") == 1
    return record


def unpack_message(raw: bytes) -> Any:
    """As much of MessagePack as a namespace needs."""
    value, rest = _message(raw)
    assert rest == b""
    return value


def _message(raw: bytes) -> tuple[Any, bytes]:
    kind, rest = raw[0], raw[1:]
    if kind < 0x80:
        return kind, rest
    if 0x80 <= kind < 0x90:
        found = {}
        for _ in range(kind & 15):
            key, rest = _message(rest)
            found[key], rest = _message(rest)
        return found, rest
    if 0xA0 <= kind < 0xC0:
        size = kind & 31
        return rest[:size].decode(), rest[size:]
    if kind in (0xD9, 0xDA, 0xDB):
        width = {0xD9: 1, 0xDA: 2, 0xDB: 4}[kind]
        size = int.from_bytes(rest[:width], "big")
        return rest[width : width + size].decode(), rest[width + size :]
    code = {0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}[kind]
    size = struct.calcsize(code)
    return struct.unpack(code, rest[:size])[0], rest[size:]


@dataclass
class Blob:
    """A file that has proved itself."""

    name: str
    metadata: dict[str, str]
    shapes: dict[str, tuple[str, list[int]]]
    data: dict[str, bytes]
    digest: bytes
    nbytes: int

    @property
    def start(self) -> int:
        return int(self.metadata["start"])

    @property
    def end(self) -> int:
        return int(self.metadata["end"])

    @property
    def tokens(self) -> list[int]:
        raw = self.data.get("tokens", b"")
        return list(struct.unpack(f"<{len(raw) // 8}q", raw))

    @property
    def replaces(self) -> list[str]:
        return self.metadata.get("replaces", "").split()

    def hangs_in(self, blobs: dict[str, Blob]) -> bool:
        """Whether what it hangs on is there."""
        above = blobs.get(self.metadata["parent"])
        return above is not None and above.start < self.start <= above.end

    def parent_in(self, blobs: dict[str, Blob]) -> Blob:
        return blobs[self.metadata["parent"]]

    def prompt(self, blobs: dict[str, Blob]) -> list[int] | None:
        """All tokens up to its end, if its parents are there and it follows these tokens."""
        tokens, here = self.tokens, self
        while here.start > 0:
            if not here.hangs_in(blobs):
                return None
            above = here.parent_in(blobs)
            tokens = above.tokens[: here.start - above.start] + tokens
            here = above
        before = pack(tokens[: self.start])
        return tokens if xxh3_128(before) == self.metadata["prefix"] else None

    @classmethod
    def read(cls, path: Path, *, whole: bool = True) -> Blob:
        """Read a file as sections 2 and 3 say, and check all that they say of it.

        Unless it is to be checked `whole`, that of its data is its tokens.
        """
        raw = path.read_bytes()
        (length,) = struct.unpack_from("<Q", raw)
        data_start = 8 + length
        assert data_start % 16384 == 0
        text = raw[8:data_start]
        assert data_start - 16384 < 8 + len(text.rstrip(b" "))
        table = json.loads(text)
        metadata = table.pop("__metadata__")
        assert all(isinstance(value, str) for value in metadata.values())
        said = {key: value for key, value in metadata.items() if key != "seal"}
        assert metadata["seal"] == xxh3_128(canonical([said, table]))
        checksums = json.loads(metadata["checksums"])
        shapes, data, expected = {}, {}, 0
        for name, tensor in table.items():
            begin, end = tensor["data_offsets"]
            assert begin == expected
            expected = end
            data[name] = raw[data_start + begin : data_start + end]
            shapes[name] = tensor["dtype"], tensor["shape"]
            elements = int(np.prod(tensor["shape"], dtype=np.int64))
            assert end - begin == elements * ELEMENT_BYTES[tensor["dtype"]]
            if whole or name == "tokens":
                assert checksums[name] == xxh3_128(data[name])
        assert checksums.keys() == data.keys()
        assert data_start + expected == len(raw)
        blob_name = path.name.removesuffix(".safetensors")
        digest = xxhash.xxh3_128(raw[:data_start]).digest()
        return cls(blob_name, metadata, shapes, data, digest, len(raw))


@dataclass(frozen=True)
class Found:
    """The longest usable prefix of a prompt, by section 7."""

    num_tokens: int
    common: int
    runs: list[tuple[str, int]]
    checkpoint: str | None


class FormatReader:
    """A second implementation of reading."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tables: dict[str, dict[bytes, bytes]] = {}
        with lmdb.open(
            str(root), readonly=True, lock=False, max_dbs=32, lib_version=0, create=False
        ) as environment:
            with environment.begin() as txn:
                names = [bytes(key) for key in txn.cursor().iternext(values=False)]
            for name in names:
                database = environment.open_db(name, create=False)
                with environment.begin() as txn:
                    self.tables[name.decode()] = {
                        bytes(key): bytes(value) for key, value in txn.cursor(database)
                    }

    def counter(self, name: str) -> int:
        raw = self.tables["meta"].get(name.encode())
        return 0 if raw is None else int(struct.unpack("<q", raw)[0])

    def namespaces(self) -> dict[bytes, dict[str, Any]]:
        found = {}
        for key, raw in self.tables["namespaces"].items():
            assert raw[0] == 1
            found[key] = unpack_message(raw[1:])
        return found

    def records(self, table: str, record: str) -> dict[int, dict[str, Any]]:
        rows = self.tables[table].items()
        return {struct.unpack(">Q", key)[0]: unpack(record, raw) for key, raw in rows}

    def path_of(self, blob: int) -> Path:
        record = unpack("blob", self.tables["blobs"][struct.pack(">Q", blob)])
        name: str = record["name"].hex()
        return self.root / "blobs" / name[:2] / f"{name}.safetensors"

    def find(self, key: bytes, tokens: Sequence[int], limit: int) -> Found:
        """Walk one namespace."""
        packed = pack(tokens)
        node, position = self.namespaces()[key]["root"], 0
        usable, by_rows, all_complete = 0, 0, True
        checkpoint = None
        steps: list[tuple[int, int, int]] = []
        while position < len(tokens):
            here = packed[position * 8 :]
            raw = self.tables["edges"].get(struct.pack(">Q", node) + here[:8])
            if raw is None:
                break
            edge = unpack("edge", raw)
            blob = self.tables["tokens"][struct.pack(">Q", edge["blob"])]
            run = blob[edge["first_row"] * 8 : (edge["first_row"] + edge["rows"]) * 8]
            used = 0
            while used < edge["rows"] and run[used * 8 :][:8] == here[used * 8 :][:8]:
                used += 1
            steps.append((edge["blob"], position, used))
            position += used
            all_complete = all_complete and bool(edge["complete"])
            if all_complete:
                by_rows = position
            if used < edge["rows"]:
                break
            node = edge["node"]
            if edge["entry"] and by_rows < position <= limit:
                entry = unpack("entry", self.tables["entries"][struct.pack(">Q", edge["entry"])])
                if entry["checkpoint"]:
                    usable, checkpoint = position, self.path_of(entry["checkpoint"]).stem
        if not usable:
            usable = min(by_rows, limit)
        runs: list[tuple[str, int]] = []
        for number, start, used in steps:
            if start < usable:
                name, used = self.path_of(number).stem, min(used, usable - start)
                if runs and runs[-1][0] == name:
                    used += runs.pop()[1]
                runs.append((name, used))
        return Found(usable, position, runs, checkpoint)

    def tensor(self, found: Found, place: str, buffer: str) -> np.ndarray:
        """One buffer of one layer for a match, as bytes `(B, H, rows, bytes of a row)`."""
        state = f"layers.{place}.state.{buffer}"
        if found.checkpoint is not None:
            blob = self.blob(found.checkpoint)
            if place in json.loads(blob.metadata["detail"])["states"]:
                return as_rows(blob, state)
        parts = []
        for name, used in found.runs:
            blob = self.blob(name)
            lag = layout_at(json.loads(blob.metadata["layout"]), place).get("lag", 0)
            first = max(blob.start - lag, 0)
            wanted = max(blob.start + used - lag, 0) - first
            parts.append(as_rows(blob, f"layers.{place}.{buffer}")[:, :, :wanted])
        return np.concatenate(parts, axis=2)

    def blob(self, name: str) -> Blob:
        return Blob.read(self.root / "blobs" / name[:2] / f"{name}.safetensors")


def layout_at(layout: list[dict[str, Any]], place: str) -> dict[str, Any]:
    index, _, inner = place.partition(".")
    found = layout[int(index)]
    return layout_at(found["members"], inner) if inner else found


def as_rows(blob: Blob, name: str) -> np.ndarray:
    shape = blob.shapes[name][1]
    return np.frombuffer(blob.data[name], np.uint8).reshape(*shape[:3], -1)


# ---- section 3: whether a file is a blob ---------------------------------------------------------


class Damaged(Exception):
    """What a reader has to refuse; why, in a word or two."""


def read_blob(path: Path, *, whole: bool = True) -> Blob:
    """Read a file and let nothing pass that is not a blob, as far as it is checked.

    Raises:
        Damaged: It is none.
    """
    try:
        blob = Blob.read(path, whole=whole)
        if (blob.metadata["format"], blob.metadata["version"]) != ("persist-cache", "1"):
            raise Damaged("version")
        kinds = {"run": blob.start < blob.end, "checkpoint": blob.start == blob.end}
        if not kinds[blob.metadata["kind"]] or blob.metadata["tier"] not in TIERS:
            raise Damaged("claims")
        inner = json.loads(blob.metadata.get("inner_entries", "[]"))
        dates = [float(blob.metadata["created"]), *(date for _, _, date in inner)]
        if not all(0 <= date < 1e12 for date in dates):
            raise Damaged("date")
        if not {label for _, label, _ in inner} <= set(TIERS):
            raise Damaged("inner tier")
        if len(bytes.fromhex(blob.metadata["fingerprint"])) != 32:
            raise Damaged("fingerprint")
        if blob.metadata["kind"] == "run" and blob.shapes["tokens"] != ("I64", [len(blob.tokens)]):
            raise Damaged("tokens")
        if len(blob.tokens) != blob.end - blob.start:
            raise Damaged("tokens")
        return blob
    except (AssertionError, KeyError, ValueError, struct.error, IndexError) as error:
        raise Damaged(type(error).__name__) from error


# ---- section 8: a store from its blobs alone -----------------------------------------------------


@dataclass
class Node:
    """A position in the prompts of one namespace.

    Attributes:
        blob: Run with the row of the token before it.
        complete: That has the rows of all layers.
        above: The position before it.
        below: By token.
        tier: Of the entry that ends here, or -1.
        checkpoint: Of that entry, or "".
    """

    blob: str = ""
    complete: bool = True
    above: Node | None = None
    token: int = 0
    below: dict[int, Node] = field(default_factory=dict)
    tier: int = -1
    checkpoint: str = ""

    def way(self) -> list[Node]:
        """From the first token down to here."""
        found: list[Node] = []
        node: Node | None = self
        while node is not None and node.above is not None:
            found.append(node)
            node = node.above
        return found[::-1]


@dataclass
class Rebuilt:
    """What section 8 makes of a folder of blobs."""

    trees: dict[bytes, Node] = field(default_factory=dict)
    placed: set[str] = field(default_factory=set)

    def entries(self) -> dict[int, tuple[str, int, str]]:
        """By number: tier, length and checkpoint."""
        found = {}
        for key, root in self.trees.items():
            for node in _all_below(root):
                if node.tier >= 0:
                    way = node.way()
                    digest = xxhash.xxh3_64(key + pack([one.token for one in way])).intdigest()
                    found[digest or 1] = (TIERS[node.tier], len(way), node.checkpoint)
        return found

    def find(self, key: bytes, tokens: Sequence[int], limit: int) -> Found:
        """The longest usable prefix, by section 7."""
        way: list[Node] = []
        node = self.trees.get(key, Node())
        for token in tokens:
            if token not in node.below:
                break
            node = node.below[token]
            way.append(node)
        complete = 0
        while complete < len(way) and way[complete].complete:
            complete += 1
        for end in range(min(len(way), limit), complete, -1):
            if way[end - 1].checkpoint:
                usable, checkpoint = end, way[end - 1].checkpoint
                break
        else:
            usable, checkpoint = min(complete, limit), ""
        runs: list[tuple[str, int]] = []
        for one in way[:usable]:
            used = runs.pop()[1] if runs and runs[-1][0] == one.blob else 0
            runs.append((one.blob, used + 1))
        return Found(usable, len(way), runs, checkpoint or None)


def _all_below(node: Node) -> Iterator[Node]:
    for one in node.below.values():
        yield one
        yield from _all_below(one)


def rebuild(root: Path) -> Rebuilt:
    """Make trees of the blobs in a store's folder, and of nothing else."""
    blobs: dict[str, Blob] = {}
    for path in sorted((root / "blobs").glob("??/*")):
        name = path.name.removesuffix(".safetensors")
        if re.fullmatch("[0-9a-f]{32}", name) and path.parent.name == name[:2]:
            try:
                blobs[name] = read_blob(path, whole=False)
            except Damaged:
                continue
    stands_for = {old: one for one in blobs.values() for old in one.replaces} | blobs
    needed = {one.parent_in(stands_for).name for one in blobs.values() if one.hangs_in(stands_for)}

    def order(one: Blob) -> tuple[Any, ...]:
        by_others = {old for name in one.replaces if name in blobs for old in blobs[name].replaces}
        is_its_place = any(old not in blobs and old not in by_others for old in one.replaces)
        is_run = one.metadata["kind"] == "run"
        return one.start, not is_run, not is_its_place, one.name not in needed, -one.end, one.name

    found = Rebuilt()
    for blob in sorted(blobs.values(), key=order):
        tokens = blob.prompt(stands_for)
        if tokens is not None:
            layout = xxhash.xxh3_128(blob.metadata["layout"].encode()).digest()
            key = bytes.fromhex(blob.metadata["fingerprint"]) + layout
            _place(found, key, blob, tokens)
    for root_node in found.trees.values():
        _finish(root_node)
    for key in [key for key, node in found.trees.items() if not node.below]:
        del found.trees[key]
    living = {node.blob for tree in found.trees.values() for node in _all_below(tree)}
    living |= {node.checkpoint for tree in found.trees.values() for node in _all_below(tree)}
    found.placed = living - {""}
    return found


def _place(found: Rebuilt, key: bytes, blob: Blob, tokens: list[int]) -> None:
    root = found.trees.setdefault(key, Node())
    node, common = root, 0
    while common < len(tokens) and tokens[common] in node.below:
        node = node.below[tokens[common]]
        common += 1
    tier = TIERS.index(blob.metadata["tier"])
    if blob.metadata["kind"] == "checkpoint":
        if common == blob.end > 0 and not node.checkpoint:
            node.checkpoint = blob.name
            node.tier = max(node.tier, tier)
        return
    if common != blob.start:
        return
    for token in tokens[blob.start :]:
        below = Node(blob.name, blob.metadata["complete"] == "1", node, token)
        node.below[token] = below
        node = below
    way = node.way()
    if not all(one.complete for one in way):
        return
    if blob.metadata["entry"] == "1":
        node.tier = max(node.tier, tier)
    for end, label, _ in json.loads(blob.metadata.get("inner_entries", "[]")):
        if blob.start < end < blob.end:
            way[end - 1].tier = max(way[end - 1].tier, TIERS.index(label))


def _finish(root: Node) -> None:
    """Each leaf carries an entry, or goes with what leads to it alone."""
    for leaf in [node for node in _all_below(root) if not node.below and node.tier < 0]:
        if all(one.complete for one in leaf.way()):
            leaf.tier = TIERS.index("assistant")
            continue
        node = leaf
        while node.above is not None and not node.below and node.tier < 0:
            del node.above.below[node.token]
            node = node.above


# ---- sections 4 and 6: what the index and the layout must say ------------------------------------

SCALARS = {
    "KVCache": set(),
    "ConcatenateKVCache": set(),
    "QuantizedKVCache": {"bits", "group_size"},
    "RotatingKVCache": {"keep", "max_size"},
    "ChunkedKVCache": {"chunk_size"},
    "ArraysCache": {"slots"},
}
PARTS = {
    "QuantizedKVCache": [
        f"{side}.{part}" for side in ("keys", "values") for part in ("w", "scales", "biases")
    ],
    "ArraysCache": [],
}
MOVING = {
    "RotatingKVCache": {"offset", "index"},
    "ChunkedKVCache": {"offset", "start"},
    "ArraysCache": set(),
}


def layers_of(text: str) -> dict[str, dict[str, Any]]:
    """The leaves of a layout by place.

    Raises:
        Damaged: It is no layout.
    """
    try:
        layout = json.loads(text)
        if not isinstance(layout, list) or not layout or canonical(layout).decode() != text:
            raise Damaged("layout")
        return dict(_leaves(layout, ""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged("layout") from error


def _leaves(layout: list[dict[str, Any]], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, layer in enumerate(layout):
        kind = layer["class"]
        if not layer.keys() <= {"class", "scalars", "rows", "lag", "members"}:
            raise Damaged("layout member")
        if kind == "CacheList":
            if layer.keys() & {"scalars", "rows", "lag"}:
                raise Damaged("list")
            yield from _leaves(layer.get("members", []), f"{prefix}{index}.")
            continue
        if kind not in SCALARS:
            raise Damaged("class")
        scalars = layer.get("scalars", {})
        if scalars.keys() != SCALARS[kind] or min(scalars.values(), default=0) < 0:
            raise Damaged("scalars")
        rows = layer.get("rows", {})
        if layer.get("members") or (rows and set(rows) != set(PARTS.get(kind, ["keys", "values"]))):
            raise Damaged("buffers")
        if not 0 <= layer.get("lag", 0) <= (16 if rows else 0):
            raise Damaged("lag")
        for one in rows.values():
            if (
                one.keys() != {"batch", "dim", "dtype", "heads"}
                or one["dtype"] not in ELEMENT_BYTES
            ):
                raise Damaged("dtype")
            if min(one["batch"], one["dim"], one["heads"]) < 0:
                raise Damaged("geometry")
        yield f"{prefix}{index}", layer


def check_layout(blob: Blob) -> None:
    """Hold a blob's tensors against its layout.

    Raises:
        Damaged: They do not fit.
    """
    layers = layers_of(blob.metadata["layout"])
    is_run = blob.metadata["kind"] == "run"
    wanted: dict[str, tuple[str, list[int]]] = {}
    states: dict[str, Any] = {}
    if is_run:
        wanted["tokens"] = "I64", [blob.end - blob.start]
    else:
        detail = json.loads(blob.metadata["detail"])
        if not isinstance(detail, dict) or not isinstance(detail.get("states"), dict):
            raise Damaged("detail")
        states = detail["states"]
        if not states.keys() <= layers.keys():
            raise Damaged("state of no layer")
    for place, layer in layers.items():
        kind, rows, lag = layer["class"], layer.get("rows", {}), layer.get("lag", 0)
        if is_run:
            there = [key for key in rows if f"layers.{place}.{key}" in blob.shapes]
            if blob.metadata["complete"] == "1" and (kind == "ArraysCache" or (rows and not there)):
                raise Damaged("complete")
            if rows and not there and kind not in MOVING:
                raise Damaged("rows")
            count = max(blob.end - lag, 0) - max(blob.start - lag, 0)
            wanted |= _shapes(f"layers.{place}.", rows if there else {}, count)
            continue
        needed = kind in MOVING and (rows or kind == "ArraysCache")
        if bool(needed) != (place in states):
            raise Damaged("states")
        if not needed:
            continue
        moving = states[place]
        if moving.keys() != MOVING[kind] or not all(type(one) is int for one in moving.values()):
            raise Damaged("moving")
        prefix = f"layers.{place}.state."
        if kind == "ArraysCache":
            slots = [*map(str, range(layer["scalars"]["slots"])), "left_padding", "lengths"]
            names = [prefix + slot for slot in slots]
            wanted |= {name: blob.shapes[name] for name in names if name in blob.shapes}
            continue
        if f"{prefix}keys" not in blob.shapes or len(blob.shapes[f"{prefix}keys"][1]) != 4:
            raise Damaged("state")
        count = blob.shapes[f"{prefix}keys"][1][2]
        wanted |= _shapes(prefix, rows, count)
        if moving["offset"] != blob.end - lag:
            raise Damaged("offset")
        if kind == "ChunkedKVCache" and moving["offset"] - moving["start"] != count:
            raise Damaged("start")
        if kind == "ChunkedKVCache" and moving["start"] < 0:
            raise Damaged("start")
        if kind == "RotatingKVCache" and not 0 <= moving["index"] <= count:
            raise Damaged("index")
    if {name: (dtype, list(shape)) for name, (dtype, shape) in blob.shapes.items()} != wanted:
        raise Damaged("tensors")


def _shapes(prefix: str, rows: dict[str, Any], count: int) -> dict[str, tuple[str, list[int]]]:
    return {
        prefix + key: (one["dtype"], [one["batch"], one["heads"], count, one["dim"]])
        for key, one in rows.items()
    }


def problems(root: Path) -> set[str]:
    """What an index says wrong of itself and of the blobs that it names."""
    index, found = FormatReader(root), set()
    edges = {
        (struct.unpack(">Q", key[:8])[0], key[8:]): unpack("edge", raw)
        for key, raw in index.tables["edges"].items()
    }
    blobs, entries = index.records("blobs", "blob"), index.records("entries", "entry")
    read: dict[int, Blob] = {}
    for number, record in blobs.items():
        try:
            read[number] = blob = read_blob(index.path_of(number))
        except (Damaged, OSError):
            found.add("blob")
            continue
        if (blob.nbytes, blob.digest) != (record["nbytes"], record["digest"]):
            found.add("digest")
        if record["kind"] == 0 and index.tables["tokens"][struct.pack(">Q", number)] != pack(
            blob.tokens
        ):
            found.add("tokens")
    spaces = index.namespaces()
    for edge in edges.values():
        blob_of = read.get(edge["blob"])
        if blob_of is not None and str(edge["complete"]) != blob_of.metadata["complete"]:
            found.add("complete")
    for key, space in spaces.items():
        if xxhash.xxh3_128(space["layout"].encode()).digest() != key[32:]:
            found.add("layout")
        pending = [(space["root"], b"", True)]
        while pending:
            node, packed, is_complete = pending.pop()
            for (above, _), edge in edges.items():
                if above != node or len(packed) > 1 << 20:
                    continue
                tokens = index.tables["tokens"][struct.pack(">Q", edge["blob"])]
                run = tokens[edge["first_row"] * 8 : (edge["first_row"] + edge["rows"]) * 8]
                pending.append((edge["node"], packed + run, is_complete and edge["complete"]))
                entry = entries.get(edge["entry"])
                if entry and not (entry["checkpoint"] or (is_complete and edge["complete"])):
                    found.add("resumable")
                right = xxhash.xxh3_64(key + packed + run).intdigest() or 1
                if edge["entry"] and edge["entry"] != right and right not in entries:
                    found.add("number")
    nodes = [edge["node"] for edge in edges.values()] + [one["root"] for one in spaces.values()]
    given = {
        "next_node": nodes,
        "next_blob": blobs,
        "next_namespace": [one["number"] for one in spaces.values()],
    }
    for counter, numbers in given.items():
        if index.counter(counter) < max(numbers, default=0):
            found.add(counter)
    return found


# ---- docs/bundle.md ------------------------------------------------------------------------------

MOST_TOKENS = 1 << 24


def read_bundle(path: Path) -> list[str]:
    """The ids of a bundle's entries, after all the checks of section 4.

    Raises:
        Damaged: One of them failed.
    """
    raw = path.read_bytes()
    members, at = [], 0
    while at < len(raw) and raw[at]:
        size = _member_size(raw[at : at + 512])
        name = raw[at : at + 100].rstrip(b"\0").decode("ascii", "replace")
        content = raw[at + 512 : at + 512 + size]
        if raw[at : at + 512] != _member_header(name, size) or len(content) != size:
            raise Damaged("header")
        at += 512 + size
        if any(raw[at : at + -size % 512]):
            raise Damaged("padding")
        at += -size % 512
        members.append((name, content))
    if raw[at:] != bytes(1024):
        raise Damaged("end")
    names = [name for name, _ in members]
    if names[:2] != ["manifest.json", "manifest.xxh3"]:
        raise Damaged("members")
    if members[1][1] != f"{xxh3_128(members[0][1])}\n".encode():
        raise Damaged("manifest checksum")
    try:
        return _read_entries(json.loads(members[0][1]), members[2:], path)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise Damaged("manifest") from error


def _member_size(header: bytes) -> int:
    if header[124:125] == b"\x80":
        return int.from_bytes(header[125:136], "big")
    try:
        return int(header[124:135], 8)
    except ValueError as error:
        raise Damaged("size") from error


def _member_header(name: str, size: int) -> bytes:
    sized = b"%011o\0" % size if size < 8 << 30 else b"\x80" + size.to_bytes(11, "big")
    made = bytearray(512)
    for offset, text in (
        (0, name.encode()),
        (100, b"0000600\0" + b"0000000\0" * 2 + sized + b"0" * 11 + b"\0" + b" " * 8 + b"0"),
        (257, b"ustar\x0000"),
        (329, b"0000000\0" * 2),
    ):
        made[offset : offset + len(text)] = text
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


def _read_entries(
    manifest: dict[str, Any], members: list[tuple[str, bytes]], path: Path
) -> list[str]:
    if manifest["format"] != "persist-cache-bundle" or manifest["version"] != 1:
        raise Damaged("version")
    blobs: dict[str, Blob] = {}
    if [f"{one['name']}.safetensors" for one in manifest["blobs"]] != [name for name, _ in members]:
        raise Damaged("members")
    models = []
    for model in manifest["models"]:
        texts = [text for item in sorted(model["identity"]["fields"].items()) for text in item]
        digest = hashlib.blake2b(pack_texts(texts), digest_size=32, person=b"persist-cache.fp")
        if model["identity"]["fields"]["layout"] != "1":
            raise Damaged("layout version")
        layers_of(model["layout"])
        models.append((digest.hexdigest(), model["layout"]))
    for said, (_, content) in zip(manifest["blobs"], members, strict=True):
        beside = path.with_name(f"{said['name']}.safetensors")
        beside.write_bytes(content)
        try:
            blob = read_blob(beside)
        finally:
            beside.unlink()
        if (blob.nbytes, blob.digest.hex()) != (said["nbytes"], said["digest"]):
            raise Damaged("digest")
        if (blob.metadata["fingerprint"], blob.metadata["layout"]) not in models:
            raise Damaged("model")
        check_layout(blob)
        parent = blobs.get(blob.metadata["parent"])
        if blob.metadata["kind"] == "run":
            if blob.start and (parent is None or not parent.start < blob.start <= parent.end):
                raise Damaged("parent")
            if not blob.start and blob.metadata["parent"]:
                raise Damaged("parent")
            if parent is not None and not _same_model(parent, blob):
                raise Damaged("model")
            if blob.prompt(blobs) is None or blob.end > MOST_TOKENS:
                raise Damaged("prefix")
        blobs[blob.name] = blob
    used, ids = set(), []
    for entry in manifest["entries"]:
        runs = [blobs[name] for name in entry["runs"]]
        way = [""] + [run.name for run in runs[:-1]]
        if [run.metadata["parent"] for run in runs] != way:
            raise Damaged("path")
        if not runs[-1].start < entry["num_tokens"] <= runs[-1].end:
            raise Damaged("length")
        prompt = runs[-1].prompt(blobs)
        assert prompt is not None
        tokens = prompt[: entry["num_tokens"]]
        digest, layout = models[entry["model"]]
        if (runs[-1].metadata["fingerprint"], runs[-1].metadata["layout"]) != (digest, layout):
            raise Damaged("model")
        key = bytes.fromhex(digest) + xxhash.xxh3_128(layout.encode()).digest()
        if f"{xxhash.xxh3_64(key + pack(tokens)).intdigest() or 1:016x}" != entry["id"]:
            raise Damaged("id")
        _check_states(entry, runs, blobs, tokens)
        used |= {*entry["runs"], entry["checkpoint"]}
        ids.append(entry["id"])
    if used - {None} != blobs.keys() or len(set(ids)) < len(ids):
        raise Damaged("unused")
    return ids


def _same_model(one: Blob, other: Blob) -> bool:
    return all(one.metadata[key] == other.metadata[key] for key in ("fingerprint", "layout"))


def _check_states(
    entry: dict[str, Any], runs: list[Blob], blobs: dict[str, Blob], tokens: list[int]
) -> None:
    states: dict[str, Any] = {}
    if entry["checkpoint"] is None:
        if not all(run.metadata["complete"] == "1" for run in runs):
            raise Damaged("incomplete")
    else:
        state = blobs[entry["checkpoint"]]
        right = (
            state.metadata["kind"] == "checkpoint"
            and state.start == state.end == len(tokens)
            and state.metadata["prefix"] == xxh3_128(pack(tokens))
            and state.metadata["parent"] == runs[-1].name
            and _same_model(state, runs[-1])
        )
        if not right:
            raise Damaged("checkpoint")
        states = json.loads(state.metadata["detail"])["states"]
    for place, layer in layers_of(runs[0].metadata["layout"]).items():
        for key in layer.get("rows", {}) if place not in states else ():
            if not all(f"layers.{place}.{key}" in run.shapes for run in runs):
                raise Damaged("neither rows nor state")


def write_blob(
    path: Path, metadata: dict[str, str], tensors: dict[str, tuple[str, list[int], bytes]]
) -> None:
    """Write a blob as sections 2 and 3 say."""
    table, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
        assert math.prod(shape) * ELEMENT_BYTES[dtype] == len(data)
    checksums = {name: xxh3_128(data) for name, (_, _, data) in tensors.items()}
    metadata = {**metadata, "checksums": json.dumps(checksums)}
    metadata["seal"] = xxh3_128(canonical([metadata, table]))
    text = json.dumps({"__metadata__": metadata, **table}).encode()
    text += b" " * (-(8 + len(text)) % 16384)
    data = b"".join(data for _, _, data in tensors.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
