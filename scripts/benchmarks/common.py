"""What all benchmarks share: fresh processes, medians, the machine, and where results go."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "scripts" / "benchmarks" / "results"
IMAGES = REPOSITORY / "docs" / "img"
PAGE = REPOSITORY / "docs" / "performance.md"

# A forked child may not use Metal.
_PROCESSES: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    _PROCESSES.set_forkserver_preload(
        [
            "mlx_lm.models.cache",
            "persist_cache.tensors",
            "persist_cache.cache.prompt_cache",
            "scripts.benchmarks.kv",
        ]
    )


@dataclass(frozen=True)
class Context:
    """How a benchmark is to run.

    Attributes:
        quick: Fewer repetitions and smaller sizes.
        folder: Where stores and files are made; on the disk that is measured.
    """

    quick: bool
    folder: Path

    def pick(self, quick: Any, full: Any) -> Any:
        return quick if self.quick else full

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder that is removed afterwards."""
        with tempfile.TemporaryDirectory(prefix="bench-", dir=self.folder) as made:
            yield Path(made)


@dataclass(frozen=True)
class Spread:
    """Repetitions of one case."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))

    def show(self, scale: float = 1.0, digits: int = 1) -> str:
        """`median (low-high)`."""
        median, low, high = (
            f"{value * scale:.{digits}f}" for value in (self.median, self.low, self.high)
        )
        return f"{median} ({low}–{high})"


@dataclass(frozen=True)
class Table:
    """A table as it is printed, and as it stands in the Markdown file."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [f"### {self.title}", ""]
        lines.append("| " + " | ".join(self.columns) + " |")
        lines.append("| " + " | ".join(["---", *["---:"] * (len(self.columns) - 1)]) + " |")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        if self.note:
            lines += ["", self.note]
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """What one benchmark found.

    Attributes:
        name: Of the benchmark, and of its files.
        title: One line.
        values: Whatever `table` and the plots need, as JSON.
        tables: For people.
    """

    name: str
    title: str
    values: Mapping[str, Any]
    tables: Sequence[Table]


def fresh(function: Callable[..., Any], **arguments: Any) -> Any:
    """Run `function(**arguments)` in a new process, and return what it returns.

    On Linux it is forked from a process that has imported MLX and mlx-lm and done nothing with
    them, which saves two seconds each; its memory for arrays is as new as any.
    """
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_call, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        result, error = None, f"it died with exit code {process.exitcode}"
    process.join()
    if error:
        raise RuntimeError(f"{function.__module__}.{function.__name__}: {error}")
    return result


def _call(sender: Connection, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    try:
        sender.send((function(**arguments), ""))
    except BaseException:
        sender.send((None, traceback.format_exc()))


def run_python(
    module: str, function: str, arguments: Mapping[str, Any], env: Mapping[str, str]
) -> Any:
    """Run a function of a module in a newly started Python with `env` added to its environment."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.child", module, function, json.dumps(arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module}.{function}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def limit_memory(nbytes: int = 6 << 30) -> None:
    """Let this process fail with `MemoryError` rather than take the machine's last memory."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))


def take_turns(
    cases: Mapping[str, Callable[[], Any]], repetitions: int, progress: str = ""
) -> dict[str, list[Any]]:
    """Run each case once, then each again: what disturbs the machine disturbs all of them."""
    found: dict[str, list[Any]] = {name: [] for name in cases}
    for number in range(repetitions):
        for name, case in cases.items():
            if progress:
                say(f"{progress}: {name}, {number + 1} of {repetitions}")
            found[name].append(case())
    return found


def say(text: str) -> None:
    """Tell people where a long run is; on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Exponent `p` of the best fit `y = c x^p`: 0 does not grow, 1 grows in proportion."""
    return fit([math.log(x) for x in xs], [math.log(y) for y in ys])[1]


def fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of the least-squares line."""
    if len(set(xs)) < 2:
        return (ys[0] if ys else 0.0), 0.0
    line = statistics.linear_regression(xs, ys)
    return line.intercept, line.slope


def sync(path: Path) -> None:
    """Make the bytes of all files below `path` durable, so that no later write waits for them."""
    for file in files_below(path):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def drop_page_cache(path: Path) -> bool:
    """Let the kernel forget the contents of all files below `path`; whether it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files_below(path):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    return True


def files_below(path: Path) -> list[Path]:
    """Files of a store or folder, but LMDB's lock file, which must not be opened and closed."""
    found = [path] if path.is_file() else sorted(path.rglob("*"))
    return [file for file in found if file.is_file() and file.name != "lock.mdb"]


def disk_bytes(path: Path) -> int:
    """What all below `path` takes on disk, folders included."""
    return sum(one.lstat().st_blocks * 512 for one in (path, *path.rglob("*")))


def machine() -> dict[str, Any]:
    """What the numbers depend on; nothing that names the machine or its owner."""
    versions = {}
    for package in ("mlx", "mlx-lm", "lmdb", "xxhash"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "system": platform.system(),
        "arch": platform.machine(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(_memory_bytes() / 2**30),
        "python": platform.python_version(),
        **versions,
    }


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def machine_line(about: Mapping[str, Any]) -> str:
    """The machine in one line, for captions."""
    versions = ", ".join(f"{name} {about[name]}" for name in ("mlx", "mlx-lm") if name in about)
    return (
        f"{about['system']} {about['arch']}, {about['cores']} cores, "
        f"{about['memory_gib']} GiB, Python {about['python']}, {versions}"
    )


def save(report: Report, context: Context) -> dict[str, Any]:
    """Write `results/<name>.json` and `.md`, and return what the JSON says."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    said: dict[str, Any] = {
        "benchmark": report.name,
        "quick": context.quick,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "values": report.values,
        "tables": [asdict(table) for table in report.tables],
    }
    (RESULTS / f"{report.name}.json").write_text(json.dumps(said, indent=1) + "\n")
    lines = [f"## {report.title}", "", machine_line(said["machine"]) + "."]
    if context.quick:
        lines += ["", "A quick run: few repetitions, small sizes."]
    for table in report.tables:
        lines += ["", table.markdown()]
    (RESULTS / f"{report.name}.md").write_text("\n".join(lines) + "\n")
    return said


def load(name: str) -> dict[str, Any] | None:
    """What `save` wrote last, or None."""
    try:
        said: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    except FileNotFoundError:
        return None
    return said


def write_page(mark: str, names: Sequence[str]) -> None:
    """Put the Markdown of the last results between two marks of docs/performance.md."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    parts = []
    for name in names:
        path = RESULTS / f"{name}.md"
        if not path.exists():
            continue
        parts.append(path.read_text().strip())
        if (IMAGES / f"{name}-light.svg").exists():
            said = load(name) or {}
            title = str(said.get("tables", [{}])[0].get("title", name))
            parts.append(
                "<picture>\n"
                f'  <source media="(prefers-color-scheme: dark)" srcset="img/{name}-dark.svg">\n'
                f'  <img src="img/{name}-light.svg" alt="{title}">\n'
                "</picture>"
            )
    before, _, rest = PAGE.read_text().partition(begin)
    after = rest.partition(end)[2]
    PAGE.write_text(before + "\n\n".join([begin, *parts, end]) + after)
