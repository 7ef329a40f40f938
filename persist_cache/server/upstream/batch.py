"""Upstream's batch, as our generation loop uses it."""

from __future__ import annotations

import functools
from typing import Any

from mlx_lm import server as upstream

from persist_cache import tensors
from persist_cache.prefill.clock import PrefillClock


class Batch(upstream.BatchGenerator):  # type: ignore[misc]
    """Upstream's batch, timing prefill alone: not the queue, nor decoding for others.

    A sequence leaves it as views of the batch, of which `insert_cache` copies what is new.
    """

    def __init__(self, prefill_clock: PrefillClock, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._prefill_clock = prefill_clock
        # Upstream keeps these two as long as the batch, and moves sequences into and out of them.
        for batch in (self._prompt_batch, self._generation_batch):
            batch.extract_cache = functools.partial(_extract, batch)

    def next(self) -> Any:
        with self.stats() as spent:
            prompts, tokens = super().next()
        computed = sum(not one.end_of_prompt for one in prompts)
        if computed:
            self._prefill_clock.add(spent.prompt_time, computed)
        return prompts, tokens


def _extract(batch: Any, index: int) -> list[Any]:
    return tensors.extract(batch.prompt_cache, index)
