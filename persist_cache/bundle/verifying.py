"""Whether a bundle's manifest and its members fit together; what does not is refused.

Everything that they say is checked before any of it is used, and tensors are verified in small
parts, so that memory stays bounded whatever a file claims.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from persist_cache.blobs.header import TOKENS, BlobHeader, prefix_digest
from persist_cache.blobs.layout import Shapes
from persist_cache.bundle.container import MAX_TOKENS, EntrySection, MalformedError, Manifest
from persist_cache.bundle.entries import BundledRun
from persist_cache.entry import Tier
from persist_cache.errors import CorruptBlobError, StoreFormatError
from persist_cache.fingerprint.value import LAYOUT_VERSION, Fingerprint
from persist_cache.index.records import entry_id, entry_number, namespace_key
from persist_cache.portable.checking import check_blob
from persist_cache.portable.entries import Member, PortableEntry, Stretch

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total."""


class Verified:
    """Puts members and manifest together and lets nothing pass that does not fit."""

    def __init__(
        self,
        manifest: Manifest,
        members: dict[str, Member],
        nbytes: int,
        progress: Progress | None,
    ) -> None:
        self._members = members
        self._models = [_fingerprint(model.identity) for model in manifest.models]
        self._layouts = [model.layout for model in manifest.models]
        self._keys = [
            (fingerprint.hex, layout)
            for fingerprint, layout in zip(self._models, self._layouts, strict=True)
        ]
        if len(set(self._keys)) != len(self._keys):
            raise MalformedError("its manifest names a model twice")
        try:
            self._shapes = {key: Shapes(key[1]) for key in self._keys}
        except ValueError as error:
            raise MalformedError(f"a model cannot be used: {error}") from None
        self._runs: dict[str, BundledRun] = {}
        for name, member in members.items():
            self._check_header(member)
            if member.header.kind == "run":
                self._runs[name] = self._run(member)
        self._states: set[str] = set()
        entries = [self._entry(section) for section in manifest.entries]
        self._check_nothing_is_left(manifest, entries)
        done = 0
        for member in members.values():
            member.verify()
            done += member.nbytes
            if progress is not None:
                progress(done, nbytes)
        self.entries = sorted(entries, key=lambda entry: (entry.num_tokens, entry.id))

    def _check_header(self, member: Member) -> None:
        header = member.header
        if (header.fingerprint, header.layout) not in self._keys:
            raise CorruptBlobError(member.path, "is of a model that the manifest does not name")
        check_blob(member, self._shapes[_key(header)], MAX_TOKENS)

    def _run(self, member: Member) -> BundledRun:
        header = member.header
        parent: BundledRun | None = None
        if header.start > 0:
            parent = self._runs.get(header.parent)
            if parent is None or not parent.header.start < header.start <= parent.header.end:
                raise CorruptBlobError(member.path, "does not follow the run that it hangs on")
            if _key(parent.header) != _key(header):
                raise CorruptBlobError(member.path, "hangs on a run of another model")
        elif header.parent:
            raise CorruptBlobError(member.path, "begins a prompt, but hangs on another run")
        before = b"" if parent is None else parent.path(header.start)
        if prefix_digest(before) != header.prefix:
            raise CorruptBlobError(member.path, "follows other tokens than it says")
        return BundledRun(member, member.read_bytes(TOKENS), parent)

    def _entry(self, section: EntrySection) -> PortableEntry:
        if section.model >= len(self._models):
            raise MalformedError(f"entry {section.id} is of a model that is not named")
        fingerprint, layout = self._models[section.model], self._layouts[section.model]
        runs = [self._known_run(section, name) for name in section.runs]
        if [run.parent for run in runs] != [None, *runs[:-1]]:
            raise MalformedError(f"the runs of entry {section.id} do not form a path")
        last = runs[-1]
        if not last.header.start < section.num_tokens <= last.header.end:
            raise MalformedError(f"entry {section.id} does not end in its last run")
        if _key(last.header) != self._keys[section.model]:
            raise MalformedError(f"entry {section.id} has the rows of another model")
        ends = [run.header.start for run in runs[1:]] + [section.num_tokens]
        packed = last.path(section.num_tokens)
        number = entry_number(namespace_key(fingerprint.digest, layout), packed)
        if entry_id(number) != section.id:
            raise MalformedError(f"entry {section.id} has other tokens than its id says")
        entry = PortableEntry(
            id=section.id,
            fingerprint=fingerprint,
            layout=layout,
            tier=Tier.parse(section.tier),
            packed=packed,
            created=section.created,
            prefill_s=section.prefill_s,
            label=section.label,
            stretches=tuple(
                Stretch(run.reader, run.header.start, end)
                for run, end in zip(runs, ends, strict=True)
            ),
            state=self._state(section, packed),
        )
        if entry.state is None and not entry.complete:
            raise MalformedError(f"entry {section.id} has neither all of its rows nor a state")
        if entry.state is not None:
            try:
                headers = [run.header for run in runs]
                self._shapes[self._keys[section.model]].check_entry(headers, entry.state.header)
            except ValueError as error:
                raise MalformedError(f"entry {section.id} cannot be used: {error}") from None
        return entry

    def _known_run(self, section: EntrySection, name: str) -> BundledRun:
        run = self._runs.get(name)
        if run is None:
            raise MalformedError(f"entry {section.id} names run {name}, which is not there")
        run.used = True
        return run

    def _state(self, section: EntrySection, packed: bytes) -> Member | None:
        if section.checkpoint is None:
            return None
        member = self._members.get(section.checkpoint)
        if (
            member is None
            or member.header.kind != "checkpoint"
            or member.header.start != section.num_tokens
            or member.header.prefix != prefix_digest(packed)
            or member.header.parent != section.runs[-1]
            or _key(member.header) != self._keys[section.model]
            or section.checkpoint in self._states
        ):
            raise MalformedError(f"entry {section.id} names a checkpoint that is not its own")
        self._states.add(section.checkpoint)
        return member

    def _check_nothing_is_left(self, manifest: Manifest, entries: list[PortableEntry]) -> None:
        if len({entry.id for entry in entries}) != len(entries):
            raise MalformedError("its manifest names an entry twice")
        used = self._states | {name for name, run in self._runs.items() if run.used}
        if used != set(self._members):
            raise MalformedError("it has a member that no entry needs")
        if {section.model for section in manifest.entries} != set(range(len(self._models))):
            raise MalformedError("it names a model that no entry needs")


def _key(header: BlobHeader) -> tuple[str, str]:
    return header.fingerprint, header.layout


def _fingerprint(identity: object) -> Fingerprint:
    """The identity of a model whose blobs have a layout that is known here.

    Raises:
        StoreFormatError: They have not.
    """
    try:
        fingerprint = Fingerprint.from_json(msgspec.json.encode(identity))
    except ValueError as error:
        raise MalformedError(f"an identity is malformed ({error})") from None
    layout = fingerprint.fields.get("layout", "none")
    if layout != str(LAYOUT_VERSION):
        raise StoreFormatError(
            f"The bundle holds KV of layout version {layout}; this version of persist-cache "
            f"knows version {LAYOUT_VERSION} only."
        )
    return fingerprint
