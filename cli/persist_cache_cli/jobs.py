"""The prompts that a command is given: its options, and what they say as jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from msgspec import Struct
from msgspec.structs import replace

from persist_cache import Tier
from persist_cache.entry import NO_GROUP
from persist_cache.server.rendering import PromptRequest, system_only
from persist_cache.stability.names import DEFAULTS
from persist_cache.stability.prefixes import LEAST_TOKENS
from persist_cache_cli.output import plural, printable
from persist_cache_cli.parse import parse_duration, parse_group, parse_label, parse_repairs
from persist_cache_cli.prompts import (
    ManifestPrompt,
    ModelChoice,
    Template,
    choose_model,
    choose_template,
    model_options,
    protocol_option,
    read_manifest,
    read_request_file,
    read_text,
    stabilize_option,
    template_options,
    with_tools,
)
from persist_cache_cli.recorded import Recordings, beginnings, read_recordings
from persist_cache_cli.warming import Job

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--model", metavar="PATH_OR_HUB_ID", help="The model, as the server is given it."),
    click.option(
        "--system", metavar="TEXT", help="System prompt: the text, @FILE, or - for stdin."
    ),
    click.option(
        "--messages",
        type=click.Path(path_type=Path),
        help="JSON file with a client's request to store as a whole, or just its messages.",
    ),
    click.option(
        "--tools",
        type=click.Path(path_type=Path),
        help="JSON file with tool definitions, instead of those in the request.",
    ),
    click.option(
        "--manifest",
        type=click.Path(path_type=Path),
        help="TOML file with several prompts, one [[prompt]] each.",
    ),
    click.option(
        "--requests",
        type=click.Path(path_type=Path),
        help="Recorded requests, a file or a folder: store the beginnings that they share.",
    ),
    protocol_option,
    model_options,
    template_options,
    stabilize_option,
)


def prompt_options(command: F) -> F:
    """Add the options that name a prompt, or several, and the model that they are for."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class Jobs(Struct, frozen=True):
    """What was asked for.

    Attributes:
        jobs: The prompts.
        is_incomplete: Some that were recorded could not be read, and it was said why.
    """

    jobs: Sequence[Job]
    is_incomplete: bool = False


def jobs_of(
    *,
    model: str | None,
    system: str | None,
    messages: Path | None,
    tools: Path | None,
    manifest: Path | None,
    requests: Path | None,
    protocol: str | None,
    chat_template_args: str | None,
    chat_template: str | None,
    use_default_chat_template: bool,
    stabilize: frozenset[str],
    silent: bool,
    tier: str | None = None,
    pin: bool = False,
    ttl: float | None = None,
    label: str = "",
    **model_choice: Any,
) -> Jobs:
    """Read the prompts of a command line.

    Args:
        silent: Say nothing of what was read, but what could not be.
        tier, pin, ttl, label: As `warm` has them.
        model, system, messages, tools, manifest, requests, protocol, stabilize: The options.
        chat_template_args, chat_template, use_default_chat_template: The options.
        model_choice: The others that choose a model.

    Raises:
        click.UsageError: They do not go together.
    """
    template = choose_template(chat_template_args, chat_template, use_default_chat_template)
    if manifest is not None:
        if model or system or messages or tools or protocol or requests:
            raise click.UsageError("--manifest says it all; leave out the options of one prompt.")
        return Jobs([_job_of(prompt) for prompt in read_manifest(manifest)])
    if requests is not None:
        if system or messages or tools or tier:
            raise click.UsageError(
                "--requests says it all; leave out --system, --messages, --tools and --tier."
            )
        choice = choose_model(_required(model), **model_choice)
        recordings = read_recordings(requests, protocol=protocol, stabilize=stabilize)
        jobs = _jobs_of(recordings, choice, template, pin=pin, ttl_s=ttl, label=label)
        _tell_recordings(recordings, len(jobs), quiet=silent)
        return Jobs(jobs, bool(recordings.complaints))
    job = _make_job(
        choose_model(_required(model), **model_choice),
        system=system,
        messages=messages,
        tools=tools,
        protocol=protocol,
        template=template,
        stabilize=stabilize,
        tier=tier,
        pin=pin,
        ttl_s=ttl,
        label=label,
    )
    return Jobs([job])


def _required(model: str | None) -> str:
    if not model:
        raise click.UsageError("Name the model with --model, or several prompts with --manifest.")
    return model


def _jobs_of(
    recordings: Recordings,
    choice: ModelChoice,
    template: Template,
    *,
    pin: bool,
    ttl_s: float | None,
    label: str,
) -> list[Job]:
    """What is worth storing of recorded requests."""
    if not recordings.requests:
        return []
    tokenizer = template.tokenizer(choice.model)
    jobs = []
    for one in beginnings(recordings, lambda request: template.render(tokenizer, request)):
        tier = Tier.SYSTEM if one.found.is_head else Tier.USER
        request = PromptRequest([])
        name = label or one.name
        whole = not one.found.is_head
        jobs.append(Job(choice, template, request, whole, tier, pin, ttl_s, name, one.tokens))
    return jobs


def _tell_recordings(recordings: Recordings, beginnings: int, *, quiet: bool) -> None:
    """Say what was read, and what of that could not be."""
    for complaint in recordings.complaints:
        click.echo(f"Left out: {printable(complaint)}", err=True)
    if not quiet:
        click.echo(
            f"{plural(len(recordings.requests), 'request')} in "
            f"{plural(recordings.files, 'file')}; "
            f"{plural(beginnings, 'beginning')} of at least {LEAST_TOKENS} tokens to be stored."
        )


def _job_of(prompt: ManifestPrompt) -> Job:
    choice = choose_model(
        prompt.model,
        prompt.adapter_path,
        prompt.kv_bits,
        prompt.kv_group_size,
        prompt.quantized_kv_start,
        prompt.salt,
    )
    return _make_job(
        choice,
        system=prompt.system,
        messages=Path(prompt.messages) if prompt.messages else None,
        tools=Path(prompt.tools) if prompt.tools else None,
        protocol=prompt.protocol,
        template=Template(
            prompt.chat_template_args, prompt.chat_template, prompt.use_default_chat_template
        ),
        stabilize=parse_repairs(prompt.stabilize) if prompt.stabilize else DEFAULTS,
        tier=prompt.tier,
        pin=prompt.pin,
        ttl_s=None if prompt.ttl is None else parse_duration(prompt.ttl),
        label=parse_label(prompt.label),
        group=parse_group(prompt.group) if prompt.group else NO_GROUP,
    )


def _make_job(
    choice: ModelChoice,
    *,
    system: str | None,
    messages: Path | None,
    tools: Path | None,
    protocol: str | None,
    template: Template,
    stabilize: frozenset[str],
    tier: str | None,
    pin: bool,
    ttl_s: float | None,
    label: str,
    group: str = NO_GROUP,
) -> Job:
    if (system is None) == (messages is None):
        raise click.UsageError("Give either --system or --messages.")
    if messages is not None:
        request = read_request_file(messages, tools=tools, protocol=protocol, stabilize=stabilize)
    else:
        text = read_text(system or "", "--system")
        request = with_tools([{"role": "system", "content": text}], tools, stabilize)
    whole = not system_only(request)
    if not whole and request.asked is None:
        # Only what precedes the user message is stored, so its text does not matter.
        user = {"role": "user", "content": "Hello"}
        request = replace(request, messages=[*request.messages, user])
    try:
        parsed = Tier.parse(tier or ("user" if whole else "system"))
    except ValueError as error:
        raise click.UsageError(f"{error}.") from None
    return Job(choice, template, request, whole, parsed, pin, ttl_s, label, group=group)
