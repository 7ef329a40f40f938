"""Entries that nothing will ask for again: their model changed, or what is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from persist_cache.fingerprint.value import CACHE_SALT
from persist_cache.fingerprint.versions import installed_version
from persist_cache.queries.models import Model

if TYPE_CHECKING:
    from persist_cache.fingerprint.identifier import Identifier


_OPTION_FIELDS = frozenset(
    {
        *("kv_bits", "kv_group_size", "quantized_kv_start", "max_kv_size", "layout"),
        *("salt", CACHE_SALT),
    }
)
"""What a request chooses, not a model: such fields never make a model unknown."""


def stale_reason(model: Model, identifier: Identifier) -> str:
    """Why nothing installed here can use this model's entries any more; "" if something may.

    Args:
        model: A model of the store.
        identifier: Looks at the files; its own KV options do not matter.
    """
    from persist_cache.fingerprint.loads import Unidentified

    if outdated := outdated_reason(model):
        return outdated
    name, adapter = model.info.get("name", ""), model.info.get("adapter")
    draft = model.info.get("draft.path") or model.info.get("draft.name")
    changed = ""
    for key in dict.fromkeys(one for one in (model.path, name) if one):
        found = identifier.look_up((key, adapter, draft))
        if isinstance(found, Unidentified):
            continue
        differing = [
            change.name for change in found.diff(model.fields) if change.name not in _OPTION_FIELDS
        ]
        if not differing:
            return ""
        changed = f"the model's files have changed ({', '.join(differing)})"
    if changed:
        return changed
    gone = [
        path
        for path in (model.path, adapter, model.info.get("draft.path"))
        # A relative path says nothing, because it may have been meant from another folder.
        if path and Path(path).is_absolute() and not Path(path).exists()
    ]
    return f"{gone[0]} is gone" if gone else ""


def outdated_reason(model: Model) -> str:
    """Why the versions installed here rule out this model's entries; "" if they do not."""
    from persist_cache.fingerprint.value import LAYOUT_VERSION

    wrote = model.fields.get("mlx_lm", "")
    installed = installed_version("mlx-lm") if wrote else ""
    if installed and wrote != installed:
        return f"computed by mlx-lm {wrote}, and {installed} is installed"
    layout = model.fields.get("layout", "")
    if layout and layout != str(LAYOUT_VERSION):
        return f"written with layout {layout}, and persist-cache has {LAYOUT_VERSION} now"
    return ""
