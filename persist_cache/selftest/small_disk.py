"""A full disk: what is stored stays whole, eviction makes room, and nothing ends.

The disk is a small one of the check's own: on Linux in memory, in a mount namespace that ends with
its process; on a Mac an image, attached without the need of any rights.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from persist_cache.errors import PersistCacheError
from persist_cache.selftest import material
from persist_cache.selftest.checks import Failed, NotApplicable, Result, Setting
from persist_cache.selftest.runner import DISK, environment

_MIB = 48
_PROMPTS = 12
_PROMPT_TOKENS = 2_000
_LIMIT_S = 100.0
_MOUNT = 'mount -t tmpfs -o size="$0" none "$1" && shift && exec "$@"'


def full_disk_is_survived(setting: Setting) -> Result:
    """Fill a small disk to its last block; store, read, evict, and store again."""
    disk = setting.folder / DISK
    disk.mkdir()
    program = [sys.executable, "-m", "persist_cache.selftest.child", "part", str(disk)]
    program += ["--part", "small_disk:fill_disk"]
    with _attached(setting.folder, disk) as prefix:
        done = subprocess.run(
            [*prefix, *program],
            cwd=setting.folder,
            env=environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIMIT_S,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise Failed(f"on a full disk: {last}")
    said = json.loads(done.stdout.splitlines()[-1])
    return Result(
        f"{_MIB} MiB filled to the last block: {said['kept']} prompts stayed whole, a new one was "
        f"{said['put']}, eviction freed {said['freed_bytes']:,} bytes",
        said,
    )


@contextlib.contextmanager
def _attached(folder: Path, disk: Path) -> Iterator[list[str]]:
    """Have a small disk at `disk`; yields what starts a process that sees it.

    Raises:
        NotApplicable: None can be had here.
    """
    if sys.platform == "darwin":
        image = folder / "disk.dmg"
        _hdiutil("create", "-quiet", "-size", f"{_MIB}m", "-fs", "APFS", str(image))
        _hdiutil("attach", "-quiet", "-nobrowse", "-mountpoint", str(disk), str(image))
        try:
            yield []
        finally:
            _hdiutil("detach", "-quiet", "-force", str(disk))
        return
    options = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
    prefix = ["unshare", *options, "sh", "-c", _MOUNT, f"{_MIB}m", str(disk)]
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NotApplicable("there is no `unshare`, which would give this check a disk") from None
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise NotApplicable(f"no small disk may be mounted here ({last})")
    yield prefix


def _hdiutil(*words: str) -> None:
    try:
        done = subprocess.run(["hdiutil", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NotApplicable("there is no hdiutil, which would give this check a disk") from None
    if done.returncode:
        raise NotApplicable(f"no small disk can be made here (hdiutil {words[0]} failed)")


def fill_disk(disk: Path) -> None:
    """Part: do all that is done on a full disk; prints what came of it, or ends with a sentence."""
    prompts = [material.tokens(seed, _PROMPT_TOKENS) for seed in range(_PROMPTS)]
    late = material.tokens(_PROMPTS, _PROMPT_TOKENS)
    filler = disk / "filler"
    with material.opened(disk) as store:
        for prompt in prompts:
            material.put(store, prompt)
        _fill(filler)
        put = "stored"
        try:
            material.put(store, late)
        except PersistCacheError:
            put = "refused"
        kept = sum(material.is_whole(store, prompt) for prompt in prompts)
        if kept != store.stats().entries - (put == "stored"):
            sys.exit(f"{kept} prompts came back whole, of {store.stats().entries} that are listed")
        if not kept:
            sys.exit("nothing that was stored came back")
        try:
            freed = store.evict([store.entries()[0].id])
        except PersistCacheError as error:
            sys.exit(f"nothing could be evicted: {error}")
    filler.unlink()
    with material.opened(disk) as store:
        material.put(store, late)
        if not material.is_whole(store, late):
            sys.exit("with room again, what was stored did not come back")
        if problems := store.check(read_data=True):
            sys.exit(f"check found {len(problems)} problems: {problems[0].message}")
    print(json.dumps({"kept": kept, "put": put, "freed_bytes": freed}))


def _fill(path: Path) -> None:
    """Write until there is no block left."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for size in (1 << 20, 4096):
            with contextlib.suppress(_Full):
                while True:
                    _write(fd, bytes(size))
    finally:
        os.close(fd)


class _Full(Exception):
    """The disk is full."""


def _write(fd: int, data: bytes) -> None:
    try:
        os.write(fd, data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _Full from None
