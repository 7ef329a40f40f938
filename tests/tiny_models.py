"""Random models of a few thousand weights, in folders that `mlx_lm.load` opens.

They say nothing sensible, but everything that a real model does to a prompt cache they do as
well: a chat template with roles and tools, a byte-level tokenizer, one KV cache per layer.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# ChatML with the tool conventions of Qwen, which mlx-lm recognises as "json_tools".
CHAT_TEMPLATE = """\
{%- set has_system = messages and messages[0].role == 'system' -%}
{%- if tools or has_system -%}
<|im_start|>system
{% if has_system %}{{ messages[0].content }}
{% endif %}
{%- if tools %}# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>
{% endif -%}
<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if not (loop.first and has_system) -%}
<|im_start|>{{ message.role }}
{% if message.content %}{{ message.content }}{% endif %}
{%- for tool_call in message.tool_calls or [] -%}
{%- if tool_call.function %}{% set tool_call = tool_call.function %}{% endif -%}
<tool_call>{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}\
</tool_call>
{%- endfor -%}
<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

# What the merges are learned from: enough for a vocabulary of about 512.
CORPUS = [
    "You are a helpful assistant. Answer the question of the user in a short sentence.",
    "Once upon a time there was a little dragon who lived in a cave above the village.",
    "Tell me a story about dragons. Hello! How are you today? What is the weather like?",
    "The capital of France is Paris, and the capital of Italy is Rome; both are old cities.",
    "system user assistant tool function name arguments description parameters properties",
    "Every morning the baker opened the window and put fresh bread and cakes on the counter.",
    "When the train finally arrived, nobody on the platform noticed that it was raining again.",
    "import numpy as np; def add(a, b): return a + b; for key, value in items: print(key)",
    "Mountains, rivers and forests changed with the seasons, but the path stayed the same.",
    "She had always wanted to know which stars were visible from the other side of the world.",
]


def build_model_dir(
    path: Path,
    *,
    seed: int = 0,
    model_type: str = "llama",
    vocab_size: int = 512,
    corpus: Sequence[str] = (),
    **config: Any,
) -> Path:
    """Write a random model with tokenizer and chat template into the folder `path`.

    The same arguments give the same weights. Seeds MLX's global random numbers with `seed`.

    Args:
        path: The folder; made when it does not exist.
        seed: Chooses the weights.
        model_type: Module of `mlx_lm.models` to build.
        vocab_size: Size of the tokenizer to train, at least 259, and of the embedding.
        corpus: Further texts to learn from, where prompts are long or the vocabulary is large.
        config: Fields of config.json to add or to replace, for instance
            `num_hidden_layers=4`, `sliding_window=64`.

    Returns:
        `path`.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(vocab_size, [*CORPUS, *corpus])
    tokenizer.save_pretrained(path)
    settings = {
        "model_type": model_type,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        # The smallest group in which mlx-lm's --kv-bits quantizes is also 64.
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab_size,
        "max_position_embeddings": 32_768,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        **config,
    }
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    # For the biases, which keep these values; the matrices are drawn again below.
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(settings))
    _randomise(model, seed)
    save_model(path, model)
    save_config(settings, path / "config.json")
    return path


def _train_tokenizer(vocab_size: int, corpus: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # A model must not answer with a token that its tokenizer cannot decode.
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}: "
            "ask for at least 259, or for fewer"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def _randomise(model: Any, seed: int) -> None:
    """Replace every matrix by random numbers, large enough for clear preferences."""
    parameters = tree_flatten(model.parameters())
    keys = mx.random.split(mx.random.key(seed), len(parameters))
    drawn = [
        (name, value if value.ndim < 2 else _normal(value.shape, key))
        for (name, value), key in zip(parameters, keys, strict=True)
    ]
    model.update(tree_unflatten(drawn))


def _normal(shape: tuple[int, ...], key: mx.array) -> mx.array:
    # Unit variance through a layer, so that the two layers neither vanish nor saturate.
    matrix: mx.array = mx.random.normal(shape, key=key) * shape[-1] ** -0.5
    return matrix
