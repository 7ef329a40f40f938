"""The context of a model as its configuration names it, and what room it leaves for an answer."""

from __future__ import annotations

from typing import Any

import pytest

from persist_cache.server.lengths import NO_LIMIT, UNBOUNDED_REPLY_TOKENS, context_tokens, room
from persist_cache.server.validation import RefusedError

CONFIGS: list[tuple[dict[str, Any], int | None]] = [
    ({}, None),
    ({"max_position_embeddings": 8192}, 8192),
    ({"n_positions": 1024}, 1024),
    ({"max_seq_len": 2048}, 2048),
    ({"max_position_embeddings": None, "seq_length": 4096}, 4096),
    ({"max_position_embeddings": -1}, None),
    ({"max_position_embeddings": "many"}, None),
    ({"text_config": {"max_position_embeddings": 131_072}}, 131_072),
    ({"text_config": 5}, None),
    # Llama 3: the field has the whole length.
    (
        {
            "max_position_embeddings": 131_072,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
            },
        },
        131_072,
    ),
    # Qwen 2.5, as its card says to stretch it: the field has the length before.
    (
        {
            "max_position_embeddings": 32_768,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32_768,
            },
        },
        131_072,
    ),
    # DeepSeek V3, gpt-oss: the field has the length after.
    (
        {
            "max_position_embeddings": 163_840,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 4096,
            },
        },
        163_840,
    ),
    (
        {
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        },
        8192,
    ),
    # Gemma 3 stretches its global layers to what the field says.
    (
        {
            "model_type": "gemma3_text",
            "max_position_embeddings": 131_072,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        131_072,
    ),
    ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear"}}, 4096),
    ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": "x"}}, 4096),
]


@pytest.mark.parametrize(("config", "expected"), CONFIGS)
def test_context_is_what_the_configuration_names(
    config: dict[str, Any], expected: int | None
) -> None:
    assert context_tokens(config) == expected


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "context", "expected"),
    [
        (10, 5, 100, 5),
        (10, 500, 100, 90),
        (10, NO_LIMIT, 100, 90),
        (99, NO_LIMIT, 100, 1),
        (100, 0, 100, 1),
        (10, 0, 100, 1),
        (10, 500, None, 500),
        (10, NO_LIMIT, None, UNBOUNDED_REPLY_TOKENS),
        (10, 0, None, 1),
    ],
)
def test_answer_has_the_room_that_is_left(
    num_tokens: int, max_tokens: int, context: int | None, expected: int
) -> None:
    assert room(num_tokens, max_tokens, context) == expected


@pytest.mark.parametrize(("num_tokens", "max_tokens"), [(100, 1), (100, NO_LIMIT), (101, 0)])
def test_prompt_that_leaves_no_room_is_refused_in_openais_words(
    num_tokens: int, max_tokens: int
) -> None:
    with pytest.raises(RefusedError, match="maximum context length is 100 tokens") as refused:
        room(num_tokens, max_tokens, 100, param="messages")

    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    assert refused.value.param == "messages"
