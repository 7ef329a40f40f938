"""How many examples a property is tried on: few by default, many with `scripts/test --all`."""

from __future__ import annotations

_are_many = False


def decide(marks: str) -> None:
    """Say before tests are collected by which marks they are chosen, as of pytest's `-m`."""
    global _are_many
    _are_many = "not long" not in marks


def examples(few: int, many: int) -> int:
    """The one that suits the tests that are run."""
    return many if _are_many else few
