"""The LMDB environment: opening, locking and growing it, and the transactions in it.

The only module that imports lmdb, and longer than others for that reason: opening, transactions,
growing and what LMDB's errors mean all need it. What may be asked of a transaction is in
`transaction`, the lock under which every change runs in `writer_lock`.

Thread safety: an `Index` may be shared between threads. Reads run side by side; writes are
serialised by `WriterLock`. `_gate` counts the threads that are in a transaction, because LMDB
resizes its map only while there is none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from persist_cache import fs
from persist_cache.errors import (
    DamagedIndexError,
    StoreAccessError,
    StoreError,
    StoreFormatError,
    StoreFullError,
    StoreInUseError,
    StoreReadOnlyError,
)
from persist_cache.index import data_file, lock_table, semaphores
from persist_cache.index.ballast import Spare
from persist_cache.index.records import (
    COUNTER_BYTES,
    UNREADABLE,
    unpack_counter,
)
from persist_cache.index.transaction import ADDED, DATABASES, ERASED, LATER, Reader, Writer
from persist_cache.index.writer_lock import LOCK_FILE, WriterLock
from persist_cache.system import forked

SCHEMA_VERSION = 1
_DAMAGE = (
    lmdb.BadTxnError,
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
)
_GIB = 1 << 30
_LEAST_MAP_BYTES = 64 << 20
_FULL = "The disk is full; nothing was changed in the index."
_NOTHING_TO_GIVE = (
    "The disk is full, and the store has nothing that could be given up for this change; free some "
    "space on it and try again. Nothing was changed."
)
_NO_ROOM_BYTES = 1 << 20
_LEAST_BYTES_BEHIND = 64 << 10
"""XFS takes no less ahead; elsewhere a file may have some blocks for what says where others are."""
_OPENING_PATIENCE_S = 2.0
"""How long to try to open an environment that others begin or close at the same moment."""
T = TypeVar("T")


class _TableInChangeError(Exception):
    """Another process begins or closes the environment at this moment; try again."""


class _ErasedError(Exception):
    """Pages were erased since the environment was opened; it is to be opened anew."""


class _UndoError(Exception):
    """Ends a transaction without a commit."""


class Index:
    """One open LMDB environment."""

    def __init__(
        self,
        root: Path,
        *,
        read_only: bool,
        map_bytes: int = 16 * _GIB,
        presence: int = -1,
        spare: Spare | None = None,
    ) -> None:
        """Open the index in the folder `root`, creating it unless `read_only`.

        Args:
            root: Folder of `data.mdb`.
            read_only: Never write, and do not create it.
            map_bytes: Address space to begin with; it grows when the index does.
            presence: Descriptor whose lock says that the store is in use; closed with the index.
            spare: What is given up where the disk has no room to open it; the ballast when None.

        Raises:
            DamagedIndexError: The file cannot be what LMDB wrote.
            StoreFormatError: It has a schema of an unknown version.
            StoreInUseError: This process has it open already.
        """
        self.root = root
        self.data_path = root / data_file.FILE
        self.read_only = read_only
        self._pid = os.getpid()
        self._presence = presence
        self._writers = WriterLock(root)
        self._gate = threading.Condition()
        self._inside = 0
        self._growing = False
        self._closed = False
        self._data_fd = -1
        self._erased = 0
        self._terms = threading.local()
        self._map_bytes = map_bytes
        self._spare = Spare(root) if spare is None else spare
        self._env: lmdb.Environment
        self._is_open = False
        self.semaphores: semaphores.Semaphores | None = None
        """LMDB's, where it has some."""
        try:
            if read_only:
                self._open()
            else:
                self._writers.open()
                self._require_durability()
                # Opening a table is a transaction that writes.
                with self._alone():
                    self._open()
        except BaseException:
            self.detach_presence()
            self.close()
            raise

    def _open(self) -> None:
        """Open everything; where it may be written, under `writer.lock`."""
        data_file.check_length(self.data_path, read_only=self.read_only)
        self._env = self._open_environment()
        forked.register(self)
        self._check_last_page()
        self._file = data_file.identity(self.data_path)
        self.page_bytes = int(self._env.stat()["psize"])
        if not self.read_only:
            self._data_fd = os.open(self.data_path, os.O_RDWR | os.O_CLOEXEC)
            # LMDB creates its files under the umask, which may be any.
            fs.restrict(self.root / data_file.FILE, fs.FILE_MODE)
            fs.restrict(self.root / lock_table.FILE, fs.FILE_MODE)
            self.reader_check()
        self._db = self._open_databases()
        self._check_schema()

    def detach_presence(self) -> None:
        """Leave the descriptor of `presence` to the caller, also when the index is closed."""
        self._presence = -1

    def close(self, timeout_s: float | None = None) -> bool:
        """Wait for transactions of other threads, then close; further calls do nothing.

        Returns:
            Whether it is closed: not if those took longer than `timeout_s`. Then nothing new is
            begun, and the files stay open as long as the process.
        """
        if self._closed or os.getpid() != self._pid:
            return True  # a forked child must not touch its parent's environment
        give_up = None if timeout_s is None else time.monotonic() + max(timeout_s, 0.0)
        with self._writers.threads_kept_out(_left(give_up)) as are_out:
            if not are_out:
                return False
            with self._gate:
                self._closed = True
                if not self._gate.wait_for(lambda: not self._inside, _left(give_up)):
                    return False
                self._close_environment()
                self._close_files()
        return True

    @property
    def is_ours(self) -> bool:
        """Whether this process opened it, rather than the one it was forked from."""
        return os.getpid() == self._pid

    def let_go(self) -> None:
        """In a forked child: drop the locks that are the parent's; the child may not use it."""
        self._close_files()

    def _close_files(self) -> None:
        self._writers.close()
        for fd in (self._data_fd, self._presence):
            if fd >= 0:
                os.close(fd)
        self._data_fd = self._presence = -1
        if self.semaphores is not None:
            self.semaphores.let_go()

    @contextlib.contextmanager
    def read(self, *, copies: bool = False) -> Iterator[Reader]:
        """A consistent view of the index; nothing taken from it may outlive the block undecoded.

        Blocks must not be nested, nor contain an `update`: growing the map waits for them.

        Args:
            copies: Copy what is read, which is faster for whole tables of small records.
        """
        self._enter()
        try:
            with self._begin_read(copies) as txn:
                yield Reader(txn, self._db)
        except lmdb.Error as error:
            raise _translated(error) from error
        except UNREADABLE as error:
            raise _contradictory(error) from error
        except OSError as error:
            raise fs.translated(error, "while the index was read") from error
        finally:
            self._leave()

    def dry_run(self, attempt: Callable[[Writer], T]) -> T:
        """What `attempt` returns in a transaction that is undone: to see what a change would do.

        Raises:
            StoreError: As `update`.
        """
        found: list[T] = []

        def undone(txn: Writer) -> None:
            found.append(attempt(txn))
            raise _UndoError

        with contextlib.suppress(_UndoError):
            self.update(undone)
        return found[-1]

    @contextlib.contextmanager
    def terms(
        self, *, relieve: Callable[[], int] | None = None, patience_s: float | None = None
    ) -> Iterator[None]:
        """Say for the changes of this thread in the block what is special about them.

        Args:
            relieve: Frees some of the disk if the commit finds it full, and returns how many
                bytes; called until that is enough or it returns 0, while no other process can
                write.
            patience_s: How long to wait for other processes; `PATIENCE_S` when None.
        """
        before = self._terms.__dict__.copy()
        said = {"relieve": relieve, "patience_s": patience_s}
        self._terms.__dict__.update((key, one) for key, one in said.items() if one is not None)
        try:
            yield
        finally:
            self._terms.__dict__.clear()
            self._terms.__dict__.update(before)

    def update(self, change: Callable[[Writer], T]) -> T:
        """Run `change` in a write transaction and commit it durably.

        `change` may run more than once (the map may have to grow first), so it must have no
        effect besides the transaction. If it raises, nothing is changed.

        Raises:
            StoreFullError: The disk or the map is full; nothing was changed.
            StoreReadOnlyError: The store is open read-only.
            StoreBusyError: Another process does not end its transaction.
        """
        if self.read_only:
            raise StoreReadOnlyError("The store is open read-only; nothing was changed.")
        self._check_usable()
        try:
            with self._alone():
                # A reader that was killed keeps every page freed since from being used again, and
                # the file would grow past any budget.
                self._reader_check()
                value = self._committed(change)
                self._trim()
                return value
        except lmdb.Error as error:
            raise _translated(error) from error
        except UNREADABLE as error:
            raise _contradictory(error) from error
        except OSError as error:
            raise fs.translated(error, "while the index was changed") from error

    def alone(self, act: Callable[[], T]) -> T:
        """Do something while no other thread or process changes the index; `act` may read it.

        Raises:
            StoreReadOnlyError: The store is open read-only.
            StoreBusyError: Another process does not end its transaction.
        """
        if self.read_only:
            raise StoreReadOnlyError("The store is open read-only; nothing was changed.")
        try:
            with self._alone():
                return act()
        except OSError as error:
            raise fs.translated(error, "while the store was changed") from error

    def _committed(self, change: Callable[[Writer], T]) -> T:
        """Commit `change`, mending what stands in the way."""
        relieve: Callable[[], int] | None = getattr(self._terms, "relieve", None)
        freed = 0
        renewed = False
        while True:
            try:
                return self._commit(change)
            except _ErasedError:
                self._renew()
            except lmdb.MapFullError:
                self._resize(data_file.larger_map(self._env.info()["map_size"]))
            except lmdb.MapResizedError:
                self._resize(data_file.larger_map(self.data_path.stat().st_size))
            except lmdb.PanicError:
                # A commit before this one failed while it wrote its last page.
                if renewed:
                    raise
                self._renew()
                renewed = True
            except lmdb.Error as error:
                if not self._found_full(error):
                    raise
                more = relieve() if relieve is not None else 0
                freed += more
                if more:
                    continue
                if freed:
                    raise StoreFullError(
                        f"The disk is full: the {freed} bytes that were kept back for this were "
                        "given up, and something else took them at once. Nothing was changed; "
                        "free some space on it and try again."
                    ) from error
                if relieve is not None:
                    raise StoreFullError(_NOTHING_TO_GIVE) from error
                raise StoreFullError(_FULL) from error

    def _trim(self) -> None:
        """Give back what the file system took ahead for the file, which counts (XFS).

        Only a file that does not `grow_exactly` has any: one that an earlier version made.
        """
        with contextlib.suppress(OSError, lmdb.Error):
            if fs.bytes_behind(self._data_fd) < _LEAST_BYTES_BEHIND:
                return
            self._enter()
            try:
                # Under LMDB's own lock: whoever opens the store takes no other.
                with self._env.begin(write=True):
                    fs.trim(self._data_fd)
            finally:
                self._leave()

    def _found_full(self, error: lmdb.Error) -> bool:
        """Whether a commit failed because there was no room.

        LMDB says the same of a disk that takes a part of what is written as of one that is broken.
        """
        if _is_full(error):
            return True
        if os.strerror(errno.EIO) not in str(error):
            return False
        with contextlib.suppress(OSError):
            return fs.free_bytes(self.root) < _NO_ROOM_BYTES
        return False

    def waits_for(self) -> str:
        """What keeps changes waiting at this moment, in a sentence; "" if nothing does."""
        return self._writers.waits_for()

    def _commit(self, change: Callable[[Writer], T]) -> T:
        self._enter()
        try:
            with self._env.begin(write=True, buffers=True) as txn:
                writer = Writer(txn, self._db)
                if writer.counter(ERASED) != self._erased:
                    raise _ErasedError
                return change(writer)
        finally:
            self._leave()

    @property
    def last_page(self) -> int:
        """Number of the last page of the file."""
        return int(self._env.info()["last_pgno"])

    def oldest_reader(self) -> int | None:
        """Number of the oldest commit that somebody reads; None when nobody reads."""
        told = (line.split() for line in str(self._env.readers()).splitlines())
        commits = [int(one[2]) for one in told if len(one) == 3 and one[2].isdigit()]
        return min(commits, default=None)

    def sync(self) -> None:
        """Make commits durable now; a power cut may otherwise take the last one back."""
        self._enter()
        try:
            self._env.sync(True)
        except lmdb.Error as error:
            raise _translated(error) from error
        finally:
            self._leave()

    def reader_check(self) -> int:
        """Free the slots of readers that died; returns how many there were."""
        with self._claiming():
            return int(self._env.reader_check())

    def file_bytes(self) -> int:
        """Bytes the index takes on disk, as `du` counts."""
        names = (data_file.FILE, lock_table.FILE, LOCK_FILE)
        return sum(fs.disk_bytes(self.root / name) for name in names)

    def is_lost(self) -> bool:
        """Whether the open file no longer has its name: somebody removed or replaced the folder.

        A closed one has none: it was lost before, and its number may be another file's by now.
        """
        try:
            return self._closed or data_file.identity(self.data_path) != self._file
        except OSError:
            return True

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise StoreInUseError(
                "The store was opened before this process was forked; open it again in the child "
                "under another process start method (spawn)."
            )
        if self._closed:
            raise StoreError("The store is closed.")

    def _enter(self) -> None:
        """Count this thread among those that are in a transaction."""
        self._check_usable()
        with self._gate:
            while self._growing:
                self._gate.wait()
            self._check_usable()
            self._inside += 1

    def _leave(self) -> None:
        with self._gate:
            self._inside -= 1
            self._gate.notify_all()

    def _begin_read(self, copies: bool) -> lmdb.Transaction:
        """Begin a transaction in a thread that `_enter` has counted."""
        while True:
            try:
                if self.semaphores is None:
                    return self._begun(copies)
                with self.semaphores.claiming():
                    return self._begun(copies)
            except lmdb.ReadersFullError:
                if self.reader_check() == 0:
                    raise
            except (lmdb.MapResizedError, lmdb.PanicError) as error:
                # Uncounted meanwhile: two threads that get here together would each wait for
                # the other to leave.
                self._leave()
                try:
                    if isinstance(error, lmdb.PanicError):
                        self._renew()
                    else:
                        self._resize(data_file.larger_map(self.data_path.stat().st_size))
                finally:
                    self._enter()

    def _begun(self, copies: bool) -> lmdb.Transaction:
        if copies:
            return self._env.begin(buffers=False)
        return self._env.begin(buffers=True)

    def _resize(self, size: int) -> None:
        """Resize the map, which LMDB allows only while this process holds no transaction."""
        with self._nobody_inside():
            if not self._closed and size > self._env.info()["map_size"]:
                self._env.set_mapsize(size)

    def _renew(self) -> None:
        """Open the environment again; LMDB wants that after it failed to write a meta page."""
        is_alone = self.read_only or self._writers.is_mine
        with contextlib.nullcontext() if is_alone else self._alone(), self._nobody_inside():
            if self._closed:
                return
            self._close_environment()
            try:
                self._env = self._open_environment()
                self._db = self._open_databases()
            except BaseException:
                self._closed = True
                raise

    @contextlib.contextmanager
    def _nobody_inside(self) -> Iterator[None]:
        """Hold while no thread of this process is in a transaction."""
        with self._gate:
            self._growing = True
            try:
                while self._inside:
                    self._gate.wait()
                yield
            finally:
                self._growing = False
                self._gate.notify_all()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of writers, with LMDB's semaphore for them free."""
        patience_s: float | None = getattr(self._terms, "patience_s", None)
        with self._writers.held(patience_s, self._check_usable, self._mend_writer):
            yield

    def _mend_writer(self) -> None:
        if self.semaphores is not None:
            self.semaphores.mend_writer()

    def _reader_check(self) -> None:
        with contextlib.suppress(lmdb.PanicError):  # the transaction is told so, too
            self.reader_check()

    def _claiming(self) -> contextlib.AbstractContextManager[None]:
        """Hold while a slot in the table of readers may be claimed or freed."""
        return contextlib.nullcontext() if self.semaphores is None else self.semaphores.claiming()

    def _require_durability(self) -> None:
        """LMDB asks the system to make each commit durable, and has no other way (macOS)."""
        if self._writers.syncs_fully:
            return
        raise StoreAccessError(
            f"{self.root} is on {fs.volume(self.root)}, a volume that cannot make a commit of the "
            "index durable (it has no F_FULLFSYNC, as exFAT volumes); use a folder on an APFS "
            "volume (--store PATH)."
        )

    def _open_environment(self) -> lmdb.Environment:
        """Open it with as much address space as there is, up to what was asked for."""
        size = self._map_bytes
        if not self.read_only:
            data_file.create_empty(self.data_path)
        give_up = time.monotonic() + _OPENING_PATIENCE_S
        while True:
            try:
                with lock_table.opening(self.root, self.read_only, self._spare) as readers:
                    environment = self._opened(size, readers)
                break
            except lmdb.MemoryError as error:
                size //= 4
                if size < _LEAST_MAP_BYTES:
                    raise StoreError(
                        f"The index at {self.root} cannot be mapped: this process may not have "
                        "enough address space; raise that limit (ulimit -v)."
                    ) from error
            except _TableInChangeError as error:
                if time.monotonic() > give_up:
                    raise StoreError(
                        f"The index at {self.root} cannot be opened: {error}"
                    ) from error
                time.sleep(0.005)
        self._table = lock_table.key(self.root)
        self._is_open = True
        return environment

    def _opened(self, map_bytes: int, readers: int) -> lmdb.Environment:
        """Open it once."""
        # A reader on a read-only file system cannot register itself in the lock file.
        lockable = not self.read_only or os.access(self.root / lock_table.FILE, os.W_OK)
        try:
            if sys.platform == "linux" or not lockable:
                return _opened(self.root, self.read_only, map_bytes, readers, lockable)
            return self._opened_with_semaphores(map_bytes, readers)
        except lmdb.MemoryError:
            raise
        except lmdb.InvalidError as error:
            if lock_table.is_begun(self.root):
                raise _TableInChangeError(f"{lock_table.FILE} is not LMDB's.") from error
            raise DamagedIndexError(f"{self.data_path} is not an LMDB file.") from error
        except lmdb.Error as error:
            text = str(error)
            if "already open" in text:
                raise StoreInUseError(
                    f"The store at {self.root} is open in this process already; share that object."
                ) from error
            if os.strerror(errno.ENOENT) in text and self.data_path.exists():
                # Another process closed it, and its semaphores, at the same moment.
                raise _TableInChangeError("its semaphores are missing.") from error
            if _is_full(error) and sys.platform != "linux" and semaphores.are_exhausted():
                raise StoreError(
                    f"The index at {self.root} cannot be opened: this system has no room for "
                    "another named semaphore (sysctl kern.posix.sem.max); end programs that keep "
                    "them, or restart the computer."
                ) from error
            raise _translated(error) from error

    def _opened_with_semaphores(self, map_bytes: int, readers: int) -> lmdb.Environment:
        found = semaphores.Semaphores(self.root)
        environment = None
        try:
            with found.opening():
                environment = _opened(self.root, self.read_only, map_bytes, readers, True)
            if not self.read_only:
                found.mend_writer()
        except BaseException:
            if environment is not None:
                environment.close()
            found.close()
            raise
        self.semaphores = found
        return environment

    def _close_environment(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        with contextlib.nullcontext() if self.semaphores is None else self.semaphores.closing():
            self._env.close()
        lock_table.closed(self._table)

    def _check_last_page(self) -> None:
        """A truncated file would raise SIGBUS at the first look-up beyond its end."""
        needed = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        size = self.data_path.stat().st_size
        if size < needed:
            raise DamagedIndexError(f"{self.data_path} has {size} of its {needed} bytes.")

    def _open_databases(self) -> dict[bytes, Any]:
        try:
            if self.read_only:
                with self._claiming():
                    found = {name: self._env.open_db(name, create=False) for name in DATABASES}
                    for name in (*ADDED, *LATER):
                        with contextlib.suppress(lmdb.NotFoundError):
                            found[name] = self._env.open_db(name, create=False)
                    return found
            with self._env.begin(write=True) as txn:
                names = (*DATABASES, *ADDED, *LATER)
                found = {name: self._env.open_db(name, txn=txn) for name in names}
                self._erased = Reader(txn, found).counter(ERASED)
                return found
        except lmdb.NotFoundError:
            raise DamagedIndexError(f"{self.data_path} lacks tables of the index.") from None
        except lmdb.Error as error:
            raise _translated(error) from error

    def _check_schema(self) -> None:
        with self.read() as txn:
            found = txn.meta("schema")
        if found is None:
            if self.read_only:
                raise DamagedIndexError(f"{self.data_path} has no schema version.")
            try:
                self._committed(_initialise)
            except lmdb.Error as error:
                raise _translated(error) from error
        elif len(found) != COUNTER_BYTES:
            raise DamagedIndexError(f"{self.data_path} has no schema version.")
        elif unpack_counter(found) != SCHEMA_VERSION:
            raise StoreFormatError(
                f"The store at {self.root} has schema version {unpack_counter(found)}; this "
                f"version of persist-cache knows {SCHEMA_VERSION} only. Use the version that "
                "wrote it, or another --store."
            )


def _initialise(txn: Writer) -> None:
    if txn.meta("schema") is None:
        txn.add("schema", SCHEMA_VERSION)
        txn.set_meta("store_id", os.urandom(16))
        txn.add("created", int(time.time()))


def _left(give_up: float | None) -> float | None:
    return None if give_up is None else max(0.0, give_up - time.monotonic())


def _opened(
    root: Path, read_only: bool, map_bytes: int, readers: int, lockable: bool
) -> lmdb.Environment:
    # lib_version=0 fixes the engine: others read and write other file formats. metasync=False
    # saves half of the commit and loses at most the last one, never consistency.
    return lmdb.open(
        os.fsencode(root),
        lib_version=0,
        map_size=map_bytes,
        max_dbs=32,
        max_readers=readers,
        max_spare_txns=1,
        metasync=False,
        mode=fs.FILE_MODE,
        readonly=read_only,
        create=not read_only,
        lock=lockable,
    )


def _contradictory(error: Exception) -> StoreError:
    return StoreError(
        f"The index holds a damaged record ({error}); run `persist-cache check --repair`."
    )


def _translated(error: lmdb.Error) -> StoreError:
    text = str(error)
    if isinstance(error, lmdb.MapFullError) or _is_full(error):
        return StoreFullError(_FULL)
    if any(os.strerror(one) in text for one in fs.FORBIDDEN):
        return StoreAccessError(f"The index may not be used: {text}.")
    if isinstance(error, _DAMAGE):
        return DamagedIndexError(f"The index is damaged ({text}); run `persist-cache check`.")
    return StoreError(f"The index failed: {text}.")


def _is_full(error: lmdb.Error) -> bool:
    """Whether the file system said that it has no room, or none for us."""
    return any(os.strerror(one) in str(error) for one in fs.FULL)
