"""Malice: whatever lies on a remote, only what a holder of the secret published enters a store."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persist_cache.fingerprint.value import Fingerprint
from persist_cache.remote import Remote, RemoteError, RemoteSettings, Why, make_publisher_key
from persist_cache.remote.keys import Keys, Place, anchor_name, places_of_entry
from persist_cache.remote.manifest import (
    MAGIC,
    MAX_MANIFEST_BYTES,
    Manifest,
    RefusedError,
    encode_manifest,
    open_manifest,
    pack,
    sealed,
)
from persist_cache.remote.trust import Seal, open_trust
from persist_cache.store.store import Store
from persist_cache.tokens import pack_tokens
from tests.examples import examples
from tests.fakes import blob_files, fetched, fingerprint
from tests.remotes import (
    LONG,
    SECRET,
    bring,
    folder_settings,
    machine,
    objects,
    opened,
    put_real,
    secret_file,
)

Trust = tuple[Keys, Seal]
Reader = tuple[Store, RemoteSettings]


class Objects(dict[str, bytes]):
    """Objects by name; shown shortly, because Hypothesis shows arguments for each example."""

    def __repr__(self) -> str:
        return f"<{len(self)} objects>"


AFTER_OTHERS = [9999, *LONG[1:]]
OTHER = [*LONG[:300], *range(4000, 4500)]
PACKED = pack_tokens(LONG)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    """Two entries that begin alike, one of another model, and one of another secret."""
    folder = tmp_path_factory.mktemp("first")
    settings = folder_settings(folder)
    with machine(folder, "first", settings) as (store, remote):
        remote.publish(put_real(store, LONG, complete=False))
        remote.publish(put_real(store, OTHER))
        remote.publish(put_real(store, AFTER_OTHERS, complete=False))
        remote.publish(put_real(store, LONG, model="w1", complete=False))
        foreign = msgspec.structs.replace(
            settings, secret_file=secret_file(folder, "another secret of 16 bytes")
        )
        with opened(store, foreign) as another:
            another.publish(put_real(store, LONG, complete=False))
    return Objects(objects(folder))


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bucket")


@pytest.fixture(scope="module")
def reader(bucket: Path) -> Iterator[Reader]:
    """The store of another machine."""
    settings = folder_settings(bucket)
    with Store.open(bucket / "reader", max_bytes=1 << 30, min_free_bytes=0) as store:
        yield store, settings


@pytest.fixture(scope="module")
def trust() -> Trust:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERSIST_CACHE_REMOTE_SECRET", SECRET)
        return open_trust("secret", "", "")


def place(bucket: Path, content: Objects) -> None:
    """Have exactly these objects lie in the bucket."""
    root = bucket / "bucket"
    for path in root.rglob("*"):
        if path.is_file() and str(path.relative_to(root)) not in content:
            path.unlink()
    for name, raw in content.items():
        path = root / name
        if not path.exists() or path.read_bytes() != raw:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)


def names_of(trust: Trust, tokens: list[int], **model: str) -> dict[Place, bytes]:
    """The keys of an entry's anchors."""
    keys, _ = trust
    return keys.anchors(fingerprint(**model), pack_tokens(tokens), places_of_entry(len(tokens)))


def manifest_of(trust: Trust, content: Objects, tokens: list[int]) -> Manifest:
    key = names_of(trust, tokens)[Place(len(tokens), is_end=True)]
    return open_manifest(content[anchor_name(key)], key, trust[1], fingerprint()).manifest


def refused(bucket: Path, reader: Reader, content: Objects) -> set[str]:
    """Offer `content` to a reader, which must take nothing; returns what it refused."""
    place(bucket, content)
    store, settings = reader
    with opened(store, settings) as remote:
        brought = bring(remote, LONG, ends=[len(LONG)])
        counted = remote.status().counters
    assert not brought.is_hit, brought
    assert store.entries() == []
    assert blob_files(store.root) == []
    assert list((store.root / "tmp").iterdir()) == []
    return {name for name in counted if name.startswith("refused:")}


def without_others(trust: Trust, published: Objects) -> Objects:
    """The blobs, and the manifest of `LONG` at its end alone."""
    key = names_of(trust, LONG)[Place(len(LONG), is_end=True)]
    kept = {name: raw for name, raw in published.items() if name.startswith("pc1/b/")}
    return Objects(kept | {anchor_name(key): published[anchor_name(key)]})


def end_of(trust: Trust) -> bytes:
    return names_of(trust, LONG)[Place(len(LONG), is_end=True)]


def test_the_published_entry_is_brought_where_nothing_is_changed(
    bucket: Path, reader: Reader, trust: Trust, published: Objects
) -> None:
    place(bucket, without_others(trust, published))
    store, settings = reader

    with opened(store, settings) as remote:
        brought = bring(remote, LONG, ends=[len(LONG)])

    assert brought.num_tokens == fetched(store, LONG) == len(LONG)
    store.evict([one.id for one in store.entries()])


# ---- manifests ----------------------------------------------------------------------------------


def test_a_manifest_that_was_moved_to_another_anchor_is_refused(
    bucket: Path, reader: Reader, trust: Trust, published: Objects
) -> None:
    content = without_others(trust, published)
    raw = content.pop(anchor_name(end_of(trust)))
    content[anchor_name(names_of(trust, LONG)[Place(256)])] = raw
    other = names_of(trust, OTHER)[Place(len(OTHER), is_end=True)]
    content[anchor_name(end_of(trust))] = published[anchor_name(other)]

    assert refused(bucket, reader, content) == {"refused:seal"}


def test_a_manifest_of_another_model_is_refused(
    bucket: Path, reader: Reader, trust: Trust, published: Objects
) -> None:
    end = Place(len(LONG), is_end=True)
    raw = published[anchor_name(names_of(trust, LONG, weights="w1")[end])]
    content = without_others(trust, published)
    content[anchor_name(end_of(trust))] = raw

    assert refused(bucket, reader, content) == {"refused:seal"}


def test_a_sealed_manifest_of_another_model_is_refused(
    bucket: Path, reader: Reader, trust: Trust, published: Objects
) -> None:
    manifest = manifest_of(trust, published, LONG)
    other = msgspec.structs.replace(manifest, fields=dict(fingerprint(weights="w1").fields))

    assert offered(bucket, reader, trust, published, other) == {"refused:model"}


def test_a_manifest_of_another_secret_is_refused(
    bucket: Path, reader: Reader, trust: Trust, published: Objects, tmp_path: Path
) -> None:
    keys, _ = open_trust("secret", secret_file(tmp_path, "another secret of 16 bytes"), "")
    end = Place(len(LONG), is_end=True)
    theirs = keys.anchors(fingerprint(), PACKED, [end])[end]
    content = without_others(trust, published)
    content[anchor_name(end_of(trust))] = published[anchor_name(theirs)]

    assert refused(bucket, reader, content) == {"refused:seal"}


def test_what_another_secret_published_is_not_found(
    bucket: Path, published: Objects, tmp_path: Path
) -> None:
    place(bucket, published)
    settings = folder_settings(bucket, secret_file=secret_file(tmp_path, "a third one, 16 bytes"))

    with machine(tmp_path, "third", settings) as (store, remote):
        brought = bring(remote, LONG)

        assert brought.why == Why.NOT_FOUND
        assert store.entries() == []


def test_a_manifest_that_is_replayed_over_a_newer_one_brings_what_it_always_did(
    bucket: Path, reader: Reader, trust: Trust, published: Objects
) -> None:
    """Its tokens, its model and its place are sealed, so an old one is as right as a new one."""
    place(bucket, without_others(trust, published))
    store, settings = reader
    with opened(store, settings) as remote:
        bring(remote, LONG, ends=[len(LONG)])
        store.evict([one.id for one in store.entries()])

        again = bring(remote, LONG, ends=[len(LONG)])

    assert again.num_tokens == fetched(store, LONG) == len(LONG)
    store.evict([one.id for one in store.entries()])


def altered(manifest: Manifest, **changes: Any) -> bytes:
    """The body of a manifest in which some fields are not what they may be."""
    said = msgspec.msgpack.decode(encode_manifest(manifest))
    said.update(changes)
    return msgspec.msgpack.encode(said)


def offered(
    bucket: Path, reader: Reader, trust: Trust, published: Objects, what: Manifest | bytes
) -> set[str]:
    """Offer a manifest with a right seal, as only a holder of the secret can make it."""
    body = what if isinstance(what, bytes) else encode_manifest(what)
    content = without_others(trust, published)
    content[anchor_name(end_of(trust))] = sealed(body, end_of(trust), trust[1])
    return refused(bucket, reader, content)


HUGE: dict[str, Callable[[Manifest], dict[str, Any]]] = {
    "a blob of 2^60 bytes": lambda m: {"blobs": [[0, len(LONG), [[bytes(32), 1 << 60]]]]},
    "2^60 tokens": lambda m: {"num_tokens": 1 << 60},
    "a blob that ends at 2^60": lambda m: {"blobs": [_blob(0, 1 << 60)]},
    "a negative size": lambda m: {"blobs": [[0, len(LONG), [[bytes(32), -1]]]]},
    "a size that is no number": lambda m: {"blobs": [[0, len(LONG), [[bytes(32), "5"]]]]},
    "a blob without objects": lambda m: {"blobs": [[0, len(LONG), []]]},
    "a digest that is a path": lambda m: {"blobs": [[0, len(LONG), [[b"../../../etc/passwd", 5]]]]},
    "a name": lambda m: {"name": "../../etc/passwd"},
    "blobs that overlap": lambda m: {"blobs": [_blob(0, 700)] * 2},
    "blobs with a gap": lambda m: {
        "blobs": [[0, 700, [[bytes(32), 5]]], [800, 1200, [[bytes(32), 5]]]]
    },
    "no blobs": lambda m: {"blobs": []},
    "a state elsewhere": lambda m: {"state": _blob(5, 5)},
    "a state of some tokens": lambda m: {"state": _blob(5, len(LONG))},
    "neither rows nor a state": lambda m: {"state": None},
    "too many tokens": lambda m: {"tokens": pack(pack_tokens([*LONG, 1]))},
    "too few tokens": lambda m: {"tokens": pack(pack_tokens(LONG[:-1]))},
    "tokens that unpack to 32 MiB": lambda m: {"tokens": zlib.compress(bytes(32 << 20))},
    "tokens with something behind them": lambda m: {"tokens": m.tokens + b"x"},
    "tokens that are none": lambda m: {"tokens": b"x"},
    "other tokens": lambda m: {"tokens": pack(pack_tokens([1, *LONG[1:]]))},
    "another version": lambda m: {"version": 2},
    "another tier": lambda m: {"tier": "root"},
    "a date before time": lambda m: {"created": -1.0},
    "no date at all": lambda m: {"created": float("nan")},
    "an unknown layout": lambda m: {"layout": '[{"class":"Mine"}]'},
    "no layout": lambda m: {"layout": "{"},
    "a fingerprint of another format": lambda m: {"fields": {**m.fields, "layout": "2"}},
    "a path in the fields": lambda m: {"fields": {**m.fields, "../..": "x"}},
}


def _blob(start: int, end: int) -> list[Any]:
    return [start, end, [[bytes(32), 5]]]


@pytest.mark.parametrize("name", HUGE)
def test_a_manifest_that_cannot_be_is_refused_even_with_a_seal(
    bucket: Path, reader: Reader, trust: Trust, published: Objects, name: str
) -> None:
    manifest = manifest_of(trust, published, LONG)

    assert offered(bucket, reader, trust, published, altered(manifest, **HUGE[name](manifest)))


def test_a_manifest_that_is_too_long_is_not_read_to_its_end(
    bucket: Path, reader: Reader, trust: Trust, published: Objects
) -> None:
    content = without_others(trust, published)
    content[anchor_name(end_of(trust))] = MAGIC + bytes(MAX_MANIFEST_BYTES)

    assert refused(bucket, reader, content) == {"refused:malformed"}


@given(st.data())
@settings(max_examples=examples(30, 2000))
def test_no_changed_manifest_is_opened(
    published: Objects, trust: Trust, data: st.DataObject
) -> None:
    key = end_of(trust)
    raw = _damaged(data, published[anchor_name(key)])

    with pytest.raises(RefusedError):
        open_manifest(raw, key, trust[1], fingerprint())


@given(st.binary(max_size=300))
@settings(max_examples=examples(30, 2000))
def test_no_body_with_a_seal_does_anything_but_be_refused(trust: Trust, body: bytes) -> None:
    key = end_of(trust)

    with pytest.raises(RefusedError):
        open_manifest(sealed(body, key, trust[1]), key, trust[1], fingerprint())


def _damaged(data: st.DataObject, raw: bytes) -> bytes:
    """The bytes, but not all of them as they were."""
    at = data.draw(st.integers(0, len(raw) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "drop"]))
    if kind == "flip":
        return raw[:at] + bytes([raw[at] ^ data.draw(st.integers(1, 255))]) + raw[at + 1 :]
    if kind == "cut":
        return raw[:at]
    if kind == "insert":
        return raw[:at] + data.draw(st.binary(min_size=1, max_size=9)) + raw[at:]
    return raw[:at] + raw[at + 1 :]


# ---- blobs --------------------------------------------------------------------------------------


def blobs_of(trust: Trust, published: Objects) -> list[str]:
    """The names of the objects of `LONG`, in order, its state last."""
    manifest = manifest_of(trust, published, LONG)
    assert manifest.state is not None
    sections = [*manifest.blobs, manifest.state]
    return [trust[0].blob_name(part.digest) for one in sections for part in one.parts]


@pytest.mark.parametrize("which", [0, 1, -1])
@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: b"",
        lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:],
        lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
        lambda raw: bytes(len(raw)),
    ],
    ids=["truncated", "longer", "empty", "flipped", "length flipped", "zeros"],
)
def test_a_changed_blob_is_refused(
    bucket: Path,
    reader: Reader,
    trust: Trust,
    published: Objects,
    which: int,
    change: Callable[[bytes], bytes],
) -> None:
    content = without_others(trust, published)
    name = blobs_of(trust, published)[which]
    assert len(content[name]) > 16384
    content[name] = change(content[name])

    assert refused(bucket, reader, content) & {"refused:digest", "refused:length"}


def test_blobs_that_were_swapped_are_refused(
    bucket: Path, reader: Reader, trust: Trust, published: Objects
) -> None:
    content = without_others(trust, published)
    first, second, *_ = blobs_of(trust, published)
    content[first], content[second] = content[second], content[first]

    assert refused(bucket, reader, content) & {"refused:digest", "refused:length"}


@pytest.mark.parametrize(
    "kind", ["other tokens", "other tokens before", "another model", "another place"]
)
def test_a_sealed_manifest_with_the_blobs_of_something_else_is_refused(
    bucket: Path, reader: Reader, trust: Trust, published: Objects, kind: str
) -> None:
    manifest = manifest_of(trust, published, LONG)
    first, *others = manifest.blobs
    if kind == "other tokens before":
        others[0] = manifest_of(trust, published, AFTER_OTHERS).blobs[1]
        parts = first.parts
    elif kind == "other tokens":
        parts = manifest_of(trust, published, OTHER).blobs[0].parts
    elif kind == "another model":
        end = Place(len(LONG), is_end=True)
        key = names_of(trust, LONG, weights="w1")[end]
        theirs = fingerprint(weights="w1")
        raw = published[anchor_name(key)]
        parts = open_manifest(raw, key, trust[1], theirs).manifest.blobs[0].parts
    else:
        parts = others[0].parts
    wrong = msgspec.structs.replace(first, parts=parts)
    content = msgspec.structs.replace(manifest, blobs=(wrong, *others))

    assert offered(bucket, reader, trust, published, content) == {"refused:blob"}


@given(st.data())
@settings(max_examples=examples(10, 300))
def test_no_changed_blob_enters_a_store(
    bucket: Path, reader: Reader, trust: Trust, published: Objects, data: st.DataObject
) -> None:
    content = without_others(trust, published)
    name = data.draw(st.sampled_from(blobs_of(trust, published)))
    content[name] = _damaged(data, content[name])

    assert refused(bucket, reader, content) & {"refused:digest", "refused:length"}


# ---- publishers ---------------------------------------------------------------------------------


def test_a_mirror_of_a_publisher_takes_only_what_the_publisher_signed(tmp_path: Path) -> None:
    private = tmp_path / "publisher.key"
    public = make_publisher_key(private)
    settings = folder_settings(
        tmp_path, trust="publisher", public_key=public, secret_file=str(private)
    )
    reading = msgspec.structs.replace(settings, secret_file="")
    with machine(tmp_path, "publisher", settings) as (store, remote):
        remote.publish(put_real(store, LONG))
    with machine(tmp_path, "reader", reading) as (store, remote):
        brought = bring(remote, LONG)
        entry = store.entries()[0].id
        with pytest.raises(RemoteError, match="private key is not on this machine"):
            remote.publish(entry)
    other_key = tmp_path / "other.key"
    other_public = make_publisher_key(other_key)
    keys, _ = open_trust("publisher", "", public)
    _, forger = open_trust("publisher", str(other_key), other_public)
    end = Place(len(LONG), is_end=True)
    key = keys.anchors(fingerprint(), PACKED, [end])[end]
    path = tmp_path / "bucket" / anchor_name(key)
    body = path.read_bytes()[len(MAGIC) + forger.nbytes :]
    for one in (tmp_path / "bucket" / "pc1/a").rglob("*"):
        if one.is_file():
            one.unlink()
    path.write_bytes(sealed(body, key, forger))
    with machine(tmp_path, "third", reading) as (store, remote):
        forged = bring(remote, LONG)

        assert store.entries() == []

    assert brought.num_tokens == len(LONG)
    assert forged.why == Why.REFUSED


def test_a_key_that_does_not_belong_to_the_public_one_is_refused(
    tmp_path: Path, store: Store
) -> None:
    private = tmp_path / "publisher.key"
    make_publisher_key(private)
    other = make_publisher_key(tmp_path / "other.key")

    with pytest.raises(RemoteError, match="does not fit"):
        Remote.open(
            store,
            folder_settings(
                tmp_path, trust="publisher", public_key=other, secret_file=str(private)
            ),
        )


def test_names_say_nothing_of_what_they_stand_for(trust: Trust, published: Objects) -> None:
    """Neither prompt nor model nor content can be told from a name without the secret."""
    keys, _ = trust
    other = Keys(b"secret\0" + b"another secret")
    digest = bytes(range(32))

    assert keys.blob_name(digest) != other.blob_name(digest)
    assert digest.hex() not in keys.blob_name(digest)
    assert Fingerprint({}).hex not in " ".join(published)
