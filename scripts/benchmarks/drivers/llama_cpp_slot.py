"""llama.cpp's sequence state file, which the slots of its server are saved to."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp

from scripts.benchmarks.drivers import llama_cpp_model


def save(llama: Any, place: Path, tokens: list[int]) -> None:
    ids = (llama_cpp.llama_token * len(tokens))(*tokens)
    file = str(place / "slot.bin").encode()
    assert llama_cpp.llama_state_seq_save_file(llama.ctx, file, 0, ids, len(tokens))


def restore(llama: Any, place: Path, tokens: list[int]) -> int:
    ids = (llama_cpp.llama_token * len(tokens))()
    found = ctypes.c_size_t()
    file = str(place / "slot.bin").encode()
    size, room = ctypes.byref(found), len(tokens)
    assert llama_cpp.llama_state_seq_load_file(llama.ctx, file, 0, ids, room, size)
    assert list(ids) == tokens
    return found.value


if __name__ == "__main__":
    llama_cpp_model.run(save, restore)
