"""llama-cpp-python's `LlamaDiskCache`, as `Llama.create_completion` uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_cpp import LlamaDiskCache

from scripts.benchmarks.drivers import llama_cpp_model


def save(llama: Any, place: Path, tokens: list[int]) -> None:
    cache = LlamaDiskCache(str(place))
    cache[tokens] = llama.save_state()


def restore(llama: Any, place: Path, tokens: list[int]) -> int:
    llama.load_state(LlamaDiskCache(str(place))[tokens])
    return int(llama.n_tokens)


if __name__ == "__main__":
    llama_cpp_model.run(save, restore)
