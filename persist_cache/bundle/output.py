"""The file of a bundle while it is written: nobody sees it before it is whole.

It has no name until then, or another one where files must have a name; what a killed export left
is removed by the next one into the same folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from persist_cache import fs
from persist_cache.bundle.container import BLOCK, END, MANIFEST, member_header, padding
from persist_cache.errors import StoreAccessError

_PART = re.compile(r"\..+\.[0-9a-f]{16}\.part")
_PAUSE_S = 60.0


def write_file(
    file: Path, force: bool, members: Iterable[tuple[str, int, Iterator[memoryview]]]
) -> int:
    """Write members into the new file `file`; see `export`. Returns its length.

    Args:
        file: The bundle to be.
        force: Replace `file` if it exists.
        members: Name, length and content of each, in order.

    Raises:
        FileExistsError: There is a `file`, and `force` was not given.
        StoreFullError: Its disk is full.
        StoreAccessError: It cannot be written there.
    """
    remove_parts(file.parent)
    with _write_errors(file):
        fd, part = _begin(file)
    try:
        with _write_errors(file):
            nbytes = sum(_write_one(fd, *member) for member in members)
            nbytes += fs.write_all(fd, [memoryview(END)])
            fs.sync(fd)
        with _write_errors(file):
            if part is None and not force:
                fs.give_name(fd, file)
            else:
                if part is None:
                    part = _part_of(file)
                    fs.give_name(fd, part)
                _move(part, file, force)
            fs.sync_folder(file.parent)
    finally:
        # First: the name of a part without a lock is removed by whoever comes by.
        if part is not None:
            with contextlib.suppress(OSError):
                fs.unlink(part)
        os.close(fd)
    return nbytes


def _begin(file: Path) -> tuple[int, Path | None]:
    """A file beside `file`, and its name: None where files need none until they are whole.

    KV reveals its prompt, so what a killed export wrote must not stay. A part that needs a name is
    locked while its writer lives, and removed by the next export into the same folder.
    """
    with contextlib.suppress(OSError):
        fd = fs.create_nameless(file.parent)
        if os.path.exists(f"/proc/self/fd/{fd}"):
            return fd, None
        os.close(fd)
    part = _part_of(file)
    fd = fs.create(part)
    fs.try_lock(fd)
    return fd, part


def _part_of(file: Path) -> Path:
    return file.with_name(f".{file.name}.{secrets.token_hex(8)}.part")


def remove_parts(folder: Path) -> int:
    """Remove what exports that were killed left in `folder`; returns how many files."""
    removed = 0
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        for one in list(found):
            if _PART.fullmatch(one.name) and one.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    removed += _remove_part(Path(one.path))
    return removed


def _remove_part(path: Path) -> bool:
    fd = fs.open_read(path)
    try:
        status = os.fstat(fd)
        head = os.pread(fd, len(MANIFEST), 0)
        # Earlier versions take no lock, but never pause while they write.
        is_old = not 0 <= time.time() - status.st_mtime < _PAUSE_S
        is_ours = status.st_uid == os.geteuid() and MANIFEST.encode().startswith(head)
        if not (is_ours and is_old and fs.try_lock(fd)):
            return False
        fs.unlink(path)
        return True
    finally:
        os.close(fd)


def pieces_of(
    members: Iterable[tuple[str, int, Iterator[memoryview]]],
) -> Iterator[memoryview]:
    """The bytes of a bundle with these members; see `write_file`."""
    for name, nbytes, pieces in members:
        yield memoryview(member_header(name, nbytes))
        yield from pieces
        yield memoryview(padding(nbytes))
    yield memoryview(END)


def length_of(sizes: Iterable[int]) -> int:
    """How many bytes a bundle has whose members have these sizes."""
    return len(END) + sum(BLOCK + size + len(padding(size)) for size in sizes)


def _write_one(fd: int, name: str, nbytes: int, pieces: Iterator[memoryview]) -> int:
    head, tail = member_header(name, nbytes), padding(nbytes)
    written = fs.write_all(fd, [memoryview(head)])
    for piece in pieces:
        written += fs.write_all(fd, [piece])
    written += fs.write_all(fd, [memoryview(tail)])
    assert written == len(head) + nbytes + len(tail), "a member is longer or shorter than announced"
    return written


def _move(temporary: Path, file: Path, force: bool) -> None:
    """Give the file its name, in one step that never replaces another unless `force`."""
    if force:
        os.replace(temporary, file)
        return
    try:
        os.link(temporary, file)
    except FileExistsError:
        raise
    except OSError:
        # Some file systems have no links; then there is a moment in which another may appear.
        if os.path.lexists(file):
            raise FileExistsError(file) from None
        fs.rename(temporary, file)


@contextlib.contextmanager
def _write_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise StoreAccessError(f"{file} cannot be written ({error.strerror}).") from error
    except OSError as error:
        raise fs.translated(error, f"while {file} was written") from error
