"""What the code of this repository sees of `sys`, `os` and `fcntl` in the Darwin lane.

The interpreter is Linux's, so the modules themselves stay as they are: the standard library and
MLX would break. Instead every module of this repository, tests included, gets a view of the three
when it imports them: `sys.platform` is "darwin", what macOS does not have is missing, what only
macOS has is there, and calls have its limits. Everything else is passed on to the real module,
assignments too, so that a test can replace a function as it does elsewhere; until it is undone.

`install` is called when an interpreter of the lane's environment starts, so it is in force in
every process that a test starts.
"""

from __future__ import annotations

import builtins
import errno
import fcntl as real_fcntl
import os as real_os
import struct
import sys as real_sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGES = ("persist_cache", "persist_cache_cli", "tests", "torture", "bench")
IOV_MAX = 1024
LONGEST_CALL = (1 << 31) - 1
F_PREALLOCATE, F_RDADVISE, F_NOCACHE, F_FULLFSYNC = 42, 44, 48, 51
_NOT_IN_OS = """
O_DIRECT O_NOATIME O_PATH O_TMPFILE copy_file_range eventfd fdatasync getrandom getresgid getresuid
getxattr listxattr memfd_create pidfd_open pipe2 posix_fadvise posix_fallocate removexattr
sched_getaffinity sched_setaffinity setns setresgid setresuid setxattr splice unshare
"""
_NOT_IN_FCNTL = """
F_ADD_SEALS F_GETLEASE F_GETPIPE_SZ F_GET_SEALS F_NOTIFY F_OFD_GETLK F_OFD_SETLK F_OFD_SETLKW
F_SETLEASE F_SETPIPE_SZ
"""


class View(ModuleType):
    """A module as another one, with some names of its own and some missing."""

    def __init__(self, real: ModuleType, own: Mapping[str, Any], missing: Sequence[str]) -> None:
        super().__init__(real.__name__, real.__doc__)
        self.__dict__.update(own, _real=real, _missing=frozenset(missing), _replaced={})
        self.__dict__["_own"] = frozenset((*own, *missing))

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on macOS")
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._own:
            self._replaced.setdefault(name, getattr(self._real, name))
            setattr(self._real, name, value)
        # Here, too: who undoes it looks whether it was here before.
        self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        del self.__dict__[name]
        if name in self._replaced:
            setattr(self._real, name, self._replaced.pop(name))

    def __dir__(self) -> list[str]:
        return sorted({*dir(self._real), *self.__dict__} - self._missing)


def _limited(name: str) -> Callable[..., int]:
    def call(fd: int, buffers: Sequence[Any], *rest: Any) -> int:
        nbytes = sum(memoryview(buffer).nbytes for buffer in buffers)
        if len(buffers) > IOV_MAX or nbytes > LONGEST_CALL:
            raise OSError(errno.EINVAL, real_os.strerror(errno.EINVAL))
        return int(getattr(real_os, name)(fd, buffers, *rest))

    return call


def _fcntl(fd: Any, command: int, argument: Any = 0) -> Any:
    number = fd if isinstance(fd, int) else fd.fileno()
    if command == F_FULLFSYNC:
        real_os.fsync(number)
        return 0
    if command == F_NOCACHE:
        return 0
    if command == F_RDADVISE:
        start, nbytes = struct.unpack("qi4x", argument)
        real_os.posix_fadvise(number, start, nbytes, real_os.POSIX_FADV_WILLNEED)
        return argument
    if command == F_PREALLOCATE:
        _, _, start, nbytes, _ = struct.unpack("Iiqqq", argument)
        real_os.posix_fallocate(number, start + real_os.fstat(number).st_size, nbytes)
        return argument
    return real_fcntl.fcntl(fd, command, argument)


VIEWS: dict[str, ModuleType] = {
    "sys": View(real_sys, {"platform": "darwin"}, ()),
    "os": View(
        real_os,
        {name: _limited(name) for name in ("readv", "writev", "preadv", "pwritev")},
        _NOT_IN_OS.split(),
    ),
    "fcntl": View(
        real_fcntl,
        {"fcntl": _fcntl, "F_FULLFSYNC": F_FULLFSYNC, "F_NOCACHE": F_NOCACHE},
        _NOT_IN_FCNTL.split(),
    ),
}


def _import(
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    found = builtins.__import__(name, globals, locals, fromlist or (), level)
    return found if level else VIEWS.get(name if fromlist else name.partition(".")[0], found)


def _with_view(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def executed(module: ModuleType) -> None:
        if module.__name__.partition(".")[0] in PACKAGES:
            module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        execute(module)

    return executed


class _Finder:
    """Finds what the others find, and has it executed with the view."""

    is_darwin_view = True

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "_pytest.assertion.rewrite":
            return self._found(name, path, target, self._rewriter)
        if name.partition(".")[0] in PACKAGES:
            return self._found(name, path, target, _with_view)
        return None

    def _found(
        self,
        name: str,
        path: Sequence[str] | None,
        target: ModuleType | None,
        wrap: Callable[[Callable[[ModuleType], None]], Callable[[ModuleType], None]],
    ) -> ModuleSpec | None:
        for finder in real_sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                loader: Any = spec.loader
                if loader is not None and not getattr(loader, "has_darwin_view", False):
                    loader.has_darwin_view = True
                    loader.exec_module = wrap(loader.exec_module)
                return spec
        return None

    @staticmethod
    def _rewriter(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        """Pytest executes test modules itself."""

        def executed(module: ModuleType) -> None:
            execute(module)
            hook = module.AssertionRewritingHook
            run = hook.exec_module
            hook.has_darwin_view = True
            hook.exec_module = lambda self, one: _with_view(lambda same: run(self, same))(one)

        return executed


def install() -> None:
    """Have every module of this repository that is imported from now on see a Mac."""
    # A folder of packages may be listed twice, and what is listed in it is done twice.
    if not any(hasattr(finder, "is_darwin_view") for finder in real_sys.meta_path):
        real_sys.meta_path.insert(0, _Finder())
