"""Files with a `[[prompt]]` for each prompt, of `serve --warm` and `warm --manifest`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from persist_cache_cli.prompts import read_manifest
from persist_cache_cli.warm_file import read_warm_file

MODEL = "model = 'm'\n"


@pytest.fixture(params=[read_warm_file, read_manifest])
def read(request: pytest.FixtureRequest) -> Callable[[Path], Any]:
    """Reads one of both kinds."""
    found: Callable[[Path], Any] = request.param
    return found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("labl = 'y'\n", "prompt 1: there is no labl; did you mean label?"),
        ("Lable = 'y'\n", "prompt 1: there is no Lable; did you mean label?"),
        ("stabilise = 'date'\n", "did you mean stabilize?"),
        ("zzz = 1\n", "prompt 1: there is no zzz."),
        ("system = ''\n", "prompt 1: system is empty; give the text, or @FILE."),
        ("system = '@'\n", "prompt 1: system: @ needs the name of a file behind it."),
        ("messages = ''\n", "prompt 1: messages is empty; give the name of a file."),
        ("tools = ''\n", "prompt 1: tools is empty; give the name of a file."),
        ("ttl = ''\n", "prompt 1: ttl is empty; give a time such as 7d."),
        ("system = 3\n", "prompt 1: system: a text is wanted, not 3."),
        ("pin = 'yes'\n", 'prompt 1: pin: true or false is wanted, not "yes".'),
        ("protocol = 'chta'\n", 'prompt 1: protocol: "chta" is none of chat, messages, responses.'),
    ],
)
def test_a_key_or_value_that_there_is_not_is_named_with_what_is_wanted(
    text: str, said: str, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    assert said in refusal(read, f"[[prompt]]\n{MODEL}{text}", tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[[promt]]\n", "[prompt]\n", "prompt = 1\n", "prompt = [1]\n", "system = 'x'\n"]
)
def test_what_is_no_prompt_is_told_how_one_begins(
    text: str, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    assert "each prompt begins with a line [[prompt]]" in refusal(read, text, tmp_path)


def test_a_manifest_says_which_model(tmp_path: Path) -> None:
    said = refusal(read_manifest, "[[prompt]]\nsystem = 'x'\n", tmp_path)

    assert "prompt 1: model is missing; give a folder, or a name in the hub." in said


@pytest.mark.parametrize("name", ["kv_bits", "kv-bits"])
def test_what_the_server_says_is_no_key_of_its_file(name: str, tmp_path: Path) -> None:
    said = refusal(read_warm_file, f"[[prompt]]\nsystem = 'x'\n{name} = 8\n", tmp_path)

    assert "give the server --kv-bits" in said


def refusal(read: Callable[[Path], Any], text: str, folder: Path) -> str:
    """The sentence by which a file is refused."""
    path = folder / "prompts.toml"
    path.write_text(text)
    with pytest.raises(click.UsageError) as refused:
        read(path)
    sentence = refused.value.format_message()
    assert str(path) in sentence
    for odd in ("\n", "`", "Object", "$", "standard input"):
        assert odd not in sentence
    return sentence
