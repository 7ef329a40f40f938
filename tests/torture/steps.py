"""Every step of every operation fails once, and the store is looked at after each.

The operations run in one process, so a fault costs milliseconds; only death takes a child.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from persist_cache.errors import StoreError
from persist_cache.remote import Remote, RemoteSettings, make_secret
from persist_cache.store.store import Store
from tests import forge
from tests.fakes import Clock, blob_files, disk_usage, eager_gc, fetched, fingerprint, put
from tests.torture.judge import users_of
from tests.torture.seam import ERRORS, Seam, at_step
from tests.torture.storm import in_child

SYSTEM = list(range(1, 20))
BASE: tuple[tuple[str, list[int]], ...] = (
    ("w0", SYSTEM),
    ("w0", [*SYSTEM, 50, 51, 52]),
    ("w0", [*SYSTEM[:8], *range(30, 46)]),
    ("w1", [*SYSTEM[:9], 60, 61, 62, *range(63, 80)]),
)
FOREIGN = [9, 9, 9, *range(200, 220)]
"""A prompt that comes from a bundle."""
SHARED = [7, 7, 7, *range(1000, 1297)]
"""A prompt that comes from a remote, which looks for none that is shorter."""
MOSTLY_DEAD = [8, 8, 8, *range(500, 900)]
MAX_BYTES = 1 << 28
_READS = ("read_into", "open_read")


class Broken(AssertionError):
    """A promise was broken."""


@dataclass
class Bed:
    """A store with a few known entries, made good again after every fault."""

    folder: Path
    dice: random.Random
    clock: Clock = field(default_factory=Clock)
    max_bytes: int = MAX_BYTES
    doomed: set[str] = field(default_factory=set)
    known: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    wanted: tuple[str, list[int]] = ("w0", [1])

    def __post_init__(self) -> None:
        self.root = self.folder / "store"
        self.bundle = self.folder / "entries.pcb"
        self._store: Store | None = None
        self._base: dict[str, tuple[str, list[int]]] = {}

    def opened(self, root: Path) -> Store:
        return Store.open(
            root, max_bytes=self.max_bytes, min_free_bytes=0, run_tokens=8, clock=self.clock
        )

    @property
    def store(self) -> Store:
        if self._store is None:
            self._store = self.opened(self.root)
        return self._store

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def make_good(self) -> None:
        """The known entries and nothing else."""
        self.doomed = set()
        if self.max_bytes != MAX_BYTES:
            self.close()
            self.max_bytes = MAX_BYTES
        if set(self._ids()) == set(self._base) and self._base:
            self.known = dict(self._base)
            return
        self._base = {
            put(self.store, tokens, model=model, complete=model == "w0"): (model, tokens)
            for model, tokens in BASE
        }
        others = [one for one in self._ids() if one not in self._base]
        if others:
            self.store.evict(others)
        self.known = dict(self._base)

    def _ids(self) -> list[str]:
        with self.store.read() as txn:
            return [f"{number:016x}" for number, _ in txn.entries()]

    def verify(self, lost: Callable[[str], bool]) -> None:
        """Whatever failed: all is served that has to be, and nothing is left behind.

        Raises:
            Broken: It is not so.
        """
        store = self.store
        for number, (model, tokens) in self.known.items():
            try:
                found = fetched(store, tokens, model=model)
            except AssertionError as error:
                raise Broken(f"wrong bytes for {tokens}") from error
            if found < len(tokens) and number not in self.doomed:
                with store.read() as txn:
                    departed = txn.departed(int(number, 16))
                reason = departed.note if departed else ""
                if not lost(reason):
                    raise Broken(f"{number} was lost: {found} of {len(tokens)} left; {reason!r}")
        store.gc()
        # What is served has been compared above: sizes are enough here.
        problems = store.check()
        if problems:
            raise Broken(f"check: {problems}")
        self.verify_sizes()

    def verify_sizes(self) -> None:
        """The store takes what it says, no more than it may, and nothing is on its way.

        Raises:
            Broken: It is not so.
        """
        usage, du = self.store.stats().usage, disk_usage(self.root)
        if usage.pending or usage.trash:
            raise Broken(f"left behind: {usage}")
        if usage.total != du:
            raise Broken(f"usage says {usage.total}, du says {du}")
        if du > self.max_bytes:
            raise Broken(f"{du} bytes, the budget is {self.max_bytes}")
        if list((self.root / "tmp").iterdir()):
            raise Broken("something is left in tmp/")


# ---- operations: what comes before, without faults, and what is cut ------------------------------


def _fresh(bed: Bed) -> list[int]:
    cut = bed.dice.randrange(1, len(SYSTEM))
    return [*SYSTEM[:cut], *(bed.dice.randrange(100, 200) for _ in range(20))]


def _want_rows(bed: Bed) -> None:
    bed.wanted = "w0", _fresh(bed)


def _want_state(bed: Bed) -> None:
    bed.wanted = "w1", _fresh(bed)


def _want_room(bed: Bed) -> None:
    """So little room that the put has to evict."""
    bed.wanted = "w0", _fresh(bed)
    bed.close()
    bed.max_bytes = disk_usage(bed.root) + 150_000
    bed.doomed = set(bed.known)
    _ = bed.store


def _put(bed: Bed) -> None:
    model, tokens = bed.wanted
    number = put(bed.store, tokens, model=model, complete=model == "w0")
    bed.known[number] = bed.wanted


def _want_eviction(bed: Bed) -> None:
    bed.doomed = {bed.dice.choice(sorted(bed.known))}


def _evict(bed: Bed) -> None:
    bed.store.evict(sorted(bed.doomed))


def _all_may_go(bed: Bed) -> None:
    bed.doomed = set(bed.known)


def _make_room(bed: Bed) -> None:
    bed.store.evict_to(bed.store.stats().usage.total - 30_000)


def _nothing(bed: Bed) -> None:
    _ = bed.store


def _load(bed: Bed) -> None:
    for model, tokens in list(bed.known.values())[-2:]:
        fetched(bed.store, tokens, model=model)
    bed.store.flush()


def _load_all(bed: Bed) -> None:
    for model, tokens in bed.known.values():
        fetched(bed.store, tokens, model=model)


def _want_collection(bed: Bed) -> None:
    put(bed.store, [5, 5, 5], expires=bed.clock() + 1)
    bed.clock.advance(2)


def _collect(bed: Bed) -> None:
    bed.store.gc()


def _want_compaction(bed: Bed) -> None:
    """One file with a few living rows and many dead ones."""
    bed.close()
    with Store.open(bed.root, max_bytes=MAX_BYTES, min_free_bytes=0, clock=bed.clock) as store:
        long = put(store, MOSTLY_DEAD)
        bed.known[put(store, MOSTLY_DEAD[:9], tier="user")] = "w0", MOSTLY_DEAD[:9]
        store.evict([long])
    _ = bed.store


def _want_merging(bed: Bed) -> None:
    """A chain of files, each of one turn."""
    talk = [bed.dice.randrange(1000, 2000)]
    for _ in range(6):
        talk = [*talk, bed.dice.randrange(100)]
        bed.known[put(bed.store, talk, tier="user")] = "w0", talk


def _merge(bed: Bed) -> None:
    with eager_gc():
        bed.store.gc()


def _damaged(bed: Bed) -> Path:
    path = bed.dice.choice(blob_files(bed.root))
    bed.doomed = users_of(bed.store, path.stem)
    return path


def _flip(bed: Bed) -> None:
    path = _damaged(bed)
    data = bytearray(path.read_bytes())
    data[bed.dice.choice((20, -1))] ^= 4
    path.write_bytes(data)


def _delete(bed: Bed) -> None:
    _damaged(bed).unlink()


def _cut(bed: Bed) -> None:
    bed.store.purge_quarantine()  # or there are more steps each time
    path = _damaged(bed)
    path.write_bytes(path.read_bytes()[:-1])


def _repair_by_size(bed: Bed) -> None:
    bed.store.check(repair=True)


def _repair(bed: Bed) -> None:
    bed.store.check(read_data=True, repair=True)


def _contradict(bed: Bed) -> None:
    forge.change(bed.store, lambda txn: txn.add("blob_bytes", 1))


def _repair_index(bed: Bed) -> None:
    """Until it is mended: a repair that was cut short leaves the contradiction where it was."""
    _repair(bed)


def _shut(bed: Bed) -> None:
    bed.close()


def _lose_index(bed: Bed) -> None:
    bed.close()
    (bed.root / "data.mdb").unlink()


def _open(bed: Bed) -> None:
    bed.close()
    _ = bed.store


def _want_import(bed: Bed) -> None:
    from persist_cache.bundle import export

    if not bed.bundle.exists():
        with bed.opened(bed.folder / "other") as other:
            put(other, FOREIGN, tier="system", real=True)
            put(other, [*FOREIGN, 7], complete=False, model="w1", real=True)
            export(other, [entry.id for entry in other.entries()], bed.bundle)
        shutil.rmtree(bed.folder / "other")


def _import(bed: Bed) -> None:
    from persist_cache.bundle import Bundle, load

    with Bundle(bed.bundle) as bundle:
        load(bed.store, bundle.entries)


def _want_pull(bed: Bed) -> None:
    """A prompt that lies on a remote; in a child, because what reads there lives in no fork."""
    if not (bed.folder / "remote").exists():
        in_child(lambda: _share(bed))
    _ = bed.store


def _settings(bed: Bed) -> RemoteSettings:
    return RemoteSettings(
        url=(bed.folder / "remote").as_uri(),
        secret_file=str(bed.folder / "secret"),
        publish_plain=True,
    )


def _share(bed: Bed) -> None:
    make_secret(bed.folder / "secret")
    (bed.folder / "remote").mkdir()
    with bed.opened(bed.folder / "sharing") as other:
        entry = put(other, SHARED, tier="system", real=True)
        remote = Remote.open(other, _settings(bed))
        remote.publish(entry)
        remote.close()
    shutil.rmtree(bed.folder / "sharing")


def _pull(bed: Bed) -> None:
    remote = Remote.open(bed.store, _settings(bed))
    try:
        remote.bring(fingerprint(weights="w0"), SHARED, known=0, limit=len(SHARED))
    finally:
        remote.close()


OPERATIONS: dict[str, tuple[Callable[[Bed], None], Callable[[Bed], None]]] = {
    "put": (_want_rows, _put),
    "put with a state": (_want_state, _put),
    "put into a full store": (_want_room, _put),
    "evict": (_want_eviction, _evict),
    "evict all": (_all_may_go, _evict),
    "make room": (_all_may_go, _make_room),
    "load": (_nothing, _load),
    "gc": (_want_collection, _collect),
    "compact": (_want_compaction, _collect),
    "merge": (_want_merging, _merge),
    "load what is damaged": (_flip, _load_all),
    "check and repair": (_delete, _repair),
    "quarantine": (_cut, _repair_by_size),
    "rebuild": (_contradict, _repair_index),
    "open": (_shut, _open),
    "open without index": (_lose_index, _open),
    "import": (_want_import, _import),
    "pull": (_want_pull, _pull),
}
_REBUILDS = ("rebuild", "open without index")
_LOOKERS = ("check and repair", "quarantine", *_REBUILDS)
_WORK_TO_REDO = {
    "rebuild": _repair,
    "quarantine": _repair,
    "check and repair": _repair,
    "load what is damaged": _load_all,
}
"""What makes good again what was bad before a death."""
_DONE_BEFORE = {
    "rebuild": "the counter says",
    "quarantine": "damaged",
    "load what is damaged": "damaged",
    "check and repair": "missing",
}
"""What may still be found after a death, since it is no doing of the dead process."""


def _may_be_lost(operation: str, kind: str, seam: Seam) -> Callable[[str], bool]:
    """What a fault may cost: what cannot be read is gone, and only that."""

    def lost(reason: str) -> bool:
        unreadable = kind == "I/O error" or (kind == "no permission" and operation in _LOOKERS)
        unreadable = unreadable and any(name in _READS for name in seam.names)
        if unreadable and reason.startswith("quarantined"):
            return True
        # A new index leaves out what it cannot read, and nobody was asked to leave.
        return operation in _REBUILDS and unreadable

    return lost


def fail_at(bed: Bed, operation: str, kind: str, number: int, *, lasting: bool = False) -> Seam:
    """Run `operation` with a fault at step `number`, and look at what is left.

    Returns:
        The seam; it has injected nothing when the operation has fewer steps.

    Raises:
        Broken: A promise was broken.
    """
    prepare, act = OPERATIONS[operation]
    bed.make_good()
    prepare(bed)
    before = {entry.id for entry in bed.store.entries()} if operation == "import" else set()
    seam = Seam(at_step(number, kind, lasting=lasting))
    where = f"{operation}, {kind} at step {number}"
    try:
        with seam.installed():
            act(bed)
    except StoreError:
        pass
    except Exception as error:
        raise Broken(f"{where} ({seam.names[-1]}): {error!r} came out") from error
    where += f" ({seam.names[number - 1]})" if len(seam.names) >= number else ""
    try:
        if operation == "rebuild":
            _repair(bed)
        bed.verify(_may_be_lost(operation, kind, seam))
        if operation == "import" and not lasting:
            added = {entry.id for entry in bed.store.entries()} - before
            if len(added) not in (0, 2):
                raise Broken(f"an import added {len(added)} of 2 entries")
    except (Broken, StoreError) as error:
        raise Broken(f"{where}{', lasting' if lasting else ''}: {error}") from error
    return seam


def deaths(bed: Bed, operation: str, stride: int = 1) -> Iterator[int]:
    """Have a child killed at every `stride`-th step of `operation`, and look at what is left.

    Each child finds the same store, and each yields the number of its step.

    Raises:
        Broken: A promise was broken.
    """
    prepare, act = OPERATIONS[operation]
    bed.make_good()
    prepare(bed)
    bed.close()
    template = bed.folder / "template"
    shutil.copytree(bed.root, template)
    try:
        number = 1
        while _dies_at(bed, act, number, where := f"{operation}, killed at step {number}"):
            try:
                _is_sound_once_opened(bed, operation)
                _WORK_TO_REDO.get(operation, _nothing)(bed)
                bed.verify_sizes()
                bed.verify(lambda reason: False)
                _works_on(bed)
            except (Broken, StoreError, AssertionError) as error:
                raise Broken(f"{where}: {error}") from error
            yield number
            number += stride
            bed.close()
            shutil.rmtree(bed.root)
            shutil.copytree(template, bed.root)
    finally:
        shutil.rmtree(template)


def _dies_at(bed: Bed, act: Callable[[Bed], None], number: int, where: str) -> bool:
    """Run `act` in a child that is killed at step `number`, if it gets that far."""
    child = os.fork()
    if child == 0:
        try:
            _ = bed.store
            with Seam(at_step(number, "killed")).installed():
                act(bed)
        except BaseException:
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise Broken(f"{where}: the child ended with {code}")
    return code != 0


def _is_sound_once_opened(bed: Bed, operation: str) -> None:
    """Opening the store is all that a death asks for, but what was bad before is bad.

    Raises:
        Broken: Something is.
    """
    known = _DONE_BEFORE.get(operation, "")
    problems = bed.store.check(read_data=True)
    problems = [one for one in problems if not known or known not in f"{one.kind} {one.message}"]
    if problems:
        raise Broken(f"opening leaves {problems}")


def _works_on(bed: Bed) -> None:
    """What is stored after a death is served."""
    tokens = [6, 6, 6, *range(30)]
    put(bed.store, tokens)
    if fetched(bed.store, tokens) != len(tokens) or bed.store.check(read_data=True):
        raise Broken("it does not work on")


@dataclass
class Tried:
    """Faults tried, by kind, and by the operation they were tried in.

    Attributes:
        all_steps: Steps of all operations times the kinds of faults.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    all_steps: int = 0
    findings: list[str] = field(default_factory=list)


def lengths(bed: Bed) -> dict[str, int]:
    """Steps of each operation when nothing fails."""
    found = {}
    for operation, (prepare, act) in OPERATIONS.items():
        bed.make_good()
        prepare(bed)
        seam = Seam(lambda step, name: None)
        with seam.installed():
            act(bed)
        found[operation] = len(seam.names)
    return found


def run(folder: Path, seed: int, faults: int) -> Tried:
    """Every fault at every step of every operation, then lasting ones, until there are `faults`.

    Fewer than all are a sample.
    """
    bed = Bed(folder, random.Random(seed))
    tried = Tried()
    every = [
        (operation, kind, number)
        for operation, length in lengths(bed).items()
        for kind in (*ERRORS, "short", "slow")
        for number in range(1, length + 1)
    ]
    tried.all_steps = len(every)
    lasting = False
    while True:
        bed.dice.shuffle(every)
        for operation, kind, number in every:
            if tried.kinds.total() >= faults or len(tried.findings) > 20:
                bed.close()
                return tried
            try:
                seam = fail_at(bed, operation, kind, number, lasting=lasting)
            except Broken as error:
                tried.findings.append(str(error))
                bed.close()
                shutil.rmtree(bed.root, ignore_errors=True)
                continue
            if seam.injected:
                tried.kinds[kind] += 1
                tried.operations[operation] += 1
        lasting = not lasting


def run_deaths(folder: Path, seed: int, stride: int = 1) -> Tried:
    """Death at every step, or every `stride`-th, of every operation."""
    bed = Bed(folder, random.Random(seed))
    tried = Tried()
    for operation in OPERATIONS:
        try:
            for _ in deaths(bed, operation, stride):
                tried.kills += 1
                tried.operations[operation] += 1
        except Broken as error:
            tried.findings.append(str(error))
            bed.close()
            shutil.rmtree(bed.root, ignore_errors=True)
    bed.close()
    return tried
