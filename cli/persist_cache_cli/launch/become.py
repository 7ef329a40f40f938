"""This process becomes the client, so terminal, signals and exit status are the client's own.

What has to happen after its end is left to a child of this process, which sees it by its parent.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from persist_cache.server.needed import is_last

_LOOK_S = 0.1
_MOST_DESCRIPTORS = 65_536


def become(path: str, words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Go on as another program.

    Args:
        path: Of the program.
        words: Its command line, with its name.
        environment: All of its variables.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # Python ignores these, and what is ignored stays so in another program.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execve(path, list(words), dict(environment))


def need_until_end(needing: int, folder: Path) -> None:
    """Hold a server until this process ends, whatever it becomes; the last one tidies up.

    Args:
        needing: Descriptor that holds the server; it is closed when this process becomes another.
        folder: Of the server's lock and log.
    """
    ours = os.getpid()
    if os.fork() != 0:
        return
    status = 1
    try:
        _let_go_of_all_but(needing)
        while os.getppid() == ours:
            time.sleep(_LOOK_S)
        if is_last(needing):
            shutil.rmtree(folder, ignore_errors=True)
        status = 0
    finally:
        os._exit(status)


def _let_go_of_all_but(fd: int) -> None:
    """Keep nothing that somebody waits for the end of, and hear nothing meant for the client."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    os.closerange(3, fd)
    os.closerange(fd + 1, _MOST_DESCRIPTORS)
