"""Prefilling: what a prompt's system part is, and how a model is run over a prompt ahead of time.

The server, `warm` and the demo cut prompts at the same places and in chunks of the same size, so
that what one stores the others find.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from persist_cache.entry import NO_GROUP, PARTIAL_LABEL, Tier
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.prefill.clock import PrefillClock, Rate, whole_s
from persist_cache.prefill.run import KVQuantization, new_cache, prefill
from persist_cache.store.store import Store

WARM_STEP_TOKENS = 512
"""Tokens per call and commit of `warm`: smaller, since an interruption loses one step."""


@dataclass(frozen=True, slots=True)
class Warmed:
    """What `warm` did.

    Attributes:
        entry: Id of the entry.
        num_tokens: Tokens that requests will find.
        found_tokens: Of these, stored before.
        nbytes: Bytes written.
        seconds: Time the prefill of the others took.
    """

    entry: str | None
    num_tokens: int
    found_tokens: int
    nbytes: int
    seconds: float


def warm(
    store: Store,
    fingerprint: Fingerprint,
    model: Any,
    tokens: Sequence[int],
    *,
    tier: Tier | str = Tier.SYSTEM,
    label: str = "",
    pinned: bool = False,
    expires: float | None = None,
    group: str = NO_GROUP,
    system_tokens: int = 0,
    cuts: Collection[int] = (),
    step_tokens: int = WARM_STEP_TOKENS,
    quantize: KVQuantization | None = None,
    progress: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Warmed:
    """Prefill `tokens` and store them, chunk by chunk, so that an interruption loses one chunk.

    Args:
        store: An open store.
        fingerprint: Identity that `model` was loaded with, its KV options included.
        model: The model.
        tokens: The prefix to store.
        tier, label, pinned, expires, group: As in `Store.put`.
        system_tokens: Length of the system part of `tokens`. Where they go on behind it, an entry
            of its own is left there, as a server does: not every cache can be cut there later.
        cuts: Further places where an entry of its own is left, if the cache cannot be cut there.
        step_tokens: Tokens per model call and per commit.
        quantize: How the server that will use it quantizes its KV, or None.
        progress: Called with the tokens done so far, those found on disk included.
        clock: Seconds by which prefill is timed.

    Raises:
        StoreError: The disk is full or failed; what was stored before stays.
        UnsupportedCacheError: The model's cache cannot be saved.
    """
    from persist_cache import tensors

    found = store.fetch(fingerprint, tokens, tensors.restore)
    cache, done = (new_cache(model), 0) if found is None else (found[0], found[1].num_tokens)
    found_s = 0.0 if found is None else found[1].saved_s
    timer, rate = PrefillClock(clock), Rate()
    found_tokens, nbytes = done, 0
    if progress is not None:
        progress(done)
    while True:
        end = min(done + step_tokens, len(tokens))
        end = min([end, *(stop for stop in (system_tokens, *cuts) if stop > done)])
        before = timer()
        with timer.running():
            prefill(model, cache, tokens[done:end], step_tokens=step_tokens, quantize=quantize)
        rate.add(end - done, timer() - before)
        last = end == len(tokens)
        tensors.prepare(cache, end)
        is_head = end == system_tokens and not last
        lasts = last or is_head or (end in cuts and not tensors.can_trim(cache))
        computed = end - found_tokens
        result = store.put(
            fingerprint,
            tokens[:end],
            tensors.source(cache, end),
            tier=Tier.SYSTEM if is_head else tier,
            prefill_s=whole_s(found_tokens, found_s, computed, timer(), rate) if computed else 0.0,
            label=label if last else "" if lasts else PARTIAL_LABEL,
            pinned=pinned and last,
            expires=expires if last else None,
            group=group,
        )
        nbytes += result.nbytes
        done = end
        if progress is not None:
            progress(done)
        if last:
            return Warmed(result.entry, len(tokens), found_tokens, nbytes, timer())
