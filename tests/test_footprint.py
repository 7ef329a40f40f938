from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from persist_cache.cache.footprint import Footprint
from tests.examples import examples

KEYS = st.integers(0, 6)


class FootprintMachine(RuleBasedStateMachine):
    """Against the set of all buffers; buffer `n` has `10 * n + 1` bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.footprint: Footprint[int] = Footprint()
        self.buffers: dict[int, dict[int, int]] = {}
        self.nbytes: dict[int, int] = {}

    @rule(key=KEYS, numbers=st.sets(st.integers(0, 9), max_size=5))
    def add(self, key: int, numbers: set[int]) -> None:
        self.remove(key)
        self.buffers[key] = {number: 10 * number + 1 for number in numbers}
        self.nbytes[key] = self.footprint.add(key, self.buffers[key])

    @rule(key=KEYS)
    def remove(self, key: int) -> None:
        if key in self.buffers:
            self.nbytes.update(self.footprint.remove(key))
            del self.buffers[key], self.nbytes[key]

    @invariant()
    def every_buffer_counts_once_and_for_one_that_has_it(self) -> None:
        everything: dict[int, int] = {}
        for key, buffers in self.buffers.items():
            everything |= buffers
            assert self.nbytes[key] == self.footprint.of(key) <= sum(buffers.values())
        assert sum(self.nbytes.values()) == sum(everything.values())


TestFootprintMachine = FootprintMachine.TestCase
TestFootprintMachine.settings = settings(
    deadline=None, max_examples=examples(15, 60), stateful_step_count=30
)
