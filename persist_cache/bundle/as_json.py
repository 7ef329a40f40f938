"""What became of a bundle, as JSON: the same for commands and admin API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from persist_cache.bundle.importing import Imported, Usability, load, preview, usability
from persist_cache.bundle.reading import Bundle
from persist_cache.entry import NO_GROUP
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.portable.entries import PortableEntry
from persist_cache.queries.models import Model
from persist_cache.store.store import Store

Judged = list[tuple[Fingerprint, Usability]]


def judged(bundle: Bundle, here: Fingerprint | None, store: Store | None) -> Judged:
    """Whether a model here can use what a bundle has, for each model in it."""
    identities = {one.fingerprint.hex: one.fingerprint for one in bundle.entries}
    return [(one, usability(one, here, store)) for one in identities.values()]


def usable(bundle: Bundle, here: Fingerprint | None) -> list[PortableEntry]:
    """The entries of a bundle that a model can use; all where none is given."""
    return [one for one in bundle.entries if here is None or one.fingerprint.digest == here.digest]


def imported(
    store: Store,
    bundle: Bundle,
    here: Fingerprint | None,
    *,
    group: str = NO_GROUP,
    dry_run: bool,
) -> tuple[Judged, list[Imported]]:
    """Put into a store what a model can use of a bundle, or say what that would do.

    Raises:
        StoreError: There is no room, or the disk failed; nothing was added.
    """
    entries = usable(bundle, here)
    # Before, because afterwards the store has entries of all these models.
    models = judged(bundle, here, store)
    if dry_run or not entries:
        return models, preview(store, entries)
    return models, load(store, entries, here=here, group=group)


def imported_json(
    bundle: Bundle, models: Judged, done: Sequence[Imported], *, dry_run: bool
) -> dict[str, Any]:
    """What was imported, and who can use it."""
    return {
        "file_bytes": bundle.nbytes,
        "writer": bundle.writer,
        "created": bundle.created,
        "dry_run": dry_run,
        "entries": [
            {
                "id": one.id,
                "tier": one.tier.label,
                "label": one.label,
                "num_tokens": one.num_tokens,
                "new_tokens": one.new_tokens,
                "written_bytes": one.nbytes,
                "was_there": one.was_there,
            }
            for one in done
        ],
        "models": [
            {
                "fingerprint": fingerprint.hex,
                "model": model_name(fingerprint),
                "usable": found.usable,
                "message": found.message,
                "changes": [
                    {"field": change.name, "stored": change.old, "now": change.new}
                    for change in found.changes
                ],
                "identity": {"fields": dict(fingerprint.fields), "info": dict(fingerprint.info)},
            }
            for fingerprint, found in models
        ],
    }


def model_name(fingerprint: Fingerprint) -> str:
    """What people call the model of a bundle."""
    return Model(fingerprint.hex, fingerprint.fields, fingerprint.info).name
