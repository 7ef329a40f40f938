"""Reading what a prompt is made of: system text, messages, tools, template arguments, manifests."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import click
import msgspec

from persist_cache.fingerprint import Identifier
from persist_cache.warm import KVQuantization

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model and the options that change its KV.

    Attributes:
        model: Folder or hub id.
        adapter_path: Folder of a LoRA adapter, or None.
        quantize: How the server quantizes the KV, or None.
        salt: Isolates one user's entries from another's.
    """

    model: str
    adapter_path: str | None = None
    quantize: KVQuantization | None = None
    salt: str = ""

    @property
    def key(self) -> tuple[str, str | None, None]:
        """The model key as mlx-lm's server forms it."""
        return (self.model, self.adapter_path, None)

    def identifier(self) -> Identifier:
        if self.quantize is None:
            return Identifier(salt=self.salt)
        return Identifier(
            kv_bits=self.quantize.bits,
            kv_group_size=self.quantize.group_size,
            quantized_kv_start=self.quantize.start,
            salt=self.salt,
        )


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat request.

    Attributes:
        messages: As in the OpenAI API.
        tools: Tool definitions, or None.
        template_args: Further arguments of the chat template.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_args: dict[str, Any] = field(default_factory=dict)


def model_options(command: F) -> F:
    """Add the options that choose a model, spelled as `mlx_lm.server` spells them."""
    options: list[Any] = [
        click.option("--adapter-path", metavar="PATH", help="LoRA adapter of the model."),
        click.option("--kv-bits", type=click.IntRange(2, 8), help="Quantize the KV cache."),
        click.option("--kv-group-size", type=int, default=64, show_default=True),
        click.option("--quantized-kv-start", type=int, default=5000, show_default=True),
        click.option("--salt", default="", help="Keep this user's entries apart."),
    ]
    decorated: Any = command
    for option in reversed(options):
        decorated = option(decorated)
    return cast(F, decorated)


def choose_model(
    model: str,
    adapter_path: str | None,
    kv_bits: int | None,
    kv_group_size: int,
    quantized_kv_start: int,
    salt: str,
) -> ModelChoice:
    """Put the values of `model_options` together."""
    quantize = None
    if kv_bits is not None:
        quantize = KVQuantization(kv_bits, kv_group_size, quantized_kv_start)
    return ModelChoice(model, adapter_path, quantize, salt)


def read_text(argument: str, option: str) -> str:
    """The text itself, `@FILE`, or `-` for standard input.

    Raises:
        click.ClickException: The file cannot be read, or the text is empty.
    """
    if argument == "-":
        text = sys.stdin.read()
    elif argument.startswith("@"):
        text = _read_file(Path(argument[1:]), option)
    else:
        text = argument
    if not text.strip():
        raise click.UsageError(f"{option} is empty; give the text, @FILE, or - for standard input.")
    return text


def read_json(path: Path, option: str, kind: type[T]) -> T:
    """A JSON file of a given shape.

    Raises:
        click.ClickException: It cannot be read, or is not what is expected.
    """
    return _decode(_read_file(path, option), f"{option} {path}", kind)


def parse_json(text: str, option: str, kind: type[T]) -> T:
    """JSON from the command line."""
    return _decode(text, option, kind)


def _decode(text: str, what: str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(text.encode(), type=kind)
    except msgspec.ValidationError as error:
        raise click.UsageError(f"{what} has the wrong shape: {error}.") from None
    except msgspec.DecodeError as error:
        raise click.UsageError(f"{what} is not valid JSON: {error}.") from None


def _read_file(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"{option}: {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise click.UsageError(f"{option}: {path} is not UTF-8 text.") from None


def read_messages(path: Path, option: str = "--messages") -> list[dict[str, Any]]:
    """A list of chat messages, or a whole chat request with such a list.

    Raises:
        click.ClickException: It is neither.
    """
    found = read_json(path, option, dict[str, Any] | list[dict[str, Any]])  # type: ignore[arg-type]
    messages = found.get("messages") if isinstance(found, dict) else found
    try:
        checked = msgspec.convert(messages, list[dict[str, Any]])
    except msgspec.ValidationError:
        checked = []
    if not checked or not all(isinstance(one.get("role"), str) for one in checked):
        raise click.UsageError(
            f"{option} {path} must be a list of messages with a role each, "
            'such as [{"role": "user", "content": "Hello"}].'
        )
    return checked


class ManifestPrompt(msgspec.Struct, forbid_unknown_fields=True):
    """One `[[prompt]]` of a manifest; the fields are the options of `warm`."""

    model: str
    system: str | None = None
    messages: str | None = None
    tools: str | None = None
    adapter_path: str | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    chat_template_args: dict[str, Any] = msgspec.field(default_factory=dict)
    tier: str | None = None
    pin: bool = False
    ttl: str | None = None
    label: str = ""
    salt: str = ""


class Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """A TOML file with prompts to keep warm."""

    prompt: list[ManifestPrompt]


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; paths in it are relative to its folder.

    Raises:
        click.ClickException: It cannot be read or understood.
    """
    text = _read_file(path, "--manifest")
    try:
        manifest = msgspec.convert(tomllib.loads(text), Manifest)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise click.UsageError(f"--manifest {path} cannot be understood: {error}.") from None
    folder = path.parent
    for prompt in manifest.prompt:
        if prompt.system is not None and prompt.system.startswith("@"):
            prompt.system = f"@{folder / prompt.system[1:]}"
        prompt.messages = str(folder / prompt.messages) if prompt.messages else None
        prompt.tools = str(folder / prompt.tools) if prompt.tools else None
        if (folder / prompt.model).is_dir():
            prompt.model = str(folder / prompt.model)
    return manifest
