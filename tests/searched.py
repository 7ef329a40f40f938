"""Where something that should be nowhere still is: in the files of a folder, in a process's memory.

`python -m tests.searched JOB.json` is a server as of `tests.server_process` that searches itself
when it is asked to.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.server_process import ServerProcess, main
from tests.waiting import until

_ASKED, _FOUND = "search.json", "found.json"


def patterns(texts: Iterable[str], tokens: Iterable[Sequence[int]]) -> list[bytes]:
    """What texts and token ids look like as bytes, in each way in which they are kept."""
    found = [text.encode() for text in texts]
    for ids in tokens:
        found.append(np.array(ids, np.int64).tobytes())
        if max(ids) < 1 << 31:
            found.append(np.array(ids, np.int32).tobytes())
    return found


def in_folder(folder: Path, wanted: Sequence[bytes]) -> list[str]:
    """Files below `folder` that have any of these bytes."""
    found = []
    for path in sorted(folder.rglob("*")):
        # Closing lock.mdb would drop LMDB's locks in this process, and it is no place for tokens.
        if not path.is_file() or path.name == "lock.mdb":
            continue
        raw = path.read_bytes()
        found += [str(path.relative_to(folder)) for one in wanted if one in raw][:1]
    return found


class SearchedServer(ServerProcess):
    """A server whose memory can be searched."""

    def __init__(self, model: Path, store: Path, folder: Path, **options: Any) -> None:
        """As `ServerProcess`."""
        super().__init__(model, store, folder, module="tests.searched", **options)
        self.folder = self.log.parent

    def in_memory(self, texts: Sequence[str], tokens: Sequence[Sequence[int]]) -> list[str]:
        """What kinds of objects hold any of these texts, or tokens in a row."""
        asked, found = self.folder / _ASKED, self.folder / _FOUND
        found.unlink(missing_ok=True)
        new = asked.with_suffix(".new")
        new.write_text(json.dumps([list(texts), [list(one) for one in tokens]]))
        new.rename(asked)
        until(found.exists, timeout_s=60)
        said: list[str] = json.loads(found.read_text())
        return said


def _held(texts: Sequence[str], tokens: Sequence[Sequence[int]]) -> Iterator[str]:
    raw = patterns(texts, tokens)
    numbers = [",".join(map(str, one)) for one in tokens]
    mine = {id(texts), id(tokens), id(raw), id(numbers), *map(id, tokens)}
    gc.collect()
    for holder in gc.get_objects():
        if id(holder) in mine or isinstance(holder, type(sys._getframe())):
            continue
        if isinstance(holder, list | tuple) and len(holder) > 2 and type(holder[0]) is int:
            said = ",".join(map(str, holder))
            if any(one in said for one in numbers):
                yield f"{type(holder).__name__} of {len(holder)} tokens, in {_in(holder)}"
        for one in _referents(holder):
            if isinstance(one, str) and any(text in one for text in texts):
                yield f"str in {type(holder).__name__}: {str(holder)[:200]}"
            elif isinstance(one, bytes | bytearray) and any(kind in one for kind in raw):
                yield f"bytes in {type(holder).__name__}"


def _referents(holder: object) -> Iterator[object]:
    """What an object refers to, also by tuples that the collector does not follow."""
    pending = gc.get_referents(holder)
    while pending:
        one = pending.pop()
        yield one
        if isinstance(one, tuple) and not gc.is_tracked(one):
            pending += one


def _in(value: object) -> list[str]:
    """What refers to a value, for whoever has to find it."""
    return [
        f"{type(one).__name__} {list(one)[:8] if isinstance(one, dict) else ''}"
        for one in gc.get_referrers(value)
        if one is not sys._getframe(1)
    ]


def _watch(folder: Path) -> None:
    asked, found = folder / _ASKED, folder / _FOUND
    while True:
        until(asked.exists, timeout_s=86_400)
        texts, tokens = json.loads(asked.read_text())
        asked.unlink()
        said = json.dumps(sorted(set(_held(texts, tokens))))
        del texts, tokens
        new = found.with_suffix(".new")
        new.write_text(said)
        os.rename(new, found)


if __name__ == "__main__":
    folder = Path(sys.argv[1]).parent
    threading.Thread(target=_watch, args=(folder,), daemon=True).start()
    main()
