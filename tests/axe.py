"""axe-core, which finds what keeps people from using a page; got from npm, for the tests alone.

It is not in the repository: half a megabyte, under another license. It is fetched once, beside the
packages of the virtual environment, by npm.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

VERSION = "4.10.3"
_TIMEOUT_S = 60


@cache
def source() -> str:
    """Its script; the test is skipped where it cannot be had."""
    kept = Path(sys.prefix) / f"axe-core-{VERSION}.js"
    if not kept.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("AXE IS MISSING: the page was not checked by axe-core (npm is not here)")
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [npm, "pack", "--silent", f"axe-core@{VERSION}"],
                cwd=folder,
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
            packed = list(Path(folder).glob("*.tgz"))
            if done.returncode or not packed:
                pytest.skip("AXE IS MISSING: the page was not checked by axe-core (no network)")
            with tarfile.open(packed[0]) as archive:
                script = archive.extractfile("package/axe.min.js")
                assert script is not None
                kept.write_bytes(script.read())
    return kept.read_text()


def violations(driver: Any) -> list[str]:
    """What is serious or worse on the page that a browser shows, a line each."""
    # By the debugger, because the page's policy lets no other script in.
    driver.execute_cdp_cmd("Runtime.evaluate", {"expression": source()})
    found = driver.execute_async_script(
        "axe.run(document, {resultTypes: ['violations']}).then(arguments[0])"
    )
    return [
        f"{one['id']}: {one['help']}: {[node['target'] for node in one['nodes']][:3]}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
