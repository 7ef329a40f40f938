"""`scripts/bench [--quick] [--dir FOLDER] BENCHMARK...`; `all` runs every one, then the table."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

from scripts.benchmarks import common

ALL = (
    *("restore", "insert", "lookup", "growth", "turns", "interrupted", "flight", "signs"),
    *("sessions", "ttft", "start", "memory", "stall", "commands", "translation", "repairs"),
    *("remote", "shared"),
)
"""Modules of this package, in the order in which `all` runs them."""
LONG = ("agents", "unload")
"""Those that take many minutes; they stand on the page as well."""
BENCHMARKS = (*ALL, *LONG, "peers")


def main() -> int:
    arguments = _parse()
    context = common.Context(arguments.quick, arguments.dir)
    names = list(arguments.names)
    if "all" in names:
        names = [*ALL, "table", *([] if context.quick else ["page"])]
    for name in names:
        if name in BENCHMARKS:
            measure(name, context)
    code = 0
    if "table" in names:
        from scripts.benchmarks import table

        code = table.show(context, measure)
    if "page" in names:
        common.write_page("results", ["table", *ALL, *LONG])
        common.write_page("peers", ["peers"])
    return code


def measure(name: str, context: common.Context) -> None:
    """Run one benchmark, write its results and plots, and print its tables."""
    module = importlib.import_module(f"scripts.benchmarks.{name}")
    started = time.monotonic()
    report = module.run(context)
    said = common.save(report, context)
    common.say("")
    print(f"## {report.title}\n")
    for table in report.tables:
        print(table.markdown(), end="\n\n")
    draw = getattr(module, "draw", None)
    if draw is not None:
        draw(said)
    print(f"({name}: {time.monotonic() - started:.0f} s)\n", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="Measure persist-cache; see docs/performance.md."
    )
    parser.add_argument(
        "names",
        nargs="+",
        choices=[*BENCHMARKS, "table", "page", "all"],
        metavar="BENCHMARK",
        help=f"{', '.join(BENCHMARKS)}; `table` compares the results with their targets and exits "
        "with 1 if one does not hold; `page` puts the last results into docs/performance.md; `all` "
        "is everything but `agents`, `unload` and `peers`, without the page when `--quick`",
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and smaller sizes")
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where stores are made: a folder on the disk to be measured",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
