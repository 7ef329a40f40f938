"""What else is stored for a model: under which identity, and by which fields it differs.

After an upgrade, or with another option, a model's prompts are still on disk but cannot be used.
That is another answer than "nothing", so a look-up that finds a model's namespaces empty asks
here. Values that name users, files or content are never told: a salt is "another salt".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from persist_cache.entry import Match, MissReason
from persist_cache.fingerprint.value import CACHE_SALT
from persist_cache.index.transaction import Reader
from persist_cache.store.reasons import nothing, sentence

if TYPE_CHECKING:
    from persist_cache.fingerprint.value import FieldChange, Fingerprint

_FOLLOW_KV_BITS = frozenset({"kv_group_size", "quantized_kv_start"})
_TOLD = _FOLLOW_KV_BITS | {"kv_bits", "layout", "max_kv_size", "mlx_lm", "model_type"}
"""Fields whose values mean something to people, and give nothing of theirs away."""


class Kin:
    """Answers for a store."""

    def nothing(self, txn: Reader, fingerprint: Fingerprint) -> Match:
        """The match of a model for which nothing is stored, with the reason."""
        changes = nearest_changes(txn, fingerprint)
        if changes:
            return nothing(MissReason.OTHER_IDENTITY, _fields(changes))
        return nothing(MissReason.NOTHING_STORED)


def nearest_changes(txn: Reader, fingerprint: Fingerprint) -> list[FieldChange]:
    """The fields that differ from the most similar identity of this model that has entries.

    Of this model is what was loaded from the same folder, or under the same name, or has the same
    weights. Looks at namespaces of the same salt only, whatever is stored in them: what others
    store changes neither the answer nor what it takes to find it.

    Returns:
        Changes from what is stored to `fingerprint`; empty when nothing of this model is stored.
    """
    best: tuple[int, float] | None = None
    nearest: list[FieldChange] = []
    for key, namespace in txn.relatives(fingerprint.fields.get(CACHE_SALT, "")):
        if key.startswith(fingerprint.digest):
            continue
        try:
            other = msgspec.json.decode(namespace.identity, type=dict[str, dict[str, str]])
        except msgspec.MsgspecError:
            continue
        fields = other.get("fields", {})
        if not is_same_model(fingerprint, fields, other.get("info", {})):
            continue
        changes = fingerprint.diff(fields)
        rank = -len(changes), namespace.created
        if (best is None or rank > best) and txn.children(namespace.root, limit=1):
            best, nearest = rank, changes
    return nearest


def is_same_model(
    fingerprint: Fingerprint, fields: Mapping[str, str], info: Mapping[str, str]
) -> bool:
    """Whether both are of one model: the same weights, folder or name."""
    mine = fingerprint.info
    return any(
        own and own == other
        for own, other in (
            (fingerprint.fields.get("weights"), fields.get("weights")),
            (mine.get("path"), info.get("path")),
            (mine.get("name"), info.get("name")),
        )
    )


def told(changes: Sequence[FieldChange]) -> str:
    """Changed fields as the reason of a miss, their values where those tell people something."""
    return sentence(MissReason.OTHER_IDENTITY, _fields(changes))


def _fields(changes: Sequence[FieldChange]) -> str:
    toggled = any(one.name == "kv_bits" and _unset(one.old, one.new) for one in changes)
    shown = [one for one in changes if not (toggled and one.name in _FOLLOW_KV_BITS)]
    names = [_name(one) for one in shown]
    values = [
        f"{_value(one.old)} → {_value(one.new)}"
        if len(shown) == 1
        else f"{_name(one)} {_value(one.old)} → {_value(one.new)}"
        for one in shown
        if one.name in _TOLD
    ]
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return listed + (f": {', '.join(values)}" if values else "")


def _name(change: FieldChange) -> str:
    return "mlx-lm" if change.name == "mlx_lm" else change.name


def _value(value: str | None) -> str:
    return "unset" if value in (None, "null") else str(value)


def _unset(*values: str | None) -> bool:
    return any(value in (None, "null") for value in values)
