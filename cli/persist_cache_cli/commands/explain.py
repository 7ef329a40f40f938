"""`persist-cache explain`: would a request hit, and if not, why not?"""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from persist_cache.errors import ModelError
from persist_cache.queries.as_json import divergence_texts, explanation_json, explanation_message
from persist_cache.queries.explain import Explanation, explain
from persist_cache.queries.schema import VerdictJson
from persist_cache.server.rendering import Prompt, decode
from persist_cache_cli.asking import admin_token_option
from persist_cache_cli.output import format_duration, hanging, print_json, terminal_width
from persist_cache_cli.prompts import (
    choose_model,
    choose_template,
    model_options,
    protocol_option,
    read_json,
    read_request_file,
    stabilize_option,
    template_options,
)
from persist_cache_cli.requests import show_last
from persist_cache_cli.store_access import common_options, no_store, reading

_AT_LEAST = 90.0
_WITH_LAST = ("last", "admin_token", "as_json", "quiet")
_MOST_MARKS = 4
"""As many as Anthropic's own servers take."""


@click.command("explain")
@click.option("--model", metavar="PATH_OR_HUB_ID", help="The model.")
@click.option(
    "--messages",
    type=click.Path(path_type=Path),
    help="JSON file with a client's request: its body, or just the messages.",
)
@click.option(
    "--tools",
    type=click.Path(path_type=Path),
    help="JSON file with tool definitions, instead of those in the request.",
)
@click.option(
    "--tokens", type=click.Path(path_type=Path), help="JSON file with token ids, instead."
)
@protocol_option
@model_options
@template_options
@stabilize_option
@click.option("--check", is_flag=True, help="Exit 3 if too little of it would be found.")
@click.option(
    "--at-least",
    metavar="PERCENT",
    type=click.FloatRange(0, 100),
    help="What is enough for --check, of the tokens that can be found.  [default: 90]",
)
@click.option(
    "--last",
    metavar="[N]",
    type=click.IntRange(1, 1_000),
    is_flag=False,
    flag_value=1,
    help="Explain the latest request of the running server instead, or the latest N.",
)
@admin_token_option
@common_options(quiet="Print nothing; use with --check.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    *,
    model: str | None,
    messages: Path | None,
    tools: Path | None,
    tokens: Path | None,
    protocol: str | None,
    chat_template_args: str | None,
    chat_template: str | None,
    use_default_chat_template: bool,
    stabilize: frozenset[str],
    check: bool,
    at_least: float | None,
    last: int | None,
    admin_token: str | None,
    as_json: bool,
    quiet: bool,
    **model_choice: Any,
) -> None:
    """Say how much of a request is cached on disk, and why it is not more.

    Names the first token that differs from what is stored, with the text on both sides; or what
    changed about the model; or that a checkpoint is missing, or was evicted. With --last it asks
    the running server about its latest requests: what was reused, why not more, and what would
    mend it.

    \b
    Example:
      persist-cache explain --model mlx-community/Qwen3-4B-4bit --messages request.json
      persist-cache explain --last
    """
    store: str | None = ctx.obj
    if last is not None:
        _refuse_others(ctx)
        show_last(store, last, admin_token, as_json=as_json, quiet=quiet)
        return
    if model is None:
        raise click.UsageError("Give --model and a request, or --last for a running server's.")
    choice = choose_model(model, **model_choice)
    if (messages is None) == (tokens is None):
        raise click.UsageError("Give either --messages or --tokens.")
    if at_least is not None and not check:
        raise click.UsageError("--at-least says what is enough for --check; give both.")
    template = choose_template(chat_template_args, chat_template, use_default_chat_template)
    identifier = choice.identifier()
    fingerprint = identifier(choice.key)
    if fingerprint is None:
        raise ModelError(
            f"The model {model!r} cannot be identified: {identifier.reason(choice.key)}"
        )
    # A request that cannot be understood is refused before anything is loaded for it.
    request = (
        None
        if messages is None
        else read_request_file(messages, tools=tools, protocol=protocol, stabilize=stabilize)
    )
    if request is not None:
        fingerprint = fingerprint.salted(request.salt)
    tokenizer = template.tokenizer(model)
    if request is None:
        assert tokens is not None, "one of the two was given"
        prompt = Prompt(_read_tokens(tokens), 0)
    else:
        prompt = template.render(tokenizer, request)
    ids = prompt.tokens
    with reading(store) as opened:
        if opened is None:
            found = Explanation(len(ids), 0, 0, "nothing", no_store(store))
        else:
            found = explain(opened, fingerprint, ids, system_tokens=prompt.system_tokens)
    verdict = _verdict(found, _AT_LEAST if at_least is None else at_least) if check else None
    if as_json:
        said = explanation_json(
            found,
            partial(decode, tokenizer),
            check=verdict,
            repaired=prompt.repaired,
            ignored=prompt.ignored,
            marks=prompt.marks,
        )
        print_json(said)
    elif not quiet:
        _show(found, tokenizer)
        _show_form(prompt)
        if verdict is not None:
            click.echo(_sentence(verdict))
    if verdict is not None and not verdict.passed:
        sys.exit(3)


def _read_tokens(path: Path) -> list[int]:
    if str(path).lstrip().startswith("[") and not path.exists():
        raise click.UsageError(f"--tokens takes a file: write {path} into one, and name that.")
    found = read_json(path, "--tokens", list[int])
    if not found:
        raise click.UsageError(f"--tokens {path} holds no token; a prompt has at least one.")
    return found


def _refuse_others(ctx: click.Context) -> None:
    """Refuse options that say nothing about requests of a server."""
    for parameter in ctx.command.params:
        name = str(parameter.name)
        is_given = ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if is_given and name not in _WITH_LAST:
            option = parameter.opts[0]
            raise click.UsageError(f"--last asks a running server; leave out {option}.")


def _show_form(prompt: Prompt) -> None:
    """Say how the request was rendered, where that is not as it stands."""
    lines = [
        ("  repaired  ", ", ".join(prompt.repaired)),
        ("  ignored   ", ", ".join(prompt.ignored)),
        ("  marks     ", f"{prompt.marks}; all are taken" if prompt.marks > _MOST_MARKS else ""),
    ]
    for head, text in lines:
        if text:
            click.echo(hanging(head, text, terminal_width()))


def _verdict(found: Explanation, at_least: float) -> VerdictJson:
    can = max(1, found.num_tokens - 1)
    # Finding nothing never passes, whatever is asked for.
    passed = found.cached_tokens > 0 and 100 * found.cached_tokens >= at_least * can
    return VerdictJson(percent=100 * found.cached_tokens / can, at_least=at_least, passed=passed)


def _sentence(verdict: VerdictJson) -> str:
    # Cut, not rounded: 89.96 % must not look like enough.
    percent = f"{math.floor(10 * verdict.percent) / 10:g} %"
    if verdict.passed:
        return f"Check passed: {percent} of what can be found, at least {verdict.at_least:g} %."
    least = f"less than {verdict.at_least:g} %" if verdict.percent < verdict.at_least else "nothing"
    return f"Check failed: {percent} of what can be found, {least}."


def _show(found: Explanation, tokenizer: Any) -> None:
    width = terminal_width()
    parting = found.divergence
    texts = None if parting is None else divergence_texts(parting, partial(decode, tokenizer))
    click.echo(hanging("", explanation_message(found, texts), width))
    lines = []
    if found.entry is not None:
        lines.append(("  entry   ", found.entry))
    if found.saved_s:
        lines.append(("  saves   ", f"about {format_duration(found.saved_s)} of prefill"))
    for change in found.changes:
        values = f"stored {_value(change.old)}, now {_value(change.new)}"
        lines.append((f"  {change.name}: ", values))
    if texts is not None:
        lines += [
            ("  after   ", f"…{texts.before}"),
            ("  stored  ", texts.stored),
            ("  prompt  ", texts.prompt),
        ]
    for head, text in lines:
        click.echo(hanging(head, text, width))


def _value(value: str | None) -> str:
    return "nothing" if value in (None, "null") else str(value)
