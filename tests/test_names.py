"""All names of a model are one, and what cannot be loaded is refused before anything is touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from persist_cache.errors import PersistCacheError
from persist_cache.server.names import Key, Names, parse_aliases
from persist_cache.server.validation import RefusedError
from tests import official
from tests.cli import script
from tests.noted_loads import LoadsServer
from tests.server_process import sentence_in
from tests.tiny_models import build_model_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("names")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Path:
    return build_model_dir(folder / "tiny", seed=1)


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    return build_model_dir(folder / "other", seed=2)


@pytest.fixture(autouse=True)
def _home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(folder)


SPELLINGS: dict[str, Callable[[Path], str]] = {
    "default_model": lambda tiny: "default_model",
    "typed": lambda tiny: "./tiny",
    "relative": lambda tiny: "tiny",
    "home": lambda tiny: "~/tiny",
    "trailing slash": lambda tiny: f"{tiny}/",
    "dots": lambda tiny: f"{tiny}/../tiny",
    "listed": lambda tiny: str(tiny.resolve()),
    "link": lambda tiny: str(link(tiny)),
    "alias": lambda tiny: "gpt-4o",
}


def link(tiny: Path) -> Path:
    path = tiny.with_name("link")
    if not path.is_symlink():
        path.symlink_to(tiny)
    return path


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings_of_the_servers_model_are_its_key(spelling: str, tiny: Path) -> None:
    names = Names("./tiny", adapter="a", draft="d", aliases={"gpt-4o": "tiny"})

    assert names.key(SPELLINGS[spelling](tiny)) == Key("./tiny", "a", "d")
    assert names.of({}) == Key("./tiny", "a", "d")


@pytest.mark.parametrize("spelling", [one for one in SPELLINGS if one != "default_model"])
def test_all_spellings_of_another_model_are_one_key(spelling: str, tiny: Path) -> None:
    names = Names("org/another", aliases={"gpt-4o": "~/tiny"})

    assert names.key(SPELLINGS[spelling](tiny)) == Key(str(tiny.resolve()), None, None)


def test_a_hub_id_and_its_snapshot_are_one_model(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny, snapshot)
    refs = tmp_path / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    by_id, by_folder = Names("org/tiny"), Names(str(snapshot))

    assert by_id.key(str(snapshot)) == by_id.key("org/tiny") == Key("org/tiny", None, None)
    assert by_folder.key("org/tiny") == Key(str(snapshot), None, None)
    by_id.check(Key("org/tiny", None, None))


def test_what_is_loaded_keeps_its_key_under_another_name(tiny: Path, other: Path) -> None:
    names = Names(str(tiny), loaded=lambda: ("other", None, None))

    assert names.key(str(other)).model == "other"
    names.check(names.key(str(other)))


def test_adapters_and_draft_models_have_one_name_each(tiny: Path, other: Path) -> None:
    names = Names(str(tiny), adapter="tiny", draft="./other", aliases={"small": str(other)})

    assert names.key(None, f"{tiny}/", "small") == Key(str(tiny), "tiny", "./other")
    assert names.key(None, str(other)) == Key(str(tiny), str(other.resolve()), "./other")
    assert names.key("other", None, "~/tiny") == Key("./other", None, str(tiny))


def test_server_without_a_model_means_what_is_loaded_or_says_that_there_is_none(
    tiny: Path,
) -> None:
    assert Names(None, loaded=lambda: ("m", "a", "d")).key(None) == Key("m", "a", "d")
    with pytest.raises(RefusedError, match="without a model"):
        Names(None).key("default_model")


def broken(tiny: Path, path: Path, how: str) -> dict[str, str]:
    """A request's names, of which one cannot be loaded."""
    shutil.copytree(tiny, path)
    config = json.loads((path / "config.json").read_text())
    weights = path / "model.safetensors"
    match how:
        case "no such folder":
            return {"model": f"{path}/nowhere"}
        case "no such hub id":
            return {"model": "nobody/has-this"}
        case "no hub id at all":
            return {"model": "a b\n/../\0"}
        case "an empty name":
            return {"model": ""}
        case "a file":
            return {"model": str(path / "config.json")}
        case "no config":
            (path / "config.json").unlink()
        case "a pipe for a config":
            (path / "config.json").unlink()
            os.mkfifo(path / "config.json")
        case "broken config":
            (path / "config.json").write_text('{"model_type": ')
        case "config is a list":
            (path / "config.json").write_text("[]")
        case "unknown class":
            (path / "config.json").write_text(json.dumps({**config, "model_type": "no_such"}))
        case "no class":
            (path / "config.json").write_text("{}")
        case "class lacks a field":
            del config["hidden_size"]
            (path / "config.json").write_text(json.dumps(config))
        case "own code":
            (path / "config.json").write_text(json.dumps({**config, "model_file": "m.py"}))
        case "no weights":
            weights.unlink()
        case "half of the weights":
            os.truncate(weights, weights.stat().st_size // 2)
        case "half of a header":
            os.truncate(weights, 20)
        case "empty weights":
            weights.write_bytes(b"")
        case "no safetensors":
            weights.write_bytes(b"\xff" * 1000)
        case "a shard is missing":
            index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        case "no tokenizer":
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (path / name).unlink()
        case "broken tokenizer":
            (path / "tokenizer.json").write_text("{")
        case "no adapter":
            return {"adapters": str(path)}
        case "half an adapter":
            (path / "adapter_config.json").write_text("{}")
            mx.save_safetensors(str(path / "adapters.safetensors"), {"a": mx.zeros(100)})
            os.truncate(path / "adapters.safetensors", 200)
            return {"adapters": str(path)}
        case "draft model":
            weights.unlink()
            return {"draft_model": str(path)}
    return {"model": str(path)}


BROKEN = [
    "no such folder", "no such hub id", "no hub id at all", "an empty name", "a file", "no config",
    "a pipe for a config", "broken config", "config is a list", "unknown class", "no class",
    "class lacks a field", "own code", "no weights", "half of the weights", "half of a header",
    "empty weights", "no safetensors", "a shard is missing", "no tokenizer", "broken tokenizer",
    "no adapter", "half an adapter", "draft model",
]  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_what_cannot_be_loaded_is_refused_in_a_sentence(
    how: str, tiny: Path, tmp_path: Path
) -> None:
    asked = broken(tiny, tmp_path / "broken", how)
    names = Names(str(tiny), loaded=lambda: (str(tiny), None, None))

    with pytest.raises(RefusedError) as refused:
        names.check(names.of(asked))

    assert (refused.value.status, refused.value.code) == (404, "model_not_found")
    assert [refused.value.param] == list(asked)
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)


def test_sound_model_passes_also_beside_a_broken_one(tiny: Path, other: Path) -> None:
    names = Names("nobody/has-this")

    names.check(names.key(str(other), None, str(tiny)))
    names.check(names.key(str(other)))


def test_a_checked_model_is_looked_at_again_when_its_files_change(
    other: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(other, tmp_path / "changing")
    names = Names(None)
    names.check(names.key(str(path)))
    (path / "config.json").write_text("{}")

    with pytest.raises(RefusedError):
        names.check(names.key(str(path)))


@pytest.mark.parametrize(
    "given", ["name", "=model", "name=", " = ", "default_model=x", "a\nb=x", "twice=x"]
)
def test_aliases_that_are_none_are_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"NAME|name|two models"):
        parse_aliases((given, "twice=y"))


def test_aliases_are_pairs_and_models_may_hold_an_equals_sign() -> None:
    assert parse_aliases(("a=b=c", " d = e ", "a=b=c")) == {"a": "b=c", "d": "e"}


@pytest.mark.parametrize("model", ["nowhere/at-all", "second"])
def test_alias_that_is_no_use_is_refused(model: str, tiny: Path) -> None:
    with pytest.raises(PersistCacheError, match=f"--alias first={model}"):
        Names(str(tiny), aliases={"first": model, "second": str(tiny)}).check_aliases()


def test_alias_that_cannot_be_loaded_is_told_at_the_start(tiny: Path, tmp_path: Path) -> None:
    alias = f"first={tmp_path}/nowhere"
    words = ["serve", "--model", tiny, "--port", "0", "--alias", alias, "--log-level", "ERROR"]

    done = script(tmp_path / "store", *words, env={"HF_HUB_OFFLINE": "1"}, timeout=60)

    assert done.status == 1
    (sentence,) = [line for line in done.err.splitlines() if line.startswith("Error: ")]
    assert f"--alias {alias}" in sentence
    assert "Traceback" not in done.err


# ---- a server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tiny: Path, other: Path, folder: Path) -> Iterator[LoadsServer]:
    environment = pytest.MonkeyPatch()
    environment.setenv("HOME", str(folder))
    environment.setenv("HF_HUB_OFFLINE", "1")
    environment.setenv("HF_HUB_CACHE", str(folder / "no hub cache"))
    aliases = {"gpt-4o": str(link(tiny)), "other-name": f"{other}/"}
    with LoadsServer(tiny, folder / "store", folder, min_free_bytes=0, aliases=aliases) as live:
        yield live
        assert live.stop() == 0
        assert "Traceback" not in live.log.read_text()
    environment.undo()


@pytest.fixture(scope="module")
def client(server: LoadsServer) -> official.openai.OpenAI:
    return official.openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_alternating_names_of_one_model_load_it_once_and_are_echoed(
    server: LoadsServer, tiny: Path
) -> None:
    spellings = ["default_model", f"{tiny}/", str(link(tiny)), "~/tiny", "gpt-4o", str(tiny)]
    for name in spellings * 2:
        answer = server.chat(("user", "Who are you?"), model=name, max_tokens=1).json()
        assert answer["model"] == name

    assert server.loads() == [str(tiny)]
    body = {"messages": [{"role": "user", "content": "Who?"}], "model": "gpt-4o"}
    explained = server.request("POST", "/v1/cache/explain", json=body)
    assert explained.status_code == 200, explained.text


def test_models_are_listed_where_there_is_no_hub_cache(
    client: official.openai.OpenAI, tiny: Path, other: Path
) -> None:
    listed = [one.id for one in client.models.list()]

    assert listed == [str(tiny.resolve()), "gpt-4o", "other-name"]
    for name in (*listed, str(link(tiny)), "default_model"):
        assert client.models.retrieve(name).id == name
    with pytest.raises(official.openai.NotFoundError, match="lists no model 'nothing'"):
        client.models.retrieve("nothing")


def test_two_hundred_bad_names_cost_no_load_and_get_a_sentence_each(
    server: LoadsServer, tiny: Path, tmp_path: Path
) -> None:
    asked = [broken(tiny, tmp_path / str(index), how) for index, how in enumerate(BROKEN)]
    misfit = shutil.copytree(tiny, tmp_path / "misfit")
    config = json.loads((misfit / "config.json").read_text())
    (misfit / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    asked.append({"model": str(misfit)})
    server.chat(("user", "Who are you?"))
    before = server.loads()

    for number in range(200):
        names = asked[number % len(asked)]
        answer = server.chat(("user", "Who?"), **names)
        assert answer.status_code == 404, (names, answer.text)
        assert answer.json()["error"]["code"] == "model_not_found"
        assert sentence_in(answer.json()).endswith(".")

    assert server.chat(("user", "Who are you?")).status_code == 200
    assert server.loads() == before


def test_openai_client_shows_our_sentence_about_a_model(client: official.openai.OpenAI) -> None:
    with pytest.raises(official.openai.NotFoundError) as refused:
        client.chat.completions.create(
            model="nobody/has-this", messages=[{"role": "user", "content": "Hello"}]
        )

    assert "'nobody/has-this' is no folder here" in str(refused.value)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_another_model_is_loaded_by_each_of_its_names_once(
    server: LoadsServer, other: Path
) -> None:
    before = len(server.loads())
    for name in ("other-name", f"{other}/", str(other)):
        assert server.chat(("user", "Who are you?"), model=name).json()["model"] == name

    assert server.loads()[before:] == [str(other.resolve())]
    assert server.chat(("user", "Who are you?")).status_code == 200
