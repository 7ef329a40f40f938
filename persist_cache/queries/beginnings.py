"""How stored prompts begin, so that people can tell them apart.

An entry that continues another one is told by its own part: all conversations below one system
prompt begin alike. Nothing of a text is kept anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from msgspec import Struct

from persist_cache.index import tree
from persist_cache.index.records import NO_ENTRY
from persist_cache.queries.models import Model, as_model
from persist_cache.stability.lookalike import escaped
from persist_cache.store.catalog import namespace_of
from persist_cache.store.store import Store
from persist_cache.tokens import TOKEN_BYTES, unpack_tokens

MAX_TOKENS = 96
MAX_CHARACTERS = 200
_ROLE = re.compile(r"\s*(?:system|developer|user|human|assistant|model|tool)\s*(?:\n|:)", re.I)


class Beginning(Struct, frozen=True):
    """The first tokens of an entry's own part.

    Attributes:
        model: Whose entry it is.
        start: Tokens of the entry that it continues, 0 where there is none.
        tokens: What follows them, as far as it is needed.
        is_cut: Whether there is more of it.
    """

    model: Model
    start: int
    tokens: list[int]
    is_cut: bool


def beginnings(store: Store, ids: Iterable[str]) -> dict[str, Beginning]:
    """The beginnings of these entries; those that are not there are left out.

    Raises:
        StoreError: The index contradicts itself.
    """
    found = {}
    with store.read() as txn:
        for id in ids:
            record = txn.entry(int(id, 16))
            if record is None:
                continue
            path = [edge for _, edge in tree.path_of(txn, record.node)]
            own = len(path) - 1
            while own and path[own - 1].entry == NO_ENTRY:
                own -= 1
            start = sum(edge.rows for edge in path[:own])
            packed = b""
            for edge in path[own:]:
                rows = min(edge.rows, MAX_TOKENS - len(packed) // TOKEN_BYTES)
                packed += txn.tokens(edge.blob, edge.first_row, rows)
                if len(packed) >= MAX_TOKENS * TOKEN_BYTES:
                    break
            model = as_model(*namespace_of(txn, record))
            is_cut = record.num_tokens - start > len(packed) // TOKEN_BYTES
            found[id] = Beginning(model, start, unpack_tokens(packed), is_cut)
    return found


def on_one_line(text: str, *, is_cut: bool = False, most: int = MAX_CHARACTERS) -> str:
    """A decoded beginning as a title: harmless, of one line, without the role that it opens with.

    Args:
        text: Without the tokens that only structure it.
        is_cut: Whether there is more of it.
        most: Characters that it may have.
    """
    line = " ".join(_ROLE.sub("", text, count=1).split()) if _ROLE.match(text) else ""
    line = line or " ".join(text.split())
    shown = escaped(line[:most].rstrip("\ufffd") if is_cut else line[: most + 1])
    if len(shown) <= most and not (is_cut and shown):
        return shown
    return f"{shown[: most - 1]}…"
