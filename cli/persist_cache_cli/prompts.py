"""Reading what a prompt is made of: system text, messages, tools, template arguments, manifests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import click
import msgspec

from persist_cache.errors import ModelError
from persist_cache.fingerprint.identifier import Identifier
from persist_cache.prefill.loading import load_tokenizer, model_errors
from persist_cache.prefill.run import KVQuantization
from persist_cache.server.protocols.recognized import PROTOCOLS, RESPONSES, protocol_at
from persist_cache.server.rendering import Prompt, PromptRequest, read_request, render
from persist_cache.server.validation import RefusedError, check_template_args, decode_json
from persist_cache.stability.names import DEFAULTS
from persist_cache_cli.parse import REPAIRS
from persist_cache_cli.prompt_files import read_tables, understood

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
class Template:
    """The server's options that change how prompts are rendered.

    Attributes:
        args: `--chat-template-args`; a request's own `chat_template_kwargs` win over them.
        text: `--chat-template`, instead of the model's own, or None.
        use_default: `--use-default-chat-template`.
    """

    args: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    use_default: bool = False

    def tokenizer(self, model: str) -> Any:
        """Load the tokenizer of a model as the server does.

        Raises:
            ModelError: It cannot be found or loaded.
            MissingDependencyError: mlx-lm is not installed.
        """
        found = load_tokenizer(model, chat_template=self.text)
        if self.use_default and found.chat_template is None:
            with model_errors(model):
                found.chat_template = found.default_chat_template
        return found

    def render(self, tokenizer: Any, request: PromptRequest) -> Prompt:
        """Render a request as the server does.

        Raises:
            ModelError: The template refuses it.
        """
        try:
            return render(tokenizer, request, template_args=self.args)
        except RefusedError as refusal:
            raise ModelError(str(refusal)) from refusal


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


def template_options(command: F) -> F:
    """Add the options that change how prompts are rendered, as `mlx_lm.server` spells them."""
    options: list[Any] = [
        click.option(
            "--chat-template-args",
            metavar="JSON",
            help="Further arguments of the template; those in a request win.",
        ),
        click.option("--chat-template", metavar="TEXT", help="Template instead of the model's."),
        click.option(
            "--use-default-chat-template",
            is_flag=True,
            help="For a model without a template of its own.",
        ),
    ]
    decorated: Any = command
    for option in reversed(options):
        decorated = option(decorated)
    return cast(F, decorated)


def protocol_option(command: F) -> F:
    """Add the option that says which protocol the bodies in files are of."""
    option = click.option(
        "--protocol",
        type=click.Choice(PROTOCOLS),
        help="What --messages is of: OpenAI's chat or Responses, or Anthropic's Messages.  "
        "[default: by shape]",
    )
    return option(command)


def stabilize_option(command: F) -> F:
    """Add the option that says which repairs may be done to prompts, as `serve` has it."""
    option = click.option(
        "--stabilize",
        type=REPAIRS,
        default=",".join(sorted(DEFAULTS)),
        metavar="NAMES",
        help="Repairs as the server's: date, env, tools, reminders, cleared, thinking, all, none.",
    )
    return option(command)


def choose_template(
    chat_template_args: str | None, chat_template: str | None, use_default_chat_template: bool
) -> Template:
    """Put the values of `template_options` together.

    Raises:
        click.ClickException: The arguments are no JSON object, or not for a template.
    """
    args = parse_json(chat_template_args or "{}", "--chat-template-args", dict[str, Any])
    try:
        check_template_args(args, "--chat-template-args")
    except RefusedError as refusal:
        raise click.UsageError(str(refusal)) from None
    return Template(args, chat_template, use_default_chat_template)


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
        if _names_a_file(text):
            click.echo(
                f"Warning: {option} {text} is taken as the text itself; to read the file of that "
                f"name, write {option} @{text}.",
                err=True,
            )
    if not text.strip():
        raise click.UsageError(f"{option} is empty; give the text, @FILE, or - for standard input.")
    return text


def _names_a_file(text: str) -> bool:
    try:
        return "\n" not in text and Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero in it
        return False


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
        return msgspec.json.decode(text.encode(errors="surrogateescape"), type=kind)
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


def read_request_file(
    path: Path,
    option: str = "--messages",
    *,
    tools: Path | None = None,
    protocol: str | None = None,
    stabilize: frozenset[str] = DEFAULTS,
) -> PromptRequest:
    """A client's request: its body, a list of messages, or a recording with such a body.

    Args:
        path: A JSON file.
        option: What it was given with.
        tools: File with tool definitions that take the place of those in the body, or None.
        protocol: Of the body; None to tell it by the path in a recording, or by the body's shape.
        stabilize: Names of the repairs that may be done.

    Raises:
        click.ClickException: It cannot be read, or the server would not understand it.
    """
    found = read_request_json(path, option)
    if tools is not None:
        definitions = _read_tools(tools)
        body, protocol = body_of(found, protocol)
        if body.get("tools") and body["tools"] != definitions:
            click.echo(f"Note: --tools takes the place of the tools in {path}.", err=True)
        found = {**body, "tools": definitions}
    try:
        return request_of(found, protocol, stabilize)
    except RefusedError as refusal:
        raise click.UsageError(f"{option} {path} has the wrong shape: {refusal}") from None


def request_of(
    found: Any, protocol: str | None = None, stabilize: frozenset[str] = DEFAULTS
) -> PromptRequest:
    """A client's request, of its body, its messages, or a recording with such a body.

    Raises:
        RefusedError: The server would not understand it.
    """
    body, protocol = body_of(found, protocol)
    return read_request(body, protocol or "", stabilize=stabilize)


def body_of(found: Any, protocol: str | None = None) -> tuple[dict[str, Any], str | None]:
    """The body of a request, and its protocol, where the path in a recording says it."""
    if isinstance(found, list):
        return {"input" if protocol == RESPONSES else "messages": found}, protocol
    if not {"messages", "prompt", "input"} & found.keys() and isinstance(found.get("body"), dict):
        at, found = found.get("path"), found["body"]
        protocol = protocol or (protocol_at(at) if isinstance(at, str) else None)
    return found, protocol


def with_tools(
    messages: list[dict[str, Any]], tools: Path | None, stabilize: frozenset[str] = DEFAULTS
) -> PromptRequest:
    """A request with these messages, and the tools in a file."""
    known = None if tools is None else _read_tools(tools) or None
    return PromptRequest(messages, tools=known, stabilize=stabilize)


def _read_tools(path: Path) -> list[dict[str, Any]]:
    found = read_request_json(path, "--tools")
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise click.UsageError(f"--tools {path} has the wrong shape: no list of objects.")
    return found


def read_request_json(path: Path, option: str) -> Any:
    """JSON as the server decodes it: what another decoder makes of it may be another prompt."""
    try:
        found = decode_json(_read_file(path, option).encode())
    except RefusedError as refusal:
        said = str(refusal).replace("The body", f"{option} {path}", 1)
        raise click.UsageError(said) from None
    if not isinstance(found, (dict, list)):
        raise click.UsageError(f"{option} {path} has the wrong shape: no object and no list.")
    return found


class ManifestPrompt(msgspec.Struct):
    """One `[[prompt]]` of a manifest; the fields are the options of `warm`."""

    model: str
    system: str | None = None
    messages: str | None = None
    tools: str | None = None
    protocol: Literal["chat", "messages", "responses"] | None = None
    adapter_path: str | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    chat_template_args: dict[str, Any] = msgspec.field(default_factory=dict)
    chat_template: str | None = None
    use_default_chat_template: bool = False
    tier: str | None = None
    pin: bool = False
    ttl: str | None = None
    label: str = ""
    group: str = ""
    salt: str = ""
    stabilize: str = ""


def read_manifest(path: Path) -> list[ManifestPrompt]:
    """Read a manifest; paths in it are relative to its folder.

    Raises:
        click.ClickException: It cannot be read or understood.
    """
    tables = read_tables(path, "--manifest")
    prompts = [
        understood(one, ManifestPrompt, f"--manifest {path}, prompt {number}")
        for number, one in enumerate(tables, 1)
    ]
    folder = path.parent
    for prompt in prompts:
        if prompt.system is not None and prompt.system.startswith("@"):
            prompt.system = f"@{folder / prompt.system[1:]}"
        prompt.messages = str(folder / prompt.messages) if prompt.messages else None
        prompt.tools = str(folder / prompt.tools) if prompt.tools else None
        if (folder / prompt.model).is_dir():
            prompt.model = str(folder / prompt.model)
    return prompts
