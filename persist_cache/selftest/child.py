"""The process of one check, or of a part of one: `python -m persist_cache.selftest.child NAME …`.

A check prints one line of JSON at its end. When the standard input of a check ends, so does it:
its parent is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

from persist_cache.errors import PersistCacheError
from persist_cache.selftest.checks import Failed, NotApplicable, Setting, find


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", help="MODULE:FUNCTION of this package, with the rest as JSON")
    parser.add_argument("--with", dest="arguments", type=json.loads, default={})
    given = parser.parse_args()
    if given.part:
        area, _, function = given.part.partition(":")
        getattr(import_module(f"persist_cache.selftest.{area}"), function)(
            given.folder, **given.arguments
        )
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    said = _run(given.name, Setting(given.folder, given.quick))
    sys.stdout.flush()
    print(json.dumps(said), flush=True)
    # Threads of MLX that are cut short would abort the process.
    os._exit(0)


def _run(name: str, setting: Setting) -> dict[str, Any]:
    try:
        line, numbers = find(name).load()(setting)
    except NotApplicable as why:
        return {"verdict": "not applicable", "line": str(why), "numbers": {}}
    except (Failed, PersistCacheError) as error:
        return {"verdict": "FAILED", "line": str(error), "numbers": {}}
    except Exception as error:
        return {"verdict": "FAILED", "line": _described(error), "numbers": {}}
    return {"verdict": "ok", "line": line, "numbers": numbers}


def _described(error: Exception) -> str:
    """An error nobody expected, with the place in our code where it came up."""
    place, traceback = "", error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if "persist_cache" in code.co_filename:
            place = f" ({Path(code.co_filename).name}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return f"{type(error).__name__}: {error}{place}"


def _end_with_parent() -> None:
    with contextlib.suppress(OSError, ValueError):
        while os.read(0, 4096):
            pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
