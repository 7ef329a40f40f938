"""A KV source without a model: every row is a function of its token and position.

So a restored prefix can be checked byte for byte against what any source of the same tokens
would hold, whichever blobs it came from.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from persist_cache import fs
from persist_cache.codec import Blob, Payload, Tensor
from persist_cache.errors import CorruptBlobError
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.index.records import BlobRecord
from persist_cache.store.store import Store

if TYPE_CHECKING:
    import pytest

HEADS, WIDTH = 2, 4


def kv_rows(tokens: Sequence[int], start: int, end: int) -> np.ndarray:
    """Rows `(1, HEADS, end - start, WIDTH)` of int64; row i depends on tokens[0..i], as KV does."""
    running = np.cumsum(np.asarray(tokens, dtype=np.int64), dtype=np.int64)[start:end]
    heads = np.arange(1, HEADS + 1, dtype=np.int64)[:, None, None]
    width = np.arange(WIDTH, dtype=np.int64)[None, None, :]
    return np.ascontiguousarray((running[None, :, None] * heads + width)[None])


@dataclass
class FakeSource:
    """A cache of one sliceable layer, and one that keeps only its state unless `complete`.

    Attributes:
        tokens: What it stands for.
        complete: Rows of all layers are there.
        has_state: It has the second layer, also if it is complete.
        layout: Of no class that there is, unless it is `real`.
        real: As mlx-lm's classes have it, which is what an import asks for: values without width,
            and a second layer of one head of one number.
    """

    tokens: Sequence[int]
    complete: bool = True
    has_state: bool = False
    layout: str = '{"fake":1}'
    real: bool = False

    def __post_init__(self) -> None:
        if self.real:
            layers = [{"class": "KVCache", "rows": _geometry(HEADS, WIDTH)}]
            if self.has_state or not self.complete:
                scalars = {"keep": 0, "max_size": 1 << 20}
                rows = _geometry(1, 1)
                layers.append({"class": "RotatingKVCache", "rows": rows, "scalars": scalars})
            self.layout = json.dumps(layers, separators=(",", ":"), sort_keys=True)

    def rows(self, start: int, end: int) -> Payload:
        rows = kv_rows(self.tokens, start, end)
        if not self.real:
            return Payload([_tensor("layers.0.keys", rows)])
        tensors = [_tensor("layers.0.keys", rows), _tensor("layers.0.values", rows[..., :0])]
        if self.complete and self.has_state:
            tensors += _pair("layers.1", rows)
        return Payload(tensors)

    def checkpoint(self) -> Payload | None:
        if self.complete and not self.has_state:
            return None
        count = len(self.tokens)
        state = kv_rows(self.tokens, count - 1, count)
        if self.real:
            states = {"1": {"offset": count, "index": 1}}
            return Payload(_pair("layers.1.state", state), json.dumps({"states": states}))
        return Payload([_tensor("layers.1.state.0", state)], json.dumps({"at": count}))


def _geometry(heads: int, width: int) -> dict[str, dict[str, Any]]:
    keys = {"batch": 1, "dim": width, "dtype": "I64", "heads": heads}
    return {"keys": keys, "values": {**keys, "dim": 0}}


def _tensor(name: str, rows: np.ndarray) -> Tensor:
    pieces = [np.ascontiguousarray(rows).data.cast("B")] if rows.size else []
    return Tensor(name, "I64", rows.shape, pieces)


def _pair(name: str, rows: np.ndarray) -> list[Tensor]:
    """Keys of one head of one number, and values without width."""
    one = rows[:, :1, :, :1]
    return [_tensor(f"{name}.keys", one), _tensor(f"{name}.values", one[..., :0])]


@dataclass
class Restored:
    """What `restore` read."""

    rows: np.ndarray
    state: np.ndarray | None

    def equals(self, tokens: Sequence[int]) -> bool:
        """Whether this is bit for bit what a source of `tokens` holds."""
        n = len(tokens)
        right = self.rows.shape[2] == n and np.array_equal(self.rows, kv_rows(tokens, 0, n))
        if self.state is not None:
            _, heads, _, width = self.state.shape
            wanted = kv_rows(tokens, n - 1, n)[:, :heads, :, :width]
            right = right and np.array_equal(self.state, wanted)
        return bool(right)


def restore(runs: Sequence[tuple[Blob, int]], checkpoint: Blob | None, num_tokens: int) -> Restored:
    """Read a match back, as a codec would."""
    parts = []
    for reader, used in runs:
        info = reader.header.tensors["layers.0.keys"]
        rows = np.empty(info.shape, dtype=np.int64)
        reader.read("layers.0.keys", [rows.data.cast("B")])
        parts.append(rows[:, :, :used])
    rows = np.concatenate(parts, axis=2)
    if rows.shape[2] != num_tokens:
        raise CorruptBlobError(runs[-1][0].path, "its rows do not cover the match")
    state = None
    if checkpoint is not None:
        name = next(name for name in checkpoint.header.tensors if not name.endswith("values"))
        state = np.empty(checkpoint.header.tensors[name].shape, dtype=np.int64)
        checkpoint.read(name, [state.data.cast("B")])
    return Restored(rows, state)


def fingerprint(**changes: str | int) -> Fingerprint:
    """An identity; any change makes it another model."""
    return Fingerprint.from_fields({"weights": "w0", "config": "c0", **changes})


class Clock:
    """UTC seconds that go on only when told to."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def put(
    store: Store,
    tokens: Sequence[int],
    *,
    complete: bool = True,
    model: str = "w0",
    real: bool = False,
    **options: Any,
) -> str:
    """Store `tokens` and return the entry's id; the clock of the store does not move."""
    source = FakeSource(tokens, complete=complete, has_state=True, real=real)
    entry = store.put(fingerprint(weights=model), tokens, source, **options).entry
    assert entry is not None
    return entry


def fetched(store: Store, tokens: Sequence[int], *, model: str = "w0") -> int:
    """Tokens of the longest stored prefix, read back and compared byte for byte."""
    found = store.fetch(fingerprint(weights=model), tokens, restore)
    if found is None:
        return 0
    value, match = found
    assert value.equals(tokens[: match.num_tokens]), "restored bytes differ"
    return match.num_tokens


def any_dead_rows(record: BlobRecord, living: int) -> bool:
    """In the place of `compact.is_mostly_dead`: no file as small as here is mostly rows."""
    return living < record.num_tokens


@contextlib.contextmanager
def eager_gc() -> Iterator[None]:
    """Let `gc` write anew whatever it may, however little that is worth here."""
    with mock.patch.multiple(
        "persist_cache.store.compact",
        is_mostly_dead=any_dead_rows,
        LONG_CHAIN=2,
        FURTHER_RUNS=2,
        _without_long_head=lambda chain, share=0: chain,
    ):
        yield


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something between the writing of the next blob and its commit, once."""
    publish = fs.rename
    done: list[bool] = []

    def rename(source: Path, target: Path) -> None:
        publish(source, target)
        if not done and source.parent.name == "tmp":
            done.append(True)
            act()

    monkeypatch.setattr(fs, "rename", rename)


def files_in(root: Path) -> list[Path]:
    """All files below `root`."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def blob_files(root: Path) -> list[Path]:
    """Published blobs."""
    return sorted((root / "blobs").glob("*/*.safetensors"))


def disk_usage(root: Path) -> int:
    """What `du` says, also while others make and remove files there; 0 before there is a folder."""
    blocks = 0
    with contextlib.suppress(FileNotFoundError):
        blocks = os.lstat(root).st_blocks
    pending = [str(root)]
    while pending:
        with contextlib.suppress(FileNotFoundError), os.scandir(pending.pop()) as found:
            for one in found:
                with contextlib.suppress(FileNotFoundError):
                    blocks += one.stat(follow_symlinks=False).st_blocks
                    if one.is_dir(follow_symlinks=False):
                        pending.append(one.path)
    return blocks * 512
