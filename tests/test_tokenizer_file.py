"""A tokenizer.json of which a part was read says of each field what all of it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm import tokenizer_utils

import persist_cache
from persist_cache.prefill import loading
from persist_cache.prefill.tokenizer_file import TokenizerFile, read_in_part
from tests.tiny_models import build_model_dir

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["decoder", "model", "", "x"]), VALUES))
def test_each_field_is_what_json_has(content: dict[str, Any]) -> None:
    text = json.dumps(content)
    known = json.loads(text)

    found = TokenizerFile(text)

    for name in ("decoder", "model", "y"):
        assert (name in found) == (name in known)
        assert found.get(name, "none") == known.get(name, "none")
    assert dict(found) == known
    assert len(found) == len(known)


@pytest.mark.parametrize("text", ["", "{", '{"decoder": }', '{"decoder": 1} 2'])
def test_what_is_not_json_is_refused_as_by_json(text: str) -> None:
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(json.JSONDecodeError) as found:
        TokenizerFile(text)

    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("text", ['{"decoder": NaN}', '{"decoder": 1, "x": Infinity}'])
def test_what_only_json_reads_is_read_by_it(text: str) -> None:
    assert repr(dict(TokenizerFile(text))) == repr(json.loads(text))


def test_mlx_lm_reads_as_before_behind_the_block() -> None:
    with read_in_part():
        with read_in_part():
            assert tokenizer_utils.json is not json
        assert tokenizer_utils.json is not json
    assert tokenizer_utils.json is json


def test_a_load_parses_all_of_it_once_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers does so as well, and lets go of it."""
    folder = build_model_dir(tmp_path / "model")
    text = (folder / "tokenizer.json").read_text()
    parsed: list[str | bytes] = []
    loads = json.loads

    def noted(text: str | bytes, **options: Any) -> Any:
        parsed.append(text)
        return loads(text, **options)

    monkeypatch.setattr(json, "loads", noted)
    known = tokenizer_utils.load(folder)
    before = parsed.count(text)

    loaders: list[Callable[[], Any]] = [
        lambda: persist_cache.load(folder)[1],
        lambda: loading.load_tokenizer(str(folder)),
    ]
    for load in loaders:
        parsed.clear()
        one = load()
        assert parsed.count(text) == before - 1
        assert type(one.detokenizer) is type(known.detokenizer)
        assert one.encode("Good morning, all of you") == known.encode("Good morning, all of you")
