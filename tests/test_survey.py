"""What people ask of a store: one entry read alone is the one that the whole index lists."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from persist_cache import Store
from persist_cache.entry import Entry
from persist_cache.errors import StoreError
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.index.records import BlobRecord, EntryRecord, pack_number
from persist_cache.index.transaction import Reader, Writer
from persist_cache.queries.details import details_of
from persist_cache.queries.ids import short_id, short_ids
from persist_cache.queries.select import Filters
from persist_cache.queries.totals import Survey
from tests import forge
from tests.bulk_store import conversations, fill
from tests.fakes import FakeSource, fingerprint, put


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Conversations, a fork within a turn, an entry in the middle, and one with a checkpoint."""
    with Store.open(tmp_path / "store", min_free_bytes=0) as opened:
        fill(opened, conversations(fingerprint(), 200, systems=5))
        fork = [7, 7, 7, 7, 7, 7]
        for tokens in ([*fork, 8, 9, 10, 11], [*fork, 12], fork[:3], [*fork, 8, 9, 10, 11, 12]):
            put(opened, tokens)
        state = FakeSource([*fork, 13], complete=False, has_state=True)
        opened.put(fingerprint(), [*fork, 13], state)
        opened.put(fingerprint(weights="w1"), fork, FakeSource(fork))
        yield opened


def test_an_entry_read_alone_is_the_listed_one(store: Store) -> None:
    listed = store.entries()

    assert [store.get(one.id) for one in listed] == listed


def test_details_agree_with_the_whole_index(store: Store) -> None:
    survey = Survey(store)
    catalog = survey.catalog
    for entry in survey.entries:
        details = details_of(store, entry.id)

        assert details is not None
        assert details.entry == entry
        assert details.model == survey.model_of(entry)
        below = tuple(one.id for one in survey.entries if one.parent == entry.id)
        assert details.children == below
        assert sum(run.num_tokens for run in details.runs) == entry.num_tokens
        users: dict[str, int] = {}
        place = catalog.places[catalog.table.nodes[catalog.rows[int(entry.id, 16)]]]
        with store.read() as txn:
            while place >= catalog.first:
                blob = txn.blob(catalog.blobs[place])
                assert blob is not None
                users[blob.name.hex()] = catalog.users[place]
                place = catalog.above[place]
        assert {run.blob: run.entries for run in details.runs} == users


def test_columns_are_the_fields_of_the_entries(store: Store) -> None:
    survey = Survey(store)
    fields = Entry.__struct_fields__
    last_first = range(survey.num_entries - 1, -1, -1)

    for rows in (range(survey.num_entries), last_first, [2, 0], []):
        columns = survey.columns(rows, fields)
        chosen = [survey.entries[row] for row in rows]
        assert survey.entries_at(rows) == chosen
        assert {name: [getattr(one, name) for one in chosen] for name in fields} == {
            name: list(column) for name, column in columns.items()
        }
    assert survey.ids == [entry.id for entry in survey.entries]
    assert list(survey.columns([0], ["label", "id"])) == ["label", "id"]


def test_model_is_named_the_same_in_all_its_layouts(tmp_path: Path) -> None:
    """What `evict --model` means is what `list` calls so."""
    with Store.open(tmp_path / "other", min_free_bytes=0) as opened:
        for number, name in enumerate(("old-name", "new-name")):
            identity = Fingerprint.from_fields({"weights": "w0"}, {"name": name})
            source = FakeSource([number], layout=f'{{"rows":{number}}}')
            opened.put(identity, [number], source)
        survey = Survey(opened)

        for part in ("old", "new"):
            named = [one.id for one in survey.entries if part in survey.model_of(one).name]
            chosen = survey.entries_at(Filters(models=(part,)).rows(survey, 0.0))
            assert [one.id for one in chosen] == named
        assert len(survey.models) == 1


DAMAGES = {
    "an edge names an entry without record": "forget the entry",
    "an entry names a namespace without record": {"namespace": 7777},
    "an entry names a node without record": {"node": 7777},
    "an entry names a checkpoint without record": {"checkpoint": 7777},
    "an entry expires at no time": {"expires": math.nan},
    "unknown blob kind": {"kind": 9},
    "an edge begins before the one above it": {"start": 0},
    "an edge names blob or node 7777, which has no record": {"blob": 7777},
}


def spoil(txn: Writer, damage: Any) -> None:
    """Make the index contradict itself."""
    inner, record = next(
        (number, one) for number, one in txn.entries() if txn.children(one.node, limit=1)
    )
    ((key, below), *_) = txn.children(record.node, limit=1)
    if damage == "forget the entry":
        forge.delete(txn, b"entries", pack_number(inner))
    elif "blob" in damage:
        forge.put(txn, b"edges", key, below._replace(**damage).pack())
    elif damage.keys() & {"kind", "start"}:
        blob = txn.blob(below.blob)
        assert blob is not None
        raw = pack_number(below.blob), blob._replace(**damage).pack()
        forge.put(txn, b"blobs", *raw)
    else:
        raw = pack_number(inner), record._replace(**damage).pack()
        forge.put(txn, b"entries", *raw)


@pytest.mark.parametrize(("message", "damage"), DAMAGES.items(), ids=list(DAMAGES))
def test_index_that_contradicts_itself_is_refused(store: Store, message: str, damage: Any) -> None:
    forge.change(store, lambda txn: spoil(txn, damage))

    with pytest.raises(StoreError, match=message):
        Survey(store)
    with pytest.raises(StoreError, match=message):
        store.entries()
    assert store.check()


def test_short_ids_are_the_same_one_by_one(store: Store) -> None:
    ids = [entry.id for entry in store.entries()]

    assert {one: short_id(store, one) for one in ids} == short_ids(ids)


def test_details_do_not_read_the_rest_of_the_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = max(store.entries(), key=lambda one: one.num_tokens)
    path = 1
    above = entry
    while above.parent is not None:
        above = store.get(above.parent)
        path += 1
    unpacked = 0

    def counted(record: type[BlobRecord] | type[EntryRecord]) -> classmethod[object, ..., object]:
        unpack = record.unpack

        def count(cls: object, raw: bytes) -> object:
            nonlocal unpacked
            unpacked += 1
            return unpack(raw)

        return classmethod(count)

    def whole_table(reader: Reader, database: bytes) -> Sequence[object]:
        raise AssertionError(f"all of {database!r} was read")

    monkeypatch.setattr(Reader, "_table", whole_table)
    monkeypatch.setattr(BlobRecord, "unpack", counted(BlobRecord))
    monkeypatch.setattr(EntryRecord, "unpack", counted(EntryRecord))

    details_of(store, entry.id)

    assert unpacked <= 4 * path
