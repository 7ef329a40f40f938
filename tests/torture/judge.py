"""Looks at a store whose processes are all dead, and at their journals, and says what is wrong.

It runs in a process of its own: a damaged index can take down whoever opens it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from persist_cache.errors import StoreError
from persist_cache.index import tree
from persist_cache.store.store import Store
from persist_cache.tokens import unpack_tokens
from tests.fakes import disk_usage, fingerprint, restore
from tests.torture.journal import Journal, read
from tests.torture.prompts import CONVERSATIONS, TURNS, Prompt
from tests.torture.work import RUN_TOKENS, Setting

ROOM = "evicted to make room"
MODELS = ("w0", "w1")


@dataclass
class Verdict:
    """What the judge found.

    Attributes:
        findings: Sentences, each of them a broken promise.
        compared: Prefixes read back and compared byte for byte.
        demanded: Entries that had to be there, and were.
        excused: Entries that may be gone, by reason.
        repaired: Problems that `check` named after damage, and mended, by kind.
    """

    findings: list[str] = field(default_factory=list)
    compared: int = 0
    demanded: int = 0
    excused: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)


@dataclass
class _Promise:
    """An entry whose put was acknowledged last at `since`, and no eviction of which came later."""

    prompt: Prompt
    since: float
    wall: float
    expires: bool


def promises(lines: Sequence[dict[str, Any]]) -> dict[str, _Promise]:
    """Entries, by id, that were stored and that nobody asked to evict since."""
    puts: dict[str, _Promise] = {}
    expiring = set()
    for line in lines:
        if line["what"] == "put":
            if line["expires"]:
                expiring.add(line["id"])
            old = puts.get(line["id"])
            if old is None or line["since"] > old.since:
                puts[line["id"]] = _Promise(
                    Prompt(*line["prompt"]), line["since"], line["wall"], False
                )
    for number in expiring:
        puts[number].expires = True
    ended = _ends_of_evictions(lines)
    return {
        number: promise
        for number, promise in puts.items()
        if promise.since > ended.get(number, -math.inf)
    }


def _ends_of_evictions(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """When the last eviction of each entry was over.

    One that was not answered is over when its process wrote its next line, or had died.
    """
    deaths = sorted(line["at"] for line in lines if line["what"] == "all dead")
    ended: dict[str, float] = {}
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        if line["what"] not in ("evict?", "evict"):
            continue
        over = line["at"]
        if line["what"] == "evict?":
            if following is not None and following["file"] == line["file"]:
                over = following["at"]
            else:
                over = next((death for death in deaths if death > over), math.inf)
        ended[line["id"]] = max(over, ended.get(line["id"], -math.inf))
    return ended


class Judge:
    """Judges one store once."""

    def __init__(
        self,
        setting: Setting,
        *,
        damaged: str = "",
        hurt: frozenset[str] | None = frozenset(),
        index_lost: bool = False,
        foreign: bool = False,
    ) -> None:
        """Prepare.

        Args:
            setting: What the store's processes lived with.
            damaged: What was done to the files since they died: nothing (""), more "files" than
                there were, damage to "blobs" or the "index", or to a "page" within the index,
                whose loss is nobody's fault.
            hurt: Ids of the entries that damage to blobs may cost; None for any, because
                processes went on with the damaged store.
            index_lost: The index was made anew in the life of this store, and its counters with
                it.
            foreign: Files of other programs were put into the store's folder.
        """
        self._foreign = foreign
        self._setting = setting
        self._damaged = damaged
        self._hurt = hurt
        self._index_lost = index_lost
        self._verdict = Verdict()
        self._journal = Journal(setting.journals / "judge.jsonl")

    def judge(self, *, serve_first: bool) -> Verdict:
        """Open, compare, check, repair if there was damage, and hold against the journals.

        Args:
            serve_first: After damage, ask for everything before `check` has looked.
        """
        lines = list(read(self._setting.journals))
        judged = max((line["at"] for line in lines if line["what"] == "judged"), default=0.0)
        for line in lines:
            if line["what"] in ("wrong", "crash") and line["at"] > judged:
                self._find(f"{line['what']} in a {line['role']}: {line['how']}")
        self._check_foreign()
        if self._damaged:
            for attempts_left in (2, 1, 0):
                try:
                    self._mend(serve_first)
                    break
                except StoreError:
                    # A repair that LMDB refuses makes sure that opening it makes a new index.
                    if self._damaged != "page" or not attempts_left:
                        raise
                    serve_first = False
        with self._open() as store:
            for problem in store.check(read_data=True):
                self._find(f"check: {problem.kind}: {problem.message} {problem.blob}")
            self._compare_all(store)
            self._hold_against(store, lines)
            self._count(store, lines)
            store.gc()
            for problem in store.check():
                self._find(f"check after gc: {problem.kind}: {problem.message}")
            self._count_bytes(store)
        self._journal.note("judged")
        return self._verdict

    def _mend(self, serve_first: bool) -> None:
        """Repair what was damaged, which must be no more than that."""
        with self._open() as store:
            if serve_first:
                self._compare_all(store)
            problems = store.check(read_data=True, repair=True)
        self._verdict.repaired.update(problem.kind for problem in problems)
        harmless = {"files": {"orphan"}, "blobs": {"orphan", "damaged", "missing", "trash"}}
        for problem in problems:
            if problem.kind not in harmless.get(self._damaged, {problem.kind}):
                self._find(f"damage to {self._damaged} did more: {problem}")

    def _check_foreign(self) -> None:
        """What others put into the store's folder must be as they left it."""
        for place in FOREIGN:
            path = self._setting.root / place
            if path.exists():
                if path.read_bytes() != FOREIGN_TEXT:
                    self._find(f"the foreign file {place} was changed")
                path.unlink()
            elif self._foreign:
                self._find(f"the foreign file {place} was removed")

    def _open(self) -> Store:
        return Store.open(
            self._setting.root,
            max_bytes=self._setting.max_bytes,
            min_free_bytes=0,
            run_tokens=RUN_TOKENS,
        )

    def _find(self, sentence: str) -> None:
        self._verdict.findings.append(sentence)

    def _compare_all(self, store: Store) -> None:
        """Whatever is served for any prompt must be what its tokens demand."""
        for number in range(CONVERSATIONS):
            prompt = Prompt(number, TURNS - 1)
            self._compare(store, prompt.model, prompt.tokens)
        for model, tokens in _stored(store):
            self._compare(store, model, tokens)

    def _compare(self, store: Store, model: str, tokens: list[int]) -> int:
        found = store.fetch(fingerprint(weights=model), tokens, restore)
        if found is None:
            return 0
        value, match = found
        self._verdict.compared += 1
        if not value.equals(tokens[: match.num_tokens]):
            self._find(f"wrong bytes were served for {model} {tokens[:4]}... ({match.num_tokens})")
        return match.num_tokens

    def _hold_against(self, store: Store, lines: list[dict[str, Any]]) -> None:
        """Every entry that was acknowledged and that nothing excuses must be there."""
        present = {entry.id for entry in store.entries()}
        for number, promise in promises(lines).items():
            prompt = promise.prompt
            found = self._compare(store, prompt.model, prompt.tokens)
            if found >= len(prompt.tokens):
                self._verdict.demanded += 1
                if number in present:
                    continue
                # A new index knows no entry that ends within a file; its rows are there.
                if not self._index_lost and not self._damaged:
                    self._excuse_or_find(store, number, promise, found)
            else:
                self._excuse_or_find(store, number, promise, found)
            self._journal.note("evict?", id=number)
            self._journal.note("evict", id=number)

    def _excuse_or_find(self, store: Store, number: str, promise: _Promise, found: int) -> None:
        with store.read() as txn:
            departed = txn.departed(int(number, 16))
        reason = "" if departed is None else departed.note
        if departed is not None and not self._setting.jumps and departed.since < promise.wall:
            reason = ""  # that was an earlier time
        tight = self._setting.max_bytes < ROOMY
        if self._damaged == "page":
            self._verdict.excused["a page of the index was damaged"] += 1
        elif (reason == ROOM and tight and not promise.prompt.pinned) or (
            reason == "expired" and promise.expires
        ):
            self._verdict.excused[reason] += 1
        elif (
            reason.startswith("quarantined")
            and self._damaged
            and (self._hurt is None or number in self._hurt)
        ):
            self._verdict.excused["quarantined"] += 1
        elif self._index_lost and promise.expires:
            self._verdict.excused["expired"] += 1
        else:
            self._find(
                f"lost: {promise.prompt} ({number}), acknowledged; {found} of "
                f"{len(promise.prompt.tokens)} tokens are left; its leave says {reason!r}"
            )

    def _count(self, store: Store, lines: list[dict[str, Any]]) -> None:
        """Counters must add up to what the processes know they did."""
        if self._index_lost:
            return
        counted = store.stats().counters.get("puts", 0)
        acknowledged = sum(line["what"] == "put" and line["nbytes"] > 0 for line in lines)
        begun = sum(line["what"] == "put?" for line in lines)
        if not acknowledged <= counted <= begun:
            self._find(f"{counted} puts counted, {acknowledged} acknowledged of {begun} begun")

    def _count_bytes(self, store: Store) -> None:
        usage = store.stats().usage
        du = disk_usage(self._setting.root)
        if usage.pending or usage.trash:
            self._find(f"left behind: {usage}")
        if any((self._setting.root / "tmp").glob("*.safetensors")):
            self._find("an orphan is left in tmp/")
        if usage.total != du:
            self._find(f"usage says {usage.total} bytes, du says {du}")
        if du > self._setting.max_bytes:
            budget = self._setting.max_bytes
            self._find(f"{du} bytes on disk, the budget is {budget}: {usage}")


FOREIGN = ("notes.txt", "blobs/.DS_Store", "tmp/thumbs.db")
FOREIGN_TEXT = b"mine" * 1000
ROOMY = 1 << 29
"""A budget that nothing here can fill: no entry may leave to make room."""


def _stored(store: Store) -> list[tuple[str, list[int]]]:
    """Model and tokens of every entry, by what the index itself says."""
    digests = {fingerprint(weights=model).digest: model for model in MODELS}
    with store.read() as txn:
        models = {record.number: digests.get(key[:32], "?") for key, record in txn.namespaces()}
        return [
            (models[record.namespace], unpack_tokens(tree.tokens_of(txn, record.node)))
            for _, record in txn.entries()
            if models.get(record.namespace, "?") != "?"
        ]


def users_of(store: Store, blob: str) -> set[str]:
    """Ids of all entries that lose by the loss of a blob, in any way."""
    found = set()
    with store.read() as txn:
        number = txn.blob_number(bytes.fromhex(blob))
        for entry, record in txn.entries():
            on_path = {edge.blob for _, edge in tree.path_of(txn, record.node)}
            if number in on_path or record.checkpoint == number:
                found.add(f"{entry:016x}")
    return found
