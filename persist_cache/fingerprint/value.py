"""Everything that makes a KV cache reusable, as one digest and as readable fields.

A fingerprint is built from *content*, never from a path or a name: a model that is copied,
moved or renamed keeps its cache, and a model whose bytes change under the same name loses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from persist_cache.fingerprint.contents import blake2b, pack

# json, msgspec, importlib.metadata, platformdirs and concurrent.futures are imported where they
# are used: they would more than double the time of this import, and `list` needs none of them.

LAYOUT_VERSION = 1
"""Version of the blob layout; part of every key, so a new layout starts with clean misses."""
CACHE_SALT = "cache_salt"
"""Field whose entries only requests with the same salt may find."""


Scalar: TypeAlias = str | int | float | bool | None


def salt_digest(salt: str) -> str:
    """What is kept of a request's salt; "" where there is none."""
    return blake2b(salt.encode("utf-8", "surrogatepass")) if salt else ""


class FieldChange(NamedTuple):
    """One field that differs; None stands for a field that is absent on that side."""

    name: str
    old: str | None
    new: str | None


@dataclass(frozen=True)
class Fingerprint:
    """Identity of all that makes KV reusable. Equal digests mean: the KV may be shared.

    Build it with `from_fields`, which also makes the values canonical.

    Attributes:
        fields: What is in the key, readable.
        info: Recorded next to it, not in the key: names, paths, versions that do not matter.
        digest: BLAKE2b-256 over the length-prefixed, sorted fields.
    """

    fields: Mapping[str, str] = field(compare=False)
    info: Mapping[str, str] = field(default_factory=dict, compare=False)
    digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # A caller's dict may change later; the digest could not follow.
        object.__setattr__(self, "fields", MappingProxyType(dict(sorted(self.fields.items()))))
        object.__setattr__(self, "info", MappingProxyType(dict(sorted(self.info.items()))))
        packed = pack(text for item in self.fields.items() for text in item)
        digest = hashlib.blake2b(packed, digest_size=32, person=b"persist-cache.fp").digest()
        object.__setattr__(self, "digest", digest)

    @property
    def hex(self) -> str:
        return self.digest.hex()

    @property
    def may_publish(self) -> bool:
        """Whether others may be given what is stored of it: not if a salt sets it apart."""
        return not {CACHE_SALT, "salt"} & self.fields.keys()

    def salted(self, digest: str) -> Fingerprint:
        """The same model for requests of one salt alone.

        Args:
            digest: What `salt_digest` made of the salt; "" for requests without one.
        """
        if self.fields.get(CACHE_SALT, "") == digest:
            return self
        fields = {name: value for name, value in self.fields.items() if name != CACHE_SALT}
        return Fingerprint(fields | ({CACHE_SALT: digest} if digest else {}), self.info)

    @classmethod
    def from_fields(
        cls, fields: Mapping[str, Scalar], info: Mapping[str, Scalar] | None = None
    ) -> Fingerprint:
        """Build a fingerprint from named values, in any order.

        The layout version is added unless `fields` has a "layout". Canonical strings stay as
        they are, so building again from `.fields` gives the same digest.

        Raises:
            TypeError: a value is not a str, int, float, bool or None.
            ValueError: a name is empty, or a text is not valid Unicode.
        """
        return cls(
            canonical_fields({"layout": LAYOUT_VERSION, **fields}), canonical_fields(info or {})
        )

    def diff(self, other_fields: Mapping[str, str]) -> list[FieldChange]:
        """Name the fields that differ, sorted: from `other_fields` (old) to these (new)."""
        return [
            FieldChange(name, other_fields.get(name), self.fields.get(name))
            for name in sorted(self.fields.keys() | other_fields.keys())
            if other_fields.get(name) != self.fields.get(name)
        ]

    def to_json(self) -> bytes:
        """Encode fields and info; the digest follows from them."""
        import msgspec

        return msgspec.json.encode({"fields": dict(self.fields), "info": dict(self.info)})

    @classmethod
    def from_json(cls, encoded: bytes) -> Fingerprint:
        """Decode what `to_json` made.

        Raises:
            ValueError: `encoded` is something else.
        """
        import msgspec

        try:
            record = msgspec.json.decode(encoded, type=dict[str, dict[str, str]])
            return cls(record["fields"], record.get("info", {}))
        except (msgspec.MsgspecError, KeyError) as error:
            raise ValueError(f"not a stored fingerprint: {error}") from error


def canonical_fields(fields: Mapping[str, Scalar]) -> dict[str, str]:
    for name in fields:
        if not isinstance(name, str) or not name:
            raise ValueError(f"a field needs a name, not {name!r}")
    return {name: _canonical(value) for name, value in fields.items()}


def _canonical(value: Scalar) -> str:
    # bool before int, and no repr() of subclasses: enums and NumPy scalars print differently.
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return int.__repr__(value)
        case float():
            return float.__repr__(value)
        case str():
            return str.__str__(value)
    raise TypeError(f"a field is str, int, float, bool or None, not {type(value).__name__}")
