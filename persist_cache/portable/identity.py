"""What may be told elsewhere of a model's identity."""

from __future__ import annotations

from pathlib import PurePath

from persist_cache.fingerprint.value import Fingerprint

_PATH_FIELDS = frozenset({"path", "draft.path"})


def portable(fingerprint: Fingerprint) -> Fingerprint:
    """The same identity without what says where on this machine its files are."""
    info = {
        name: PurePath(value).name if _is_path(value) else value
        for name, value in fingerprint.info.items()
        if name not in _PATH_FIELDS
    }
    return Fingerprint(fingerprint.fields, info)


def _is_path(text: str) -> bool:
    """Whether `text` is no hub id: those are `name` or `owner/name`."""
    return text.startswith(("/", ".", "~")) or text.count("/") > 1
