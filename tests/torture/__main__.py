"""The command line of the torture: phases, the table, and the verdict as exit status."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from tests.torture import broken, private, replaced, scenes, shared, steps, threads
from tests.torture.storm import Report, Storm, in_child

STORMS = ("kills", "threads", "replaced", "shared")


def main(arguments: list[str] | None = None) -> int:
    """Torture a store; returns 0 when every promise held."""
    options = _options(arguments)
    # So that what was mounted and written is cleaned up, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    logging.disable(logging.CRITICAL)  # every repair is announced, thousands of times
    folder = Path(tempfile.mkdtemp(prefix="persist-cache-torture-", dir=options.folder))
    report = Report()
    run = Run(options, folder, report)
    started = time.monotonic()
    try:
        run.all_phases(started + 60 * options.minutes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - started
    if options.json:
        print(json.dumps(_as_json(run, seconds), indent=2))
    else:
        _print(run, seconds)
    return 1 if report.findings else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/torture", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute, for CI")
    parser.add_argument("--minutes", type=float, help="end the rounds of kills after this long")
    parser.add_argument("--kills", type=int, help="processes to kill at random moments")
    parser.add_argument("--faults", type=int, help="faults to inject step by step")
    parser.add_argument("--threads-s", type=float, help="seconds for threads on one PromptCache")
    parser.add_argument("--replaced-s", type=float, help="seconds for replaced models")
    parser.add_argument("--shared-s", type=float, help="seconds for machines that share a remote")
    parser.add_argument("--s3", action="store_true", help="that is SeaweedFS, and not a folder")
    parser.add_argument("--seed", type=int, default=1, help="decides all but the scheduling")
    parser.add_argument("--folder", help="where stores are made; default: memory, if there is any")
    parser.add_argument(
        "--break",
        dest="breaks",
        choices=sorted(broken.BREAKS),
        default="",
        help="break the store on purpose; the torture has to notice",
    )
    parser.add_argument("--storms-only", action="store_true", help="skip the faults step by step")
    parser.add_argument("--storm", choices=STORMS, help="this one only")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.folder is None and os.access("/dev/shm", os.W_OK):
        # A killed process loses nothing that the system has, so a slow disk would prove no more.
        options.folder = "/dev/shm"
    names = ("minutes", "kills", "faults", "threads_s", "replaced_s", "shared_s")
    quick = (1.5, 150, 500, 3.0, 8.0, 5.0)
    whole = (30.0, 1200, 10_000, 60.0, 150.0, 60.0)
    for name, value in zip(names, quick if options.quick else whole, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


class Run:
    """One run: what was asked for, and what came of it."""

    def __init__(self, options: argparse.Namespace, folder: Path, report: Report) -> None:
        self.options = options
        self.report = report
        self.tried = steps.Tried()
        self.threads = threads.Checked()
        self.replaced = replaced.Seen()
        self.shared = shared.Seen()
        self._folder = folder

    def all_phases(self, late: float) -> None:
        """Everything; a broken build only has to be caught, so its run ends with a finding."""
        options = self.options
        if options.breaks:
            self._storm(broken.FOUND_BY[options.breaks], late)
            return
        if not options.storms_only and not options.storm:
            self._step_by_step()
        for name in STORMS:
            if options.storm in (None, name):
                self._storm(name, late)

    def _step_by_step(self) -> None:
        options, report, folder = self.options, self.report, self._folder
        _say("death at every step of every operation")
        stride = 7 if options.quick else 1
        die = partial(steps.run_deaths, _made(folder, "deaths"), options.seed, stride)
        _add(report, self.tried, in_child(die))
        _say(f"{options.faults} faults, one step at a time")
        fail = partial(steps.run, _made(folder, "steps"), options.seed, options.faults)
        _add(report, self.tried, in_child(fail))
        _say("a read-only disk, full ones of each kind, an unknown version, a soak at 200 MB")
        scenes.read_only_disk(folder, report)
        scenes.full_disks(_made(folder, "disks"), report)
        scenes.unknown_schema(folder, report)
        scenes.soak(folder, report, 3.0 if options.quick else 30.0)
        _say("erasing and quotas, with kills in between")
        seconds = 2.5 if options.quick else 60.0
        private.storms(_made(folder, "private"), report, options.seed, seconds)

    def _storm(self, name: str, late: float) -> None:
        options, seed, report = self.options, self.options.seed, self.report
        # A broken build is given all the time there is.
        left = late - time.monotonic() if options.breaks else None
        folder = _made(self._folder, name)
        if name == "threads":
            _say("threads on one PromptCache")
            storm = partial(threads.run, folder, seed, left or options.threads_s, options.breaks)
            self.threads = in_child(storm)
            report.findings += self.threads.findings
        elif name == "replaced":
            _say("models replaced under a running server")
            seconds = left or options.replaced_s
            self.replaced = in_child(partial(replaced.run, folder, seed, seconds, options.breaks))
            report.findings += self.replaced.findings
            report.kills += self.replaced.kills
        elif name == "shared":
            _say("machines that share a remote")
            self.shared = shared.storm(folder, report, seed, options.shared_s, real_s3=options.s3)
        elif options.breaks:
            Storm(folder, seed, report, options.breaks).run(
                lambda: not report.findings and time.monotonic() < late
            )
        else:
            _say(f"processes killed at random, until {options.kills} are dead")
            wanted = report.kills + options.kills
            Storm(folder, seed, report).run(
                lambda: report.kills < wanted and time.monotonic() < late
            )


def _made(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def _say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


def _add(report: Report, tried: steps.Tried, more: steps.Tried) -> None:
    tried.kinds += more.kinds
    tried.operations += more.operations
    tried.kills += more.kills
    tried.all_steps += more.all_steps
    report.kills += more.kills
    report.findings += more.findings


def _as_json(run: Run, seconds: float) -> dict[str, object]:
    options, report, tried = run.options, run.report, run.tried
    return {
        "machine": f"{os.cpu_count()}-core {platform.machine()}, {platform.system()}",
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "broken": options.breaks,
        "kills": report.kills,
        "faults": report.faults.total() + tried.kinds.total() + report.damages.total(),
        "storms": {**vars(report), "skipped": sorted(report.skipped)},
        "steps": {
            "faults": tried.kinds,
            "operations": tried.operations,
            "all": tried.all_steps,
            "kills": tried.kills,
        },
        "threads": vars(run.threads),
        "replaced": vars(run.replaced),
        "shared": vars(run.shared),
        "findings": report.findings,
    }


def _print(run: Run, seconds: float) -> None:
    options, report, tried = run.options, run.report, run.tried
    machine = f"{os.cpu_count()}-core {platform.machine()}, {platform.system()}"
    print(f"{machine}; {seconds:.0f} s; seed {options.seed}; Python {platform.python_version()}")
    if options.breaks:
        print(f"The store was broken on purpose: {options.breaks}.")
    total = report.faults.total() + tried.kinds.total() + report.damages.total()
    rows: list[tuple[str, int | str]] = [
        ("processes killed", report.kills),
        ("  at a given step of an operation", tried.kills),
        ("  at a random moment", report.kills - tried.kills),
        ("faults injected", total),
        ("  one step at a time", tried.kinds.total()),
        ("    of all steps and kinds there are", tried.all_steps),
        ("  at random, in processes that share a store", report.faults.total()),
        ("  damage to files between rounds", report.damages.total()),
        ("rounds judged", report.rounds),
        ("stores opened by the workers", report.work["opened"]),
        ("entries stored", report.work["puts"]),
        ("fetches served and compared by the workers", report.work["served"]),
        ("fetches compared by the judge", report.compared),
        ("entries demanded, and there", report.demanded),
        ("samples of the bytes on disk", report.samples),
        ("  highest share of a tight budget", f"{report.highest_share:.1%}"),
        ("  most bytes during the soak at 200 MB", report.soak_bytes),
        ("  bytes written during the soak", report.soak_written),
        ("processes that a damaged page of LMDB took down", report.index_deaths),
        ("fetches by threads on one PromptCache, checked", run.threads.fetches),
        ("  other calls beside them", run.threads.calls.total()),
        ("files of a model replaced under a running server", run.replaced.replaced.total() // 3),
        ("  answers compared with the model that gave them", run.replaced.answers),
        ("  prompt tokens reused from memory", run.replaced.reused["memory"]),
        ("  prompt tokens reused from disk", run.replaced.reused["disk"]),
        ("prompts stored by machines that share a remote", run.shared.work["put"]),
        ("  published", run.shared.work["published"]),
        ("  fetched from there", run.shared.work["brought"]),
        ("  bytes fetched", run.shared.work["bytes brought"]),
        (f"  that a new machine found there, of {shared.PROMPTS}", run.shared.found),
    ]
    _table(rows)
    for title, counts in (
        ("fault", tried.kinds + report.faults),
        ("operation cut at every step", tried.operations),
        ("damage", report.damages),
        ("scenario", report.scenarios),
        ("call beside the fetches of threads", run.threads.calls),
        ("replaced in a model", run.replaced.replaced),
        ("entry gone for a reason", report.excused),
        ("problem that check named and repair mended", report.repaired),
    ):
        print(f"\n{title}")
        _table(counts.most_common())
    for skipped in sorted(report.skipped):
        print(f"\nskipped: {skipped}")
    print(f"\nbroken promises: {len(report.findings)}")
    for finding, count in list(Counter(report.findings).items())[:10]:
        print(f"- {finding}" + (f" ({count} times)" if count > 1 else ""))


def _table(rows: Iterable[tuple[str, int | str]]) -> None:
    for name, value in rows:
        text = f"{value:,}" if isinstance(value, int) else str(value)
        print(f"  {name:<52}{text:>14}")


if __name__ == "__main__":
    sys.exit(main())
