"""Why a prompt is found on disk only so far: where two prompts part, or which field changed.

Reads the index only, so it works beside a running server and without a model's weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from persist_cache.entry import Match
from persist_cache.fingerprint.value import CACHE_SALT, FieldChange, Fingerprint
from persist_cache.index import tree
from persist_cache.index.records import NO_ENTRY, entry_number
from persist_cache.index.transaction import Reader
from persist_cache.store.catalog import identity_of
from persist_cache.store.evict import REPLACED
from persist_cache.store.kin import is_same_model, told
from persist_cache.store.store import Store
from persist_cache.tokens import TOKEN_BYTES, pack_tokens, unpack_tokens

_CONTEXT_TOKENS = 24
_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60))
_MANY_MORE_TOKENS = 16
"""What a chat template puts before a prompt is stored under each version of a model."""


class Divergence(Struct, frozen=True):
    """Where a prompt leaves what is stored.

    Attributes:
        position: Index of the first token that differs.
        before: Tokens right before it, the same on both sides.
        prompt: Tokens of the prompt from there; empty when the prompt ends.
        stored: Tokens of the stored prompt from there; empty when nothing goes on.
    """

    position: int
    before: list[int]
    prompt: list[int]
    stored: list[int]


class Explanation(Struct, frozen=True):
    """What a request with a prompt would find, and why no more.

    Attributes:
        num_tokens: Length of the prompt.
        cached_tokens: Tokens that would not be computed.
        common_tokens: Tokens shared with a stored prompt, resumable or not.
        outcome: `hit` (all that can be), `ends` (what is stored ends here), `diverges`,
            `no_checkpoint`, `other_model`, `gone`, `nothing`.
        message: The answer in one sentence.
        entry: Id of the entry it would use, or None.
        saved_s: Seconds of prefill that would be saved, 0 when unknown.
        divergence: Where the prompt leaves what is stored, when it does.
        changes: Fields of the model's identity that differ from those of what is stored: of
            another model, or of this one before it was changed, which has more of the prompt.
        now_tokens: Tokens that a running server would not compute, its memory included; None
            where no server was asked.
        memory_tokens: Tokens that the server's memory alone would serve; None as before.
        expires: When that entry expires, in UTC seconds, or None.
    """

    num_tokens: int
    cached_tokens: int
    common_tokens: int
    outcome: str
    message: str
    entry: str | None = None
    saved_s: float = 0.0
    divergence: Divergence | None = None
    changes: list[FieldChange] = []
    now_tokens: int | None = None
    memory_tokens: int | None = None
    expires: float | None = None


def explain(
    store: Store,
    fingerprint: Fingerprint,
    tokens: Sequence[int],
    *,
    system_tokens: int = 0,
    leave_tokens: int = 1,
) -> Explanation:
    """Say what a request with `tokens` would find in `store`.

    Args:
        store: An open store.
        fingerprint: Identity of the model that would serve it.
        tokens: The prompt.
        system_tokens: Length of its system part, 0 if unknown.
        leave_tokens: Tokens that are always computed; 1 in a server.
    """
    packed = pack_tokens(tokens)
    limit = max(0, len(tokens) - leave_tokens)
    match = store.match(fingerprint, packed, limit=limit)
    with store.read() as txn:
        divergence = _divergence(txn, fingerprint, packed, match.common_tokens)
        if match.num_tokens == 0 and match.common_tokens == 0:
            return _explain_miss(txn, fingerprint, tokens, packed, system_tokens, divergence)
        former, common = None, 0
        if match.num_tokens < limit:
            former, common = _nearest_model(txn, fingerprint, packed, only_kin=True)
    found = _explain_match(match, tokens, limit, system_tokens, divergence)
    with contextlib.suppress(KeyError):  # it was evicted meanwhile
        expires = None if found.entry is None else store.get(found.entry).expires
        if expires is not None:
            found = msgspec.structs.replace(
                found, expires=expires, message=f"{found.message} {_expiry(store, expires)}"
            )
    if former is None or common - match.common_tokens < _MANY_MORE_TOKENS:
        return found
    # A model that stored one prompt since it was upgraded still misses all others.
    changes = fingerprint.diff(former.fields)
    return msgspec.structs.replace(
        found,
        message=f"{found.message} Of the same model, {common:,} tokens are {told(changes)}.",
        changes=changes,
    )


def _expiry(store: Store, expires: float) -> str:
    left_s = expires - store.clock()
    if left_s <= 0:
        return "Its entry has expired, and is about to go."
    unit, size = next(
        ((unit, size) for unit, size in _UNITS if left_s >= size), ("less than a minute", 0)
    )
    if not size:
        return f"Its entry expires in {unit}."
    count = int(left_s // size)
    return f"Its entry expires in {count} {unit}{'' if count == 1 else 's'}."


def with_memory(found: Explanation, *, now_tokens: int, memory_tokens: int) -> Explanation:
    """Add what a running server has in memory to what was found on disk.

    Args:
        found: What `explain` said of the disk.
        now_tokens: Tokens that a request would not have computed now.
        memory_tokens: Tokens that memory alone would serve.
    """
    disk, total = found.cached_tokens, found.num_tokens
    message = found.message
    if memory_tokens != disk:
        message = (
            f"A request would get {now_tokens:,} of {total:,} tokens now, and {disk:,} after a "
            f"restart: memory has {memory_tokens:,}, the disk {disk:,}. {message}"
        )
    return msgspec.structs.replace(
        found, message=message, now_tokens=now_tokens, memory_tokens=memory_tokens
    )


def _explain_match(
    match: Match,
    tokens: Sequence[int],
    limit: int,
    system_tokens: int,
    divergence: Divergence | None,
) -> Explanation:
    found, total = match.num_tokens, len(tokens)
    if found == limit:
        outcome, why = "hit", ""
    elif found < min(match.common_tokens, limit):
        outcome = "no_checkpoint"
        why = (
            f" A stored prompt shares {match.common_tokens:,} tokens, but there is no checkpoint "
            "at the branch: this model's cache cannot be trimmed."
        )
    elif divergence is not None and divergence.stored:
        outcome, why = "diverges", f" Token {divergence.position:,} differs from what is stored."
    else:
        outcome, why = "ends", " What is stored ends there."
    head = f"{found:,} of {total:,} tokens are cached on disk"
    if system_tokens and found >= system_tokens:
        head += f", all {system_tokens:,} system tokens among them"
    elif system_tokens:
        head += f", {found:,} of the {system_tokens:,} system tokens"
    return Explanation(
        num_tokens=total,
        cached_tokens=found,
        common_tokens=match.common_tokens,
        outcome=outcome,
        message=head + "." + why,
        entry=match.entries[-1] if match.entries else None,
        saved_s=match.saved_s,
        divergence=divergence if outcome == "diverges" else None,
    )


def _explain_miss(
    txn: Reader,
    fingerprint: Fingerprint,
    tokens: Sequence[int],
    packed: bytes,
    system_tokens: int,
    divergence: Divergence | None,
) -> Explanation:
    """Nothing was found: it has gone, it belongs to another model, or it never was."""
    total = len(tokens)
    gone = _departed(txn, fingerprint, packed, {system_tokens, total - 1, total})
    if gone:
        return Explanation(total, 0, 0, "gone", f"It was stored once, but {gone}.")
    other, common = _nearest_model(txn, fingerprint, packed)
    if other is not None:
        changes = fingerprint.diff(other.fields)
        names = ", ".join(change.name for change in changes)
        message = (
            f"{common:,} of {total:,} tokens are stored for another model; "
            f"what changed since: {names}."
        )
        return Explanation(total, 0, 0, "other_model", message, changes=changes)
    if divergence is not None and divergence.stored:
        message = "No stored prompt of this model begins with the first token."
        return Explanation(total, 0, 0, "diverges", message, divergence=divergence)
    return Explanation(total, 0, 0, "nothing", "Nothing like this prompt is stored.")


def _divergence(
    txn: Reader, fingerprint: Fingerprint, packed: bytes, common: int
) -> Divergence | None:
    """The parting of ways on the path that goes farthest with the prompt."""
    best: tree.Walk | None = None
    for _, namespace in txn.namespaces(fingerprint.digest):
        path = tree.walk(txn, namespace.root, packed)
        if best is None or path.common > best.common:
            best = path
    if best is None:
        return None
    start = max(0, common - _CONTEXT_TOKENS) * TOKEN_BYTES
    here = common * TOKEN_BYTES
    end = here + _CONTEXT_TOKENS * TOKEN_BYTES
    return Divergence(
        position=common,
        before=unpack_tokens(packed[start:here]),
        prompt=unpack_tokens(packed[here:end]),
        stored=unpack_tokens(_continuation(txn, best)),
    )


def _continuation(txn: Reader, path: tree.Walk) -> bytes:
    """What is stored behind the end of a walk: the rest of its edge, else along first children."""
    found = b""
    node = path.node
    if node is None:
        step = path.steps[-1]
        edge = step.edge
        found = txn.tokens(edge.blob, edge.first_row + step.used, edge.rows - step.used)
        node = edge.node
    while len(found) < _CONTEXT_TOKENS * TOKEN_BYTES:
        below = txn.children(node, limit=1)
        if not below:
            break
        edge = below[0][1]
        found += txn.tokens(edge.blob, edge.first_row, edge.rows)
        node = edge.node
    return found[: _CONTEXT_TOKENS * TOKEN_BYTES]


def _nearest_model(
    txn: Reader, fingerprint: Fingerprint, packed: bytes, *, only_kin: bool = False
) -> tuple[Fingerprint | None, int]:
    """The other model under which most of the prompt is stored, the most similar among equals.

    Args:
        txn: The index.
        fingerprint: The model.
        packed: The prompt.
        only_kin: Look at other versions of this model only.
    """
    best: tuple[int, int] | None = None
    nearest: Fingerprint | None = None
    for key, namespace in txn.relatives(fingerprint.fields.get(CACHE_SALT, "")):
        if key.startswith(fingerprint.digest):
            continue
        other = identity_of(namespace)
        if only_kin and not is_same_model(fingerprint, other.fields, other.info):
            continue
        common = tree.walk(txn, namespace.root, packed).common
        rank = (common, -len(fingerprint.diff(other.fields)))
        if common and (best is None or rank > best):
            best, nearest = rank, other
    return nearest, best[0] if best else 0


def _departed(txn: Reader, fingerprint: Fingerprint, packed: bytes, lengths: set[int]) -> str:
    """Why an entry with one of the likely lengths is no longer here; "" if there was none."""
    replaced = ""
    for key, _ in txn.namespaces(fingerprint.digest):
        for length in sorted(lengths, reverse=True):
            if length > 0:
                number = entry_number(key, packed[: length * TOKEN_BYTES])
                record = txn.departed(number) if number != NO_ENTRY else None
                if record is not None and record.note != REPLACED:
                    return record.note
                if record is not None:
                    replaced = f"{REPLACED}, which is gone, too"
    return replaced
