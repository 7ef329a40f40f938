"""A signal that asks the process to end is never lost.

Its handler raises an exception in the main thread, wherever that is: in a `__del__`, in a weak
reference's callback, or where somebody else's code catches everything, it goes no further. So it
is raised again until it has arrived where the process ends. Python tells, with a traceback, of
exceptions that go no further; of these it need not.

Thread safety: for the main thread, where Python runs all handlers of signals.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    import subprocess

_AGAIN_S = 0.1
_AT_ONCE_S = 1.0
"""Who asks again within this time means the same end."""


class Asked(NamedTuple):
    """What a signal has the main thread raise."""

    kind: type[BaseException]
    arguments: tuple[Any, ...]


_wanted: Asked | None = None
"""What is raised until it arrives."""
_since = 0.0
"""When that was asked for, by the monotonic clock."""
_deferred = 0
_tell_swallowed: Callable[[sys.UnraisableHookArgs], object] | None = None
"""Tells of exceptions that go no further, while ours is in its place."""


def insist(kind: type[BaseException], *arguments: Any) -> None:
    """Raise an exception until `arrived` is called; for a handler of a signal.

    Each call raises it at once, unless a block is `deferred`: whoever asks twice is heard twice,
    but not while the process cleans up because of what came a moment ago. A terminal that is
    closed, a key that is held down, and what ends services send several signals at once.
    """
    global _wanted, _since, _tell_swallowed
    now = time.monotonic()
    if _wanted is not None and now - _since < _AT_ONCE_S and _is_under_way():
        return
    _wanted, _since = Asked(kind, arguments), now
    if _tell_swallowed is None:
        _tell_swallowed, sys.unraisablehook = sys.unraisablehook, _swallowed
    signal.signal(signal.SIGALRM, _again)
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_S, _AGAIN_S)
    if not _deferred:
        _raise()


def asked() -> Asked | None:
    """What a signal asked for that has not arrived yet, if one came."""
    return _wanted


def arrived() -> None:
    """Say that the process ends in order, so that it is not raised again."""
    global _wanted, _tell_swallowed
    if _wanted is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _wanted = None
    if _tell_swallowed is not None:
        sys.unraisablehook, _tell_swallowed = _tell_swallowed, None


def rest() -> None:
    """Raise nothing any more, whatever comes: the process is about to end. `asked` still tells."""
    global _deferred
    _deferred += 1
    if _wanted is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Have what a signal raises in the block raised at its end: it is not to be cut short."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
    if _wanted is not None and not _deferred and not _is_under_way():
        _raise()


def has_ended(process: subprocess.Popen[Any]) -> bool:
    """Whether a child has ended; for whoever looks again and again.

    `Popen.poll` takes a lock and only then prepares to give it back. What a signal raises between
    the two leaves it taken, and every `wait` of that child stands for ever.
    """
    with deferred():
        return process.poll() is not None


def _swallowed(said: sys.UnraisableHookArgs) -> None:
    """Pass over what will be raised again."""
    is_ours = _wanted is not None and said.exc_type is _wanted.kind
    if not is_ours and _tell_swallowed is not None:
        _tell_swallowed(said)


def _again(signum: int, frame: object) -> None:
    if _wanted is not None and not _deferred and not _is_under_way():
        _raise()


def _raise() -> NoReturn:
    assert _wanted is not None, "there is something to raise"
    raise _wanted.kind(*_wanted.arguments)


def _is_under_way() -> bool:
    """Whether the main thread is cleaning up because of what was raised."""
    seen: set[int] = set()
    todo = [sys.exception()]
    while todo:
        error = todo.pop()
        if error is None or id(error) in seen:
            continue
        if _wanted is not None and type(error) is _wanted.kind:
            return True
        seen.add(id(error))
        todo += [error.__cause__, error.__context__]
    return False
