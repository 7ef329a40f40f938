"""A model that says what it is told to: its logits follow a script, and its caches are real ones.

A llama whose layers add nothing to what they are given, so that the next token depends on the last
one alone. The template ends a prompt with the first token of a script when the last message has
`play NAME`; each chunk of a script is a token of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.utils import save_config, save_model
from transformers import PreTrainedTokenizerFast

from tests import tiny_models

THINKS = "Is it late?\n"
SCRIPTS: Mapping[str, Sequence[str]] = {
    "silent": [],
    "hello": ["Hello", ", I am ", "here.", " "],
    "think": ["<think>", THINKS, "</think>\n\n", "It is", " six."],
    "clock": [
        "I look.\n",
        '<tool_call>{"name": "clock", "argu',
        'ments": {"city": "Bern"}}</tool_call>',
    ],
    "both": [
        "Twice.",
        '<tool_call>{"name": "clock", "arguments": {"city": "Rom"}}</tool_call>\n',
        '<tool_call>{"name": "clock", "arguments": {"city": "Ulm"}}</tool_call>\n',
    ],
    "glued": [
        "At once.",
        '<tool_call>{"name": "clock", "arguments": {}}</tool_call>\n<tool_call>{"name": "cl',
        'ock", "arguments": {"city": "Ulm"}}</tool_call>',
    ],
    "broken": ["So: ", '<tool_call>{"name": "clock", "arg', "</tool_call>"],
    "patch": [
        "So be it.\n",
        '<tool_call>{"name": "patch", "argu',
        'ments": {"input": "*** Begin\\n+ \\"a\\""}}</tool_call>',
    ],
    "day": ['<tool_call>{"name": "mcp__cal__day", "arguments": {}', "}</tool_call>"],
    "stop": ["One, ", "two, ", "STO", "P three", ", four"],
    "long": [f"{number}, " for number in range(100, 140)],
}
_CONTENT = "{% if message.content %}{{ message.content }}{% endif %}"
_THOUGHT = (
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
)
_END = "{% endif -%}\n"
_START = "{%- if 'play NAME' in messages[-1].content %}<|play NAME|>{% endif -%}\n"
TEMPLATE = "".join(
    [
        tiny_models.CHAT_TEMPLATE.replace(_CONTENT, _THOUGHT + _CONTENT).removesuffix(_END),
        *(_START.replace("NAME", name) for name in SCRIPTS),
        _END,
    ]
)


def build_scripted_model(
    path: Path,
    *,
    scripts: Mapping[str, Sequence[str]] = SCRIPTS,
    template: str = TEMPLATE,
    tokenizer: Mapping[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write the model into the folder `path`.

    Args:
        path: The folder; made when it does not exist.
        scripts: What it says, by name.
        template: That ends a prompt with `<|play NAME|>`.
        tokenizer: How to train one that is not the smallest; `build_model_dir` says how.
        config: Fields of config.json to add or to replace.
    """
    tiny_models.build_model_dir(path, **(tokenizer or {}))
    tokens = PreTrainedTokenizerFast.from_pretrained(path)
    starts = [f"<|play {name}|>" for name in scripts]
    chunks = [chunk for script in scripts.values() for chunk in script]
    if len(set(chunks)) < len(chunks):
        raise ValueError("what follows a chunk depends on it alone: no two may be the same")
    tokens.add_tokens([*starts, *chunks, "</think>"], special_tokens=True)
    tokens.chat_template = template
    tokens.save_pretrained(path)
    spoken = dict.fromkeys(tokens.convert_tokens_to_ids([*starts, *chunks]))
    # One number for each token of a script, and one for all others.
    place = {token: number for number, token in enumerate(spoken, start=1)}
    size, width = len(tokens), len(spoken) + 1
    settings = {
        **json.loads((path / "config.json").read_text()),
        "hidden_size": width,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "head_dim": 8,
        "vocab_size": size,
        "tie_word_embeddings": False,
        **config,
    }
    model = llama.Model(llama.ModelArgs.from_dict(settings))
    means, follows = mx.zeros((size, width)), mx.zeros((size, width))
    end = tokens.eos_token_id
    means[:, 0] = 1.0
    follows[end, 0] = 1.0
    for token, number in place.items():
        means[token, 0] = 0.0
        means[token, number] = 1.0
    for name, script in scripts.items():
        said = tokens.convert_tokens_to_ids([f"<|play {name}|>", *script])
        for before, after in zip(said, [*said[1:], end], strict=True):
            follows[after, place[before]] = 1.0
    model.lm_head.weight = follows
    model.model.embed_tokens.weight = means
    for layer in model.layers:
        layer.self_attn.o_proj.weight = mx.zeros_like(layer.self_attn.o_proj.weight)
        layer.mlp.down_proj.weight = mx.zeros_like(layer.mlp.down_proj.weight)
    save_model(path, model)
    save_config(settings, path / "config.json")
    return path
