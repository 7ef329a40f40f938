"""Install real clients, drive them against a server of ours, and print what was reused.

Each is asked in a folder, asked again in the same conversation, once more after the server was
killed and started again, and then anew in another folder. The model is a small one that calls the
client's shell tool five times for each question. A client that cannot be installed is named in its
row, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from persist_cache.stability.names import DEFAULTS, parse_names
from persist_cache_cli.launch.clients import Served
from tests.clients.agent_model import CONTEXT_TOKENS, DONE, build_agent_model
from tests.clients.drivers import DRIVERS, Driver, Place
from tests.clients.environments import NotInstalledError, install
from tests.clients.served import NotingServer, Reuse

STEPS = {
    "works": ("Do the steps.", "here", False),
    "turn 2": ("Do them again.", "here", True),
    "after SIGKILL": ("And once more.", "here", True),
    "other folder": ("Do the steps.", "elsewhere", False),
}
"""By column: the question, the folder, and whether the conversation goes on."""
_PATIENCE_S = 300
_PASSED_ON = ("LANG", "LC_ALL", "TERM", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS")


@dataclass
class Row:
    """What became of a client.

    Attributes:
        client: Its title.
        protocol: That it speaks.
        version: As it says itself.
        trouble: Why the rest of the steps was left out; "" if none was.
        steps: What was reused in each.
    """

    client: str
    protocol: str
    version: str = ""
    trouble: str = ""
    steps: dict[str, Reuse] = field(default_factory=dict)


def drive(
    driver: Driver, programs: Path, model: Path, folder: Path, stabilize: Collection[str] = DEFAULTS
) -> Row:
    """Ask a client in all four ways, with a server and a store of its own.

    Args:
        driver: Of the client.
        programs: The folder that its program is in.
        model: The model's.
        folder: For all that is made.
        stabilize: Repairs that the server does.
    """
    row = Row(driver.title, driver.protocol, _version(driver, programs))
    home, store = folder / "home", folder / "store"
    home.mkdir(parents=True)
    environment = _environment(programs, home)
    options = {"stabilize": sorted(stabilize)}
    with NotingServer(model, store, folder / "server", **options) as server:
        # The model is there, and what it takes to tokenize beside it.
        server.chat(("user", "Hello"))
        server.settle()
        server.reuse()
        served = Served(server.url, str(model), CONTEXT_TOKENS)
        for step, (question, where, again) in STEPS.items():
            if step == "after SIGKILL":
                server.settle()
                server.restart()
            place = Place(served, store, home, folder / where)
            place.folder.mkdir(exist_ok=True)
            call = driver.call(place, question, again)
            log = folder / f"{step.replace(' ', '-')}.log"
            said = _ask(call.words, environment | dict(call.environment), place.folder, log)
            row.steps[step] = server.reuse()
            if said:
                row.trouble = f"{step}: {said}"
                break
    return row


def _ask(words: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> str:
    """Ask a question; returns what went wrong, "" if it was answered."""
    with log.open("w") as output:
        # In a session of its own: what it starts itself is to end with it.
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            status = process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            return f"no answer in {_PATIENCE_S} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = log.read_text(errors="replace")
    if status == 0 and DONE in said:
        return ""
    lines = said.strip().splitlines()
    return f"status {status}: {lines[-1] if lines else 'it said nothing'}"


def _environment(programs: Path, home: Path) -> dict[str, str]:
    """What a client runs in: nothing of the user's but the language."""
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    path = f"{programs}:{os.environ.get('PATH', '/usr/bin:/bin')}"
    return {**kept, "PATH": path, "HOME": str(home), "PERSIST_CACHE_HOME": str(home / "none")}


def _version(driver: Driver, programs: Path) -> str:
    if driver.registry == "npm":
        (package,) = driver.packages
        described = programs.parent / package / "package.json"
        return str(json.loads(described.read_text())["version"])
    name = driver.packages[0].partition("[")[0]
    said = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run(
        [programs / "python", "-c", said], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    columns = [name for name in STEPS if name != "works"]
    headings = [*columns, "its first request"]
    lines = ["| client | speaks | works | " + " | ".join(headings) + " |"]
    lines.append("|---|---|---|" + "---:|" * len(headings))
    for row in rows:
        first = row.steps.get("works")
        works = f"no: {row.trouble}" if row.trouble else "yes"
        if first is not None and not row.trouble:
            counted = "a request" if first.requests == 1 else f"{first.requests} requests"
            works = f"yes, {counted}; {cell(first)}"
        cells = [cell(row.steps[name]) if name in row.steps else "–" for name in columns]
        cells.append(opening(row.steps["other folder"]) if "other folder" in row.steps else "–")
        named = f"{row.client} {row.version}".strip()
        lines.append(f"| {named} | {row.protocol} | {works} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(found: Reuse) -> str:
    """Tokens reused of those asked, and how much that is of what could be."""
    return f"{found.reused:,} of {found.total:,} ({found.share:.1%})"


def opening(found: Reuse) -> str:
    """The same of the first request alone."""
    reused, asked = found.opening
    return f"{reused:,} of {asked:,}"


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="persist-cache-clients-") as folder:
        yield Path(folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/clients", description=__doc__)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(DRIVERS)}")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="leave what is installed and said there"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument(
        "--stabilize",
        type=parse_names,
        default=DEFAULTS,
        metavar="NAMES",
        help="repairs that the server does, as for `persist-cache serve`",
    )
    given = parser.parse_args()
    unknown = set(given.clients) - set(DRIVERS)
    if unknown:
        parser.error(f"there is no client {unknown.pop()!r}; there are {', '.join(DRIVERS)}")
    rows: list[Row] = []
    with _folder(given.keep) as folder:
        model = folder / "model"
        if not (model / "config.json").exists():
            build_agent_model(model)
        for name in given.clients or DRIVERS:
            driver = DRIVERS[name]
            began = time.monotonic()
            print(f"{driver.title} …", file=sys.stderr, flush=True)
            try:
                programs = install(
                    folder / "installed" / "-".join(driver.packages).replace("/", "_"),
                    driver.registry,
                    driver.packages,
                )
            except NotInstalledError as error:
                rows.append(Row(driver.title, driver.protocol, trouble=f"not installed: {error}"))
                continue
            run = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
            rows.append(drive(driver, programs, model, run, given.stabilize))
            print(f"  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    if given.json is not None:
        numbers: list[dict[str, Any]] = [asdict(row) for row in rows]
        given.json.write_text(json.dumps(numbers, indent=2) + "\n")
    return 0 if all(not row.trouble for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
