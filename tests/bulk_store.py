"""Large stores in a second: records and sparse files put in place without writing any KV.

The index is what `Store.put` would have made of the same prompts, invariants included; only the
blobs are hollow, so anything that reads their bytes would call them damaged.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from persist_cache.blobs.writer import Written
from persist_cache.entry import Tier
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.index import tree
from persist_cache.index.records import BlobKind, EntryRecord, NamespaceRecord, namespace_key
from persist_cache.index.transaction import Writer
from persist_cache.store.recording import add_blob, place_entry
from persist_cache.store.store import Store
from persist_cache.tokens import pack_tokens
from tests import forge

LAYOUT = '{"fake":1}'


@dataclass(frozen=True)
class Prompt:
    """One entry to be: the tokens that it adds to those of `before`."""

    model: Fingerprint
    tokens: tuple[int, ...]
    tier: Tier
    before: Prompt | None = None
    label: str = ""
    pinned: bool = False
    hits: int = 0
    saved_s: float = 0.0
    age_s: float = 0.0
    idle_s: float = 0.0
    expires_in_s: float = 0.0

    def all_tokens(self) -> tuple[int, ...]:
        return (self.before.all_tokens() if self.before else ()) + self.tokens


def conversations(
    model: Fingerprint, number: int, *, systems: int = 1, turns: int = 3, seed: int = 0
) -> Iterator[Prompt]:
    """`number` entries: system prompts, and conversations of `turns` turns below them."""
    random_ = random.Random(seed)

    def some(count: int) -> tuple[int, ...]:
        return tuple(random_.randrange(150_000) for _ in range(count))

    roots = [Prompt(model, some(64), Tier.SYSTEM) for _ in range(min(systems, number))]
    yield from roots
    made = len(roots)
    while made < number:
        last = random_.choice(roots)
        for _ in range(turns):
            for tier in (Tier.USER, Tier.ASSISTANT):
                if made < number:
                    last = Prompt(model, some(8), tier, last)
                    yield last
                    made += 1


def fill(store: Store, prompts: Iterator[Prompt], *, bytes_per_token: int = 1024) -> None:
    """Put `prompts` into `store` in one commit, parents before children."""
    now = store.clock()

    def put_all(txn: Writer) -> None:
        for prompt in prompts:
            _put(txn, store.root, prompt, now, bytes_per_token)

    forge.change(store, put_all)


def _put(txn: Writer, root: Path, prompt: Prompt, now: float, bytes_per_token: int) -> None:
    key = namespace_key(prompt.model.digest, LAYOUT)
    namespace = _namespace(txn, key, prompt.model, now)
    packed = pack_tokens(prompt.all_tokens())
    path = tree.walk(txn, namespace.root, packed)
    start = len(prompt.all_tokens()) - len(prompt.tokens)
    assert path.common == start, "tokens of different prompts must differ at once"
    nbytes = bytes_per_token * len(prompt.tokens)
    name = os.urandom(16).hex()
    file = root / "blobs" / name[:2] / f"{name}.safetensors"
    file.parent.mkdir(mode=0o700, exist_ok=True)
    with file.open("wb") as stream:
        stream.truncate(nbytes)
    blob = add_blob(
        txn,
        Written(name, nbytes, nbytes, bytes(16)),
        namespace=namespace.number,
        kind=BlobKind.RUN,
        created=now - prompt.age_s,
        start=start,
        packed=pack_tokens(prompt.tokens),
    )
    node = tree.attach(txn, path, packed, [tree.Piece(blob, len(prompt.tokens), True)])
    record = EntryRecord.fresh(prompt.tier, len(packed) // 8, now - prompt.age_s)._replace(
        namespace=namespace.number,
        node=node,
        label=prompt.label,
        pinned=prompt.pinned,
        hits=prompt.hits,
        saved_s=prompt.saved_s,
        last_use_us=int((now - prompt.idle_s) * 1e6),
        expires=now + prompt.expires_in_s if prompt.expires_in_s else 0.0,
    )
    place_entry(txn, key, packed, record)


def _namespace(txn: Writer, key: bytes, model: Fingerprint, now: float) -> NamespaceRecord:
    found = txn.namespaces(key)
    if found:
        return found[0][1]
    record = NamespaceRecord(
        number=txn.add("next_namespace", 1),
        root=tree.new_node(txn),
        identity=model.to_json().decode(),
        layout=LAYOUT,
        created=now,
    )
    txn.put_namespace(key, record)
    return record
