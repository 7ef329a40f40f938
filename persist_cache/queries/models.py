"""The models that a store has entries of: identities, readable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from persist_cache.fingerprint.value import CACHE_SALT
from persist_cache.index.records import NamespaceRecord


class Model(Struct, frozen=True):
    """An identity that entries belong to.

    Attributes:
        fingerprint: Hex digest.
        fields: What is in the key, readable.
        info: Recorded next to it: names, paths, versions that do not matter.
    """

    fingerprint: str
    fields: Mapping[str, str] = {}
    info: Mapping[str, str] = {}

    @property
    def name(self) -> str:
        """The model as its user named it, with its adapter; else what kind it is."""
        name = self.info.get("name") or self.fields.get("model_type") or "unnamed"
        adapter = self.info.get("adapter")
        return f"{name} + {Path(adapter).name}" if adapter else name

    @property
    def may_publish(self) -> bool:
        """Whether others may be given what is stored of it: not if a salt sets it apart."""
        return not {CACHE_SALT, "salt"} & self.fields.keys()

    @property
    def path(self) -> str:
        """Folder that it was loaded from, or ""."""
        return self.info.get("path", "")


def as_model(key: bytes, record: NamespaceRecord) -> Model:
    try:
        # Not by `Fingerprint.from_json`: loading hashlib would take longer than all models do.
        said = msgspec.json.decode(record.identity, type=dict[str, dict[str, str]])
        return Model(key[:32].hex(), said["fields"], said.get("info", {}))
    except (msgspec.MsgspecError, KeyError):
        return Model(key[:32].hex())
