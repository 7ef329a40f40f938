"""Bundles: what is exported comes back bit for bit, and nothing that is wrong gets in."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from persist_cache import fs
from persist_cache.blobs.folder import SUFFIX
from persist_cache.blobs.header import BlobHeader
from persist_cache.bundle import Bundle, export, load, preview, usability
from persist_cache.bundle.container import (
    MANIFEST,
    MalformedError,
    Manifest,
    member_header,
    member_size,
    parse_manifest,
)
from persist_cache.codec import Payload, Tensor
from persist_cache.entry import Tier
from persist_cache.errors import (
    CorruptBlobError,
    PersistCacheError,
    StoreAccessError,
    StoreError,
    StoreFormatError,
    StoreFullError,
)
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.portable.identity import portable
from persist_cache.queries.ids import find_departed
from persist_cache.store.store import Store
from persist_cache.tokens import pack_tokens
from tests.bundles import Parts, pack
from tests.examples import examples
from tests.fakes import (
    Clock,
    FakeSource,
    blob_files,
    eager_gc,
    fetched,
    files_in,
    fingerprint,
    kv_rows,
)
from tests.fakes import put as put_any

put = partial(put_any, real=True)

BASE = list(range(100, 130))
BRANCH = [*BASE[:14], *range(900, 909)]
STATEFUL = [*range(50, 62), *BASE]


@pytest.fixture
def other(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    """Another store, with runs of another length."""
    with Store.open(
        tmp_path / "other", max_bytes=1 << 30, min_free_bytes=0, run_tokens=5, clock=clock
    ) as opened:
        yield opened


@pytest.fixture
def ids(store: Store) -> dict[str, str]:
    """A system prompt, two branches of it, and a prompt that needs its state."""
    return {
        "base": put(store, BASE),
        "system": put(store, BASE[:11], tier="system", label="the agent", prefill_s=1.5),
        "branch": put(store, BRANCH, tier="user"),
        "stateful": put(store, STATEFUL, complete=False),
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "agent.tar"


def transfer(source: Store, target: Store, ids: list[str], file: Path) -> list[str]:
    """Export and import; returns the ids of new entries."""
    export(source, ids, file)
    with Bundle(file) as bundle:
        return [one.id for one in load(target, bundle.entries) if not one.was_there]


def snapshot(store: Store) -> dict[str, bytes]:
    """Every byte of a store but LMDB's lock table."""
    return {
        str(path.relative_to(store.root)): path.read_bytes()
        for path in files_in(store.root)
        if path.name not in ("lock.mdb", "writer.lock")
    }


# ---- round trips -------------------------------------------------------------------------------


def test_everything_comes_back_bit_for_bit(
    store: Store, other: Store, ids: dict[str, str], file: Path
) -> None:
    added = transfer(store, other, list(ids.values()), file)

    assert sorted(added) == sorted(ids.values())
    assert fetched(other, BASE) == 30
    assert fetched(other, BRANCH) == 23
    assert fetched(other, STATEFUL) == 42
    assert fetched(other, [*BASE[:9], 1]) == 9
    assert other.check(read_data=True) == []


@pytest.mark.parametrize("name", ["base", "system", "branch", "stateful"])
def test_each_entry_alone(
    store: Store, other: Store, ids: dict[str, str], file: Path, name: str
) -> None:
    tokens = {"base": BASE, "system": BASE[:11], "branch": BRANCH, "stateful": STATEFUL}[name]

    transfer(store, other, [ids[name]], file)

    assert [entry.id for entry in other.entries()] == [ids[name]]
    assert fetched(other, [*tokens, 7]) == len(tokens)
    assert other.check(read_data=True) == []


def test_marks_of_an_entry_come_along(
    store: Store, other: Store, ids: dict[str, str], file: Path, clock: Clock
) -> None:
    clock.advance(1000)
    store.pin(ids["system"])

    transfer(store, other, [ids["system"]], file)

    was, entry = store.get(ids["system"]), other.get(ids["system"])
    assert (entry.tier, entry.label, entry.prefill_s) == (Tier.SYSTEM, "the agent", 1.5)
    assert entry.created == was.created
    assert entry.last_use == clock.now
    assert not entry.pinned
    assert entry.fingerprint == was.fingerprint


def test_a_path_that_others_share_is_stored_once(
    store: Store, other: Store, ids: dict[str, str], file: Path
) -> None:
    put(other, BASE[:17])
    export(store, [ids["base"], ids["branch"]], file)

    with Bundle(file) as bundle:
        expected = preview(other, bundle.entries)
        done = load(other, bundle.entries)

    assert {one.id: one.new_tokens for one in done} == {ids["base"]: 13, ids["branch"]: 9}
    assert [one.new_tokens for one in expected] == [one.new_tokens for one in done]
    assert fetched(other, BASE) == 30
    assert other.check(read_data=True) == []


def test_importing_twice_writes_nothing_new(
    store: Store, other: Store, ids: dict[str, str], file: Path
) -> None:
    transfer(store, other, list(ids.values()), file)
    other.set_label(ids["system"], "mine")
    before = snapshot(other)

    assert transfer(store, other, list(ids.values()), Path(f"{file}2")) == []
    assert snapshot(other) == before
    assert other.get(ids["system"]).label == "mine"


def test_entries_of_several_models_share_a_bundle(
    store: Store, other: Store, ids: dict[str, str], file: Path
) -> None:
    foreign = put(store, BASE, model="w1")

    transfer(store, other, [foreign, ids["base"]], file)

    assert fetched(other, BASE, model="w1") == 30
    assert fetched(other, BASE) == 30


def test_an_import_into_its_own_store_finds_everything(
    store: Store, ids: dict[str, str], file: Path
) -> None:
    before = snapshot(store)

    assert transfer(store, store, list(ids.values()), file) == []
    assert snapshot(store) == before


def test_random_trees(tmp_path: Path, clock: Clock) -> None:
    """Prompts that branch anywhere, exported in any choice, into stores that know some of it."""
    random_ = random.Random(4)
    with ExitStack() as stack:

        def opened(name: str, run_tokens: int) -> Store:
            return stack.enter_context(
                Store.open(tmp_path / name, min_free_bytes=0, run_tokens=run_tokens, clock=clock)
            )

        for round_ in range(2):
            store, other = opened(f"a{round_}", 7), opened(f"b{round_}", 4)
            prompts: list[list[int]] = [[1]]
            for _ in range(25):
                start = random_.choice(prompts)
                cut = random_.randrange(len(start) + 1)
                tail = [random_.randrange(4) for _ in range(random_.randrange(1, 20))]
                prompts.append([*start[:cut], *tail])
            complete = bool(round_ % 2)
            ids = {put(store, one, complete=complete): one for one in prompts}
            for known in random_.sample(prompts, 5):
                put(other, known, complete=complete)
            for _ in range(2):
                chosen = random_.sample(sorted(ids), 6)
                transfer(store, other, chosen, tmp_path / f"{random_.random()}.tar")
                for one in chosen:
                    assert fetched(other, ids[one]) == len(ids[one])
            assert other.check(read_data=True) == []


CACHES = [
    "kv",
    "kv-batch-of-3",
    "kv-values-without-width",
    "kv-unused-layer",
    "quantized-4",
    "rotating-and-kv",
    "rotating-wrapped-by-both",
    "chunked-slid",
    "list-of-arrays-and-wrapped",
    "rotating-draft-one-behind",
]


@pytest.mark.parametrize("name", CACHES)
def test_real_caches(store: Store, other: Store, file: Path, name: str) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from persist_cache import tensors
    from tests.tiny_caches import CACHES as SPECS
    from tests.tiny_caches import feed, new_cache

    specs, chunks = SPECS[name]
    cache = new_cache(specs)
    entries: dict[str, list[int]] = {}

    def keep(cache: Any, num_tokens: int) -> None:
        tokens = list(range(num_tokens))
        tensors.prepare(cache, num_tokens)
        one = store.put(fingerprint(), tokens, tensors.source(cache, num_tokens)).entry
        assert one is not None
        entries[one] = tokens

    for seed, chunk in enumerate(chunks):
        feed(cache, specs, chunk, seed)
    keep(cache, sum(chunks))
    if tensors.can_trim(cache):
        # An entry that ends within the rows of another one.
        shorter = copy.deepcopy(cache)
        assert tensors.trim(shorter, 3) == 3
        keep(shorter, sum(chunks) - 3)

    def restored(store: Store, tokens: list[int]) -> list[Any]:
        found = store.fetch(fingerprint(), tokens, tensors.restore)
        assert found is not None
        assert found[1].num_tokens == len(tokens)
        return [leaf for _, leaf in tree_flatten([layer.state for layer in found[0]])]

    for one, tokens in reversed(entries.items()):
        transfer(store, other, [one], file.with_name(one))
        for here, there in zip(restored(store, tokens), restored(other, tokens), strict=True):
            same = mx.array_equal(here, there) if isinstance(here, mx.array) else here == there
            assert same
    assert other.check(read_data=True) == []


# ---- the file ----------------------------------------------------------------------------------


def test_nothing_of_other_conversations_is_exported(
    store: Store, tmp_path: Path, file: Path
) -> None:
    public, secret = list(range(1000, 1011)), list(range(777_000, 777_020))
    identity = Fingerprint.from_fields(
        dict(fingerprint().fields),
        {"name": "/home/ann/models/qwen", "path": "/home/ann/models/qwen", "commit": "c1"},
    )
    tokens = [*public, *secret]
    store.put(identity, tokens, FakeSource(tokens, real=True), label="ann's secret")
    entry = store.put(identity, public, FakeSource(public, real=True)).entry
    assert entry is not None

    done = export(store, [entry], file)

    raw = file.read_bytes()
    assert done.num_tokens == 11
    assert pack_tokens(public[8:]) in raw
    for token in secret:
        assert pack_tokens([token]) not in raw
    for row in kv_rows(tokens, 11, 31)[0, 0]:
        assert row.tobytes() not in raw
    for text in (b"ann", b"secret", b"/home"):
        assert text not in raw
    assert b"qwen" in raw


def test_only_the_owner_can_read_it(store: Store, ids: dict[str, str], file: Path) -> None:
    export(store, [ids["base"]], file)

    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.glob(".*")) == []


def test_other_programs_can_read_it(store: Store, ids: dict[str, str], file: Path) -> None:
    from safetensors.numpy import load as load_safetensors

    export(store, list(ids.values()), file)

    with tarfile.open(file) as archive:
        names = archive.getnames()
        members = {name: archive.extractfile(name) for name in names}
        contents = {name: member.read() for name, member in members.items() if member is not None}
    manifest = json.loads(contents["manifest.json"])
    entry = next(one for one in manifest["entries"] if one["id"] == ids["base"])
    rows = [load_safetensors(contents[name + SUFFIX])["layers.0.keys"] for name in entry["runs"]]
    assert names[:2] == ["manifest.json", "manifest.xxh3"]
    assert np.array_equal(np.concatenate(rows, axis=2), kv_rows(BASE, 0, 30))
    listed = subprocess.run(["tar", "tf", str(file)], capture_output=True, text=True)
    assert (listed.stdout.split(), listed.stderr) == (names, "")


def test_blobs_of_a_bundle_make_a_store(
    store: Store, tmp_path: Path, ids: dict[str, str], file: Path
) -> None:
    """Unpacked by hand into `blobs/`, they are found when the index is made anew."""
    export(store, list(ids.values()), file)
    for name, content in Parts.of(file).blobs.items():
        path = tmp_path / "third" / "blobs" / name[:2] / (name + SUFFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    with Store.open(tmp_path / "third", min_free_bytes=0) as third:
        assert {entry.id for entry in third.entries()} >= set(ids.values()) - {ids["system"]}
        assert fetched(third, BASE) == 30
        assert fetched(third, STATEFUL) == 42
        assert third.check(read_data=True) == []


def test_an_existing_file_is_left_alone(store: Store, ids: dict[str, str], file: Path) -> None:
    file.write_text("mine")

    with pytest.raises(FileExistsError):
        export(store, [ids["base"]], file)
    assert file.read_text() == "mine"

    export(store, [ids["base"]], file, force=True)
    with Bundle(file) as bundle:
        assert [entry.id for entry in bundle.entries] == [ids["base"]]


def test_a_file_that_appears_meanwhile_is_left_alone(
    store: Store, ids: dict[str, str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fs, "sync", lambda fd: file.write_text("mine"))

    with pytest.raises(FileExistsError):
        export(store, [ids["base"]], file)
    assert file.read_text() == "mine"
    assert list(file.parent.glob(".*")) == []


def test_a_file_system_without_links(
    store: Store, ids: dict[str, str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    export(store, [ids["base"]], file)

    Bundle(file).close()
    assert list(file.parent.glob(".*")) == []


def test_a_full_disk_leaves_nothing_behind(
    store: Store, ids: dict[str, str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fs, "sync", full)

    with pytest.raises(StoreFullError, match="disk is full"):
        export(store, [ids["base"]], file)
    assert not file.exists()
    assert list(file.parent.glob(".*")) == []


@pytest.mark.parametrize("place", ["nowhere/agent.tar", "store/data.mdb/agent.tar"])
def test_a_place_that_cannot_be_written(
    store: Store, ids: dict[str, str], tmp_path: Path, place: str
) -> None:
    with pytest.raises(StoreAccessError, match="cannot be written"):
        export(store, [ids["base"]], tmp_path / place)


def test_a_damaged_blob_is_not_exported(store: Store, ids: dict[str, str], file: Path) -> None:
    for path in blob_files(store.root):
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    with pytest.raises(StoreError, match="is damaged"):
        export(store, [ids["base"]], file)
    assert not file.exists()


def test_an_entry_that_is_not_there(store: Store, file: Path) -> None:
    with pytest.raises(KeyError):
        export(store, ["0123456789abcdef"], file)
    assert not file.exists()


def test_a_store_may_be_read_only(
    store: Store, ids: dict[str, str], tmp_path: Path, file: Path
) -> None:
    store.close()
    with Store.open(tmp_path / "store", read_only=True) as opened:
        export(opened, [ids["base"]], file)

    Bundle(file).close()


def test_what_is_exported_is_not_evicted_meanwhile(
    store: Store, other: Store, ids: dict[str, str], file: Path
) -> None:
    def evict(done: int, total: int) -> None:
        store.evict_to(0)

    export(store, [ids["branch"]], file, progress=evict)

    left = {entry.id for entry in store.entries()}
    assert ids["branch"] in left
    assert not {ids["base"], ids["stateful"]} & left
    with Bundle(file) as bundle:
        load(other, bundle.entries)
    assert fetched(other, BRANCH) == len(BRANCH)


def test_files_that_are_merged_meanwhile_are_found_again(
    store: Store, other: Store, file: Path
) -> None:
    talk: list[int] = []
    for token in range(40, 48):
        talk.append(token)
        entry = put(store, talk, tier="user")
    merged: list[int] = []

    def merge(done: int, total: int) -> None:
        if not merged:
            with eager_gc():
                merged.append(store.gc().merged)

    export(store, [entry], file, progress=merge)

    assert merged == [7]
    with Bundle(file) as bundle:
        load(other, bundle.entries)
    assert fetched(other, talk) == len(talk)


def test_an_entry_that_is_evicted_meanwhile_by_another_process(
    store: Store, ids: dict[str, str], file: Path
) -> None:
    def evict(done: int, total: int) -> None:
        for entry in store.entries():
            store.evict([entry.id])

    with pytest.raises(StoreError, match="evicted while it was exported"):
        export(store, [ids["branch"]], file, progress=evict)
    assert not file.exists()


def test_progress_ends_at_the_total(
    store: Store, other: Store, ids: dict[str, str], file: Path
) -> None:
    said: list[tuple[int, int]] = []

    export(store, list(ids.values()), file, progress=lambda *amount: said.append(amount))
    assert said[-1][0] == said[-1][1]
    with Bundle(file, lambda *amount: said.append(amount)) as bundle:
        load(other, bundle.entries, progress=lambda *amount: said.append(amount))
    assert said[-1][0] == said[-1][1]


# ---- damage ------------------------------------------------------------------------------------


@pytest.fixture
def good(store: Store, ids: dict[str, str], file: Path) -> Path:
    export(store, [ids["base"], ids["branch"], ids["stateful"]], file)
    return file


def refused(path: Path, kind: type[Exception] = CorruptBlobError) -> str:
    with pytest.raises(kind) as caught:
        Bundle(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_any_flipped_bit_is_noticed(good: Path) -> None:
    raw = bytearray(good.read_bytes())
    places = {*range(0, 4096, 37), *range(0, len(raw), 1013), *range(len(raw) - 1200, len(raw), 97)}
    for place in places:
        raw[place] ^= 1 << place % 8
        good.write_bytes(raw)
        with pytest.raises((CorruptBlobError, StoreFormatError)):
            Bundle(good)
        raw[place] ^= 1 << place % 8
    good.write_bytes(raw)
    Bundle(good).close()


def test_every_member_is_verified(good: Path) -> None:
    """In each blob: a byte of the header's text, of its padding, and of each tensor."""
    parts = Parts.of(good)
    raw = bytearray(good.read_bytes())
    for content in parts.blobs.values():
        start = raw.index(content)
        for place in (9, 16_000, 16_384, len(content) - 1):
            raw[start + place] ^= 4
            good.write_bytes(raw)
            refused(good)
            raw[start + place] ^= 4


def test_a_truncated_file_is_refused(good: Path) -> None:
    raw = good.read_bytes()
    for size in {0, 1, 511, 512, 513, *range(0, len(raw), 2039), len(raw) - 1}:
        good.write_bytes(raw[:size])
        refused(good)
    good.write_bytes(raw + bytes(512))
    refused(good)


@pytest.mark.parametrize("content", [b"", b"\0" * 2048, b"PK\3\4" + bytes(600), b"x" * 5000])
def test_another_file_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)

    assert "is not a bundle" in refused(file)


def test_what_is_no_file_is_refused(tmp_path: Path, file: Path) -> None:
    assert "cannot be read (No such file" in refused(file, StoreAccessError)
    os.mkfifo(file)
    assert "is not a file" in refused(file, StoreAccessError)
    assert "is not a file" in refused(tmp_path, StoreAccessError)


# ---- forgery: checksums that are right, around what is wrong -----------------------------------


def extra_member(parts: Parts) -> bytes:
    return pack([*parts.members, ("more.safetensors", b"x" * 100)])


def repeated_member(parts: Parts) -> bytes:
    return pack([*parts.members, parts.members[-1]])


def renamed(name: str) -> Callable[[Parts], bytes]:
    def change(parts: Parts) -> bytes:
        *members, (_, content) = parts.members
        return pack([*members, (name, content)])

    return change


def link(kind: bytes) -> Callable[[Parts], bytes]:
    """A member that is a link to a file outside."""

    def change(parts: Parts) -> bytes:
        info = tarfile.TarInfo(parts.members[-1][0])
        info.type, info.linkname = kind, "/etc/passwd"
        *members, _ = parts.members
        return pack(members)[:-1024] + info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)

    return change


def other_header(**changes: Any) -> Callable[[Parts], bytes]:
    """The last member as another tar program might write it."""

    def change(parts: Parts) -> bytes:
        *members, (name, content) = parts.members
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for key, value in changes.items():
            setattr(info, key, value)
        head = pack(members)[:-1024] + info.tobuf(tarfile.GNU_FORMAT)
        return head + content + bytes(-len(content) % 512 + 1024)

    return change


@pytest.mark.parametrize(
    "forge",
    [
        extra_member,
        repeated_member,
        renamed("../../evil.safetensors"),
        renamed("/etc/evil.safetensors"),
        renamed("0" * 32 + ".safetensors"),
        renamed("x" * 100),
        link(tarfile.SYMTYPE),
        link(tarfile.LNKTYPE),
        other_header(size=1 << 60),
        other_header(type=tarfile.DIRTYPE),
        other_header(type=tarfile.GNUTYPE_SPARSE),
        other_header(mode=0o4755),
        other_header(uid=1000),
        lambda parts: pack(parts.members[1:]),
        lambda parts: pack(parts.members[:1]),
        lambda parts: pack(parts.members[:2]),
        lambda parts: pack([parts.members[0], parts.members[0], *parts.members[2:]]),
        lambda parts: pack([*parts.members[:2], *reversed(parts.members[2:])]),
        lambda parts: b"\0" * 512 + pack(parts.members),
    ],
)
def test_members_that_are_not_as_prescribed(good: Path, forge: Callable[[Parts], bytes]) -> None:
    good.write_bytes(forge(Parts.of(good)))

    refused(good)


def entry_of(parts: Parts, num_tokens: int) -> dict[str, Any]:
    found: dict[str, Any] = next(
        one for one in parts.manifest["entries"] if one["num_tokens"] == num_tokens
    )
    return found


def at(parts: Parts, path: str) -> tuple[Any, Any]:
    """The place in the manifest that `path` names, such as `blobs.0.nbytes`."""
    *above, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    here: Any = parts.manifest
    for key in above:
        here = here[key]
    return here, last


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("format", "zip"),
        ("version", "1"),
        ("version", None),
        ("created", -1),
        ("created", "now"),
        ("models", []),
        ("models.0.identity.fields", {"a": 1}),
        ("models.0.identity.fields.weights", "w9"),
        ("models.0.identity.fields.weights", "\ud800"),
        ("models.0.layout", "{}"),
        ("models.0.extra", 1),
        ("blobs", []),
        ("blobs.0.name", "../../../../etc/passwd"),
        ("blobs.0.name", "A" * 32),
        ("blobs.0.name", "0" * 32 + "\n"),
        ("blobs.0.name", "0" * 32),
        ("blobs.0.nbytes", 1 << 60),
        ("blobs.0.nbytes", 1 << 80),
        ("blobs.0.nbytes", -1),
        ("blobs.0.nbytes", 1),
        ("blobs.0.nbytes", 1.5),
        ("blobs.0.digest", "0" * 32),
        ("blobs.0.digest", ""),
        ("entries", []),
        ("entries", {}),
        ("entries.0.id", "0" * 16),
        ("entries.0.model", 1),
        ("entries.0.model", -1),
        ("entries.0.tier", "boss"),
        ("entries.0.num_tokens", 0),
        ("entries.0.num_tokens", 1),
        ("entries.0.num_tokens", 1 << 60),
        ("entries.0.runs", []),
        ("entries.0.runs", ["0" * 32]),
        ("entries.0.checkpoint", "0" * 32),
        ("entries.0.created", 1e300),
        ("entries.0.prefill_s", -1.0),
        ("entries.0.label", None),
    ],
)
def test_manifests_that_are_wrong(good: Path, place: str, value: object) -> None:
    parts = Parts.of(good)
    where, key = at(parts, place)
    where[key] = value
    parts.write(good)

    refused(good)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["entries"].append(m["entries"][0]),
        lambda m: m["entries"].pop(),
        lambda m: m["blobs"].append(m["blobs"][0]),
        lambda m: m["blobs"].reverse(),
        lambda m: m["models"].append(m["models"][0]),
        lambda m: m["models"].append({**m["models"][0], "layout": "other"}),
        lambda m: m["entries"][0]["runs"].reverse(),
        lambda m: m["entries"][0]["runs"].pop(),
        lambda m: m["entries"][0]["runs"].pop(0),
        lambda m: m["entries"][0].update(checkpoint=m["entries"][0]["runs"][0]),
        lambda m: m["entries"][-1].update(checkpoint=None),
        lambda m: m["entries"][0].update(checkpoint=m["entries"][-1]["checkpoint"]),
        lambda m: m["entries"][0].update(runs=m["entries"][-1]["runs"]),
    ],
)
def test_manifests_that_contradict_their_blobs(
    good: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    parts = Parts.of(good)
    change(parts.manifest)
    parts.write(good)

    refused(good)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "checkpoint"},
        {"kind": "boss"},
        {"complete": False},
        {"fingerprint": "0" * 64},
        {"layout": "other"},
        {"start": 1},
        {"start": -8, "end": 0},
        {"end": 9},
        {"end": 1 << 60},
        {"start": 1 << 60, "end": (1 << 60) + 8},
        {"prefix": "0" * 32},
        {"parent": "0" * 32},
    ],
)
def test_runs_that_do_not_fit(good: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    parts = Parts.of(good)
    for name in entry_of(parts, 30)["runs"][:2]:
        changed = copy.deepcopy(parts)
        changed.rewrite_header(name, tmp_path, **changes)
        changed.seal()
        changed.write(good)

        refused(good)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "run"},
        {"start": 41, "end": 41},
        {"end": 43},
        {"prefix": "0" * 32},
        {"parent": ""},
        {"detail": "["},
        {"detail": "[]"},
        {"layout": "other"},
    ],
)
def test_checkpoints_that_do_not_fit(good: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    parts = Parts.of(good)
    parts.rewrite_header(entry_of(parts, 42)["checkpoint"], tmp_path, **changes)
    parts.seal()
    parts.write(good)

    refused(good)


def test_runs_of_two_models_do_not_mix(
    store: Store, ids: dict[str, str], file: Path, tmp_path: Path
) -> None:
    """Same tokens, same digests, but the first rows are another model's."""
    export(store, [ids["base"], put(store, BASE, model="w1")], file)
    parts = Parts.of(file)
    one, other = parts.manifest["entries"]
    parts.rewrite_header(one["runs"][1], tmp_path, parent=other["runs"][0])
    one["runs"][0] = other["runs"][0]
    names = sorted(parts.blobs, key=lambda name: name != other["runs"][0])
    parts.blobs = {name: parts.blobs[name] for name in names}
    parts.manifest["blobs"].sort(key=lambda section: section["name"] != other["runs"][0])
    parts.seal()
    parts.write(file)

    assert "another model" in refused(file)


def shaped(name: str, dtype: str, *shape: int) -> Tensor:
    count = int(np.prod(shape)) * (8 if dtype == "I64" else 2)
    return Tensor(name, dtype, shape, [memoryview(bytes(count))])


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [shaped("tokens", "I64", 8)],
        [shaped("layers.0.keys", "I64", 1, 2, 8, 4)],
        [shaped("tokens", "I64", 7), shaped("layers.0.keys", "I64", 1, 2, 8, 4)],
        [shaped("tokens", "F16", 8), shaped("layers.0.keys", "I64", 1, 2, 8, 4)],
        [shaped("tokens", "I64", 8, 1), shaped("layers.0.keys", "I64", 1, 2, 8, 4)],
        [shaped("tokens", "I64", 8), shaped("layers.0.keys", "I64", 1, 2, 7, 4)],
        [shaped("tokens", "I64", 8), shaped("layers.0.keys", "I64", 1, 2, 9, 4)],
        [shaped("tokens", "I64", 8), shaped("layers.0.keys", "I64", 1, 3, 8, 4)],
        [shaped("tokens", "I64", 8), shaped("layers.0.keys", "F16", 1, 2, 8, 4)],
        [shaped("tokens", "I64", 8), shaped("layers.0.keys", "I64", 8)],
        [shaped("tokens", "I64", 8), shaped("layers.1.keys", "I64", 1, 2, 8, 4)],
    ],
)
def test_tensors_that_do_not_fit(good: Path, tmp_path: Path, tensors: list[Tensor]) -> None:
    parts = Parts.of(good)
    tokens = pack_tokens(BASE[8:16])

    def change(header: BlobHeader, old: list[Tensor]) -> tuple[BlobHeader, list[Tensor]]:
        own = [
            replace(one, pieces=[memoryview(tokens)])
            if one.name == "tokens" and one.nbytes == len(tokens)
            else one
            for one in tensors
        ]
        return header, own

    parts.rewrite(entry_of(parts, 30)["runs"][1], tmp_path, change)
    parts.seal()
    parts.write(good)

    refused(good)


def test_other_tokens_make_another_entry(good: Path, tmp_path: Path) -> None:
    parts = Parts.of(good)
    other = memoryview(pack_tokens(range(6)))

    def change(header: BlobHeader, old: list[Tensor]) -> tuple[BlobHeader, list[Tensor]]:
        return header, [replace(old[0], pieces=[other]), *old[1:]]

    parts.rewrite(entry_of(parts, 30)["runs"][-1], tmp_path, change)
    parts.seal()
    parts.write(good)

    assert "other tokens than its id says" in refused(good)


def test_an_unknown_version_is_named(good: Path) -> None:
    parts = Parts.of(good)
    parts.manifest = {"format": "persist-cache-bundle", "version": 2, "news": [[[{}]]]}
    parts.write(good)

    assert "version 2" in refused(good, StoreFormatError)


def test_an_unknown_layout_is_named(store: Store, file: Path) -> None:
    identity = Fingerprint({**fingerprint().fields, "layout": "7"})
    entry = store.put(identity, BASE, FakeSource(BASE, real=True)).entry
    assert entry is not None
    export(store, [entry], file)

    assert "layout version 7" in refused(file, StoreFormatError)


def test_an_unknown_blob_format_is_named(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Parts.of(good)
    monkeypatch.setattr("persist_cache.blobs.header.FORMAT_VERSION", "9")
    for name in parts.blobs:
        content = parts.blobs[name].replace(b'"version":"1"', b'"version":"9"', 1)
        parts.blobs[name] = content
    parts.seal()
    parts.write(good)
    monkeypatch.undo()

    assert "blob format '9'" in refused(good, StoreFormatError)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=examples(30, 150), deadline=None)
@given(st.binary(max_size=200) | _JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_manifest_or_malformed(raw: bytes) -> None:
    with suppress(MalformedError):
        assert isinstance(parse_manifest(raw), Manifest)


@settings(
    max_examples=examples(20, 80),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_change_of_a_manifest_is_taken_or_refused(good: Path, data: st.DataObject) -> None:
    """With all checksums right. What is taken holds the same tokens."""
    kept = good.with_name("kept")
    if not kept.exists():
        kept.write_bytes(good.read_bytes())
    parts = Parts.of(kept)
    where: Any = parts.manifest
    while isinstance(where, dict | list) and where:
        above = where
        key = data.draw(
            st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where)))
        )
        where = above[key]
        if data.draw(st.booleans()):
            break
    match data.draw(st.sampled_from(["drop", "replace", "double"])):
        case "drop":
            del above[key]
        case "replace":
            above[key] = data.draw(_JSON)
        case "double" if isinstance(above, list):
            above.append(above[key])
    parts.write(good)

    with suppress(PersistCacheError), Bundle(good) as bundle:
        sizes = [entry.num_tokens for entry in bundle.entries]
        assert sizes == sorted(sizes)
        assert {len(BASE), len(BRANCH), len(STATEFUL)} >= set(sizes)


@given(st.binary(max_size=600))
@settings(max_examples=examples(15, 50))
def test_any_header_is_right_or_refused(raw: bytes) -> None:
    with pytest.raises(MalformedError):
        member_size(raw, MANIFEST)


@pytest.mark.parametrize("size", [0, 1, 511, 8**11 - 1, 8**11, 1 << 62])
def test_tar_programs_understand_every_size(size: int) -> None:
    info = tarfile.TarInfo.frombuf(member_header("a.json", size), "utf-8", "strict")

    assert (info.name, info.size, info.type) == ("a.json", size, tarfile.REGTYPE)


# ---- into a store ------------------------------------------------------------------------------


def test_a_budget_that_is_too_small(
    store: Store, ids: dict[str, str], tmp_path: Path, good: Path, clock: Clock
) -> None:
    """Two pinned entries leave no room; an entry that could go stays, too."""
    with Store.open(tmp_path / "small", max_bytes=330_000, min_free_bytes=0, clock=clock) as small:
        put(small, [1] * 5, pinned=True)
        put(small, [2] * 5)
        before = snapshot(small)
        tokens = list(range(500, 4000))
        big = put(store, tokens)
        export(store, [ids["system"], big], good, force=True)

        with Bundle(good) as bundle, pytest.raises(StoreFullError):
            preview(small, bundle.entries)
        with Bundle(good) as bundle, pytest.raises(StoreFullError):
            load(small, bundle.entries)

        assert snapshot(small) == before


def test_room_is_made_for_an_import(
    store: Store, ids: dict[str, str], tmp_path: Path, good: Path, clock: Clock
) -> None:
    with Store.open(tmp_path / "small", max_bytes=480_000, min_free_bytes=0, clock=clock) as small:
        old = [put(small, [one] * 9, tier="system") for one in range(6)]
        clock.advance(1)

        with Bundle(good) as bundle:
            done = load(small, bundle.entries)

        assert {one.id for one in done} <= {entry.id for entry in small.entries()}
        assert not set(old) <= {entry.id for entry in small.entries()}
        assert small.check(read_data=True) == []


def test_a_failure_takes_back_what_was_added(
    other: Store, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = other.put
    calls: list[int] = []

    def put_once(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise StoreError("The disk failed.")
        return real(*arguments, **options)

    monkeypatch.setattr(other, "put", put_once)

    with Bundle(good) as bundle, pytest.raises(StoreError, match="disk failed"):
        load(other, bundle.entries)
    with Bundle(good) as bundle:
        gone = [find_departed(other, entry.id) for entry in bundle.entries]
    assert {one.reason for one in gone if one is not None} == {
        "removed again because its import failed"
    }
    assert other.entries() == []
    assert blob_files(other.root) == []
    assert other.check(read_data=True) == []


def test_a_file_that_changes_while_it_is_imported(other: Store, good: Path) -> None:
    with Bundle(good) as bundle:
        raw = bytearray(good.read_bytes())
        raw[-1024 - 512] ^= 1  # in the data of the last member
        good.write_bytes(raw)

        with pytest.raises(CorruptBlobError):
            load(other, bundle.entries)
    assert other.entries() == []
    assert other.check(read_data=True) == []


def test_rows_of_some_layers_in_the_way(
    store: Store, other: Store, ids: dict[str, str], file: Path
) -> None:
    """The store has these tokens without all of their rows, and the bundle brings no state."""
    put(other, BASE[:20], complete=False)
    export(store, [ids["base"]], file)
    before = snapshot(other)

    with Bundle(file) as bundle, pytest.raises(StoreError, match="only some layers"):
        load(other, bundle.entries)
    assert snapshot(other) == before


def test_who_can_use_it(store: Store, ids: dict[str, str], good: Path, tmp_path: Path) -> None:
    with Bundle(good) as bundle:
        ours = bundle.entries[0].fingerprint
    assert usability(ours).usable is None
    assert usability(ours, fingerprint()).usable
    other = usability(ours, fingerprint(weights="w5"))
    assert (other.usable, [change.name for change in other.changes]) == (False, ["weights"])
    assert "weights" in other.message
    old = usability(fingerprint(mlx_lm="0.1.0"))
    assert (old.usable, old.changes[0].old) == (False, "0.1.0")


def test_who_can_use_it_by_what_was_computed_here(other: Store, good: Path, tmp_path: Path) -> None:
    with Bundle(good) as bundle:
        ours = bundle.entries[0].fingerprint
        load(other, bundle.entries)
    assert usability(ours, store=other).usable is None

    tokens = [1, 2, 3]
    (tmp_path / "model").mkdir()
    local = Fingerprint(fingerprint().fields, {"path": str(tmp_path / "model")})
    other.put(local, tokens, FakeSource(tokens, layout="{}"))
    assert usability(ours, store=other).usable


def test_local_names_replace_those_of_the_bundle(other: Store, good: Path) -> None:
    from persist_cache.queries.totals import Survey

    here = Fingerprint(fingerprint().fields, {"name": "org/mine", "path": "/models/mine"})
    with Bundle(good) as bundle:
        load(other, bundle.entries, here=here)

    (model,) = Survey(other).models.values()
    assert (model.name, model.path) == ("org/mine", "/models/mine")


def test_a_portable_identity_keeps_its_digest() -> None:
    info = {"name": "org/m", "adapter": "../a/lora", "path": "/x", "draft.name": "/y/d", "mlx": "1"}
    whole = Fingerprint(fingerprint().fields, info)

    bare = portable(whole)

    assert bare.digest == whole.digest
    assert bare.info == {"name": "org/m", "adapter": "lora", "draft.name": "d", "mlx": "1"}


@dataclass
class WideSource(FakeSource):
    """Two KiB per token, all from one buffer."""

    def rows(self, start: int, end: int) -> Payload:
        shape = (1, 4, end - start, 256)
        pieces = [_ZEROS[: (end - start) * 2048]]
        empty = Tensor("layers.0.values", "F16", (*shape[:3], 0), [])
        return Payload([Tensor("layers.0.keys", "F16", shape, pieces), empty])


WIDE = (
    '[{"class":"KVCache","rows":{"keys":{"batch":1,"dim":256,"dtype":"F16","heads":4},'
    '"values":{"batch":1,"dim":0,"dtype":"F16","heads":4}}}]'
)
_ZEROS = memoryview(bytes(512 * 2048))


def test_memory_is_that_of_one_run(tmp_path: Path, clock: Clock) -> None:
    import tracemalloc

    tokens = list(range(12_000))
    with (
        Store.open(tmp_path / "a", min_free_bytes=0, run_tokens=512, clock=clock) as store,
        Store.open(tmp_path / "b", min_free_bytes=0, run_tokens=400, clock=clock) as other,
    ):
        entry = store.put(fingerprint(), tokens, WideSource(tokens, layout=WIDE)).entry
        assert entry is not None
        tracemalloc.start()
        added = transfer(store, other, [entry], tmp_path / "big.tar")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert added == [entry]
        assert (tmp_path / "big.tar").stat().st_size > 24_000_000
        assert peak < 6_000_000
