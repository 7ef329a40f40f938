"""The event loop on which requests run, and which knows of the library's threads within Python.

obstore answers an awaited call from a thread of its own: that takes the interpreter's lock, looks
whether the future was cancelled, and hands the result to the loop
(https://docs.rs/pyo3-async-runtimes). The loop may be through with the result before that thread
is through with Python. Where the process ends just then, up to CPython 3.13 the thread is ended
inside frames that are not Python's, which aborts the process although its work was done. So closing
the loop waits until these threads have left.

Thread safety: `begun` is for coroutines of the loop, everything else for any thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_LOOK_S = 0.002
_LEAVING_S = 0.02
"""What a thread gets to let go of the interpreter, once it has said the last of what it had to."""


class Loop(asyncio.SelectorEventLoop):
    """An event loop that can be asked whether another thread may still call it."""

    def __init__(self) -> None:
        """Make one; it is not running."""
        super().__init__()
        self._is_beginning = False
        self._owed: set[_Answer] = set()
        self._left_at = 0.0

    def begun(self, begin: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        """Start a request of the library; `wait_left` waits for its thread."""
        self._is_beginning = True
        try:
            return begin()
        finally:
            self._is_beginning = False

    def create_future(self) -> asyncio.Future[Any]:
        """As asyncio's; the library asks for one at the beginning of each request."""
        if not self._is_beginning:
            return super().create_future()
        answer = _Answer(self)
        self._owed.add(answer)
        return answer

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """As asyncio's; the library hands results over by it, the future being an argument."""
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        finally:
            for one in args:
                if isinstance(one, _Answer):
                    self.has_been_told(one)

    def has_been_told(self, answer: _Answer) -> None:
        """Note that a thread has said the last of what it had to; it is still in Python."""
        self._left_at = time.monotonic()
        self._owed.discard(answer)

    def wait_left(self, timeout_s: float) -> bool:
        """Wait until no thread of the library has anything more to say.

        Returns:
            Whether that is so within the time.
        """
        give_up = time.monotonic() + timeout_s
        while self._owed:
            if time.monotonic() > give_up:
                return False
            time.sleep(_LOOK_S)
        time.sleep(max(0.0, self._left_at + _LEAVING_S - time.monotonic()))
        return True


class _Answer(asyncio.Future[Any]):
    """A future that another thread will complete, or look at once after it was cancelled."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop=loop)
        self._thread = threading.get_ident()

    def cancelled(self) -> bool:
        is_cancelled = super().cancelled()
        if is_cancelled and threading.get_ident() != self._thread:
            loop: Any = self.get_loop()
            loop.has_been_told(self)
        return is_cancelled
