"""The identity belongs to the load: files replaced before, while and after a model is loaded."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save_file

import persist_cache
from persist_cache import PromptCache
from persist_cache.fingerprint import contents
from persist_cache.fingerprint.identifier import Identifier, identify
from persist_cache.fingerprint.loads import Unidentified
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.prefill.loading import load_model
from tests.tiny_models import build_model_dir

WEIGHTS = "model.safetensors"


def write_model(folder: Path, seed: int, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    save_file({"w": np.full(4, seed, dtype=np.float32)}, folder / WEIGHTS)
    return folder


def read(path: Path) -> bytes:
    """A load that can be seen: what the file holds now."""
    return path.read_bytes()


def identity(key: object) -> Fingerprint:
    """What the files are now, asked of nothing that remembers a load."""
    found = Identifier(paranoid=False).look_up(key)  # type: ignore[arg-type]
    assert isinstance(found, Fingerprint), found
    return found


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", 1)


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return write_model(tmp_path / "new", 2)


# Replaced in between ------------------------------------------------------------------------


def by_rename(old: Path, new: Path) -> None:
    shutil.copy(new / WEIGHTS, old / "moving")
    (old / "moving").replace(old / WEIGHTS)


def in_place(old: Path, new: Path) -> None:
    """Rewrite the bytes, and put mtime back."""
    status = (old / WEIGHTS).stat()
    with (old / WEIGHTS).open("r+b") as file:
        file.write((new / WEIGHTS).read_bytes())
    os.utime(old / WEIGHTS, ns=(status.st_atime_ns, status.st_mtime_ns))


def by_folder(old: Path, new: Path) -> None:
    old.rename(old.with_name("aside"))
    shutil.copytree(new, old)


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("replace", [by_rename, in_place, by_folder])
def test_model_replaced_after_its_weights_were_read_is_loaded_again(
    old: Path,
    new: Path,
    replace: Callable[[Path, Path], None],
    settled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if settled:
        monkeypatch.setattr(contents, "SETTLED_NS", -(10**12))
    loads: list[bytes] = []
    identifier = Identifier()

    def load() -> bytes:
        loads.append(read(old / WEIGHTS))
        if len(loads) == 1:
            replace(old, new)
        return loads[-1]

    loaded = identifier.around_load(str(old), load)

    assert len(loads) == 2
    assert loaded == read(new / WEIGHTS)
    assert identifier(str(old)) == identity(str(new))


def test_link_to_the_folder_switched_after_the_load_is_loaded_again(
    old: Path, new: Path, tmp_path: Path
) -> None:
    link = tmp_path / "current"
    link.symlink_to(old)
    identifier = Identifier()

    def load() -> bytes:
        loaded = read(link / WEIGHTS)
        link.unlink()
        link.symlink_to(new)
        return loaded

    loaded = identifier.around_load(str(link), load)

    # The second load is of the new one; the link is another one after it, too.
    assert loaded == read(new / WEIGHTS)
    assert identifier(str(link)) is None
    assert "twice in a row" in identifier.reason(str(link))


def swap_link(link: Path, target: Path) -> None:
    link.unlink()
    link.symlink_to(target)


def test_link_switched_there_and_back_while_loading_is_noticed(
    old: Path, new: Path, tmp_path: Path
) -> None:
    link = tmp_path / "current"
    link.symlink_to(old)
    loads: list[bytes] = []

    def load() -> bytes:
        if not loads:
            swap_link(link, new)
        loads.append(read(link / WEIGHTS))
        if len(loads) == 1:
            swap_link(link, old)
        return loads[-1]

    identifier = Identifier()
    loaded = identifier.around_load(str(link), load)

    assert loads == [read(new / WEIGHTS), read(old / WEIGHTS)]
    assert loaded == loads[-1]
    assert identifier(str(link)) == identity(str(old))


def test_folder_renamed_there_and_back_while_loading_is_noticed(
    old: Path, new: Path, tmp_path: Path
) -> None:
    loads: list[bytes] = []

    def load() -> bytes:
        if not loads:
            old.rename(tmp_path / "aside")
            new.rename(old)
        loads.append(read(old / WEIGHTS))
        if len(loads) == 1:
            old.rename(new)
            (tmp_path / "aside").rename(old)
        return loads[-1]

    identifier = Identifier()
    loaded = identifier.around_load(str(old), load)

    assert loads == [read(new / WEIGHTS), read(old / WEIGHTS)]
    assert loaded == loads[-1]
    assert identifier(str(old)) == identity(str(old))


@pytest.mark.parametrize(
    "part",
    [
        "model/config.json",
        "model/hf_quant_config.json",
        "model/arch.py",
        "model/layers/helper.py",
        "adapter/adapter_config.json",
        "adapter/adapters.safetensors",
        "draft/config.json",
        "draft/model.safetensors",
    ],
)
@pytest.mark.parametrize("gone", [False, True])
def test_every_file_of_the_identity_is_watched(tmp_path: Path, part: str, gone: bool) -> None:
    model = write_model(tmp_path / "model", 1, model_file="arch.py")
    (model / "hf_quant_config.json").write_text("{}")
    (model / "arch.py").write_text("class Model: ...")
    (model / "layers").mkdir()
    (model / "layers" / "helper.py").write_text("x = 1")
    adapter = write_model(tmp_path / "adapter", 3)
    (adapter / "config.json").rename(adapter / "adapter_config.json")
    (adapter / WEIGHTS).rename(adapter / "adapters.safetensors")
    draft = write_model(tmp_path / "draft", 4)
    key = (str(model), str(adapter), str(draft))
    loads = []

    def load() -> None:
        loads.append(1)
        path = tmp_path / part
        if gone and len(loads) == 1:
            path.rename(tmp_path / "gone")
            shutil.copy(tmp_path / "gone", path)
        elif not gone:
            with path.open("ab") as file:
                file.write(b" ")

    identifier = Identifier()
    identifier.around_load(key, load)

    assert len(loads) == 2
    assert gone or not identifier(key)


def test_file_removed_while_loading_leaves_no_identity(old: Path) -> None:
    identifier = Identifier()

    identifier.around_load(str(old), (old / WEIGHTS).unlink)

    assert identifier.settled(str(old)) == Unidentified(f"{old}: no model*.safetensors")


def test_file_made_in_the_folder_while_loading_changes_nothing(old: Path) -> None:
    """Running custom code makes `__pycache__`; Finder makes its own files."""
    loads = []

    def load() -> None:
        loads.append(1)
        (old / f"other-{len(loads)}").touch()

    identifier = Identifier()
    identifier.around_load(str(old), load)

    assert len(loads) == 1
    assert identifier.settled(str(old)) == identity(str(old))


def test_load_that_fails_settles_nothing_and_its_error_goes_through(old: Path) -> None:
    identifier = Identifier()
    identifier(str(old))
    before = identifier.load_number(str(old))

    def load() -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        identifier.around_load(str(old), load)

    assert identifier.settled(str(old)) is None
    assert identifier.load_number(str(old)) > before
    assert identifier(str(old)) == identity(str(old))


def test_identity_of_a_load_stands_when_files_change_afterwards(old: Path, new: Path) -> None:
    identifier = Identifier()
    before = identity(str(old))

    identifier.around_load(str(old), lambda: None)
    by_rename(old, new)

    assert identifier.settled(str(old)) == before
    assert identifier(str(old)) == before
    assert identity(str(old)) != before


def test_model_is_not_identified_by_others_while_it_is_loaded(old: Path) -> None:
    identifier = Identifier()

    said = identifier.around_load(
        str(old), lambda: (identifier.look_up(str(old)), identifier.settled(str(old)))
    )

    assert said == (Unidentified(f"{old} is being loaded"), None)
    assert identifier(str(old)) is not None


def test_number_of_a_load_grows_when_a_model_may_be_another(old: Path, new: Path) -> None:
    identifier = Identifier()
    numbers = [identifier.load_number(str(old))]

    identifier(str(old))
    assert identifier.load_number(str(old)) == numbers[0]
    changes: list[Callable[[], object]] = [
        identifier.forget,
        lambda: identifier.forget(str(old)),
        lambda: identifier.around_load(str(old), lambda: None),
    ]
    for change in changes:
        change()
        numbers.append(identifier.load_number(str(old)))
    other = identifier.load_number(str(new))
    identifier.forget(str(new))

    assert numbers == sorted(set(numbers))
    assert identifier.load_number(str(old)) == numbers[-1]
    assert identifier.load_number(str(new)) > other


def test_settled_reads_no_file(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identifier = Identifier()

    assert identifier.settled(str(old)) is None
    found = identifier(str(old))
    shutil.rmtree(old)

    assert identifier.settled(str(old)) is found
    assert identifier.settled(()) == Unidentified("no model is named")


# Custom code and shards ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["helper.py", "layers/attention.py", "package/__init__.py", "fast.cpython-311.so", "lib.zip"],
)
def test_code_that_a_model_can_import_is_part_of_its_identity(tmp_path: Path, name: str) -> None:
    model = write_model(tmp_path / "model", 1, model_file="arch.py")
    (model / "arch.py").write_text("import helper")
    alone = identity(str(model))
    (model / name).parent.mkdir(exist_ok=True)

    (model / name).write_text("x = 1")
    first = identity(str(model))
    (model / name).write_text("x = 2")
    second = identity(str(model))
    (model / "README.md").write_text("no code")
    (model / "__pycache__").mkdir()
    (model / "__pycache__" / "helper.cpython-311.pyc").write_bytes(b"compiled")

    assert [change.name for change in first.diff(alone.fields)] == ["model_code"]
    assert [change.name for change in second.diff(first.fields)] == ["model_code"]
    assert identity(str(model)) == second


def test_code_beside_a_model_without_code_of_its_own_does_not_matter(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", 1)
    before = identity(str(model))

    (model / "modeling.py").write_text("x = 1")

    assert identity(str(model)) == before


def test_code_outside_of_the_folder_has_a_reason(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", 1, model_file="../arch.py")
    (tmp_path / "arch.py").write_text("class Model: ...")

    assert "outside of the model's folder" in Identifier().reason(str(model))


def test_code_in_a_folder_that_links_to_itself_is_read_once(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", 1, model_file="arch.py")
    (model / "arch.py").write_text("class Model: ...")
    before = identity(str(model))

    (model / "loop").symlink_to(model)

    assert identity(str(model)) == before


def test_module_that_python_keeps_from_before_leaves_no_identity(tmp_path: Path) -> None:
    """`import helper` in a reloaded model is served from `sys.modules`."""
    model = write_model(tmp_path / "model", 1, model_file="arch.py")
    (model / "arch.py").write_text("import helper_of_a_model")
    (model / "helper_of_a_model.py").write_text("x = 1")
    program = f"""
import sys
from pathlib import Path
from persist_cache import Identifier
model = Path({str(model)!r})
sys.path.insert(0, str(model))
identifier = Identifier()
load = lambda: exec((model / "arch.py").read_text())
for text in ("x = 1", "x = 1", "x = 2"):
    (model / "helper_of_a_model.py").write_text(text)
    identifier.forget()
    identifier.around_load(str(model), load)
    print(bool(identifier(str(model))), identifier.reason(str(model)))
"""

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    first, second, third = done.stdout.splitlines()
    assert (first, second) == ("True ", "True ")
    assert third.startswith("False ")
    assert "helper_of_a_model" in third
    assert "restart" in third


def test_shards_that_share_a_tensor_have_a_reason(old: Path) -> None:
    save_file({"w": np.zeros(4, dtype=np.float32)}, old / "model-2.safetensors")

    said = Identifier().reason(str(old))

    assert "the tensor w is in model" in said
    assert "model-2.safetensors" in said


def test_same_shard_twice_is_as_good_as_once(old: Path) -> None:
    shutil.copy(old / WEIGHTS, old / "model-copy.safetensors")

    assert identify(str(old)) is not None


def test_shard_that_is_no_safetensors_file_has_a_reason(old: Path) -> None:
    (old / "model-2.safetensors").write_bytes(b"\xff" * 100)

    assert "model-2.safetensors is not a safetensors file" in Identifier().reason(str(old))


def test_path_that_mlx_lm_takes_for_a_pattern_has_a_reason(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m[1]", 1)
    assert identify(str(model)) is not None  # nothing could be loaded, so nothing is wrong

    write_model(tmp_path / "m1", 2)

    assert "pattern" in Identifier().reason(str(model))


# The library: persist_cache.load ------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return build_model_dir(tmp_path / "tiny", seed=1)


def retrain(folder: Path) -> None:
    """Put other weights into the folder, as a trainer does."""
    build_model_dir(folder, seed=2)


def test_load_names_the_weights_in_memory_whatever_becomes_of_the_files(tiny: Path) -> None:
    before = identity(str(tiny))
    model, tokenizer = persist_cache.load(tiny)
    retrain(tiny)

    assert tokenizer.encode("Hello")
    assert Identifier()(str(tiny)) == before
    assert Identifier()((str(tiny), None, None)) == before
    assert Identifier(kv_bits=8)(str(tiny)).fields["weights"] == before.fields["weights"]  # type: ignore[union-attr]
    del model
    gc.collect()
    assert Identifier()(str(tiny)) == identity(str(tiny)) != before


def test_latest_load_decides_for_an_identifier_that_was_there_before(tiny: Path) -> None:
    identifier = Identifier()
    first = persist_cache.load(tiny)
    numbers, found = [identifier.load_number(str(tiny))], [identifier(str(tiny))]

    retrain(tiny)
    second = persist_cache.load(tiny)
    numbers.append(identifier.load_number(str(tiny)))
    found.append(identifier(str(tiny)))

    assert first is not second
    assert found[0] != found[1]
    assert identifier.settled(str(tiny)) == found[1]
    assert numbers == sorted(set(numbers))
    del first, second
    gc.collect()
    assert identifier.load_number(str(tiny)) > numbers[1]


def test_forget_believes_the_files_rather_than_an_earlier_load(tiny: Path) -> None:
    identifier = Identifier()
    kept = persist_cache.load(tiny)
    before = identifier(str(tiny))
    retrain(tiny)

    identifier.forget(str(tiny))

    assert kept
    assert identifier(str(tiny)) != before


def write_adapter(folder: Path, model: Any, value: float) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"fine_tune_type": "full", "num_layers": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name, weights = tree_flatten(model.parameters())[0]
    mx.save_safetensors(
        str(folder / "adapters.safetensors"), {name: mx.full(weights.shape, value, weights.dtype)}
    )
    return folder


def test_weights_of_an_adapter_are_read_when_load_returns(tiny: Path, tmp_path: Path) -> None:
    plain, _ = persist_cache.load(tiny)
    adapter = write_adapter(tmp_path / "adapter", plain, 1.0)
    name, _ = tree_flatten(plain.parameters())[0]

    model, _ = persist_cache.load(tiny, adapter_path=adapter)
    before = Identifier()((str(tiny), str(adapter), None))
    path = adapter / "adapters.safetensors"
    path.write_bytes(bytes(path.stat().st_size))

    assert float(dict(tree_flatten(model.parameters()))[name].max()) == 1.0
    assert Identifier()((str(tiny), str(adapter), None)) == before
    assert before is not None


def test_key_without_the_adapter_that_was_loaded_has_a_reason(tiny: Path, tmp_path: Path) -> None:
    plain, _ = persist_cache.load(tiny)
    adapter = write_adapter(tmp_path / "adapter", plain, 1.0)
    del plain
    gc.collect()

    model, _ = persist_cache.load(tiny, adapter_path=adapter)

    assert model
    assert "the model key has to name" in Identifier().reason(str(tiny))


def test_model_config_is_part_of_the_identity(tiny: Path) -> None:
    plain = identity(str(tiny))

    model, _, config = persist_cache.load(
        tiny, model_config={"rope_theta": 5.0}, return_config=True
    )
    found = Identifier().look_up(str(tiny))

    assert model
    assert config["rope_theta"] == 5.0
    assert isinstance(found, Fingerprint)
    assert [change.name for change in found.diff(plain.fields)] == ["model_config"]


@pytest.mark.parametrize("option", ["model_config", "adapter_path"])
def test_identify_now_takes_no_files_for_what_was_loaded_by_more_than_them(
    tiny: Path, tmp_path: Path, option: str
) -> None:
    plain, _ = persist_cache.load(tiny)
    value: Any = {"rope_theta": 5.0}
    if option == "adapter_path":
        value = write_adapter(tmp_path / "adapter", plain, 1.0)
    del plain
    gc.collect()

    model, _ = persist_cache.load(tiny, **{option: value})
    with PromptCache(identify=Identifier()) as cache:
        found = cache.identify_now(str(tiny))
        later = cache.identify_now(str(tiny))

    assert model
    assert isinstance(found, Unidentified)
    assert "it was loaded with" in found.reason
    assert later == found


@pytest.mark.parametrize("identifier", [None, Identifier()], ids=["for all", "for one"])
def test_model_replaced_while_mlx_lm_loads_it_is_named_by_what_was_loaded(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, identifier: Identifier | None
) -> None:
    import mlx_lm

    loads: list[int] = []
    load = mlx_lm.load

    def replacing(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        if not loads:
            retrain(tiny)
        loads.append(1)
        return loaded

    monkeypatch.setattr(mlx_lm, "load", replacing)

    model, _ = load_model(str(tiny), identifier=identifier)
    found = (identifier or Identifier())(str(tiny))

    expected = load(str(tiny))[0]
    for (_, one), (_, other) in zip(
        tree_flatten(model.parameters()), tree_flatten(expected.parameters()), strict=True
    ):
        assert mx.array_equal(one, other)
    assert len(loads) == 2
    del model
    gc.collect()
    assert found == identity(str(tiny))


def test_mlx_lm_still_fetches_by_the_function_that_we_call() -> None:
    import inspect

    from mlx_lm import utils

    assert list(inspect.signature(utils._download).parameters)[:2] == [
        "path_or_hf_repo",
        "revision",
    ]


@pytest.mark.parametrize("by", ["load", "load_model"])
def test_loads_leave_no_random_numbers_to_be_made(tmp_path: Path, by: str) -> None:
    """mlx-lm makes weights up before it reads them: what was not evaluated was kept, and grew."""
    folder = build_model_dir(tmp_path / "model")

    if by == "load":
        persist_cache.load(folder)
    else:
        load_model(str(folder), identifier=Identifier())

    drawn = tmp_path / "state.dot"
    state: list[mx.array] = mx.random.state  # type: ignore[assignment]
    mx.export_to_dot(str(drawn), *state)
    assert "->" not in drawn.read_text(), "the state of the generator is an operation's result"
