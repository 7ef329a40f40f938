"""Typed look-ups and changes within one transaction of the index.

`Reader` and `Writer` know the sub-databases and the records in them, and nothing of how a
transaction begins or ends, which is the business of `environment`. What the records mean together,
the trie, is that of `tree`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import xxhash

from persist_cache.errors import StoreFormatError
from persist_cache.index.columns import BlobColumns, EdgeColumns, EntryColumns, Packed, Raw
from persist_cache.index.groups import joined, pack_groups, unpack_groups
from persist_cache.index.records import (
    COUNTER_BYTES,
    EXPIRY_KEY,
    FAMILY_BYTES,
    MAX_COUNTER,
    NUMBER,
    RECENCY_KEY,
    UNREADABLE,
    BlobRecord,
    Edge,
    EntryRecord,
    NamespaceRecord,
    SizedRecord,
    expiry_key,
    family,
    family_of,
    pack_counter,
    pack_number,
    recency_key,
    unpack_counter,
    unpack_number,
)

DATABASES = (
    b"meta",
    b"namespaces",
    b"edges",
    b"parents",
    b"tokens",
    b"blobs",
    b"names",
    b"entries",
    b"recency",
    b"expiry",
    b"trash",
    b"pending",
    b"quarantine",
    b"departed",
)
KEPT = b"kept"
"""Seconds for which entries are kept behind each use; missing in stores of earlier versions."""
GROUPS = b"groups"
"""Groups that entries belong to; missing in stores of earlier versions."""
ADDED = (KEPT, GROUPS)
"""What came later: without it, nothing is known of that."""
FAMILIES = b"families"
"""Keys of the namespaces behind that of their family: those of one salt are told apart by it."""
BLANK = b"blank"
"""Zeros, while what eviction left in freed pages is overwritten; else empty."""
SPACES = b"spaces"
"""Per blob the number of the namespace that it is of."""
LATER = (FAMILIES, BLANK, SPACES)
"""What came still later, and is not of entries."""
ERASED = "erased"
"""Counter: how often freed pages were overwritten. Whoever has written before opens the index anew
before it writes again, because LMDB keeps the pages that it wrote and writes parts of them again.
"""
UNFINISHED = "erasing"
"""Counter: not 0 from an eviction on until what it left is erased."""
_MOST_KEPT_S = 366 * 86400
_TREE = (
    b"namespaces",
    b"edges",
    b"parents",
    b"tokens",
    b"blobs",
    b"names",
    b"entries",
    b"recency",
    b"expiry",
)
"""What a rebuild makes anew from the blobs."""
_SPACE = "space:"
"""Prefix of the counters of what the blobs of a namespace take."""
_COUNTED = b"count:"
"""Prefix of the counters that people see; all others are the store's own."""
_MAX_NAME_BYTES = 400
_PAGE_HEADER_BYTES = 16


def _seconds(raw: Any) -> int:
    """What a record of `kept` says; a damaged one says nothing."""
    seconds = unpack_counter(raw) if raw is not None and len(raw) == COUNTER_BYTES else 0
    return seconds if 0 < seconds <= _MOST_KEPT_S else 0


TEXT = "text:"
"""What begins the names, in `meta`, of texts that belong to what builds on the store."""


def counter_name(name: str) -> str:
    """A counter's name as a key can hold it: LMDB's have 511 bytes; the rest becomes a digest."""
    raw = name.encode("utf-8", "replace")
    if len(raw) <= _MAX_NAME_BYTES:
        return raw.decode()
    head = raw[: _MAX_NAME_BYTES - 33].decode("utf-8", "ignore")
    return f"{head}~{xxhash.xxh3_128_hexdigest(raw)}"


class Reader:
    """Typed look-ups in one read transaction; valid inside its `with` block only."""

    # LMDB's transaction and databases; `environment` alone imports their classes.
    def __init__(self, txn: Any, databases: dict[bytes, Any]) -> None:
        self._txn = txn
        self._db = databases

    @property
    def commit_id(self) -> int:
        """Number of the commit that is seen; a higher one may have changed anything."""
        return int(self._txn.id())

    def counter(self, name: str) -> int:
        raw = self._txn.get(name.encode(), db=self._db[b"meta"])
        return 0 if raw is None else unpack_counter(raw)

    def counts(self) -> dict[str, int]:
        """Everything that was ever counted with `Writer.count`."""
        found: dict[str, int] = {}
        with self._txn.cursor(db=self._db[b"meta"]) as cursor:
            if cursor.set_range(_COUNTED):
                for key, value in cursor:
                    name = bytes(key)
                    if not name.startswith(_COUNTED):
                        break
                    found[name.removeprefix(_COUNTED).decode()] = unpack_counter(value)
        return found

    def meta(self, name: str) -> bytes | None:
        raw = self._txn.get(name.encode(), db=self._db[b"meta"])
        return None if raw is None else bytes(raw)

    def namespaces(self, prefix: bytes = b"") -> list[tuple[bytes, NamespaceRecord]]:
        """All namespaces whose key begins with `prefix`: one per layout of a fingerprint."""
        found = []
        with self._txn.cursor(db=self._db[b"namespaces"]) as cursor:
            if cursor.set_range(prefix):
                for key, value in cursor:
                    if not bytes(key).startswith(prefix):
                        break
                    found.append((bytes(key), NamespaceRecord.unpack(value)))
        return found

    def relatives(self, salt: str) -> list[tuple[bytes, NamespaceRecord]]:
        """All namespaces of a salt, or of none; those of others are not even looked at."""
        mine = family_of(salt)
        if FAMILIES not in self._db:
            return [one for one in self.namespaces() if family(one[1].identity) == mine]
        found = []
        with self._txn.cursor(db=self._db[FAMILIES]) as cursor:
            if cursor.set_range(mine):
                for key in cursor.iternext(values=False):
                    raw = bytes(key)
                    if not raw.startswith(mine):
                        break
                    record = self._txn.get(raw[FAMILY_BYTES:], db=self._db[b"namespaces"])
                    if record is not None:  # else an earlier version removed it
                        found.append((raw[FAMILY_BYTES:], NamespaceRecord.unpack(record)))
        return found

    def knows_all_families(self) -> bool:
        """Whether each namespace is filed under its family; earlier versions file none."""
        if FAMILIES not in self._db:
            return False
        filed = {key[FAMILY_BYTES:] for key in self.keys(FAMILIES)}
        return filed == self.keys(b"namespaces")

    def edge(self, key: bytes) -> Edge | None:
        raw = self._txn.get(key, db=self._db[b"edges"])
        return None if raw is None else Edge.unpack(raw)

    def children(self, node: int, limit: int | None = None) -> list[tuple[bytes, Edge]]:
        """Edges below `node` in the order of their first tokens' bytes."""
        prefix = pack_number(node)
        found: list[tuple[bytes, Edge]] = []
        with self._txn.cursor(db=self._db[b"edges"]) as cursor:
            if cursor.set_range(prefix):
                for key, value in cursor:
                    if bytes(key[:8]) != prefix or (limit is not None and len(found) >= limit):
                        break
                    found.append((bytes(key), Edge.unpack(value)))
        return found

    def edges(self) -> Iterator[tuple[bytes, Edge]]:
        keys, values = self._table(b"edges")
        return zip(map(bytes, keys), Edge.unpack_all(values), strict=True)

    def edge_columns(self) -> EdgeColumns:
        return EdgeColumns(*self._table(b"edges"))

    def parent_key(self, node: int) -> bytes | None:
        """Key of the edge that leads to `node`; None for a root."""
        raw = self._txn.get(pack_number(node), db=self._db[b"parents"])
        return None if raw is None else bytes(raw)

    def parents(self) -> tuple[Sequence[int], Raw]:
        """All nodes but the roots, and the key of the edge that leads to each."""
        keys, values = self._table(b"parents")
        return Packed(NUMBER, keys).field(0), values

    def blob(self, number: int) -> BlobRecord | None:
        raw = self._txn.get(pack_number(number), db=self._db[b"blobs"])
        return None if raw is None else BlobRecord.unpack(raw)

    def blobs(self) -> Iterator[tuple[int, BlobRecord]]:
        keys, values = self._table(b"blobs")
        return zip(Packed(NUMBER, keys).field(0), BlobRecord.unpack_all(values), strict=True)

    def blob_columns(self) -> BlobColumns:
        return BlobColumns(*self._table(b"blobs"))

    def blob_number(self, name: bytes) -> int | None:
        raw = self._txn.get(name, db=self._db[b"names"])
        return None if raw is None else unpack_number(raw)

    def names(self) -> tuple[Raw, Sequence[int]]:
        """The names of all blobs, and their numbers."""
        keys, values = self._table(b"names")
        return keys, Packed(NUMBER, values).field(0)

    def tokens(self, blob: int, first_row: int, rows: int) -> bytes:
        """Packed tokens of rows `[first_row, first_row + rows)` of a blob."""
        raw = self._txn.get(pack_number(blob), db=self._db[b"tokens"])
        return b"" if raw is None else bytes(raw[first_row * 8 : (first_row + rows) * 8])

    def first_tokens(self) -> dict[int, bytes]:
        """The first packed token of every run, by the blob's number."""
        keys: list[bytes] = []
        tokens: list[bytes] = []
        with self._txn.cursor(db=self._db[b"tokens"]) as cursor:
            # Not as a table: that would be all tokens at once.
            for key, value in cursor:
                keys.append(bytes(key))
                tokens.append(bytes(value[:8]))
        return dict(zip(Packed(NUMBER, keys).field(0), tokens, strict=True))

    def entry(self, number: int) -> EntryRecord | None:
        raw = self._txn.get(pack_number(number), db=self._db[b"entries"])
        return None if raw is None else EntryRecord.unpack(raw)

    def entries(self) -> Iterator[tuple[int, EntryRecord]]:
        keys, values = self._table(b"entries")
        return zip(Packed(NUMBER, keys).field(0), EntryRecord.unpack_all(values), strict=True)

    def entry_columns(self) -> EntryColumns:
        return EntryColumns(*self._table(b"entries"))

    def kept_s(self, number: int) -> int:
        """For how many seconds behind each use an entry goes after others of its tier."""
        if KEPT not in self._db:
            return 0
        return _seconds(self._txn.get(pack_number(number), db=self._db[KEPT]))

    def all_kept_s(self) -> dict[int, int]:
        """The same for all entries for which that is known, those that are gone included."""
        if KEPT not in self._db:
            return {}
        keys, values = self._table(KEPT)
        pairs = zip(keys, values, strict=True)
        return {unpack_number(key): _seconds(value) for key, value in pairs if len(key) == 8}

    def groups(self, number: int) -> tuple[str, ...]:
        """The groups that an entry belongs to; see `joined`."""
        if GROUPS not in self._db:
            return ()
        return unpack_groups(self._txn.get(pack_number(number), db=self._db[GROUPS]))

    def all_groups(self) -> dict[int, tuple[str, ...]]:
        """The same for all entries that belong to one, those that are gone included."""
        if GROUPS not in self._db:
            return {}
        keys, values = self._table(GROUPS)
        pairs = zip(keys, values, strict=True)
        return {unpack_number(key): unpack_groups(value) for key, value in pairs if len(key) == 8}

    def entries_from(self, low: int) -> Iterator[int]:
        """Entry numbers from `low` upwards: how a short id is completed."""
        with self._txn.cursor(db=self._db[b"entries"]) as cursor:
            if cursor.set_range(pack_number(low)):
                for key in cursor.iternext(values=False):
                    yield unpack_number(key)

    def recency_keys(self, after: bytes = b"") -> Iterator[bytes]:
        """Keys of all entries behind the key `after`: by tier, then the least recently used."""
        with self._txn.cursor(db=self._db[b"recency"]) as cursor:
            if cursor.set_range(after):
                for key in cursor.iternext(values=False):
                    raw = bytes(key)
                    if raw != after:
                        yield raw

    def recency_columns(self) -> list[Sequence[int]]:
        """Tier, last use in microseconds and number of all entries that are evicted in turn."""
        keys = Packed(RECENCY_KEY, self._keys(b"recency"))
        return [keys.field(place) for place in range(3)]

    def expiry_columns(self) -> list[Sequence[int]]:
        """Expiry in microseconds and number of all entries that expire."""
        keys = Packed(EXPIRY_KEY, self._keys(b"expiry"))
        return [keys.field(place) for place in range(2)]

    def expired(self, now: float) -> list[int]:
        """Entries whose time has come, the longest expired first."""
        found: list[int] = []
        limit = expiry_key(now, (1 << 64) - 1)
        with self._txn.cursor(db=self._db[b"expiry"]) as cursor:
            for key in cursor.iternext(values=False):
                raw = bytes(key)
                if raw > limit:
                    break
                found.append(unpack_number(raw[8:]))
        return found

    def sized(self, database: bytes) -> dict[bytes, SizedRecord]:
        """All records of `trash`, `pending`, `quarantine`: name (16 bytes) to record."""
        with self._txn.cursor(db=self._db[database]) as cursor:
            return {bytes(key): SizedRecord.unpack(value) for key, value in cursor}

    def keys(self, database: bytes) -> set[bytes]:
        """All keys of a sub-database, whatever their records say."""
        return set(map(bytes, self._keys(database)))

    def in_database(self, database: bytes, key: bytes) -> bool:
        return self._txn.get(key, db=self._db[database]) is not None

    def departed(self, entry: int) -> SizedRecord | None:
        """Why an entry is no longer here, if that is remembered."""
        raw = self._txn.get(pack_number(entry), db=self._db[b"departed"])
        return None if raw is None else SizedRecord.unpack(raw)

    def _keys(self, database: bytes) -> Raw:
        """All keys of a sub-database; valid until something is written."""
        with self._txn.cursor(db=self._db[database]) as cursor:
            return list(cursor.iternext(values=False))

    def _table(self, database: bytes) -> tuple[Raw, Raw]:
        """All keys and all values of a sub-database; valid until something is written."""
        with self._txn.cursor(db=self._db[database]) as cursor:
            keys, values = tuple(zip(*cursor, strict=True)) or ((), ())
        return keys, values

    def space_of(self, blob: int) -> int:
        """Number of the namespace that a blob is of; 0 where that is not known."""
        raw = self._txn.get(pack_number(blob), db=self._db[SPACES]) if SPACES in self._db else None
        return 0 if raw is None else unpack_number(raw)

    def space_bytes(self) -> dict[int, int]:
        """What the blobs of each namespace take on disk, by its number."""
        named = self.numbers(_SPACE)
        return {int(name): nbytes for name, nbytes in named.items() if name.isdigit() and nbytes}

    def numbers(self, prefix: str) -> dict[str, int]:
        """All numbers in `meta` whose names begin so, by the rest of the name."""
        found: dict[str, int] = {}
        with self._txn.cursor(db=self._db[b"meta"]) as cursor:
            if cursor.set_range(prefix.encode()):
                for key, value in cursor:
                    name = bytes(key).decode("utf-8", "replace")
                    if not name.startswith(prefix):
                        break
                    if len(value) == COUNTER_BYTES:
                        found[name.removeprefix(prefix)] = unpack_counter(value)
        return found

    def used_pages(self) -> int:
        """Pages of all tables."""
        return sum(map(self.pages_of, self._db))

    def pages_of(self, database: bytes, *, leaves: bool = False) -> int:
        """Pages of a table; without those of long values if only the `leaves` are asked for."""
        found = self._txn.stat(self._db[database])
        kinds = ("branch_pages", "leaf_pages", *([] if leaves else ["overflow_pages"]))
        return sum(int(found[kind]) for kind in kinds)

    def size_of(self, database: bytes) -> int:
        """Number of records in a sub-database."""
        return int(self._txn.stat(self._db[database])["entries"])


class Writer(Reader):
    """Typed changes in one write transaction; they all happen at its commit or not at all."""

    def discard_unreadable(self) -> None:
        """Remove damaged records from what a rebuild does not make anew."""
        for database in (b"trash", b"pending", b"quarantine", b"departed"):
            with self._txn.cursor(db=self._db[database]) as cursor:
                records = [(bytes(key), bytes(value)) for key, value in cursor]
            for key, value in records:
                try:
                    SizedRecord.unpack(value)
                    sound = len(key) == (8 if database == b"departed" else 16)
                except (StoreFormatError, *UNREADABLE):
                    sound = False
                if not sound:
                    self._txn.delete(key, db=self._db[database])
        with self._txn.cursor(db=self._db[b"meta"]) as cursor:
            sizes = [(bytes(key), len(value)) for key, value in cursor]
        for key, size in sizes:
            is_text = key.startswith(TEXT.encode())
            if not is_text and size != (16 if key == b"store_id" else 8):
                self._txn.delete(key, db=self._db[b"meta"])

    def set_meta(self, name: str, value: bytes) -> None:
        self._txn.put(name.encode(), value, db=self._db[b"meta"])

    def add(self, name: str, amount: int) -> int:
        """Add to a counter and return its new value."""
        value = max(-MAX_COUNTER, min(self.counter(name) + amount, MAX_COUNTER))
        self._txn.put(name.encode(), pack_counter(value), db=self._db[b"meta"])
        return value

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter that people see."""
        self.add(_COUNTED.decode() + counter_name(name), amount)

    def clear_tree(self) -> None:
        """Forget all prompts and blobs; what is in the trash or counted stays."""
        for database in (*_TREE, FAMILIES):
            self._txn.drop(self._db[database], delete=False)
        self.forget_spaces()

    def put_namespace(self, key: bytes, record: NamespaceRecord) -> None:
        self._txn.put(key, record.pack(), db=self._db[b"namespaces"])
        self._txn.put(family(record.identity) + key, b"", db=self._db[FAMILIES])

    def delete_namespace(self, key: bytes) -> None:
        raw = self._txn.get(key, db=self._db[b"namespaces"])
        if raw is not None:
            named = family(NamespaceRecord.unpack(raw).identity)
            self._txn.delete(named + key, db=self._db[FAMILIES])
        self._txn.delete(key, db=self._db[b"namespaces"])

    def file_families(self) -> None:
        """File each namespace under its family, and nothing else."""
        self._txn.drop(self._db[FAMILIES], delete=False)
        for key, record in self.namespaces():
            self._txn.put(family(record.identity) + key, b"", db=self._db[FAMILIES])

    # ---- overwriting what was removed ----------------------------------------------------------

    def rewrite(self, database: bytes) -> None:
        """Write all of a table anew, in pages in which nothing else is."""
        with self._txn.cursor(db=self._db[database]) as cursor:
            records = [(bytes(key), bytes(value)) for key, value in cursor]
        self._txn.drop(self._db[database], delete=False)
        for key, value in records:
            self._txn.put(key, value, db=self._db[database], append=True)

    def rewrite_tokens(self, after: bytes, limit: int, page_bytes: int) -> bytes:
        """Write anew the pages of as many runs' tokens that have others' beside them.

        Args:
            after: Key of the last run that was written anew; b"" at first.
            limit: How many runs.
            page_bytes: Of a page. What is longer has pages of its own, whose ends are zeros.

        Returns:
            Key of the last one; b"" when there are no more.
        """
        records: list[tuple[bytes, bytes]] = []
        with self._txn.cursor(db=self._db[b"tokens"]) as cursor:
            found = cursor.set_range(after)
            if found and bytes(cursor.key()) == after:
                found = cursor.next()
            while found and len(records) < limit:
                value = cursor.value()
                is_short = len(value) <= page_bytes - _PAGE_HEADER_BYTES
                records.append((bytes(cursor.key()), bytes(value) if is_short else b""))
                found = cursor.next()
        for key, value in records:
            if value:
                self._txn.put(key, value, db=self._db[b"tokens"])
            else:  # something beside it has its page written
                self._txn.put(key + b"\0", b"", db=self._db[b"tokens"])
                self._txn.delete(key + b"\0", db=self._db[b"tokens"])
        return records[-1][0] if len(records) == limit else b""

    def fill(self, first: int, pages: int, page_bytes: int) -> None:
        """Take so many free pages, and write zeros to each."""
        zeros = bytes(page_bytes - _PAGE_HEADER_BYTES)
        for number in range(first, first + pages):
            self._txn.put(pack_number(number), zeros, db=self._db[BLANK], append=True)

    def unfill(self) -> None:
        """Give them back."""
        self._txn.drop(self._db[BLANK], delete=False)

    def forget_departed(self) -> None:
        """Forget what went, and why: the numbers of entries are digests of prompts."""
        self._txn.drop(self._db[b"departed"], delete=False)

    def put_edge(self, key: bytes, edge: Edge) -> None:
        """Write an edge and the way back from its node."""
        self._txn.put(key, edge.pack(), db=self._db[b"edges"])
        self._txn.put(pack_number(edge.node), key, db=self._db[b"parents"])

    def delete_edge(self, key: bytes, node: int | None) -> None:
        """Remove an edge, and the way back unless `node` has moved to another edge."""
        self._txn.delete(key, db=self._db[b"edges"])
        if node is not None:
            self._txn.delete(pack_number(node), db=self._db[b"parents"])

    def put_blob(self, number: int, record: BlobRecord) -> None:
        self._txn.put(pack_number(number), record.pack(), db=self._db[b"blobs"])
        self._txn.put(record.name, pack_number(number), db=self._db[b"names"])

    def own(self, blob: int, namespace: int, disk_bytes: int) -> None:
        """Note of which namespace a blob is, and what it takes; 0 where that is not known."""
        if not namespace:
            return
        self._txn.put(pack_number(blob), pack_number(namespace), db=self._db[SPACES])
        self.add(f"{_SPACE}{namespace}", disk_bytes)

    def disown(self, blob: int, disk_bytes: int) -> int:
        """Forget of which namespace a blob was; returns its number, 0 where it is not known."""
        namespace = self.space_of(blob)
        if namespace:
            self._txn.delete(pack_number(blob), db=self._db[SPACES])
            self.add(f"{_SPACE}{namespace}", -disk_bytes)
        return namespace

    def forget_spaces(self) -> None:
        """Forget of which namespaces the blobs are."""
        self._txn.drop(self._db[SPACES], delete=False)
        self.set_numbers(_SPACE, {})

    def set_numbers(self, prefix: str, numbers: Mapping[str, int]) -> None:
        """Have these be all numbers in `meta` whose names begin so."""
        for name in self.numbers(prefix):
            self._txn.delete(f"{prefix}{name}".encode(), db=self._db[b"meta"])
        for name, value in numbers.items():
            self._txn.put(f"{prefix}{name}".encode(), pack_counter(value), db=self._db[b"meta"])

    def put_tokens(self, blob: int, packed: bytes) -> None:
        self._txn.put(pack_number(blob), packed, db=self._db[b"tokens"])

    def delete_blob(self, number: int, name: bytes) -> None:
        self._txn.delete(pack_number(number), db=self._db[b"blobs"])
        self._txn.delete(pack_number(number), db=self._db[b"tokens"])
        self._txn.delete(name, db=self._db[b"names"])

    def put_entry(self, number: int, record: EntryRecord) -> None:
        """Write an entry and move it to its place in the order of eviction."""
        self._forget_order(number)
        self._txn.put(pack_number(number), record.pack(), db=self._db[b"entries"])
        key = recency_key(record.tier, record.last_use_us, number)
        self._txn.put(key, b"", db=self._db[b"recency"])
        if record.expires:
            self._txn.put(expiry_key(record.expires, number), b"", db=self._db[b"expiry"])

    def keep_for(self, number: int, seconds: int) -> None:
        """Keep an entry for at least so long behind each use."""
        if self.kept_s(number) < min(seconds, _MOST_KEPT_S):
            value = pack_counter(min(seconds, _MOST_KEPT_S))
            self._txn.put(pack_number(number), value, db=self._db[KEPT])

    def join_group(self, number: int, group: str, *, is_new: bool = False) -> None:
        """Note that a request of a group uses an entry, or one of `NO_GROUP`.

        Args:
            number: Of the entry.
            group: Of the request.
            is_new: The request has just stored it.
        """
        before = self.groups(number)
        now = joined(before, group, is_new=is_new)
        if now != before:
            self._txn.put(pack_number(number), pack_groups(now), db=self._db[GROUPS])

    def leave_group(self, number: int, group: str) -> None:
        """Take an entry out of a group."""
        left = tuple(one for one in self.groups(number) if one != group)
        if any(left):
            self._txn.put(pack_number(number), pack_groups(left), db=self._db[GROUPS])
        else:
            self._txn.delete(pack_number(number), db=self._db[GROUPS])

    def forget_added_of_nobody(self) -> None:
        """Remove what earlier versions left behind, which know nothing of it."""
        for database in ADDED:
            for key in self.keys(database):
                if not self.in_database(b"entries", key):
                    self._txn.delete(key, db=self._db[database])

    def delete_entry(self, number: int) -> None:
        self._forget_order(number)
        for database in ADDED:
            self._txn.delete(pack_number(number), db=self._db[database])
        self._txn.delete(pack_number(number), db=self._db[b"entries"])

    def _forget_order(self, number: int) -> None:
        old = self.entry(number)
        if old is not None:
            key = recency_key(old.tier, old.last_use_us, number)
            self._txn.delete(key, db=self._db[b"recency"])
            if old.expires:
                self._txn.delete(expiry_key(old.expires, number), db=self._db[b"expiry"])

    def put_sized(self, database: bytes, key: bytes, record: SizedRecord) -> None:
        self._txn.put(key, record.pack(), db=self._db[database])

    def delete_sized(self, database: bytes, key: bytes) -> bool:
        return bool(self._txn.delete(key, db=self._db[database]))
