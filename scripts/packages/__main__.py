"""`scripts/release`: from the checkout to what can be uploaded, everything tried out."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import persist_cache
from scripts.packages.notes import UNRELEASED, notes_of
from scripts.packages.smoke import (
    PYTHONS,
    SmokeError,
    find_pythons,
    say,
    try_out,
    version_of,
    ways,
)

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"


def main() -> None:
    """Run all steps; the first that fails ends it with a sentence."""
    parser = argparse.ArgumentParser(prog="scripts/release")
    parser.add_argument("--draft", action="store_true", help="take the notes of [Unreleased]")
    parser.add_argument("--python", action="append", metavar="PATH", help="interpreter to try")
    parser.add_argument("--no-install", action="store_true", help="build and check only")
    given = parser.parse_args()
    try:
        _release(given)
    except (SmokeError, LookupError) as error:
        sys.exit(f"Error: {error.args[0]}")


def _release(given: argparse.Namespace) -> None:
    version = persist_cache.__version__
    notes = notes_of((ROOT / "CHANGELOG.md").read_text(), UNRELEASED if given.draft else version)
    shutil.rmtree(DIST, ignore_errors=True)
    say(f"Building persist-cache {version} ...")
    # The wheel is built from the sdist, so that the sdist is known to hold all that it takes.
    _tool("build", "--outdir", str(DIST), str(ROOT))
    wheel, sdist = _only("*.whl"), _only("*.tar.gz")
    say("Checking the packages ...")
    _tool("twine", "check", "--strict", str(wheel), str(sdist))
    checker = Path(sys.executable).with_name("check-wheel-contents")
    _step([str(checker), "--config", str(ROOT / "pyproject.toml"), str(wheel)])
    if not given.no_install:
        _install(_pythons(given.python), wheel, sdist, version)
    (DIST / "NOTES.md").write_text(notes)
    say(f"Notes: {DIST / 'NOTES.md'}")
    say(f"To release: twine upload {wheel} {sdist}")


def _install(pythons: dict[str, str], wheel: Path, sdist: Path, version: str) -> None:
    with tempfile.TemporaryDirectory(prefix="persist-cache-release-") as scratch:
        tried = [(way, wheel) for way in ways(list(pythons.values()), Path(scratch))]
        first = next(ways([next(iter(pythons.values()))], Path(scratch) / "sdist"))
        for way, package in [*tried, (first, sdist)]:
            started = time.monotonic()
            try_out(way, package, version)
            what = f"{way.name}, Python {version_of(way.python)}, {package.suffix.lstrip('.')}"
            say(f"  {what}: works ({time.monotonic() - started:.0f} s)")
    names = {way.name for way, _ in tried}
    absent = [f"Python {one}" for one in PYTHONS if one not in pythons]
    absent += [one for one in ("pipx", "uv tool") if one not in names]
    if absent:
        say(f"  not tried, because not here: {', '.join(absent)}")


def _pythons(given: list[str] | None) -> dict[str, str]:
    found = find_pythons() if given is None else {version_of(one): one for one in given}
    if not found or "" in found:
        raise SmokeError("No Python that can be started; name one with --python PATH.")
    return found


def _only(pattern: str) -> Path:
    (found,) = DIST.glob(pattern)
    return found


def _tool(name: str, *arguments: str) -> None:
    _step([sys.executable, "-m", name, *arguments])


def _step(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SmokeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}".rstrip())


if __name__ == "__main__":
    main()
