"""What is installed works: in fresh environments, by each way that users have to install it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
CHECKS = ("platform", "index", "sigterm")
LIBRARY = """
import importlib.resources, persist_cache, persist_cache_cli
files = importlib.resources.files
assert files("persist_cache").joinpath("py.typed").is_file()
assert files("persist_cache_cli").joinpath("py.typed").is_file()
assert files("persist_cache.server.page").joinpath("page.html").is_file()
with persist_cache.PromptCache() as cache:
    assert cache.fetch_nearest_cache("model", [1, 2, 3]) == (None, [1, 2, 3])
print(persist_cache.__version__)
"""


class SmokeError(Exception):
    """Something that was installed does not work; says what."""


class Way(NamedTuple):
    """A way to install.

    Attributes:
        name: For people.
        python: The interpreter that it installs for.
        command: What installs the package that follows.
        binaries: Folder of the installed command, in the environment's.
        variables: Of its environment.
    """

    name: str
    python: str
    command: Sequence[str]
    binaries: Path
    variables: Mapping[str, str]


def find_pythons() -> dict[str, str]:
    """By version the interpreters that can be started here."""
    found = {}
    for version in PYTHONS:
        managed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        for candidate in (f"python{version}", *map(str, managed)):
            if version_of(candidate) == version:
                found[version] = shutil.which(candidate) or candidate
                break
    return found


def version_of(python: str) -> str:
    """Such as `3.12`; "" when it cannot be started, as a version manager's shim may not."""
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def ways(pythons: Sequence[str], folder: Path) -> Iterator[Way]:
    """How to install here: pip for each interpreter; pipx and `uv tool` where they are."""
    for number, python in enumerate(pythons):
        place = folder / f"pip-{number}"
        installer = str(place / "bin" / "python")
        command = [installer, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        yield Way("pip", python, command, place / "bin", {})
    latest = pythons[-1]
    if pipx := shutil.which("pipx"):
        place = folder / "pipx"
        where = {"PIPX_HOME": str(place / "home"), "PIPX_BIN_DIR": str(place / "bin")}
        command = [pipx, "install", "--quiet", "--python", latest]
        yield Way("pipx", latest, command, place / "bin", where)
    if uv := shutil.which("uv"):
        place = folder / "uv"
        where = {"UV_TOOL_DIR": str(place / "home"), "UV_TOOL_BIN_DIR": str(place / "bin")}
        command = [uv, "tool", "install", "--quiet", "--python", latest]
        yield Way("uv tool", latest, command, place / "bin", where)


def try_out(way: Way, package: Path, version: str) -> None:
    """Install `package` and use it, with an empty home.

    Raises:
        SmokeError: Something failed.
    """
    with tempfile.TemporaryDirectory(prefix="persist-cache-smoke-") as home:
        env = {**_clean(), **way.variables, "HOME": home, "XDG_CACHE_HOME": f"{home}/.cache"}
        if way.name == "pip":
            _run([way.python, "-m", "venv", str(way.binaries.parent)], env, home)
        _run([*way.command, str(package)], env, home)
        use(way.binaries, env, Path(home), version)


def use(binaries: Path, env: Mapping[str, str], home: Path, version: str) -> None:
    """Use what was installed into `binaries`.

    Raises:
        SmokeError: Something failed.
    """
    program = str(binaries / "persist-cache")
    if (said := _run([program, "--version"], env, home)) != f"persist-cache, version {version}\n":
        raise SmokeError(f"--version says {said!r}, not {version}")
    _run([program, "--help"], env, home)
    if _run([program, "list", "--json"], env, home) != "[]\n":
        raise SmokeError("list shows something, though the home is empty")
    if (binaries / "python").exists():
        said = _run([str(binaries / "python"), "-c", LIBRARY], env, home)
        if said.strip() != version:
            raise SmokeError(f"__version__ is {said.strip()!r}, not {version}")
    only = [word for name in CHECKS for word in ("--only", name)]
    said = _run(
        [program, "selftest", "--quick", *only, "--dir", str(home), "--json", "-"], env, home
    )
    if not json.loads(said)["ok"]:
        raise SmokeError(f"selftest: {said}")


def _clean() -> dict[str, str]:
    """This process's environment, without what decides where Python finds packages."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "VIRTUAL_ENV", "PERSIST_CACHE", "LD_"))
    }


def _run(command: Sequence[str], env: Mapping[str, str], place: Path | str) -> str:
    done = subprocess.run(
        command, env=dict(env), cwd=place, capture_output=True, text=True, check=False
    )
    if done.returncode:
        end = "\n".join((done.stderr or done.stdout).strip().splitlines()[-12:])
        raise SmokeError(f"{' '.join(command)} ended with {done.returncode}:\n{end}")
    return done.stdout


def say(text: str) -> None:
    """Tell what goes on, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
