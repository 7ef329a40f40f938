"""What goes into a bundle: which rows of which blobs, as of one look at the index.

A blob may go on beyond the end of an entry with the text of another conversation, so every run is
cut to the rows that the exported entries need, and paths on this machine are left out.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from persist_cache import __version__
from persist_cache.bundle.container import (
    FORMAT,
    VERSION,
    BlobSection,
    EntrySection,
    Identity,
    Manifest,
    ModelSection,
)
from persist_cache.entry import Tier
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.index import tree
from persist_cache.index.records import NO_BLOB, EntryRecord, NamespaceRecord, entry_id
from persist_cache.index.transaction import Reader
from persist_cache.portable.identity import portable
from persist_cache.store.catalog import identity_of, known_blob
from persist_cache.tokens import TOKEN_BYTES


@dataclass(slots=True)
class BlobCut:
    """The leading tokens of a run that the exported entries need, or a checkpoint.

    Attributes:
        source: Name of the blob in the store.
        model: Index into the plan's models.
        start: Position of its first token, or the one that a checkpoint resumes.
        end: Position behind its last token.
        path: Tokens of an entry that uses all of it.
        parent: The run before it, or None.
        tier: Of the highest entry that uses it.
        ends: An exported entry ends where it ends.
    """

    source: str
    model: int
    start: int
    end: int
    path: bytes
    parent: BlobCut | None
    tier: Tier
    is_run: bool = True
    ends: bool = True
    name: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    def tokens(self, start: int, end: int) -> memoryview:
        """Packed tokens of its path."""
        return memoryview(self.path)[start * TOKEN_BYTES : end * TOKEN_BYTES]


class Plan:
    """What goes into a bundle, as of one look at the index.

    Attributes:
        ids: Of the entries, the shortest first.
        cuts: Blobs by their number in the index, a run before those that hang on it.
    """

    def __init__(self, txn: Reader, ids: Sequence[str]) -> None:
        self.ids: list[str] = []
        self.cuts: dict[int, BlobCut] = {}
        self._sections: list[EntrySection] = []
        self._namespaces = {record.number: record for _, record in txn.namespaces()}
        self._models: dict[int, int] = {}
        found: list[tuple[int, EntryRecord]] = []
        for one in ids:
            record = txn.entry(int(one, 16))
            if record is None:
                raise KeyError(one)
            found.append((int(one, 16), record))
        for number, record in sorted(found, key=lambda item: (item[1].num_tokens, item[0])):
            self._add(txn, number, record)

    def _add(self, txn: Reader, number: int, record: EntryRecord) -> None:
        if record.namespace not in self._namespaces:
            raise tree.damaged("an entry names a namespace without record")
        model = self._models.setdefault(record.namespace, len(self._models))
        packed = tree.tokens_of(txn, record.node)
        runs: dict[int, BlobCut] = {}
        above: BlobCut | None = None
        position = 0
        for _, edge in tree.path_of(txn, record.node):
            blob = known_blob(txn, edge.blob)
            if blob.start + edge.first_row != position:
                raise tree.damaged("an edge begins elsewhere than its rows")
            position += edge.rows
            cut = self.cuts.get(edge.blob)
            if cut is None:
                source = blob.name.hex()
                cut = self.cuts[edge.blob] = BlobCut(
                    source, model, blob.start, position, packed, above, record.tier, ends=False
                )
            elif position > cut.end:
                cut.end, cut.path, cut.ends = position, packed, False
            cut.tier = max(cut.tier, record.tier)
            runs[edge.blob] = above = cut
        if above is None or not position == len(packed) // TOKEN_BYTES == record.num_tokens:
            raise tree.damaged("an entry has another length than its path")
        above.ends |= above.end == record.num_tokens
        checkpoint = None
        if record.checkpoint != NO_BLOB:
            blob = known_blob(txn, record.checkpoint)
            end = record.num_tokens
            source = blob.name.hex()
            checkpoint = self.cuts[record.checkpoint] = BlobCut(
                source, model, end, end, packed, above, record.tier, is_run=False
            )
        self.ids.append(entry_id(number))
        self._sections.append(
            EntrySection(
                id=entry_id(number),
                model=model,
                tier=record.tier.label,  # type: ignore[arg-type]
                num_tokens=record.num_tokens,
                runs=[cut.name for cut in runs.values()],
                checkpoint=None if checkpoint is None else checkpoint.name,
                created=record.created_us / 1e6,
                prefill_s=record.prefill_s,
                label=record.label,
            )
        )

    def identity(self, model: int) -> Fingerprint:
        return portable(identity_of(self._namespace(model)))

    def _namespace(self, model: int) -> NamespaceRecord:
        return self._namespaces[list(self._models)[model]]

    def manifest(self, blobs: list[BlobSection], now: float) -> Manifest:
        models = []
        for model in range(len(self._models)):
            identity = self.identity(model)
            models.append(
                ModelSection(
                    Identity(dict(identity.fields), dict(identity.info)),
                    self._namespace(model).layout,
                )
            )
        return Manifest(
            format=FORMAT,  # type: ignore[arg-type]
            version=VERSION,
            writer=f"persist-cache {__version__}",
            created=now,
            models=models,
            blobs=blobs,
            entries=self._sections,
        )
