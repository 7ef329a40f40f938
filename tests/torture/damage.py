"""Damage to the files of a store that nobody has open: what disks, people and other programs do."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from persist_cache.blobs.folder import SUFFIX
from persist_cache.store.store import Store
from tests.torture.judge import FOREIGN, FOREIGN_TEXT, users_of
from tests.torture.work import RUN_TOKENS, Setting


@dataclass
class Done:
    """What was done.

    Attributes:
        kind: The name of the damage.
        harms: "files", "blobs", "index", "page", or "" when the store must come out as it went in.
        hurt: Ids of entries whose files it harmed.
    """

    kind: str
    harms: str
    hurt: frozenset[str] = field(default_factory=frozenset)


def _blobs(root: Path) -> list[Path]:
    return sorted((root / "blobs").glob(f"*/*{SUFFIX}"))


def _flip(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        # The head and the tokens are small, and the rows are most of it: hit each often.
        at = dice.choice((dice.randrange(len(data)), dice.randrange(min(len(data), 3000)), -1))
        data[at] ^= 1 << dice.randrange(8)
        path.write_bytes(data)


def _truncate(path: Path, dice: random.Random) -> None:
    os.truncate(path, dice.choice((0, 7, dice.randrange(path.stat().st_size))))


def _old_version(path: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes().replace(b'"version":"1"', b'"version":"0"', 1))


def _link_instead(path: Path, dice: random.Random) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def _folder_instead(path: Path, dice: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _zeros(path: Path, dice: random.Random) -> None:
    size = path.stat().st_size
    start = dice.randrange(0, size, 4096)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(min(4096, size - start)))


def _delete(path: Path, dice: random.Random) -> None:
    path.unlink()


ONE_BLOB: dict[str, Callable[[Path, random.Random], None]] = {
    "flipped bit": _flip,
    "truncated file": _truncate,
    "old layout version": _old_version,
    "symbolic link in its place": _link_instead,
    "folder in its place": _folder_instead,
    "zeroed page": _zeros,
    "deleted file": _delete,
}


def _foreign(root: Path, dice: random.Random) -> None:
    """Files of other programs, and what looks like ours but is not."""
    name = secrets.token_hex(16) + SUFFIX
    (root / "blobs" / name[:2]).mkdir(exist_ok=True)
    for name_of_others in FOREIGN:
        (root / name_of_others).write_bytes(FOREIGN_TEXT)
    for place in (
        root / "blobs" / name[:2] / name,
        root / "tmp" / name,
        root / "quarantine" / (secrets.token_hex(16) + SUFFIX),
    ):
        place.write_bytes(dice.randbytes(dice.randrange(1, 20_000)))


def _copy_under_other_name(root: Path, dice: random.Random) -> None:
    """A backup tool restored a file under a new name: valid, sealed, and unknown."""
    blobs = _blobs(root)
    if blobs:
        name = secrets.token_hex(16) + SUFFIX
        (root / "blobs" / name[:2]).mkdir(exist_ok=True)
        (root / "blobs" / name[:2] / name).write_bytes(dice.choice(blobs).read_bytes())


def _garbage_index(root: Path, dice: random.Random) -> None:
    (root / "data.mdb").write_bytes(dice.randbytes(50_000))


def _truncated_index(root: Path, dice: random.Random) -> None:
    size = (root / "data.mdb").stat().st_size
    os.truncate(root / "data.mdb", dice.choice((0, 100, 4096, 8192, size // 2, size - 4096)))


def _no_index(root: Path, dice: random.Random) -> None:
    (root / "data.mdb").unlink()


def _garbage_locks(root: Path, dice: random.Random) -> None:
    (root / "writer.lock").write_bytes(dice.choice((b"", b"\x01", b"garbage" * 10)))
    (root / "lock.mdb").unlink(missing_ok=True)


def _garbage_page(root: Path, dice: random.Random) -> None:
    path = root / "data.mdb"
    pages = path.stat().st_size // 4096
    with path.open("r+b") as file:
        file.seek(dice.randrange(2, max(3, pages)) * 4096)
        file.write(dice.choice((bytes(4096), dice.randbytes(4096), dice.randbytes(40))))


def _flip_index(root: Path, dice: random.Random) -> None:
    """Bits of an index that has no checksums: tokens, numbers, names."""
    path = root / "data.mdb"
    size = path.stat().st_size
    with path.open("r+b") as file:
        for _ in range(8):
            file.seek(dice.randrange(2 * 4096, max(size, 2 * 4096 + 1)))
            (byte,) = file.read(1) or b"\0"
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ (1 << dice.randrange(8))]))


WHOLE: dict[str, tuple[str, Callable[[Path, random.Random], None]]] = {
    "foreign files": ("files", _foreign),
    "copy under another name": ("files", _copy_under_other_name),
    "garbage index": ("index", _garbage_index),
    "truncated index": ("index", _truncated_index),
    "deleted index": ("index", _no_index),
    "garbage lock files": ("", _garbage_locks),
    "garbage page in the index": ("page", _garbage_page),
    "flipped bits in the index": ("page", _flip_index),
}
KINDS = (*ONE_BLOB, "two files swapped", *WHOLE)


def damage(setting: Setting, kind: str, dice: random.Random) -> Done:
    """Do `kind` to the store, which nobody has open."""
    root = setting.root
    if kind in WHOLE:
        harms, act = WHOLE[kind]
        # What was cut from an index that had not reached so far is no harm, and no loss either.
        act(root, dice)
        return Done(kind, harms)
    with Store.open(
        root, max_bytes=setting.max_bytes, min_free_bytes=0, run_tokens=RUN_TOKENS
    ) as store:
        blobs = [path for path in _blobs(root) if path.is_file() and not path.is_symlink()]
        chosen = dice.sample(blobs, min(2, len(blobs)))
        hurt = frozenset().union(*(users_of(store, path.stem) for path in chosen))
    if len(chosen) < 2:
        return Done(kind, "")
    if kind == "two files swapped":
        one, two = (path.read_bytes() for path in chosen)
        chosen[0].write_bytes(two)
        chosen[1].write_bytes(one)
    else:
        for path in chosen:
            ONE_BLOB[kind](path, dice)
    return Done(kind, "blobs", hurt)
