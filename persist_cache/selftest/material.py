"""KV without a model: every row follows from its token and position, so all can be checked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from persist_cache import Store
from persist_cache.blobs.layout import Layout, RowGeometry, encode_layout
from persist_cache.codec import Blob, Payload, Tensor
from persist_cache.errors import CorruptBlobError
from persist_cache.fingerprint.value import Fingerprint

DIM = 32
ROW_BYTES = 2 * DIM
_SIDES = ("keys", "values")
_GEOMETRY = RowGeometry(dtype="BF16", batch=1, heads=1, dim=DIM)
LAYOUT = encode_layout([Layout("KVCache", rows=dict.fromkeys(_SIDES, _GEOMETRY))])
MODEL = Fingerprint.from_fields({"weights": "selftest", "config": "selftest"})


def tokens(seed: int, number: int) -> list[int]:
    """A prompt that shares no beginning with that of another seed."""
    return [(seed << 20) + position for position in range(number)]


def rows(side: str, prompt: Sequence[int], start: int, end: int) -> bytes:
    """The rows of one side for the tokens `[start, end)`."""
    return b"".join(
        hashlib.blake2b(f"{side}{prompt[place]}:{place}".encode(), digest_size=ROW_BYTES).digest()
        for place in range(start, end)
    )


class RowSource:
    """What a put saves of a prompt."""

    layout = LAYOUT
    complete = True

    def __init__(self, prompt: Sequence[int]) -> None:
        self._prompt = prompt

    def rows(self, start: int, end: int) -> Payload:
        """The rows of tokens `[start, end)`."""
        return Payload(
            [
                Tensor(
                    f"layers.0.{side}",
                    "BF16",
                    (1, 1, end - start, DIM),
                    [memoryview(rows(side, self._prompt, start, end))],
                )
                for side in _SIDES
            ]
        )

    def checkpoint(self) -> Payload | None:
        """There is none: all rows are there."""
        return None


def put(store: Store, prompt: Sequence[int]) -> None:
    """Store a prompt."""
    store.put(MODEL, prompt, RowSource(prompt))


def is_whole(store: Store, prompt: Sequence[int]) -> bool:
    """Whether a prompt is there, and comes back byte for byte."""

    def restore(runs: Sequence[tuple[Blob, int]], checkpoint: Blob | None, num_tokens: int) -> bool:
        start = 0
        for reader, used in runs:
            for side in _SIDES:
                found = bytearray(reader.header.tensors[f"layers.0.{side}"].nbytes)
                reader.read(f"layers.0.{side}", [memoryview(found)])
                wanted = rows(side, prompt, start, start + used)
                if bytes(found[: len(wanted)]) != wanted:
                    raise CorruptBlobError(reader.path, "its rows are not those of the prompt")
            start += used
        return start == len(prompt)

    found = store.fetch(MODEL, prompt, restore)
    return found is not None and found[0]


def opened(folder: Path) -> Store:
    """The store of a check, which may use all of the disk."""
    return Store.open(folder / "store", min_free_bytes=0)
