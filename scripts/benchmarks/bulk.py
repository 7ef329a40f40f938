"""Indexes of any size in seconds: the records that `Store.put` would have made, without any files.

Look-ups and opening read the index only, so the blobs need not exist.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

from persist_cache import Store
from persist_cache.blobs.writer import Written
from persist_cache.entry import Tier
from persist_cache.index import tree
from persist_cache.index.records import (
    NO_ENTRY,
    BlobKind,
    Edge,
    EntryRecord,
    NamespaceRecord,
    edge_key,
    namespace_key,
)
from persist_cache.index.transaction import Writer
from persist_cache.store.recording import add_blob, place_entry
from persist_cache.tokens import TOKEN_BYTES, pack_tokens
from scripts.benchmarks.kv import FINGERPRINT, TOKENS_IN_VOCABULARY

LAYOUT = "[]"
SYSTEM_TOKENS = (800, 9_000, 28_000)
"""Lengths of the system prompts; a conversation begins with one of them."""
TURNS = 6
_NEW_TOKENS = {Tier.USER: (20, 120), Tier.ASSISTANT: (60, 240)}


def conversations(num_entries: int, seed: int = 0) -> Iterator[tuple[bytes, list[bytes]]]:
    """System prompts with what follows them: (system part, the new part of each later entry).

    Twenty system prompts at most; every conversation has `TURNS` turns of two entries.
    """
    source = random.Random(seed)

    def some(count: int) -> bytes:
        return pack_tokens([source.randrange(TOKENS_IN_VOCABULARY) for _ in range(count)])

    num_systems = min(20, max(len(SYSTEM_TOKENS), num_entries // 100))
    lengths = [SYSTEM_TOKENS[i % len(SYSTEM_TOKENS)] for i in range(num_systems)]
    systems = [some(length) for length in lengths]
    left = num_entries - num_systems
    while left > 0:
        parts = []
        for _ in range(min(TURNS, -(-left // 2))):
            for tier in (Tier.USER, Tier.ASSISTANT):
                parts.append(some(source.randint(*_NEW_TOKENS[tier])))
        yield systems[source.randrange(num_systems)], parts[:left]
        left -= len(parts[:left])


def fill(path: Path, num_entries: int) -> int:
    """Make a store with about `num_entries` entries; returns the tokens it stores."""
    with Store.open(path, min_free_bytes=0, max_bytes=1 << 50) as store:
        made = store._disk.index.update(lambda txn: _put_all(txn, num_entries))
    for number in range(256):
        (path / "blobs" / f"{number:02x}").mkdir(mode=0o700, exist_ok=True)
    return made


def _put_all(txn: Writer, num_entries: int) -> int:
    key = namespace_key(FINGERPRINT.digest, LAYOUT)
    namespace = NamespaceRecord(
        number=txn.add("next_namespace", 1),
        root=tree.new_node(txn),
        # As long as that of a real model.
        identity=FINGERPRINT.to_json().decode().ljust(2048),
        layout=LAYOUT,
        created=0.0,
    )
    txn.put_namespace(key, namespace)
    nodes: dict[bytes, int] = {}
    num_tokens = 0

    def put(before: bytes, node: int, new: bytes, tier: Tier) -> tuple[bytes, int]:
        rows, start = len(new) // TOKEN_BYTES, len(before) // TOKEN_BYTES
        name = os.urandom(16).hex()
        written = Written(name, rows * 1024, rows * 1024, bytes(16))
        blob = add_blob(
            txn,
            written,
            namespace=namespace.number,
            kind=BlobKind.RUN,
            created=0.0,
            start=start,
            packed=new,
        )
        record = txn.blob(blob)
        assert record is not None
        txn.put_blob(blob, record._replace(references=1))
        below = tree.new_node(txn)
        edge = Edge(True, blob, below, NO_ENTRY, 0, rows)
        txn.put_edge(edge_key(node, new[:TOKEN_BYTES]), edge)
        entry = EntryRecord.fresh(tier, start + rows, 0.0)._replace(
            namespace=namespace.number, node=below
        )
        place_entry(txn, key, before + new, entry)
        nonlocal num_tokens
        num_tokens += rows
        return before + new, below

    for system, parts in conversations(num_entries):
        if system not in nodes:
            nodes[system] = put(b"", namespace.root, system, Tier.SYSTEM)[1]
        path, node = system, nodes[system]
        for index, part in enumerate(parts):
            tier = Tier.ASSISTANT if index % 2 else Tier.USER
            path, node = put(path, node, part, tier)
    return num_tokens


def queries(num_entries: int, length: int, count: int) -> dict[str, list[list[int]]]:
    """Prompts under the system prompt of the size next below `length`, by kind.

    `hit`: the next turn of a stored conversation. `partial`: leaves it in the middle of its
    system prompt. `miss`: shares nothing.
    """
    from persist_cache.tokens import unpack_tokens

    system_tokens = max(size for size in SYSTEM_TOKENS if size <= length)
    source = random.Random(length)
    new = [source.randrange(TOKENS_IN_VOCABULARY) for _ in range(length)]
    found: dict[str, list[list[int]]] = {"hit": [], "partial": [], "miss": []}
    for system, parts in conversations(num_entries):
        if len(system) != system_tokens * TOKEN_BYTES:
            continue
        tokens = unpack_tokens(system + b"".join(parts))
        found["hit"].append((tokens + new)[: max(length, len(tokens) + 50)])
        found["partial"].append((tokens[: system_tokens // 2] + new)[:length])
        found["miss"].append([TOKENS_IN_VOCABULARY + len(found["miss"]), *new[1:]])
        if len(found["hit"]) == count:
            break
    return found
