"""`persist-cache explain`: would a request hit, and if not, why not?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from persist_cache.describe import divergence_texts, explanation_json
from persist_cache.errors import ModelError
from persist_cache.explain import Explanation, explain
from persist_cache.warm import load_tokenizer, render
from persist_cache_cli.output import format_duration, hanging, print_json, terminal_width
from persist_cache_cli.prompts import (
    choose_model,
    model_options,
    parse_json,
    read_json,
    read_messages,
)
from persist_cache_cli.store_access import common_options, no_store, reading


@click.command("explain")
@click.option("--model", metavar="PATH_OR_HUB_ID", required=True, help="The model.")
@click.option(
    "--messages", type=click.Path(path_type=Path), help="JSON file with a chat request's messages."
)
@click.option("--tools", type=click.Path(path_type=Path), help="JSON file with tool definitions.")
@click.option(
    "--tokens", type=click.Path(path_type=Path), help="JSON file with token ids, instead."
)
@model_options
@click.option("--chat-template-args", metavar="JSON", help="Further arguments of the template.")
@click.option("--check", is_flag=True, help="Exit 3 if nothing would be found.")
@common_options(quiet="Print nothing; use with --check.")
@click.pass_obj
def command(
    store: str | None,
    /,
    *,
    model: str,
    messages: Path | None,
    tools: Path | None,
    tokens: Path | None,
    chat_template_args: str | None,
    check: bool,
    as_json: bool,
    quiet: bool,
    **model_choice: Any,
) -> None:
    """Say how much of a request is cached, and why it is not more.

    Names the first token that differs from what is stored, with the text on both sides; or what
    changed about the model; or that a checkpoint is missing, or was evicted.

    \b
    Example:
      persist-cache explain --model mlx-community/Qwen3-4B-4bit --messages request.json
    """
    choice = choose_model(model, **model_choice)
    if (messages is None) == (tokens is None):
        raise click.UsageError("Give either --messages or --tokens.")
    identifier = choice.identifier()
    fingerprint = identifier(choice.key)
    if fingerprint is None:
        raise ModelError(
            f"The model {model!r} cannot be identified: {identifier.reason(choice.key)}"
        )
    tokenizer = load_tokenizer(model)
    system_tokens = 0
    if tokens is not None:
        ids = read_json(tokens, "--tokens", list[int])
    else:
        assert messages is not None, "one of the two was given"
        prompt = render(
            tokenizer,
            read_messages(messages),
            tools=read_json(tools, "--tools", list[dict[str, Any]]) if tools else None,
            template_args=parse_json(
                chat_template_args or "{}", "--chat-template-args", dict[str, Any]
            ),
        )
        ids, system_tokens = prompt.tokens, prompt.system_tokens
    with reading(store) as opened:
        if opened is None:
            found = Explanation(len(ids), 0, 0, "nothing", no_store(store))
        else:
            found = explain(opened, fingerprint, ids, system_tokens=system_tokens)
    if as_json:
        print_json(explanation_json(found, _decoder(tokenizer)))
    elif not quiet:
        _show(found, tokenizer)
    if check and found.cached_tokens == 0:
        sys.exit(3)


def _show(found: Explanation, tokenizer: Any) -> None:
    width = terminal_width()
    click.echo(hanging("", found.message, width))
    lines = []
    if found.entry is not None:
        lines.append(("  entry   ", found.entry))
    if found.saved_s:
        lines.append(("  saves   ", f"about {format_duration(found.saved_s)} of prefill"))
    for change in found.changes:
        values = f"stored {_value(change.old)}, now {_value(change.new)}"
        lines.append((f"  {change.name}: ", values))
    if found.divergence is not None:
        before, stored, prompt = divergence_texts(found.divergence, _decoder(tokenizer))
        lines += [("  after   ", f"…{before}"), ("  stored  ", stored), ("  prompt  ", prompt)]
    for head, text in lines:
        click.echo(hanging(head, text, width))


def _value(value: str | None) -> str:
    return "nothing" if value in (None, "null") else str(value)


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Decodes tokens as text; ids that stand for no text are left out."""

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode([one for one in tokens if 0 <= one < len(tokenizer)]))

    return decode
