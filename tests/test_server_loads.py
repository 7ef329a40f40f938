"""The server's model provider: the identity is that of the files the weights were read from."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import server as upstream

from persist_cache.errors import ModelError
from persist_cache.fingerprint.identifier import Identifier
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.server.upstream.provider import Provider
from tests.tiny_models import build_model_dir


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return build_model_dir(tmp_path / "tiny", seed=1)


@pytest.fixture
def provider(tiny: Path) -> Provider:
    arguments = Namespace(
        model=str(tiny),
        adapter_path=None,
        draft_model=None,
        trust_remote_code=False,
        chat_template=None,
        use_default_chat_template=False,
        pipeline=False,
    )
    made = Provider(arguments)
    made.identifier = Identifier()
    return made


def after_first_load(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]
) -> list[tuple[Any, ...]]:
    """Change something as soon as upstream has loaded for the first time; returns the loads."""
    loads: list[tuple[Any, ...]] = []
    load = upstream.load

    def changing(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        loads.append(args)
        if len(loads) == 1:
            change()
        return loaded

    monkeypatch.setattr(upstream, "load", changing)
    return loads


def settled(provider: Provider) -> Fingerprint:
    assert provider.identifier is not None
    found = provider.identifier.settled(provider.model_key)
    assert isinstance(found, Fingerprint), found
    return found


def test_model_moved_into_place_while_the_server_loads_is_loaded_again(
    provider: Provider, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = after_first_load(monkeypatch, lambda: build_model_dir(tiny, seed=2))

    provider.load("default_model")

    expected = upstream.load(str(tiny))[0]
    assert len(loads) == 3  # twice by the provider, once by this test
    assert settled(provider) == Identifier()(str(tiny))
    for (_, one), (_, other) in zip(
        tree_flatten(provider.model.parameters()),
        tree_flatten(expected.parameters()),
        strict=True,
    ):
        assert mx.array_equal(one, other)


def test_draft_model_moved_into_place_while_the_server_loads_is_loaded_again(
    provider: Provider, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = build_model_dir(tmp_path / "draft", seed=3)
    loads = after_first_load(monkeypatch, lambda: build_model_dir(draft, seed=4))

    provider.load("default_model", None, str(draft))

    assert len(loads) == 4
    assert settled(provider) == Identifier()((str(tiny), None, str(draft)))


def test_model_changed_after_it_was_loaded_keeps_the_identity_of_the_load(
    provider: Provider, tiny: Path
) -> None:
    before = Identifier()(str(tiny))

    provider.load("default_model")
    build_model_dir(tiny, seed=2)

    assert settled(provider) == before


def test_model_that_does_not_exist_leaves_the_loaded_one_with_its_identity(
    provider: Provider, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    provider.load("default_model")
    assert provider.identifier is not None
    before, model = settled(provider), provider.model
    number = provider.identifier.load_number(provider.model_key)
    build_model_dir(tiny, seed=2)

    with pytest.raises(ModelError, match="no folder here"):
        provider.load("nobody/has-this-model")

    assert provider.model is model
    assert settled(provider) == before
    assert provider.identifier.load_number(provider.model_key) == number


@pytest.mark.parametrize("part", ["configuration", "weights", "adapter", "draft model"])
def test_model_that_does_not_fit_leaves_the_loaded_one_with_its_identity(
    provider: Provider, tmp_path: Path, part: str
) -> None:
    provider.load("default_model")
    assert provider.identifier is not None
    before, model, key = settled(provider), provider.model, provider.model_key
    number = provider.identifier.load_number(key)
    broken = build_model_dir(tmp_path / "broken")
    wanted: list[Any] = [str(broken), None, None]
    if part == "adapter":
        (broken / "adapter_config.json").write_text('{"fine_tune_type": "full"}')
        mx.save_safetensors(str(broken / "adapters.safetensors"), {"nowhere": mx.zeros(2)})
        wanted[1] = str(broken)
    else:
        config = json.loads((broken / "config.json").read_text())
        change = {"model_type": "no such"} if part == "configuration" else {"hidden_size": 32}
        (broken / "config.json").write_text(json.dumps({**config, **change}))
        if part == "draft model":
            wanted = [str(build_model_dir(tmp_path / "sound", seed=5)), None, str(broken)]

    with pytest.raises(ModelError, match="broken"):
        provider.load(*wanted)

    assert provider.model is model
    assert provider.model_key == key
    assert settled(provider) == before
    assert provider.identifier.load_number(key) == number


def test_load_that_fails_in_the_middle_leaves_no_identity(
    provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider.load("default_model")
    assert provider.identifier is not None
    key = provider.model_key
    number = provider.identifier.load_number(key)
    other = build_model_dir(tmp_path / "other")
    monkeypatch.setattr(upstream, "load", lambda *_, **__: 1 / 0)

    with pytest.raises(ModelError):
        provider.load(str(other))

    assert provider.identifier.settled(key) is None
    assert provider.identifier.settled(str(other)) is None
    assert provider.identifier.load_number(key) > number
