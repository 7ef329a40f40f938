"""A power cut drops whatever was not synced, in any combination: what is left is consistent.

The store runs on a recorded disk. For every prefix of the recording, and for samples of what a
file system may lose at that point, the folder is made anew and opened. Bytes survive once their
file was synced; a name survives once its folder was. Commits of the index are LMDB's business and
whole or not at all; the last one may be lost, since its meta page is written without a sync.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from persist_cache import fs
from persist_cache.index.environment import Index
from persist_cache.index.transaction import Writer
from persist_cache.store.store import Store
from tests.fakes import Clock, blob_files, eager_gc, fetched, put
from tests.memory import fast_folder

SYSTEM = list(range(1, 20))


@dataclass
class File:
    """An inode: what was written, and how much of it a power cut leaves."""

    content: bytes = b""
    synced: bytes | None = None


@dataclass
class Step:
    """One change of the disk, and what a cut right behind it has to reckon with.

    Attributes:
        names: Names in all folders by now, of what is written and what is durable.
        commits: Contents of `data.mdb`: the durable one, and the last if that is not yet.
    """

    name: str
    volatile: dict[Path, File]
    durable: dict[Path, File]
    folders: dict[Path, bool]
    commits: tuple[bytes, ...]
    contents: dict[int, tuple[bytes, bytes | None]]
    promised: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass
class RecordedDisk:
    """Stands behind `fs` and remembers what has reached the platter."""

    root: Path
    volatile: dict[Path, File] = field(default_factory=dict)
    durable: dict[Path, File] = field(default_factory=dict)
    folders: dict[Path, bool] = field(default_factory=dict)
    commits: list[bytes] = field(default_factory=list)
    settled: int = 0
    steps: list[Step] = field(default_factory=list)
    promised: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    open_files: dict[int, File] = field(default_factory=dict)

    def note(self, name: str) -> None:
        files = {**self.volatile, **self.durable}
        self.steps.append(
            Step(
                name,
                dict(self.volatile),
                dict(self.durable),
                dict(self.folders),
                tuple(self.commits[self.settled :]),
                {id(file): (file.content, file.synced) for file in files.values()},
                tuple(self.promised),
            )
        )

    @contextmanager
    def recording(self) -> Iterator[None]:
        originals: dict[str, Any] = {
            name: getattr(fs, name)
            for name in (
                "create",
                "write_all",
                "sync",
                "sync_folder",
                "rename",
                "unlink",
                "make_folder",
                "remove_folder",
            )
        }
        update, sync = Index.update, Index.sync

        def create(path: Path) -> int:
            fd: int = originals["create"](path)
            self.open_files[fd] = self.volatile[path] = File()
            self.note("create")
            return fd

        def write_all(fd: int, buffers: Any) -> int:
            count: int = originals["write_all"](fd, buffers)
            self.open_files[fd].content += b"".join(bytes(one) for one in buffers)
            self.note("write")
            return count

        def sync_file(fd: int) -> None:
            if fd in self.open_files:
                self.open_files[fd].synced = self.open_files[fd].content
            self.note("sync")

        def sync_folder(path: Path) -> None:
            for name in [*self.volatile, *self.durable]:
                if name.parent == path:
                    if name in self.volatile:
                        self.durable[name] = self.volatile[name]
                    else:
                        self.durable.pop(name, None)
            for folder in self.folders:
                if folder.parent == path:
                    self.folders[folder] = True
            self.note("sync folder")

        def rename(source: Path, target: Path) -> None:
            originals["rename"](source, target)
            self.volatile[target] = self.volatile.pop(source)
            self.note("rename")

        def unlink(path: Path) -> None:
            originals["unlink"](path)
            self.volatile.pop(path, None)
            self.note("unlink")

        def make_folder(path: Path) -> None:
            if not path.exists():
                self.folders[path] = False
            originals["make_folder"](path)
            self.note("make folder")

        def remove_folder(path: Path) -> None:
            originals["remove_folder"](path)
            self.folders.pop(path, None)
            self.note("remove folder")

        def committed(index: Index, change: Callable[[Writer], Any]) -> Any:
            # The pages of a commit are synced, and with them the meta page of the one before.
            self.settled = max(0, len(self.commits) - 1)
            value = update(index, change)
            self.commits.append((self.root / "data.mdb").read_bytes())
            self.note("commit")
            return value

        def synced(index: Index) -> None:
            sync(index)
            self.settled = max(0, len(self.commits) - 1)
            self.note("sync index")

        replaced = locals()
        for name in originals:
            setattr(fs, name, replaced["sync_file" if name == "sync" else name])
        Index.update = committed  # type: ignore[method-assign,assignment]
        Index.sync = synced  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(fs, name, original)
            Index.update, Index.sync = update, sync  # type: ignore[method-assign]


def after_the_cut(step: Step, old: Path, new: Path, dice: random.Random) -> None:
    """Make the folder as one of the ways the disk may look after a cut behind `step`."""
    new.mkdir(mode=0o700)
    for name in ("blobs", "tmp", "quarantine"):
        (new / name).mkdir(mode=0o700)
    folders = {folder for folder, durable in step.folders.items() if durable or dice.random() < 0.5}
    for folder in folders:
        moved = new / folder.relative_to(old)
        if moved.parent.exists():
            moved.mkdir(mode=0o700, exist_ok=True)
    for path in {**step.volatile, **step.durable}:
        states = {id(one): one for one in (step.volatile.get(path), step.durable.get(path)) if one}
        options: list[File | None] = list(states.values())
        if path not in step.volatile or path not in step.durable:
            options.append(None)
        chosen = dice.choice(options)
        target = new / path.relative_to(old)
        if chosen is None or not target.parent.exists():
            continue
        content, synced = step.contents[id(chosen)]
        if synced is None:
            torn = content[: dice.randrange(len(content) + 1)]
            content = dice.choice((b"", torn, bytes(len(content)), content))
        target.write_bytes(content)
    if step.commits:
        (new / "data.mdb").write_bytes(dice.choice(step.commits[-2:]))


def work(store: Store, promise: Callable[[str, list[int]], None]) -> None:
    """Puts that extend, split and need a state, evictions, a compaction, a damaged file."""
    put(store, SYSTEM, tier="system")
    promise("w0", SYSTEM)
    reply = put(store, [*SYSTEM, 50, 51, 52])
    put(store, [*SYSTEM[:12], *range(70, 90)], tier="user")
    promise("w0", [*SYSTEM[:12], *range(70, 90)])
    put(store, [*SYSTEM[:9], 60], complete=False, model="w1")
    store.evict([reply])
    other = put(store, [7, 7, 7], expires=store.clock() - 1)
    store.gc()
    assert other not in {entry.id for entry in store.entries()}
    long = put(store, [6, 1, 2, 3, 4, 5])
    put(store, [6, 1, 2], tier="user")
    promise("w0", [6, 1, 2])
    store.evict([long])
    talk = [4]
    for token in (1, 2, 3, 4, 5):
        talk = [*talk, token]
        put(store, talk, tier="user")
        promise("w0", talk)
    with eager_gc():
        collected = store.gc()
    assert collected.compacted == 1
    assert collected.merged >= 4
    put(store, [*talk[:3], 9])
    promise("w0", [*talk[:3], 9])
    put(store, [6, 1, 2, 3])
    promise("w0", [6, 1, 2, 3])
    bad = put(store, [8, 8, 8])
    (path,) = [one for one in blob_files(store.root) if _holds(store, bad, one)]
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert fetched(store, [8, 8, 8]) == 0
    put(store, [9, 9, 9])
    promise("w0", [9, 9, 9])


def _holds(store: Store, entry: str, path: Path) -> bool:
    from tests.torture.judge import users_of

    return entry in users_of(store, path.stem)


@pytest.fixture(scope="module")
def recorded() -> Iterator[RecordedDisk]:
    with fast_folder() as folder:
        disk = RecordedDisk(folder / "store")
        with (
            disk.recording(),
            Store.open(disk.root, min_free_bytes=0, run_tokens=8, clock=Clock()) as store,
        ):
            # What comes back from a put is on the platter but for the last commit.
            work(store, lambda model, tokens: disk.promised.append((model, tuple(tokens))))
        yield disk


@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.long)])
def test_every_prefix_of_the_recording_opens_to_a_consistent_store(
    recorded: RecordedDisk, times: int
) -> None:
    names = {step.name for step in recorded.steps}
    assert names >= {"create", "write", "sync", "rename", "sync folder", "unlink", "commit"}
    dice = random.Random(5)
    cuts = 0
    for number, step in enumerate(recorded.steps):
        for _ in range(times):
            folder = recorded.root.parent / "cut"
            after_the_cut(step, recorded.root, folder, dice)
            with Store.open(folder, min_free_bytes=0, run_tokens=8, clock=Clock()) as store:
                where = f"cut behind step {number}, {step.name}"
                problems = store.check(read_data=True)
                # A lost reservation leaves a file that nobody knows, until `gc` scans for such.
                # The damage that `work` did by hand may still be undiscovered.
                kinds = [one.kind for one in problems if one.kind != "orphan"]
                assert kinds in ([], ["damaged"]), (where, problems)
                for model, tokens in step.promised[:-1]:
                    assert fetched(store, list(tokens), model=model) == len(tokens), where
                store.gc()
                store.check(repair=True, read_data=True)
                assert store.check(read_data=True) == [], where
                assert store.stats().usage.pending == 0, where
            shutil.rmtree(folder)
            cuts += 1
    assert cuts > 70 * times


def test_recording_notices_a_rename_that_is_not_made_durable(tmp_path: Path) -> None:
    """The same proof fails for a store that syncs no folder: the proof can fail."""
    root = tmp_path / "store"
    disk = RecordedDisk(root)
    with disk.recording():
        sync_folder, fs.sync_folder = fs.sync_folder, lambda path: None
        try:
            with Store.open(root, min_free_bytes=0, run_tokens=8, clock=Clock()) as store:
                put(store, SYSTEM)
                put(store, [5, 5])
        finally:
            fs.sync_folder = sync_folder
    dice = random.Random(5)
    kinds = set()
    for number in range(20):
        folder = tmp_path / f"cut-{number}"
        after_the_cut(disk.steps[-1], root, folder, dice)
        with Store.open(folder, min_free_bytes=0, run_tokens=8, clock=Clock()) as store:
            kinds |= {problem.kind for problem in store.check()}
    assert kinds == {"missing"}
