from __future__ import annotations

import enum
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from persist_cache.fingerprint import contents
from persist_cache.fingerprint import memo as memo_module
from persist_cache.fingerprint import value as module
from persist_cache.fingerprint.identifier import Identifier, identify, identify_or_reason
from persist_cache.fingerprint.loads import Unidentified
from persist_cache.fingerprint.value import FieldChange, Fingerprint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "MLXLM_USE_MODELSCOPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PERSIST_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files be remembered as soon as they are written."""
    monkeypatch.setattr(contents, "SETTLED_NS", -(10**12))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content was digested, in order."""
    names: list[str] = []
    file_digest = hashlib.file_digest

    def counting(file, digest):  # type: ignore[no-untyped-def]
        names.append(Path(file.name).name)
        return file_digest(file, digest)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return names


def write_weights(
    path: Path, seed: int = 0, rows: int = 8, tensor: str = "model.embed_tokens.weight"
) -> None:
    values = np.random.default_rng(seed).standard_normal((rows, 64), dtype=np.float32)
    save_file({tensor: values}, path)


def write_model(folder: Path, seed: int = 0, **config: object) -> Path:
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "hidden_size": 64, **config}
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder / "model.safetensors", seed)
    return folder


def write_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "lora", "num_layers": 4}')
    write_weights(folder / "adapters.safetensors", seed=7)
    return folder


def write_hub_model(home: Path, repo: str = "org/name", blob: str = "ab" * 32) -> Path:
    """Lay out a hub cache as huggingface_hub does; returns the snapshot."""
    repository = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    write_model(snapshot)
    (snapshot / "model.safetensors").rename(repository / "blobs" / blob)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob}")
    return snapshot


def flip_byte(path: Path, position: int) -> None:
    """Flip one byte in place and put mtime back, as a careless tool would."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def known(model_key: object, **options: object) -> Fingerprint:
    result = identify_or_reason(model_key, **options)  # type: ignore[arg-type]
    assert isinstance(result, Fingerprint), result
    return result


def reason(model_key: object, **options: object) -> str:
    result = identify_or_reason(model_key, **options)  # type: ignore[arg-type]
    assert isinstance(result, Unidentified), result
    assert identify(model_key, **options) is None  # type: ignore[arg-type]
    return result.reason


def changed(new: Fingerprint, old: Fingerprint) -> list[str]:
    """Names of the fields that differ; checks that the digest agrees."""
    names = [change.name for change in new.diff(old.fields)]
    assert bool(names) == (new.digest != old.digest)
    return names


# The value: canonical, injective, readable


def test_digest_has_256_bits_and_depends_on_fields_only() -> None:
    one = Fingerprint.from_fields({"a": 1, "b": "x"}, {"path": "here"})
    other = Fingerprint.from_fields({"b": "x", "a": 1}, {"path": "there"})

    assert len(one.digest) == 32
    assert one.hex == one.digest.hex()
    assert one == other
    assert hash(one) == hash(other)


def test_values_become_canonical_strings() -> None:
    class Bits(enum.IntEnum):
        EIGHT = 8

    fields = Fingerprint.from_fields(
        {"a": True, "b": Bits.EIGHT, "c": np.float64(0.5), "d": None, "e": "text"}
    ).fields

    assert fields == {
        "a": "true",
        "b": "8",
        "c": "0.5",
        "d": "null",
        "e": "text",
        "layout": str(module.LAYOUT_VERSION),
    }
    assert Fingerprint.from_fields(fields).fields == fields


def test_unusable_fields_are_refused() -> None:
    with pytest.raises(ValueError):
        Fingerprint.from_fields({"": 1})
    with pytest.raises(ValueError):
        Fingerprint.from_fields({"a": "\ud800"})
    with pytest.raises(TypeError):
        Fingerprint.from_fields({"a": [1]})  # type: ignore[dict-item]


def test_fields_do_not_follow_the_dict_they_came_from() -> None:
    source = {"a": "1"}
    fingerprint = Fingerprint(source)

    source["a"] = "2"

    assert fingerprint.fields == {"a": "1"}
    with pytest.raises(TypeError):
        fingerprint.fields["a"] = "2"  # type: ignore[index]


# An alphabet this small makes every way of joining names and values collide, if any can.
_texts = st.text("ab\0\x01=", max_size=4)
_fields = st.dictionaries(_texts.filter(bool), _texts, max_size=3)


@given(_fields, _fields)
def test_equal_digests_mean_equal_fields(one: dict[str, str], other: dict[str, str]) -> None:
    same = Fingerprint.from_fields(one).digest == Fingerprint.from_fields(other).digest

    assert same == (one == other)


def test_names_and_values_do_not_run_into_each_other() -> None:
    digests = {
        Fingerprint.from_fields(fields).digest
        for fields in ({"ab": "c"}, {"a": "bc"}, {"a": "b", "c": ""}, {"a": "", "b": "c"})
    }

    assert len(digests) == 4


@given(st.dictionaries(st.text(min_size=1), st.text(), max_size=4))
def test_json_round_trip_keeps_everything(fields: dict[str, str]) -> None:
    fingerprint = Fingerprint.from_fields(fields, {"path": "ü"})

    stored = Fingerprint.from_json(fingerprint.to_json())

    assert stored == fingerprint
    assert stored.fields == fingerprint.fields
    assert stored.info == fingerprint.info


@pytest.mark.parametrize("encoded", [b"", b"{", b"[]", b"{}", b'{"fields": {"a": 1}}', b"\xff"])
def test_json_of_something_else_is_refused(encoded: bytes) -> None:
    with pytest.raises(ValueError):
        Fingerprint.from_json(encoded)


def test_diff_names_what_changed_from_old_to_new() -> None:
    old = Fingerprint.from_fields({"a": 1, "b": 2, "d": 4})
    new = Fingerprint.from_fields({"a": 1, "b": 3, "c": None})

    assert new.diff(old.fields) == [
        FieldChange("b", "2", "3"),
        FieldChange("c", None, "null"),
        FieldChange("d", "4", None),
    ]
    assert new.diff(new.fields) == []


def test_digest_is_the_same_in_every_process(tmp_path: Path) -> None:
    """LMCache #2136: keys from Python's `hash()`."""
    model = write_model(tmp_path / "model")
    script = (
        "import sys; from persist_cache.fingerprint.identifier import identify;"
        "print(identify((sys.argv[1], None, None), kv_bits=8, salt='s').hex)"
    )

    digests = {
        subprocess.run(
            [sys.executable, "-c", script, str(model)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }

    assert digests == {known(model, kv_bits=8, salt="s").hex}


def test_import_brings_no_model_library() -> None:
    script = (
        "import sys, persist_cache.fingerprint.identifier;"
        "print({'mlx', 'mlx_lm', 'transformers', 'huggingface_hub', 'numpy', 'msgspec'}"
        " & set(sys.modules))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip() == "set()"


# What is in the key: each field changed alone is a miss, and changed back a hit


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("model/model.safetensors", ["weights"]),
        ("model/arch.py", ["model_file"]),
        ("adapter/adapters.safetensors", ["adapter.weights"]),
        ("draft/model.safetensors", ["draft.weights"]),
    ],
)
def test_a_byte_flipped_in_place_is_a_miss_until_restored(
    tmp_path: Path, file: str, expected: list[str]
) -> None:
    model = write_model(tmp_path / "model", model_file="arch.py")
    (model / "arch.py").write_text("class Model: ...  # any code")
    key = (str(model), str(write_adapter(tmp_path / "adapter")), str(tmp_path / "draft"))
    write_model(tmp_path / "draft", seed=1)
    before = known(key)
    position = (tmp_path / file).stat().st_size // 2

    flip_byte(tmp_path / file, position)
    during = known(key)
    flip_byte(tmp_path / file, position)
    after = known(key)

    assert changed(during, before) == expected
    assert after == before


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("paranoid", [False, True])
def test_one_byte_in_the_middle_of_a_large_file_matters(tmp_path: Path, paranoid: bool) -> None:
    model = write_model(tmp_path / "model")
    weights = model / "model.safetensors"
    write_weights(weights, rows=20_000)
    size = weights.stat().st_size
    assert size > 5_000_000
    before = known(model, paranoid=paranoid)

    flip_byte(weights, size // 2 + 12_345)
    during = known(model, paranoid=paranoid)
    flip_byte(weights, size // 2 + 12_345)

    assert weights.stat().st_size == size
    assert changed(during, before) == ["weights"]
    assert known(model, paranoid=paranoid) == before


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("model/config.json", '"hidden_size": 64', '"hidden_size": 65', ["config"]),
        ("model/config.json", "llama", "qwen2", ["config", "model_type"]),
        ("model/hf_quant_config.json", "NVFP4", "FP8", ["quant_config"]),
        ("adapter/adapter_config.json", "4", "8", ["adapter.config"]),
        ("draft/config.json", '"hidden_size": 64', '"hidden_size": 65', ["draft.config"]),
    ],
)
def test_a_changed_config_is_a_miss_until_restored(
    tmp_path: Path, file: str, old: str, new: str, expected: list[str]
) -> None:
    model = write_model(tmp_path / "model")
    (model / "hf_quant_config.json").write_text('{"quant_algo": "NVFP4"}')
    key = (model, write_adapter(tmp_path / "adapter"), write_model(tmp_path / "draft", seed=1))
    before = known(key)

    edit(tmp_path / file, old, new)
    during = known(key)
    edit(tmp_path / file, new, old)

    assert changed(during, before) == expected
    assert known(key) == before


@pytest.mark.parametrize(
    ("options", "others", "expected"),
    [
        ({}, {"kv_bits": 8}, ["kv_bits", "kv_group_size", "quantized_kv_start"]),
        ({"kv_bits": 8}, {}, ["kv_bits", "kv_group_size", "quantized_kv_start"]),
        ({"kv_bits": 8}, {"kv_bits": 4}, ["kv_bits"]),
        ({"kv_bits": 8}, {"kv_bits": 8, "kv_group_size": 32}, ["kv_group_size"]),
        ({"kv_bits": 8}, {"kv_bits": 8, "quantized_kv_start": 0}, ["quantized_kv_start"]),
        ({}, {"kv_group_size": 32, "quantized_kv_start": 0}, []),
        ({}, {"max_kv_size": 4096}, ["max_kv_size"]),
        ({}, {"salt": "alice"}, ["salt"]),
        ({"salt": "alice"}, {"salt": "bob"}, ["salt"]),
    ],
)
def test_kv_options_are_in_the_key(
    tmp_path: Path, options: dict[str, object], others: dict[str, object], expected: list[str]
) -> None:
    model = write_model(tmp_path / "model")

    assert changed(known(model, **others), known(model, **options)) == expected
    assert known(model, **options) == known(model, **options)


def test_versions_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model")
    before = known(model)

    with monkeypatch.context() as patch:
        patch.setattr(module, "LAYOUT_VERSION", 2)
        assert changed(known(model), before) == ["layout"]
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: f"999 of {name}")
        assert changed(known(model), before) == ["mlx_lm"]
        assert known(model).info["mlx"] == "999 of mlx"

    assert known(model) == before


def test_missing_mlx_lm_is_an_empty_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)

    assert known(write_model(tmp_path / "model")).fields["mlx_lm"] == ""


def test_adapter_and_draft_are_in_the_key(tmp_path: Path) -> None:
    """vLLM #42125, llama.cpp #26207: a LoRA retrained at the same path, served with old KV."""
    model = write_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter")
    plain = known((str(model), None, None))

    adapted = known((str(model), str(adapter), None))
    drafted = known((str(model), None, str(write_model(tmp_path / "draft"))))

    assert changed(adapted, plain) == ["adapter.config", "adapter.weights"]
    assert changed(drafted, plain) == ["draft.config", "draft.model_type", "draft.weights"]


def test_salt_is_not_stored(tmp_path: Path) -> None:
    fingerprint = known(write_model(tmp_path / "model"), salt="a secret of alice")

    assert b"alice" not in fingerprint.to_json()
    assert "alice" not in repr(fingerprint)


def test_every_shard_counts(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    for number in range(6):
        write_weights(
            model / f"model-{number}-of-6.safetensors", seed=number, tensor=f"layer.{number}"
        )
    before = known(model)

    (model / "model-3-of-6.safetensors").rename(tmp_path / "aside")
    without = known(model)
    (tmp_path / "aside").rename(model / "model-3-of-6.safetensors")

    assert changed(without, before) == ["weights"]
    assert known(model) == before


def test_names_of_shards_do_not_matter(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    write_weights(model / "model-2.safetensors", seed=2, tensor="lm_head.weight")
    before = known(model)

    (model / "model.safetensors").rename(model / "model-3.safetensors")

    assert known(model) == before


# What is not in the key


def test_paths_and_names_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model")
    copy = shutil.copytree(model, tmp_path / "elsewhere" / "another [name]")
    before = known((str(model), None, None))

    assert known((str(copy), None, None)) == before
    assert known(model) == before
    assert known((model,)) == before
    monkeypatch.chdir(tmp_path)
    assert known("model") == before

    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    assert known(copy) == before


def test_config_is_compared_by_meaning(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    before = known(model)
    config = json.loads((model / "config.json").read_text())

    reordered = dict(reversed(config.items()))
    (model / "config.json").write_text(json.dumps(reordered, indent=4))

    assert known(model) == before


@pytest.mark.parametrize(
    ("file", "info"),
    [
        ("tokenizer.json", "tokenizer"),
        ("chat_template.jinja", "chat_template"),
        ("generation_config.json", None),
    ],
)
def test_tokenizer_and_templates_are_recorded_only(
    tmp_path: Path, file: str, info: str | None
) -> None:
    model = write_model(tmp_path / "model")
    (model / file).write_text('{"a": 1}')
    before = known(model)

    (model / file).write_text('{"a": 2}')
    after = known(model)

    assert after == before
    if info:
        assert after.info[info] != before.info[info]


def test_chat_template_is_found_in_the_tokenizer_config(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    assert "chat_template" not in known(model).info

    (model / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')

    assert "chat_template" in known(model).info


# The hub's cache


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"])
def test_hub_id_is_resolved_in_the_local_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    cache = tmp_path / "xdg" / "huggingface"
    values = {
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": "$WHERE/hub",
        "XDG_CACHE_HOME": str(cache.parent),
    }
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("WHERE", str(cache))
    monkeypatch.setenv(variable, values[variable])
    snapshot = write_hub_model(cache)

    fingerprint = known(("org/name", None, None))

    assert fingerprint == known(str(snapshot))
    assert fingerprint.info["commit"] == COMMIT
    assert fingerprint.info["name"] == "org/name"
    assert fingerprint.info["path"] == str(snapshot)


def test_hub_blob_name_is_the_identity_and_nothing_is_read(
    tmp_path: Path, reads: list[str]
) -> None:
    write_hub_model(tmp_path / "hf", blob="cd" * 32)

    assert known("org/name").fields["weights"] == f"sha256:{'cd' * 32}"
    assert reads == []


def test_hub_blob_and_its_paranoid_copy_are_the_same(tmp_path: Path) -> None:
    content = write_model(tmp_path / "source") / "model.safetensors"
    digest = hashlib.sha256(content.read_bytes()).hexdigest()
    snapshot = write_hub_model(tmp_path / "hf", blob=digest)
    copy = shutil.copytree(snapshot, tmp_path / "copy", symlinks=False)

    assert known(copy, paranoid=True) == known(snapshot)
    assert known(snapshot, paranoid=True) == known(snapshot)
    assert changed(known(copy), known(snapshot)) == ["weights"]


@pytest.mark.usefixtures("settled")
def test_hub_blob_changed_in_place_is_a_miss_until_restored(tmp_path: Path) -> None:
    content = write_model(tmp_path / "source") / "model.safetensors"
    digest = hashlib.sha256(content.read_bytes()).hexdigest()
    snapshot = write_hub_model(tmp_path / "hf", blob=digest)
    before = known(snapshot)

    flip_byte(snapshot / "model.safetensors", 300)
    during = known(snapshot)
    flip_byte(snapshot / "model.safetensors", 300)

    assert changed(during, before) == ["weights"]
    assert known(snapshot) == before


def test_xet_hash_of_a_shared_blob_is_not_taken_for_its_content(tmp_path: Path) -> None:
    snapshot = write_hub_model(tmp_path / "hf", blob="ab" * 32)
    blob = snapshot.parents[1] / "blobs" / ("ab" * 32)
    shared = tmp_path / "hf" / "hub" / "blobs" / "ef" / ("ef" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(f"../../blobs/ef/{'ef' * 32}")

    assert known(snapshot).fields["weights"] == f"sha256:{'ab' * 32}"


@pytest.mark.parametrize("blob", ["ab" * 20, "AB" * 32, "xy" * 32])
def test_other_blob_names_are_not_believed(tmp_path: Path, reads: list[str], blob: str) -> None:
    write_hub_model(tmp_path / "hf", blob=blob)

    assert known("org/name").fields["weights"].startswith("xxh3-128:")
    assert reads == ["model.safetensors"]


@pytest.mark.parametrize("folder", ["blobs", "models--org--name/other"])
def test_links_outside_a_hub_cache_are_read(tmp_path: Path, reads: list[str], folder: str) -> None:
    model = write_model(tmp_path / "model")
    (tmp_path / folder).mkdir(parents=True)
    target = (model / "model.safetensors").rename(tmp_path / folder / ("ab" * 32))
    (model / "model.safetensors").symlink_to(target)

    assert known(model).fields["weights"].startswith("xxh3-128:")
    assert len(reads) == 1


# Models that cannot be identified: a value with a reason, never an exception


@pytest.mark.parametrize(
    ("model_key", "expected"),
    [
        (None, "no model"),
        ((), "no model"),
        ((None, None, None), "no model"),
        (7, "no model"),
        ("", "empty"),
        (("m", "", None), "empty"),
        ((b"m", None, None), "not a text"),
        (("m", None, None, "more"), "4 parts"),
        ("org/absent", "not in the Hugging Face cache"),
        ("/no/such/folder", "no such folder"),
        ("nul\0", "no such folder"),
        ("\udcff\ud800", "no such folder"),
        ("x" * 5000, ""),
    ],
)
def test_unusable_model_keys_have_a_reason(model_key: object, expected: str) -> None:
    assert expected in reason(model_key)
    assert json.dumps(reason(model_key)).encode()
    assert reason(model_key)


def _remove(name: str) -> Callable[[Path], object]:
    return lambda model: (model / name).unlink()


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(content)


def _fifo(model: Path) -> None:
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")


def _dangling(model: Path) -> None:
    (model / "model-2.safetensors").symlink_to("../../blobs/" + "ab" * 32)


def _loop(model: Path) -> None:
    (model / "model-2.safetensors").symlink_to("model-2.safetensors")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_remove("config.json"), "config.json"),
        (_remove("model.safetensors"), "no model*.safetensors"),
        (_write("config.json", b"{"), "not JSON"),
        (_write("config.json", b"\xff\xfe\xfa"), "not JSON"),
        (_write("config.json", b"[]"), "not a JSON object"),
        (_write("config.json", b'{"a":' * 200_000), ""),
        (_write("config.json", b'{"model_file": "absent.py"}'), "absent.py"),
        (_write("hf_quant_config.json", b"-"), "hf_quant_config.json"),
        (_fifo, "not a file"),
        (_dangling, "model-2.safetensors"),
        (_loop, "model-2.safetensors"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_damaged_models_have_a_reason(
    tmp_path: Path, damage: Callable[[Path], object], expected: str
) -> None:
    model = write_model(tmp_path / "model")

    damage(model)

    assert expected in reason((str(model), None, None))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_weights_have_a_reason(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "model.safetensors").chmod(0)

    assert "Permission denied" in reason(model)


def test_missing_adapter_or_draft_is_not_ignored(tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "model"))
    (tmp_path / "empty").mkdir()

    assert "adapter_config.json" in reason((model, str(tmp_path / "absent"), None))
    assert "adapter_config.json" in reason((model, str(tmp_path / "empty"), None))
    assert "org/draft" in reason((model, None, "org/draft"))


def test_hub_cache_without_a_usable_commit_has_a_reason(tmp_path: Path) -> None:
    snapshot = write_hub_model(tmp_path / "hf")
    main = snapshot.parents[1] / "refs" / "main"

    main.write_text("../../elsewhere")
    assert "names no commit" in reason("org/name")
    main.write_text("f" * 40)
    assert "config.json" in reason("org/name")
    main.unlink()
    assert "not in the Hugging Face cache" in reason("org/name")


def test_modelscope_ids_are_not_looked_up_in_the_hub_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hub_model(tmp_path / "hf")
    monkeypatch.setenv("MLXLM_USE_MODELSCOPE", "True")

    assert "ModelScope" in reason("org/name")


def test_weights_written_while_they_are_read_have_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model")
    file_digest = hashlib.file_digest

    def interrupted(file, digest):  # type: ignore[no-untyped-def]
        with Path(file.name).open("ab") as other:
            other.write(b"more")
        return file_digest(file, digest)

    monkeypatch.setattr(hashlib, "file_digest", interrupted)

    assert "was changed while it was read" in reason(model)


def test_unprintable_names_are_storable(tmp_path: Path) -> None:
    try:
        model = write_model(tmp_path / "caf\udce9", model_type="\ud800")
    except OSError:
        pytest.skip("this file system wants Unicode names")

    fingerprint = known(model)

    assert Fingerprint.from_json(fingerprint.to_json()) == fingerprint


# The memo


@pytest.mark.usefixtures("settled")
def test_weights_are_read_once(tmp_path: Path, home: Path, reads: list[str]) -> None:
    model = write_model(tmp_path / "model")

    assert known(model) == known(model)

    assert reads == ["model.safetensors"]
    assert (home / "weights.json").stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in home.iterdir()] == ["weights.json"]
    assert b"model" not in (home / "weights.json").read_bytes()


@pytest.mark.usefixtures("settled")
def test_a_new_stamp_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    model = write_model(tmp_path / "model")
    before = known(model)

    os.utime(model / "model.safetensors", ns=(0, 0))

    assert known(model) == before
    assert len(reads) == 2


def test_a_file_just_written_is_not_remembered(tmp_path: Path, reads: list[str]) -> None:
    model = write_model(tmp_path / "model")

    assert known(model) == known(model)

    assert len(reads) == 2


@pytest.mark.usefixtures("settled")
def test_paranoid_reads_every_time(tmp_path: Path, reads: list[str]) -> None:
    model = write_model(tmp_path / "model")

    assert known(model, paranoid=True) == known(model, paranoid=True)

    assert len(reads) == 2


@pytest.mark.usefixtures("settled")
def test_memo_path_may_be_given(tmp_path: Path, home: Path) -> None:
    memo = tmp_path / "a" / "b" / "memo.json"

    known(write_model(tmp_path / "model"), memo_path=memo)

    assert memo.exists()
    assert not home.exists()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"garbage",
        b"\xff" * 100,
        b"[" * 100_000,
        b"[]",
        b'{"version": 99, "records": []}',
        b'{"version": 1, "records": [[[1, 2], "x"]]}',
        b'{"version": 1, "records": [[[1, 2, 3, 4, 5], "md5:0"]]}',
    ],
)
def test_a_damaged_memo_is_replaced(
    tmp_path: Path, home: Path, reads: list[str], garbage: bytes
) -> None:
    model = write_model(tmp_path / "model")
    expected = known(model, memo_path=tmp_path / "other.json")
    home.mkdir()
    (home / "weights.json").write_bytes(garbage)

    assert known(model) == expected
    assert known(model) == expected

    assert len(reads) == 2


@pytest.mark.usefixtures("settled")
def test_a_wrong_identity_in_the_memo_is_not_used(tmp_path: Path, home: Path) -> None:
    model = write_model(tmp_path / "model")
    expected = known(model)
    memo = home / "weights.json"

    memo.write_text(memo.read_text().replace("xxh3-128:", "xxh3-128:0"))

    assert known(model) == expected


@pytest.mark.usefixtures("settled")
def test_a_memo_of_another_version_is_not_used(
    tmp_path: Path, home: Path, reads: list[str]
) -> None:
    model = write_model(tmp_path / "model")
    known(model)
    memo = home / "weights.json"

    memo.write_text(memo.read_text().replace('"version":1', '"version":2'))
    known(model)

    assert len(reads) == 2


@pytest.mark.usefixtures("settled")
def test_a_memo_that_cannot_be_written_costs_time_only(tmp_path: Path, reads: list[str]) -> None:
    model = write_model(tmp_path / "model")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()

    for memo in (tmp_path / "file" / "memo.json", tmp_path / "folder"):
        assert known(model, memo_path=memo) == known(model, memo_path=memo)

    assert len(reads) == 4
    assert list(tmp_path.glob(".*.tmp")) == []


@pytest.mark.usefixtures("settled")
def test_memo_keeps_the_newest_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    monkeypatch.setattr(memo_module, "MEMO_RECORDS", 2)
    models = [write_model(tmp_path / str(number), seed=number) for number in range(3)]
    for model in models:
        known(model)
    reads.clear()

    known(models[2])
    known(models[1])
    assert reads == []
    known(models[0])
    assert len(reads) == 1


@pytest.mark.usefixtures("settled")
def test_concurrent_identifiers_agree(tmp_path: Path, home: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    models = [write_model(tmp_path / str(number), seed=number) for number in range(4)]
    expected = [known(model, memo_path=tmp_path / "other.json") for model in models]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(known, models * 8))

    assert found == expected * 8
    assert [path.name for path in home.iterdir()] == ["weights.json"]
    assert [known(model) for model in models] == expected


# Identifier


def test_identifier_answers_for_the_weights_as_first_seen(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    key = (str(model), None, None)
    identifier = Identifier()
    before = identifier(key)

    write_weights(model / "model.safetensors", seed=1)
    during = identifier(key)
    identifier.forget()
    after = identifier(key)

    assert before is not None
    assert during is before
    assert after is not None
    assert after != before
    assert identifier.reason(key) == ""


def test_identifier_keeps_a_reason_until_it_is_told_to_forget(tmp_path: Path) -> None:
    key = (str(tmp_path / "model"), None, None)
    identifier = Identifier()
    assert identifier(key) is None

    write_model(tmp_path / "model")

    assert identifier(key) is None
    assert "no such folder" in identifier.reason(key)
    identifier.forget()
    assert identifier(key) is not None


def test_identifier_refuses_unusable_options_at_once() -> None:
    with pytest.raises(TypeError):
        Identifier(kv_bits=[8])  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Identifier(kv_bit=8)  # type: ignore[call-arg]
