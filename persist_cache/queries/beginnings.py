"""How stored prompts begin, so that people can tell them apart.

An entry that continues another one is told by its own part: all conversations below one system
prompt begin alike. Nothing of a text is kept anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

from msgspec import Struct

from persist_cache.index import tree
from persist_cache.index.records import NO_ENTRY
from persist_cache.queries.models import Model, as_model
from persist_cache.stability.lookalike import escaped
from persist_cache.store.catalog import namespace_of
from persist_cache.store.store import Store
from persist_cache.tokens import TOKEN_BYTES, common_prefix_tokens, unpack_tokens

MAX_TOKENS = 96
MAX_CHARACTERS = 200
_ROLE = re.compile(r"\A\s*(?:system|developer|user|human|assistant|model|tool)\s*(?:\n|:)", re.I)
_NEXT = re.compile(r"\s*\n\s*(?:user|human|assistant|model|tool)\s*(?:\n|\Z)", re.I)
_CONTEXT_TOKENS = 12
_WINDOW_TOKENS = 40
_SHORT = 48
"""Characters that a title has in front of what tells it apart."""


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
    """A decoded beginning as a title: its first turn on one line, without the role before it.

    Args:
        text: Without the tokens that only structure it.
        is_cut: Whether there is more of it.
        most: Characters that it may have.
    """
    own = _ROLE.sub("", text, count=1)
    first = _NEXT.split(own if own.strip() else text, maxsplit=1)
    line = " ".join(first[0].split())
    is_cut = is_cut and len(first) == 1
    shown = escaped(line[: most + 1].rstrip("\ufffd") if is_cut else line[: most + 1])
    if len(shown) <= most and not (is_cut and shown):
        return shown
    return f"{shown[: most - 1]}…"


def partings(store: Store, ids: Sequence[str]) -> dict[str, list[int]]:
    """Of prompts that begin alike, the tokens around the place from which each is like no other.

    Args:
        store: With the entries.
        ids: Of entries; those that are gone are left out.
    """
    with store.read() as txn:
        records = {id: txn.entry(int(id, 16)) for id in ids}
        packed = {id: tree.tokens_of(txn, record.node) for id, record in records.items() if record}
    # What has most in common with one stands beside it.
    order = sorted(packed, key=packed.__getitem__)
    shared = [common_prefix_tokens(packed[one], packed[other]) for one, other in pairwise(order)]
    found = {}
    for id, before, behind in zip(order, [0, *shared], [*shared, 0], strict=True):
        start = max(0, max(before, behind) - _CONTEXT_TOKENS)
        window = packed[id][start * TOKEN_BYTES : (start + _WINDOW_TOKENS) * TOKEN_BYTES]
        found[id] = unpack_tokens(window)
    return found


def told_apart(title: str, window: str) -> str:
    """A title that others have as well, with what they do not have."""
    line = escaped(" ".join(window.split()).strip("\ufffd"))
    return f"{title[:_SHORT].rstrip(' …')} … {line}"[:MAX_CHARACTERS]


def titles(
    store: Store, begins: Mapping[str, Beginning], decode: Callable[[Model, list[int]], str | None]
) -> dict[str, str | None]:
    """Titles of entries that differ, as far as the entries do; None where one cannot be decoded.

    Args:
        store: With the entries.
        begins: Their beginnings.
        decode: Tokens of a model as text, without those that only structure a prompt.
    """
    found: dict[str, str | None] = {}
    alike: dict[tuple[str, str], list[str]] = {}
    for id, begin in begins.items():
        text = decode(begin.model, begin.tokens)
        title = found[id] = None if text is None else on_one_line(text, is_cut=begin.is_cut)
        if title and begin.is_cut:
            alike.setdefault((begin.model.fingerprint, title), []).append(id)
    for (_, title), ids in alike.items():
        if len(ids) > 1:
            for id, window in partings(store, ids).items():
                found[id] = told_apart(title, decode(begins[id].model, window) or "")
    return found
