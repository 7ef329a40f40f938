"""What repairs are worth, in tokens: for each a pair of requests, and recorded ones elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from persist_cache.prefill.loading import load_tokenizer
from persist_cache.server.rendering import read_request, render
from persist_cache.server.validation import RefusedError
from persist_cache.stability.names import DEFAULTS, REPAIRS, parse_names
from persist_cache.tokens import common_prefix_tokens, pack_tokens, unpack_tokens
from tests.repair_pairs import Pair, elsewhere, pairs, recorded
from tests.tiny_models import build_model_dir

PAIRS = pairs()
TOKEN_BYTES = 8
USER, BEGINS = "<|im_start|>user", "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(build_model_dir(tmp_path_factory.mktemp("pairs") / "model")))


def prompts(tokenizer: Any, pair: Pair, names: frozenset[str]) -> list[bytes]:
    tokenizer.chat_template = pair.template
    found = []
    for body in pair.bodies:
        request = read_request(body, pair.protocol, stabilize=names)
        found.append(pack_tokens(render(tokenizer, request).tokens))
    return found


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: str(pair.name))
def test_repair_leaves_only_what_is_new_to_compute(tokenizer: Any, pair: Pair) -> None:
    names = parse_names(pair.name)
    first, second = prompts(tokenizer, pair, names)

    shared = common_prefix_tokens(first, second)

    whole = len(first) // TOKEN_BYTES
    if len(pair.bodies[1]["messages"]) > len(pair.bodies[0]["messages"]):
        # All of the first prompt but the beginning of an answer.
        assert shared >= whole - len(tokenizer.encode(BEGINS, add_special_tokens=False))
    else:
        # Another session: all in front of what the user says.
        begins = len(tokenizer.encode(tokenizer.decode(unpack_tokens(first)).split(USER)[0]))
        assert shared >= begins


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: str(pair.name))
def test_without_the_repair_more_is_computed(tokenizer: Any, pair: Pair) -> None:
    without = frozenset(REPAIRS) - set(pair.name.split(","))
    repaired = common_prefix_tokens(*prompts(tokenizer, pair, parse_names(pair.name)))
    if pair.name == "inline-system":
        with pytest.raises(RefusedError):
            prompts(tokenizer, pair, without)
        return

    assert common_prefix_tokens(*prompts(tokenizer, pair, without)) < repaired


@pytest.mark.parametrize(("name", "share"), [("opencode-02", 0.95), ("qwen-01", 0.8)])
def test_recorded_session_in_another_folder_on_the_next_day_shares_its_head(
    tokenizer: Any, name: str, share: float
) -> None:
    body = recorded(name)
    pair = Pair("env,date", (body, elsewhere(body)))
    assert pair.bodies[0] != pair.bodies[1]

    before = prompts(tokenizer, pair, DEFAULTS)
    after = prompts(tokenizer, pair, parse_names("env,date"))

    assert common_prefix_tokens(*before) < 0.5 * len(before[1]) // TOKEN_BYTES
    assert common_prefix_tokens(*after) >= share * len(after[1]) // TOKEN_BYTES


def test_every_repair_has_a_pair() -> None:
    assert {name for pair in PAIRS for name in pair.name.split(",")} == set(REPAIRS)
