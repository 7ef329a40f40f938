"""A KV source without a model: every row is a function of its token and position.

So a restored prefix can be checked byte for byte against what any source of the same tokens
would hold, whichever blobs it came from.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from persist_cache import fs
from persist_cache.blobs import BlobReader, Payload, Tensor
from persist_cache.errors import CorruptBlobError
from persist_cache.fingerprint import Fingerprint
from persist_cache.records import BlobRecord
from persist_cache.store import Store

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
    """A cache of one sliceable layer, and one that keeps only its state unless `complete`."""

    tokens: Sequence[int]
    complete: bool = True
    has_state: bool = False
    layout: str = '{"fake":1}'

    def rows(self, start: int, end: int) -> Payload:
        rows = kv_rows(self.tokens, start, end)
        tensors = [Tensor("layers.0.keys", "I64", rows.shape, [rows.data.cast("B")])]
        return Payload(tensors)

    def checkpoint(self) -> Payload | None:
        if self.complete and not self.has_state:
            return None
        state = kv_rows(self.tokens, len(self.tokens) - 1, len(self.tokens))
        tensors = [Tensor("layers.1.state.0", "I64", state.shape, [state.data.cast("B")])]
        return Payload(tensors, json.dumps({"at": len(self.tokens)}))


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
            right = right and np.array_equal(self.state, kv_rows(tokens, n - 1, n))
        return bool(right)


def restore(
    runs: Sequence[tuple[BlobReader, int]], checkpoint: BlobReader | None, num_tokens: int
) -> Restored:
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
        info = checkpoint.header.tensors["layers.1.state.0"]
        state = np.empty(info.shape, dtype=np.int64)
        checkpoint.read("layers.1.state.0", [state.data.cast("B")])
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
    store: Store, tokens: Sequence[int], *, complete: bool = True, model: str = "w0", **options: Any
) -> str:
    """Store `tokens` and return the entry's id; the clock of the store does not move."""
    source = FakeSource(tokens, complete=complete, has_state=True)
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
        "persist_cache.compact",
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
    """What `du` says."""
    paths = [root, *root.rglob("*")]
    return sum(path.lstat().st_blocks * 512 for path in paths)
