"""A process that serves prompts through a `PromptCache` and records the logits it computed.

Run as `python -m tests.restart_worker JOB.json`; `tests/test_restart.py` starts several, one after
the other on one store, and one that is never restarted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from persist_cache import PromptCache, Store
from persist_cache.prefill.loading import load_model
from persist_cache.prefill.run import new_cache, prefill, snapshot

DECODE_STEPS = 6


def serve(model: Any, cache: PromptCache, key: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Answer one prompt as the server does; returns cached tokens, the reply, and its logits."""
    tokens: list[int] = request["tokens"]
    kv, rest = cache.fetch_nearest_cache(key, tokens)
    position = cached = len(tokens) - len(rest)
    kv = new_cache(model) if kv is None else kv
    for end, tier in ((request["system"], "system"), (len(tokens) - 1, "user")):
        if end > position:
            prefill(model, kv, tokens[position:end], step_tokens=64)
            position = end
            cache.insert_cache(key, tokens[:end], snapshot(kv), cache_type=tier)
    logits, reply = [], []
    following = tokens[position:]
    for _ in range(DECODE_STEPS):
        out = model(mx.array([following]), cache=kv)[:, -1, :]
        mx.eval(out)
        logits.append(np.array(out.astype(mx.float32)))
        following = [int(np.array(mx.argmax(out)))]
        reply += following
    model(mx.array([following]), cache=kv)
    cache.insert_cache(key, [*tokens, *reply], kv, cache_type="assistant")
    return {
        "cached": cached,
        "source": cache.last_fetch.source,
        "reply": reply,
        "logits": np.concatenate(logits),
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    model, _ = load_model(job["model"])
    key = (job["model"], None, None)
    results = []
    store = Store.open(job["store"], min_free_bytes=0) if job["store"] else None
    cache = PromptCache(max_size=100, store=store, leave_tokens=1)
    for request in job["requests"]:
        results.append(serve(model, cache, key, request))
    cache.close()
    if store is not None:
        store.close()
    logits = {str(index): result.pop("logits") for index, result in enumerate(results)}
    np.savez(job["out"] + ".npz", **logits)
    Path(job["out"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
