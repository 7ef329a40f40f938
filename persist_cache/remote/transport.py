"""The only place that talks to an object store: three requests, each bounded in time and memory.

Objects are read by name and created by name. Nothing is listed, overwritten or deleted, except
what `probe` made. All requests run on one thread of their own, as many at once as there are.

Thread safety: `Transport` may be used from any thread; its coroutines run on its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from persist_cache.errors import RemoteError
from persist_cache.remote.loop import Loop
from persist_cache.remote.settings import RemoteSettings, folder_of
from persist_cache.remote.trust import missing_extra

T = TypeVar("T")
CONNECT_S = 1.0
STALL_S = 5.0
"""An object that comes piece by piece is given up when no piece came for so long."""
CREATE_S = 60.0
_LONGEST_REQUEST_S = 300
_PIECE_BYTES = 256 << 10
_MAX_PIECE_BYTES = 8 << 20
_PAUSE_S = 0.02
_NAME = re.compile(r"pc1/[abcp]/[0-9a-f]{2}/[0-9a-f]{64}")
_CREDENTIALS_HOST = "169.254.169.254"
"""What is asked in a cloud when the environment has no credentials."""
_STATUS = re.compile(r"status code: (\d{3})")


class Failure(enum.Enum):
    """What kind of failure a request met; the values are labels of counters."""

    DENIED = "denied"
    FULL = "full"
    TIME_OUT = "time_out"
    UNREACHABLE = "unreachable"
    SERVER = "server"
    CLOSED = "closed"


class TransportError(Exception):
    """A request failed; `str()` is a clause for people."""

    def __init__(self, kind: Failure, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class TooLargeError(Exception):
    """An object is longer than it may be."""


class Transport:
    """One remote that can be asked."""

    def __init__(self, settings: RemoteSettings, count: Callable[[str, int], None]) -> None:
        """Get ready; nothing is asked yet.

        Args:
            settings: Checked.
            count: Called with the name of a counter and an amount.

        Raises:
            RemoteError: The library does not understand them.
            MissingDependencyError: It is not installed.
        """
        self._obstore, self._store = _opened(settings)
        self._folder = folder_of(settings.url)
        self._device_inode = None if self._folder is None else _device_inode(self._folder)
        self._count = count
        self._loop = Loop()
        self._thread = threading.Thread(target=self._run, name="persist-cache-remote", daemon=True)
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def call(self, work: Coroutine[Any, Any, T], pause: Callable[[], None] = lambda: None) -> T:
        """Run a coroutine to its end; on the calling thread only `pause` is called meanwhile.

        However it is left, the coroutine has ended then, and with it all that it began.

        Raises:
            TransportError: The transport is closed.
            Exception: What `work` or `pause` raises; the latter ends the work.
        """
        tasks: list[asyncio.Task[T]] = []
        has_ended = threading.Event()

        def begin() -> None:
            task = self._loop.create_task(work)
            task.add_done_callback(lambda _: has_ended.set())
            tasks.append(task)

        with self._lock:
            if self._is_closed:
                work.close()
                raise TransportError(Failure.CLOSED, "this process is about to end")
            self._loop.call_soon_threadsafe(begin)
        try:
            while not has_ended.wait(_PAUSE_S):
                pause()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the loop is closed: all has ended
                self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            has_ended.wait()
            raise
        try:
            return tasks[0].result()
        except asyncio.CancelledError:
            raise TransportError(Failure.CLOSED, "this process is about to end") from None

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Have a coroutine run by itself; unless the transport is closed."""
        with self._lock:
            if self._is_closed:
                work.close()
                return
            asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, timeout_s: float) -> bool:
        """End all that is under way. Returns whether it has ended within that time."""
        give_up = time.monotonic() + timeout_s
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        self._thread.join(timeout_s)
        has_left = self._loop.wait_left(give_up - time.monotonic())
        return has_left and not self._thread.is_alive()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        self._loop.call_soon(self._loop.stop)

    def check_folder(self) -> None:
        """See whether the folder of a remote that is one is still the one that was opened.

        Else what is created would go to the disk below a mount that ended. It may block, as a
        disk does.

        Raises:
            TransportError: It is not.
        """
        if self._folder is not None and _device_inode(self._folder) != self._device_inode:
            raise TransportError(
                Failure.UNREACHABLE, "its folder is not there any more, or no longer mounted"
            )

    async def read(self, name: str, limit: int) -> bytes | None:
        """A small object; None if it is not there.

        Raises:
            TooLargeError: It has more than `limit` bytes.
            TransportError: The request failed.
        """
        found = bytearray()
        pieces = self.pieces(name)
        try:
            async for piece in pieces:
                if len(found) + len(piece) > limit:
                    raise TooLargeError
                found += piece
        except FileNotFoundError:
            return None
        finally:
            await pieces.aclose()
        return bytes(found)

    async def pieces(self, name: str) -> AsyncGenerator[bytes]:
        """The bytes of an object, a few MiB at a time.

        Raises:
            FileNotFoundError: It is not there.
            TransportError: The request failed.
        """
        self._count("requests", 1)
        self._count("requests_get", 1)
        try:
            async with asyncio.timeout(STALL_S):
                found = await self._loop.begun(
                    lambda: self._obstore.get_async(self._store, _checked(name))
                )
            stream = aiter(found.stream(min_chunk_size=_PIECE_BYTES))
            while True:
                try:
                    async with asyncio.timeout(STALL_S):
                        piece = await self._loop.begun(lambda: anext(stream))
                except StopAsyncIteration:
                    return
                self._count("received_bytes", len(piece))
                for start in range(0, len(piece), _MAX_PIECE_BYTES):
                    yield piece[start : start + _MAX_PIECE_BYTES]
        except FileNotFoundError:
            raise
        except Exception as error:
            raise self._failed(error) from error

    async def create(self, name: str, content: Any) -> bool:
        """Create an object; False if there is one of this name, which stays.

        Raises:
            TransportError: The request failed.
        """
        self._count("requests", 1)
        self._count("requests_create", 1)
        try:
            async with asyncio.timeout(CREATE_S):
                await self._loop.begun(
                    lambda: self._obstore.put_async(
                        self._store, _checked(name), content, mode="create", use_multipart=False
                    )
                )
        except self._obstore.exceptions.AlreadyExistsError:
            return False
        except Exception as error:
            raise self._failed(error) from error
        self._count("sent_bytes", len(content))
        return True

    async def remove(self, name: str) -> None:
        """Remove what a probe made; it does not matter whether that is allowed."""
        try:
            async with asyncio.timeout(STALL_S):
                await self._loop.begun(
                    lambda: self._obstore.delete_async(self._store, _checked(name))
                )
        except Exception:
            return

    def _failed(self, error: Exception) -> TransportError:
        """What is told of what the library raised."""
        if isinstance(error, TransportError):
            return error
        if isinstance(error, TimeoutError):
            return TransportError(Failure.TIME_OUT, "it did not answer in time")
        text = str(error)
        said = text.partition("\n")[0]
        status = _STATUS.search(said)
        code = status[1] if status else ""
        if _CREDENTIALS_HOST in text:
            return TransportError(
                Failure.DENIED, "no credentials were found; they belong to the environment"
            )
        if "RequestTimeTooSkewed" in text:
            return TransportError(
                Failure.DENIED, "it refused, because its clock and that of this machine differ"
            )
        kinds = self._obstore.exceptions
        denials = (kinds.PermissionDeniedError, kinds.UnauthenticatedError, PermissionError)
        if isinstance(error, denials) or code in ("401", "403"):
            what = f"it refused ({code})" if code else "it may not be used"
            return TransportError(
                Failure.DENIED,
                f"{what}; look at the credentials and at what they allow. S3 also refuses to say "
                "that an object is missing to those who may not list the bucket (s3:ListBucket)",
            )
        if code == "507":
            return TransportError(Failure.FULL, "it is full (507)")
        if code:
            return TransportError(Failure.SERVER, f"it answered with status {code}")
        if "StorageFull" in text or "os error 28" in text or "os error 122" in text:
            return TransportError(Failure.FULL, "it is full")
        if "TimedOut" in text or "kind: Timeout" in text:
            return TransportError(Failure.TIME_OUT, "it did not answer in time")
        if "kind: Connect" in text:
            return TransportError(Failure.UNREACHABLE, "it cannot be reached")
        if "os error 13" in text or "os error 30" in text or "os error 1)" in text:
            return TransportError(Failure.DENIED, "its folder may not be written or read")
        return TransportError(Failure.SERVER, f"it failed ({said[:300]})")


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an object")
    return name


def _opened(settings: RemoteSettings) -> tuple[Any, Any]:
    """The library, and its object for the remote."""
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise missing_extra() from None
    from datetime import timedelta

    parts = urlsplit(settings.url)
    try:
        folder = folder_of(settings.url)
        if folder is not None:
            # It is not made: it may be on a disk that is not mounted.
            if not folder.is_dir():
                raise RemoteError(f"There is no folder {folder}; mount it, or make it.")
            return obstore, obstore.store.LocalStore(folder)
        endpoint = settings.options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL", "")
        client: dict[str, Any] = {
            "connect_timeout": timedelta(seconds=CONNECT_S),
            "timeout": timedelta(seconds=_LONGEST_REQUEST_S),
            "allow_http": parts.scheme == "http" or _may_be_plain(endpoint),
        }
        options: dict[str, Any] = dict(settings.options)
        if parts.scheme == "s3":
            options["disable_bulk_delete"] = True  # which some servers do not know
        open_url: Any = obstore.store.from_url
        store: Any = open_url(
            settings.url,
            config=options or None,
            client_options=client,
            # What failed is told at once: a request waits, or the breaker tries again later.
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
        )
    except RemoteError:
        raise
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise RemoteError(f"The remote {settings.url} cannot be used: {said}.") from None
    return obstore, store


def _device_inode(folder: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _may_be_plain(endpoint: str) -> bool:
    """Whether an endpoint may be talked to without encryption."""
    said = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
    return said or urlsplit(endpoint).hostname in ("127.0.0.1", "localhost", "::1")
