"""The secret of the admin API, and where the servers of a store answer.

Both are small files in the store's folder, for their owner alone, so that whoever may read the
prompts there may also use the admin API, and nobody else. What is written holds the folder's
`flock`; what is read does not need it, because files are replaced as a whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from persist_cache import fs
from persist_cache.errors import StoreAccessError
from persist_cache.filenames import NEW_TOKEN_FILE, SERVER_FILE, TOKEN_FILE

log = logging.getLogger(__name__)

_TOKEN = re.compile(r"[A-Za-z0-9_-]{32,128}")
_MAX_BYTES = 4096
_PATIENCE_S = 5.0
_LOOK_S = 1.0
"""How often a server sees whether commands can still find it."""


class AdminToken:
    """The secret of one server: the one given, else the store's, else one in memory alone.

    Thread safety: may be asked by many threads at once.
    """

    def __init__(self, folder: Path, given: str | None = None) -> None:
        """Find the secret, and make one if there is none.

        Args:
            folder: The store's; created for its owner alone if it does not exist.
            given: Use this one instead; nothing is read or written.
        """
        self.is_given = given is not None
        self.trouble = ""
        """Why commands cannot find it, or ""."""
        self._folder = folder
        self._last = given if given is not None else secrets.token_urlsafe(32)
        if given is None:
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                fs.make_folder(folder)
                self._last = _keep(folder, self._last)
            except (OSError, StoreAccessError) as error:
                self.trouble = _reason(error, folder)

    def __call__(self) -> str:
        """The secret as of now: the file may have been replaced, or lost with its folder."""
        if (
            not self.is_given
            and not self.trouble
            and _read(self._folder / TOKEN_FILE) != self._last
        ):
            with contextlib.suppress(OSError, StoreAccessError):
                self._last = _keep(self._folder, self._last)
        return self._last

    def renew(self) -> None:
        """See that it is in the folder, if there is one: it may have been unusable before."""
        if self.is_given or not os.path.isdir(self._folder):  # Path.is_dir may raise
            return
        if self.trouble or _read(self._folder / TOKEN_FILE) != self._last:
            try:
                self._last = _keep(self._folder, self._last)
                self.trouble = ""
            except (OSError, StoreAccessError) as error:
                self.trouble = _reason(error, self._folder)


class Serving(msgspec.Struct, frozen=True):
    """A server that runs, as it says of itself.

    Attributes:
        url: Where it answers.
        own_token: It was given its secret, so the store's is not its.
    """

    url: str
    own_token: bool = False


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
                if _reason(error, self._folder) != self._trouble:
                    self._trouble = _reason(error, self._folder)
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
        is_mine = self._lock.acquire(timeout=_PATIENCE_S)
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
        with _locked(self._folder):
            for dead, _ in _server_files(self._folder, living=False):
                fs.unlink(dead)
            self._fd = fs.create(self._path)
            # Whoever looks for servers at this moment may have it.
            fs.lock(self._fd, _PATIENCE_S)
            fs.write_all(self._fd, [memoryview(msgspec.json.encode(self._serving))])

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


def stored_token(folder: Path) -> str | None:
    """The store's secret, or None if it has none that can be trusted."""
    return _read(folder / TOKEN_FILE)


def _keep(folder: Path, proposal: str) -> str:
    """The secret that is kept in `folder`; `proposal`, if there is none yet.

    Raises:
        StoreAccessError: The folder is another user's, or others may write there.
        OSError: It cannot be read or written.
    """
    with _locked(folder):
        path = folder / TOKEN_FILE
        found = _read(path)
        if found is not None:
            return found
        if os.path.lexists(path):
            log.warning("%s may have been read by others or is damaged: it is replaced", path)
            proposal = secrets.token_urlsafe(32)
        new = folder / NEW_TOKEN_FILE
        with contextlib.suppress(FileNotFoundError):
            fs.unlink(new)  # whoever left it died
        fd = fs.create(new)
        try:
            fs.write_all(fd, [memoryview(f"{proposal}\n".encode())])
            fs.sync(fd)
        finally:
            os.close(fd)
        fs.rename(new, path)
        fs.sync_folder(folder)
        return proposal


def _read(path: Path) -> str | None:
    """The secret in a file of ours that nobody else can read; None for anything else."""
    raw = _read_own(path)
    text = "" if raw is None else raw.decode("ascii", "replace").strip()
    return text if _TOKEN.fullmatch(text) else None


def _read_own(path: Path) -> bytes | None:
    try:
        # What a pipe says is nothing to wait for.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        if not mine or status.st_mode & 0o077:
            return None
        return os.read(fd, _MAX_BYTES)
    except OSError:
        return None
    finally:
        os.close(fd)


def _server_files(folder: Path, *, living: bool) -> list[tuple[Path, bytes]]:
    found = []
    for name in os.listdir(folder):
        path = folder / name
        if not SERVER_FILE.fullmatch(name) or (raw := _read_own(path)) is None:
            continue
        with contextlib.suppress(OSError):
            fd = fs.open_read(path)
            try:
                if fs.try_lock(fd) != living:
                    found.append((path, raw))
            finally:
                os.close(fd)
    return found


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, if it is ours alone to write.

    Raises:
        StoreAccessError: It is not, or somebody holds the lock for long.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid():
            raise StoreAccessError(f"{folder} belongs to another user.")
        if status.st_mode & 0o022:
            raise StoreAccessError(f"Other users may write to {folder}.")
        deadline = time.monotonic() + _PATIENCE_S
        while not fs.try_lock(fd):
            if time.monotonic() > deadline:
                raise StoreAccessError(f"Another process holds {folder} locked.")
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _reason(error: OSError | StoreAccessError, folder: Path) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or folder} cannot be used ({error.strerror})."
    return str(error)
