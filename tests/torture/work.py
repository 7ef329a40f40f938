"""The processes that share a store: a server, a warmer, an evictor, a reader.

Each compares every byte it is served with what the tokens demand, and writes down what it was
told has been stored or evicted. It ends when it is killed, or when its time is up.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from persist_cache.errors import StoreError
from persist_cache.store.store import Store
from tests.fakes import FakeSource, eager_gc, fingerprint, restore
from tests.torture import broken
from tests.torture.journal import Journal, Tally
from tests.torture.prompts import Prompt, any_prompt
from tests.torture.seam import Seam, at_random

ROLES = ("server", "warmer", "evictor", "reader")
RUN_TOKENS = 16
DAY_S = 86_400.0
TALLIED = (
    "puts",
    "fetches",
    "served",
    "evictions",
    "refused",
    "opened",
    "fault: no space",
    "fault: I/O error",
    "fault: no descriptors",
    "fault: no permission",
    "fault: read-only",
    "fault: short",
    "fault: slow",
)
_FAULTS = tuple(name.removeprefix("fault: ") for name in TALLIED if name.startswith("fault: "))


@dataclass(frozen=True, slots=True)
class Setting:
    """What a store's processes live with.

    Attributes:
        root: The store.
        journals: Folder of the journals.
        max_bytes: Budget.
        faults: Share of steps that fail.
        jumps: Clocks jump by days.
        descriptors: Files a process may open beyond those it has, or None.
        breaks: The deliberate defect, or "".
    """

    root: Path
    journals: Path
    max_bytes: int
    faults: float = 0.0
    jumps: bool = False
    descriptors: int | None = None
    breaks: str = ""


class JumpyClock:
    """UTC seconds of somebody who sets his clock now and then."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._offset = 0.0

    def __call__(self) -> float:
        if self._dice.random() < 0.05:
            self._offset = self._dice.choice((0.0, -DAY_S, DAY_S, 3600.0, 40 * DAY_S, -3600.0))
        return time.time() + self._offset


class Worker:
    """One process."""

    def __init__(self, setting: Setting, role: str, seed: int, tally: Tally) -> None:
        self._setting = setting
        self._role = role
        self._dice = random.Random(seed)
        self._tally = tally
        self._journal = Journal(setting.journals / f"{role}-{os.getpid()}-{seed}.jsonl")
        self._clock = JumpyClock(self._dice) if setting.jumps else time.time

    def run(self, seconds: float) -> None:
        """Work for `seconds`; nothing raised in here is an accident that goes unnoticed."""
        if self._setting.descriptors is not None:
            # Those that are open already are numbered without gaps.
            lowest = os.dup(0)
            os.close(lowest)
            limit = lowest + self._setting.descriptors
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        broken.install(self._setting.breaks)
        end = time.monotonic() + seconds
        with self._faults():
            while time.monotonic() < end:
                self._guard(lambda: self._session(end))

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        if not self._setting.faults:
            yield
            return
        draw = at_random(self._dice, self._setting.faults, _FAULTS)

        def choose(step: int, name: str) -> str | None:
            kind = draw(step, name)
            if kind is not None:
                self._tally.add(f"fault: {kind}")
            return kind

        with Seam(choose).installed():
            yield

    def _guard(self, doing: Callable[[], object]) -> None:
        """Errors that the store announces are refusals; any other is a finding."""
        try:
            doing()
        except StoreError:
            self._tally.add("refused")
        except Exception:
            self._journal.note("crash", role=self._role, how=traceback.format_exc()[-1500:])

    def _session(self, end: float) -> None:
        """Open the store, use it for a while, close it: a server seldom, a command at once."""
        reads = self._role == "reader" and self._dice.random() < 0.3
        rounds = {"server": 400, "warmer": 4, "evictor": 8, "reader": 30}[self._role]
        with Store.open(
            self._setting.root,
            max_bytes=None if reads else self._setting.max_bytes,
            min_free_bytes=None if reads else 0,
            read_only=reads,
            run_tokens=RUN_TOKENS,
            clock=self._clock,
        ) as store:
            self._tally.add("opened")
            step: Callable[[Store], None] = getattr(self, f"_{self._role}")
            for _ in range(rounds):
                if time.monotonic() > end:
                    return
                self._guard(lambda: step(store))

    # ---- roles -------------------------------------------------------------------------------

    def _server(self, store: Store) -> None:
        """A turn of a conversation: look up what there is, store what is new."""
        prompt = any_prompt(self._dice)
        self._fetch(store, prompt)
        self._put(store, prompt)
        if self._dice.random() < 0.3:
            store.flush()

    def _warmer(self, store: Store) -> None:
        prompt = Prompt(self._dice.randrange(30), 0)
        found = store.match(fingerprint(weights=prompt.model), prompt.tokens)
        if found.num_tokens < len(prompt.tokens) or self._dice.random() < 0.5:
            self._put(store, prompt)

    def _evictor(self, store: Store) -> None:
        what = self._dice.random()
        if what < 0.7:
            free = [entry.id for entry in store.entries() if not entry.pinned]
            for one in self._dice.sample(free, min(2, len(free))):
                self._evict(store, one)
        elif what < 0.85:
            with eager_gc():
                store.gc()
        else:
            self._fetch(store, any_prompt(self._dice))

    def _reader(self, store: Store) -> None:
        self._fetch(store, any_prompt(self._dice))

    # ---- what they have in common ------------------------------------------------------------

    def _fetch(self, store: Store, prompt: Prompt) -> None:
        tokens = prompt.tokens
        self._tally.add("fetches")
        found = store.fetch(fingerprint(weights=prompt.model), tokens, restore)
        if found is None:
            return
        value, match = found
        self._tally.add("served")
        if not value.equals(tokens[: match.num_tokens]):
            how = f"bytes of {prompt} differ within {match.num_tokens} tokens"
            self._journal.note("wrong", role=self._role, how=how)
        store.touch(match)

    def _put(self, store: Store, prompt: Prompt) -> None:
        tokens = prompt.tokens
        expires = self._clock() + 0.2 if prompt.number in (11, 12) and prompt.turn else None
        since, wall = time.monotonic(), time.time()
        self._journal.note("put?")
        done = store.put(
            fingerprint(weights=prompt.model),
            tokens,
            FakeSource(tokens, complete=prompt.complete, has_state=True),
            tier=prompt.tier,
            pinned=prompt.pinned,
            expires=expires,
        )
        self._journal.note(
            "put",
            id=done.entry,
            prompt=[prompt.number, prompt.turn],
            since=since,
            wall=wall,
            nbytes=done.nbytes,
            expires=expires is not None,
        )
        self._tally.add("puts")

    def _evict(self, store: Store, one: str) -> None:
        self._journal.note("evict?", id=one)
        with contextlib.suppress(KeyError):  # somebody else was first
            store.evict([one])
        self._journal.note("evict", id=one)
        self._tally.add("evictions")


def main(setting: Setting, role: str, seed: int, tally: Tally, seconds: float) -> None:
    """The whole life of a forked worker."""
    try:
        Worker(setting, role, seed, tally).run(seconds)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        os._exit(3)
    os._exit(0)
