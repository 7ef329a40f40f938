"""Where the servers of a store answer: a small file in its folder for each, made and found.

The file is for its owner alone. It is locked as long as its server lives, so one that is not locked
is that of a dead server, whatever process has its number now; pid and date are for people.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from persist_cache import fs
from persist_cache.errors import StoreAccessError
from persist_cache.filenames import SERVER_FILE
from persist_cache.server.own_files import PATIENCE_S, locked, read_own, reason

log = logging.getLogger(__name__)

_LOOK_S = 1.0
"""How often a server sees whether commands can still find it."""


class Serving(msgspec.Struct, frozen=True):
    """A server that runs, as it says of itself.

    Attributes:
        url: Where it answers.
        own_token: It was given its secret, so the store's is not its.
        model: Its own model, as `/v1/models` lists it; None if it has none.
        pid: Of its process; 0 where an earlier version made the file.
        started: When it began to listen, in UTC seconds.
        while_locked: The file that is held locked by who needs it; "" for a server that stays.
    """

    url: str
    own_token: bool = False
    model: str | None = None
    pid: int = 0
    started: float = 0.0
    while_locked: str = ""


class _Announcement:
    """The file by which commands find a server.

    Its lock ends with the process, so one that is not locked is that of a dead server.

    Thread safety: may be shared between threads; `_lock` is held while the file is looked at.
    """

    def __init__(self, folder: Path, serving: Serving, renew: Callable[[], object]) -> None:
        self._folder, self._serving, self._renew = folder, serving, renew
        self._path = folder / f"server.{secrets.token_hex(8)}"
        self._lock = threading.Lock()
        self._fd = -1
        self._trouble = ""
        self._ended = threading.Event()

    def look(self) -> None:
        """Make the file if it is not there: somebody may have removed it with its folder."""
        with self._lock:
            if self._ended.is_set():
                return
            self._renew()
            if self._is_there():
                return
            self._close()
            try:
                self._make()
                self._trouble = ""
            except (OSError, StoreAccessError) as error:
                self._close()
                if reason(error, self._folder) != self._trouble:
                    self._trouble = reason(error, self._folder)
                    log.warning("commands cannot find this server: %s", self._trouble)

    def keep_looking(self) -> None:
        """Look now and then, until it is withdrawn."""
        while not self._ended.wait(_LOOK_S):
            try:
                self.look()
            except Exception:
                log.exception("commands may not find this server")

    def withdraw(self) -> None:
        """Remove the file."""
        self._ended.set()
        # The other thread may be stuck on a disk that does not answer.
        is_mine = self._lock.acquire(timeout=PATIENCE_S)
        try:
            if self._is_there():
                with contextlib.suppress(OSError):
                    fs.unlink(self._path)
            self._close()
        finally:
            if is_mine:
                self._lock.release()

    def _is_there(self) -> bool:
        if self._fd < 0:
            return False
        try:
            return os.path.samestat(os.lstat(self._path), os.fstat(self._fd))
        except OSError:
            return False

    def _make(self) -> None:
        with locked(self._folder):
            for dead, _ in _server_files(self._folder, living=False):
                fs.unlink(dead)
            new = self._path.with_name(f"{self._path.name}.new")
            self._fd = fs.create(new)
            fs.lock(self._fd, PATIENCE_S)  # what looks for servers may have it for a moment
            fs.write_all(self._fd, [memoryview(msgspec.json.encode(self._serving))])
            fs.rename(new, self._path)

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


@contextlib.contextmanager
def announced(
    folder: Path, serving: Serving, renew: Callable[[], object] = lambda: None
) -> Iterator[Callable[[], None]]:
    """Let commands know of a server, as long as the block and the process last.

    Also after the folder was removed and made again, which is noticed within a second or two.

    Args:
        folder: The store's.
        serving: What is to be known.
        renew: Called before each look at the folder.

    Yields:
        What looks at once.
    """
    announcement = _Announcement(folder, serving, renew)
    announcement.look()
    thread = threading.Thread(
        target=announcement.keep_looking, name="persist-cache-announcing", daemon=True
    )
    thread.start()
    try:
        yield announcement.look
    finally:
        announcement.withdraw()


def running_servers(folder: Path) -> list[Serving]:
    """The servers of a store that run, the one that was started last first."""
    found = []
    with contextlib.suppress(OSError):
        files = [(path.stat().st_mtime_ns, raw) for path, raw in _server_files(folder, living=True)]
        for _, raw in sorted(files, reverse=True):
            with contextlib.suppress(msgspec.DecodeError):
                found.append(msgspec.json.decode(raw, type=Serving))
    return found


def _server_files(folder: Path, *, living: bool) -> list[tuple[Path, bytes]]:
    found = []
    for name in os.listdir(folder):
        path = folder / name
        found_name = SERVER_FILE.fullmatch(name)
        if found_name is None or (living and found_name[1]) or (raw := read_own(path)) is None:
            continue
        with contextlib.suppress(OSError):
            fd = fs.open_read(path)
            try:
                if fs.try_lock(fd) != living:
                    found.append((path, raw))
            finally:
                os.close(fd)
    return found
