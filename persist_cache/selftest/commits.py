"""The index: commits, kills, semaphores, many processes, and how it grows."""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import signal
import statistics
import struct
import sys
import time
from pathlib import Path
from typing import Any

from persist_cache import Store
from persist_cache.errors import PersistCacheError
from persist_cache.selftest import material, parts
from persist_cache.selftest.checks import Failed, NotApplicable, Result, Setting
from persist_cache.store import budget

_PROBE_LIMIT_S = 2.0
_PROMPT_TOKENS = 8
_OPENERS = 4
_SEMAPHORES_COMMIT, _MUTEX_COMMIT = 40, 48
"""Where `lock.mdb` has the number of the last commit: behind two numbers and a name, or a mutex."""


def index_is_as_expected(setting: Setting) -> Result:
    """Commit, and look at page size, kind of locks, and the number of the last commit."""
    with material.opened(setting.folder) as store:
        material.put(store, material.tokens(1, _PROMPT_TOKENS))
        page_bytes = store.page_bytes
        if page_bytes != mmap.PAGESIZE:
            raise Failed(f"a new index has pages of {page_bytes} bytes, not {mmap.PAGESIZE}")
        has_semaphores = store.semaphores is not None
        if has_semaphores != (sys.platform == "darwin"):
            raise Failed(
                f"LMDB was expected to use {_locks(not has_semaphores)} here, and has "
                f"{_locks(has_semaphores)}"
            )
        commit_s = [_time_commit(store, number) for number in range(setting.some(60))]
        offset = _SEMAPHORES_COMMIT if has_semaphores else _MUTEX_COMMIT
        number = store.commit_id()
        found = _in_table(setting.folder, offset)
        if found != number:
            raise Failed(
                f"lock.mdb has {found} at offset {offset}, where the number of the last commit, "
                f"{number}, was expected"
            )
        median_s = statistics.median(commit_s)
        return Result(
            f"commits take {median_s * 1000:.2f} ms (median), pages have {page_bytes:,} bytes, "
            f"locks are {_locks(has_semaphores)}, the commit's number is at offset {offset}",
            {
                "commit_s": median_s,
                "page_bytes": page_bytes,
                "semaphores": has_semaphores,
                "commit_offset": offset,
            },
        )


def _locks(semaphores: bool) -> str:
    return "named semaphores" if semaphores else "robust mutexes"


def _time_commit(store: Store, number: int) -> float:
    started = time.perf_counter()
    store.count("selftest")
    store.flush()
    return time.perf_counter() - started


def _in_table(folder: Path, offset: int) -> int:
    """A number in `lock.mdb`, read by another process: closing it here would drop LMDB's locks."""
    return int(parts.ended(parts.start("commits:print_number", folder, offset=offset), "a reader"))


def print_number(folder: Path, offset: int) -> None:
    """Part: print the 64-bit number there."""
    with (folder / "store" / "lock.mdb").open("rb") as file:
        print(struct.unpack_from("=Q", file.read(256), offset)[0])


# ---- kills ---------------------------------------------------------------------------------------


def kills_are_survived(setting: Setting) -> Result:
    """Kill writers and openers beside a keeper; all that was committed has to be there."""
    rounds = setting.some(200)
    slowest_s = 0.0
    with material.opened(setting.folder) as store:
        storm = parts.start("commits:kill_in_rounds", setting.folder, rounds=rounds)
        assert storm.stdin is not None
        assert storm.stdout is not None
        for number in range(2 * rounds):
            line = storm.stdout.readline()
            if not line.strip():
                parts.ended(storm, "what kills")
                raise Failed("what kills writers ended early")
            started = time.monotonic()
            material.put(store, material.tokens(number, _PROMPT_TOKENS))
            slowest_s = max(slowest_s, time.monotonic() - started)
            if slowest_s > _PROBE_LIMIT_S:
                raise Failed(
                    f"a put waited {slowest_s:.1f} s after kill {number + 1} of {2 * rounds}"
                )
            storm.stdin.write("\n")
            storm.stdin.flush()
        acknowledged = json.loads(storm.stdout.readline())
        storm.stdin.close()
        storm.wait(60)
        wanted = [*range(2 * rounds), *acknowledged]
        lost = [seed for seed in wanted if not _is_there(store, seed)]
        if lost:
            raise Failed(f"{len(lost)} of {len(wanted)} commits were lost")
        problems = store.check(read_data=True)
        if problems:
            raise Failed(f"check found {len(problems)} problems: {problems[0].message}")
    return Result(
        f"{rounds} writers and {rounds} openers killed; the slowest probe took {slowest_s:.2f} s, "
        f"none of {len(wanted):,} commits was lost",
        {
            "writers_killed": rounds,
            "openers_killed": rounds,
            "slowest_probe_s": slowest_s,
            "commits": len(wanted),
            "acknowledged_by_killed": len(acknowledged),
        },
    )


def _is_there(store: Store, seed: int) -> bool:
    return material.is_whole(store, material.tokens(seed, _PROMPT_TOKENS))


def kill_in_rounds(folder: Path, rounds: int) -> None:
    """Part: fork and kill a writer, then an opener, and say so, in turn; at last, what they put."""
    dice = random.Random(2)
    acknowledged: list[int] = []
    for number in range(2 * rounds):
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            _be_killed(folder, 10_000 + 500 * number, writing, is_writer=number % 2 == 0)
        os.close(writing)
        select.select([reading], [], [], 10)  # it has begun
        time.sleep(dice.random() * 0.08)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        acknowledged += _numbers(reading)
        print("killed", flush=True)
        sys.stdin.readline()
    print(json.dumps(acknowledged), flush=True)


def _be_killed(folder: Path, seed: int, writing: int, *, is_writer: bool) -> None:
    """Write, or open and close, until killed; sends the seed of each put that has returned."""
    try:
        if is_writer:
            store = material.opened(folder)
            os.write(writing, struct.pack("=q", -1))
            for number in range(seed, seed + 500):
                material.put(store, material.tokens(number, _PROMPT_TOKENS))
                os.write(writing, struct.pack("=q", number))
        os.write(writing, struct.pack("=q", -1))
        while True:
            material.opened(folder).close()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(1)


def _numbers(reading: int) -> list[int]:
    raw = b""
    while piece := os.read(reading, 65_536):
        raw += piece
    os.close(reading)
    return [number for (number,) in struct.iter_unpack("=q", raw) if number >= 0]


# ---- semaphores ----------------------------------------------------------------------------------


def abandoned_semaphores_are_recovered(setting: Setting) -> Result:
    """Have a process die with each semaphore, and see the others go on."""
    with material.opened(setting.folder) as store:
        semaphores = store.semaphores
        if semaphores is None:
            raise NotApplicable("LMDB has robust mutexes here, which the system recovers")
        slowest_s = 0.0
        times = setting.some(40)
        for number in range(times):
            for which in ("take_writer", "take_readers"):
                part = parts.start("commits:die_with", setting.folder, which=which)
                out, _ = part.communicate(timeout=60)
                if "taken" not in out:
                    raise Failed(f"a process could not take a semaphore ({which})")
                started = time.monotonic()
                material.put(store, material.tokens(number, _PROMPT_TOKENS))
                parts.ended(parts.start("commits:open_once", setting.folder), "an opener", 20)
                slowest_s = max(slowest_s, time.monotonic() - started)
        in_table, in_data = semaphores.commits()
        if in_table != in_data:
            raise Failed(f"lock.mdb says that commit {in_table} is the last, data.mdb {in_data}")
        if slowest_s > 2 * _PROBE_LIMIT_S:
            raise Failed(f"recovering took {slowest_s:.1f} s")
        if not all(_is_there(store, number) for number in range(times)):
            raise Failed("a commit was lost")
    return Result(
        f"{2 * times} abandoned, all recovered; the slowest took {slowest_s:.2f} s",
        {"abandoned": 2 * times, "slowest_s": slowest_s},
    )


def die_with(folder: Path, which: str) -> None:
    """Part: take a semaphore and die of SIGKILL."""
    store = material.opened(folder)
    if getattr(store.semaphores, which)():
        print("taken", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def open_once(folder: Path) -> None:
    """Part: open the store and close it."""
    material.opened(folder).close()


# ---- many processes ------------------------------------------------------------------------------


def opens_and_closes_do_not_clash(setting: Setting) -> Result:
    """Have four processes open and close the store, a thousand times in all."""
    material.opened(setting.folder).close()
    each = setting.some(1000) // _OPENERS
    started = time.monotonic()
    openers = [
        parts.start("commits:open_and_close", setting.folder, times=each, seed=seed)
        for seed in range(_OPENERS)
    ]
    said: list[dict[str, Any]] = [
        json.loads(parts.ended(one, "a process that opens and closes", 240)) for one in openers
    ]
    errors = [error for one in said for error in one["errors"]]
    if errors:
        raise Failed(f"{len(errors)} of {each * _OPENERS} failed: {errors[0]}")
    with material.opened(setting.folder) as store:
        if not all(_is_there(store, one["seed"] * each + n) for one in said for n in range(each)):
            raise Failed("a commit was lost")
    slowest_s = max(one["slowest_s"] for one in said)
    return Result(
        f"{each * _OPENERS:,} by {_OPENERS} processes in {time.monotonic() - started:.1f} s, the "
        f"slowest in {slowest_s:.2f} s",
        {"opens": each * _OPENERS, "processes": _OPENERS, "slowest_s": slowest_s},
    )


def open_and_close(folder: Path, times: int, seed: int) -> None:
    """Part: open, put, close, again and again."""
    errors: list[str] = []
    slowest_s = 0.0
    for number in range(times):
        started = time.monotonic()
        try:
            with material.opened(folder) as store:
                material.put(store, material.tokens(seed * times + number, _PROMPT_TOKENS))
        except PersistCacheError as error:
            errors.append(str(error))
        slowest_s = max(slowest_s, time.monotonic() - started)
    print(json.dumps({"errors": errors, "slowest_s": slowest_s, "seed": seed}))


# ---- growth --------------------------------------------------------------------------------------


def growth_is_within_the_slack(setting: Setting) -> Result:
    """See that a put makes the index grow by no more than is reserved, and `du` by what is said."""
    most, allowed = 0, 0
    with material.opened(setting.folder) as store:
        for number in range(setting.some(400)):
            length = 1 + 37 * (number % 60)
            before = store.stats().usage.index
            material.put(store, material.tokens(number, length))
            grown = store.stats().usage.index - before
            allowed = budget.index_growth(length, store.page_bytes)
            if grown > allowed:
                raise Failed(f"a put of {length} tokens took {grown:,} bytes of {allowed:,}")
            most = max(most, grown)
        said, used = store.stats().usage.total, _du(setting.folder / "store")
        if used > said:
            raise Failed(f"du counts {used:,} bytes, and the store says that it takes {said:,}")
    return Result(
        f"a put took at most {most:,} bytes of the index; du counts {used:,} bytes, the store "
        f"{said:,}",
        {"most_growth_bytes": most, "du_bytes": used, "usage_bytes": said},
    )


def _du(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        total += os.lstat(place).st_blocks * 512
        total += sum(os.lstat(os.path.join(place, name)).st_blocks * 512 for name in names)
    return total
