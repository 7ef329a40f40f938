"""How long upstream's loop serves its batch before it looks whether somebody asks."""

from __future__ import annotations

from queue import Queue
from typing import Any, Self

from mlx_lm import server as upstream


class Budget(upstream.TimeBudget):  # type: ignore[misc]
    """Upstream's half a second, which ends with the model's call during which somebody asks.

    So whoever has waited for what another one computed need not wait for its reply as well.
    """

    def __init__(self, requests: Queue[Any]) -> None:
        """Look at the queue of requests."""
        super().__init__()
        self._requests = requests
        self._has_served = False

    def __iter__(self) -> Self:
        super().__iter__()
        self._has_served = False
        return self

    def __next__(self) -> None:
        # Ranks have to serve alike, and requests come to one of them only.
        if self._has_served and not self._is_distributed and not self._requests.empty():
            raise StopIteration
        self._has_served = True
        super().__next__()
