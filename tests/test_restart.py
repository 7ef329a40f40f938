"""Real processes, one after the other, on one store: bit for bit what one process would compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persist_cache import Store
from tests import prepared
from tests.tiny_models import build_model_dir

SYSTEM = [(7 * i) % 400 + 5 for i in range(150)]
FIRST = [*SYSTEM, 11, 12, 13, 14, 15]
SECOND = [*SYSTEM, 21, 22, 23]


def run(
    tmp_path: Path, model: Path, store: Path | None, prompts: list[list[int]]
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Serve `prompts` in a process of their own."""
    out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}.json"
    job = tmp_path / (out.name + ".job")
    requests = [{"tokens": prompt, "system": len(SYSTEM)} for prompt in prompts]
    job.write_text(
        json.dumps(
            {
                "model": str(model),
                "store": str(store) if store else None,
                "requests": requests,
                "out": str(out),
            }
        )
    )
    log = tmp_path / (out.name + ".log")
    status = prepared.start("tests.restart_worker", [str(job)], log).wait()
    assert status == 0, log.read_text()
    results = json.loads(out.read_text())
    with np.load(str(out) + ".npz") as arrays:
        return results, [arrays[str(index)] for index in range(len(results))]


# Every layout of caches that mlx-lm's architectures have, the window and the chunk wrapped.
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"model_type": "llama"},
    "sliding": {"model_type": "gemma3_text", "sliding_window": 32, "sliding_window_pattern": 2},
    "recurrent": {
        "model_type": "mamba",
        "state_size": 16,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_restarted_processes_continue_as_one_uninterrupted(name: str, tmp_path: Path) -> None:
    model = build_model_dir(tmp_path / "model", **MODELS[name])
    store = tmp_path / "store"

    (first,), (first_logits,) = run(tmp_path, model, store, [FIRST])
    third_prompt = [*FIRST, *first["reply"], 31, 32]
    (second,), (second_logits,) = run(tmp_path, model, store, [SECOND])
    (third,), (third_logits,) = run(tmp_path, model, store, [third_prompt])
    whole, whole_logits = run(tmp_path, model, None, [FIRST, SECOND, third_prompt])

    assert [first["source"], second["source"], third["source"]] == ["miss", "disk", "disk"]
    assert second["cached"] == whole[1]["cached"] == len(SYSTEM)
    assert third["cached"] == whole[2]["cached"] == len(FIRST) + len(first["reply"])
    assert [first["reply"], second["reply"], third["reply"]] == [one["reply"] for one in whole]
    for restarted, uninterrupted in zip(
        (first_logits, second_logits, third_logits), whole_logits, strict=True
    ):
        np.testing.assert_array_equal(restarted, uninterrupted)
    with Store.open(store) as checked:
        assert checked.check(read_data=True) == []


def test_changed_weights_are_a_miss_and_restoring_them_gives_the_hit_back(tmp_path: Path) -> None:
    model = build_model_dir(tmp_path / "model")
    store = tmp_path / "store"
    weights = model / "model.safetensors"
    original = weights.read_bytes()
    run(tmp_path, model, store, [FIRST])

    changed = bytearray(original)
    changed[-1000] ^= 1
    weights.write_bytes(changed)
    (other,), _ = run(tmp_path, model, store, [SECOND])
    weights.write_bytes(original)
    (same,), _ = run(tmp_path, model, store, [SECOND])

    assert (other["source"], other["cached"]) == ("miss", 0)
    assert (same["source"], same["cached"]) == ("disk", len(SYSTEM))


@pytest.mark.on_disk
def test_flipped_bit_is_a_miss_and_the_next_request_stores_it_anew(tmp_path: Path) -> None:
    model = build_model_dir(tmp_path / "model")
    store = tmp_path / "store"
    _, (right,) = run(tmp_path, model, store, [FIRST])
    for blob in (store / "blobs").rglob("*.safetensors"):
        content = bytearray(blob.read_bytes())
        content[-77] ^= 16
        blob.chmod(0o600)
        blob.write_bytes(content)

    (damaged,), (damaged_logits,) = run(tmp_path, model, store, [FIRST])
    (again,), (again_logits,) = run(tmp_path, model, store, [FIRST])

    assert damaged["source"] == "miss"
    assert (again["source"], again["cached"]) == ("disk", len(FIRST) - 1)
    np.testing.assert_array_equal(damaged_logits, right)
    assert again["reply"] == damaged["reply"]
    assert again_logits.shape == right.shape
    assert list((store / "quarantine").iterdir()) != []
