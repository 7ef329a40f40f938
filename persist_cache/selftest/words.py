"""What the checks found, put in words: what it means for whoever runs a cache here."""

from __future__ import annotations

from collections.abc import Sequence

from persist_cache.selftest.checks import Outcome

MEANINGS = {
    "platform": "Neither server nor cache can be expected to work here until that is mended.",
    "bytes": "What is stored would be damaged; use another disk (--store PATH).",
    "sync": "What is stored may be lost in a power cut; use another disk (--store PATH).",
    "space": "Room that is needed on the disk may not come back when entries are deleted.",
    "read-ahead": "It works, but the first request after a start waits longer for the disk.",
    "read-speed": "It works, but `doctor` measures memory, not the disk.",
    "index": "The index may not notice what other processes do; please report this.",
    "kills": "After a killed process, others may wait or miss what was stored; please report this.",
    "semaphores": "After a killed process, others may wait for ever; please report this.",
    "opens": "Use the store from one process at a time, and please report this.",
    "growth": "The store may take more than its budget; please report this.",
    "locks": "Use the store from one process at a time: a local file system is needed "
    "(--store PATH).",
    "caches": "Do not use it here: a model could go on from a wrong state. Please report this.",
    "writer": "Do not use it here: what is saved while a model decodes may be wrong. Please report "
    "this.",
    "arrays": "Do not use it here: what is restored may not reach the device. Please report this.",
    "names": "The server starts, but late; its machine's name cannot be looked up quickly.",
    "sigterm": "The latest answers are lost when a server is ended; end it while it is idle.",
    "restart": "A server does not find again what was stored before it was killed.",
    "unload": "Do not use `serve --unload-after`: what comes back is not what left. Please report "
    "this.",
    "full-disk": "Keep room on the disk (--min-free): a full one may cost what is stored.",
    "backups": "Backups may take a copy of the store: exclude its folder by hand.",
    "descriptors": "mlx-lm cannot be imported, or too few files may be open; raise the limit "
    "(`ulimit -Hn`).",
}
"""By check what it means that it failed, and what to do."""


def meaning(outcome: Outcome) -> str:
    """What a check that failed means; "" for another."""
    return MEANINGS.get(outcome.name, "") if outcome.verdict == "FAILED" else ""


def verdict(outcomes: Sequence[Outcome], *, quick: bool = False, left_out: int = 0) -> str:
    """All of it in a sentence or two.

    Args:
        outcomes: Of the checks that were run.
        quick: Only a part of each was done.
        left_out: How many other checks there are.
    """
    failed = [one.name for one in outcomes if one.verdict == "FAILED"]
    skipped = [one.name for one in outcomes if one.verdict == "not applicable"]
    passed = len(outcomes) - len(failed) - len(skipped)
    without = f" Not applicable here: {', '.join(skipped)}." if skipped else ""
    if left_out:
        without += f" {left_out} other {'check was' if left_out == 1 else 'checks were'} not run."
    if quick:
        without += " This was a quick run, with a twentieth of each; leave out --quick for all."
    if failed:
        checks = "check" if len(failed) == 1 else "checks"
        return f"{len(failed)} {checks} failed: {', '.join(failed)}.{without}"
    if not passed:
        return f"Nothing was checked.{without}"
    done = "The check passed" if passed == 1 else f"All {passed} checks passed"
    return f"Nothing is wrong. {done}.{without}"
