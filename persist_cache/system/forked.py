"""What a forked child lets go of: locked descriptors, whose locks would outlive its parent.

A `flock` belongs to the open file, which parent and child share, so a child that lives on would
hold what a killed parent held.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Holding(Protocol):
    """Something with locked descriptors."""

    def let_go(self) -> None:
        """Close them, in a child; the locks stay with the parent."""


_holding: WeakSet[Holding] = WeakSet()


def register(one: Holding) -> None:
    """Have `one` let go in every child forked from now on."""
    _holding.add(one)


def _let_go() -> None:
    for one in list(_holding):
        one.let_go()
    _holding.clear()


os.register_at_fork(after_in_child=_let_go)
