"""File systems of one's own, on loop-mounted images: where Linux's root may mount them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from persist_cache import fs

MIB = 1 << 20
KINDS = ("ext4", "xfs", "btrfs", "tmpfs")
SMALLEST = {"ext4": 8 * MIB, "xfs": 304 * MIB, "btrfs": 112 * MIB, "tmpfs": 1 * MIB}
"""What `mkfs` makes at least."""
_MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-m", "0"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f", "-m", "single"),
}


class NoDisk(Exception):
    """Such a file system cannot be had here; says why."""


@contextlib.contextmanager
def mounted(
    kind: str,
    nbytes: int,
    folder: Path,
    *,
    files: int | None = None,
    make: Sequence[str] = (),
    options: str = "",
) -> Iterator[Path]:
    """Mount an empty file system; yields where.

    Args:
        kind: One of `KINDS`.
        nbytes: Its size, at least that of `SMALLEST`.
        folder: Where the image and the mount point go.
        files: How many files it can have, where that is fixed (ext4, tmpfs).
        make: Further options of `mkfs`.
        options: For `mount`.

    Raises:
        NoDisk: It cannot be made or mounted here.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NoDisk("only Linux's root may mount")
    nbytes = max(nbytes, SMALLEST[kind])
    point = folder / f"{kind}-disk"
    point.mkdir()
    if kind == "tmpfs":
        limit = f",nr_inodes={files}" if files else ""
        command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes},mode=700{limit}", "none"]
    else:
        program = _MKFS[kind]
        if shutil.which(program[0]) is None:
            raise NoDisk(f"{program[0]} is not installed")
        image = folder / f"{kind}.img"
        with image.open("wb") as file:
            file.truncate(nbytes)
        _run([*program, *make, *(("-N", str(files)) if files else ()), str(image)])
        command = ["mount", "-o", f"loop{',' + options if options else ''}", str(image)]
    _run([*command, str(point)])
    try:
        point.chmod(0o700)
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoDisk(f"{command[0]} failed: {done.stderr.strip()}")


def fill(place: Path) -> int:
    """Take every free block of a file system, as another program may; returns the files made.

    They are called `filler-…`, in `place`.
    """
    number = len(list(place.glob("filler-*")))
    for size in (16 * MIB, MIB, 65_536, 4096):
        for _ in range(100_000):
            path = place / f"filler-{number}"
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            except OSError:
                return number
            number += 1
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError:
                # What could be had of it stays.
                with contextlib.suppress(OSError):
                    while os.write(fd, b"x" * 4096):
                        pass
                break
            finally:
                os.close(fd)
    fs.sync_file_system(place)
    return number


def unfill(place: Path) -> None:
    """Give all of that back."""
    for path in place.glob("filler-*"):
        path.unlink()
    fs.sync_file_system(place)
