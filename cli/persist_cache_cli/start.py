"""Where the process of `persist-cache` begins, before anything is imported that takes time.

Until `main` runs, Python would answer Ctrl-C with a traceback. There is nothing to clean up yet, so
the process ends at once, as by SIGTERM. A standard stream that is closed, as cron and services may
leave it, leads to the null device: commands print without asking.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def start() -> NoReturn:
    """Run the command line of this process."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from persist_cache.system import streams

    for number in streams.occupy():
        name, mode = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))[number]
        setattr(sys, name, os.fdopen(number, mode, closefd=False))

    from persist_cache_cli.main import main

    main()
