"""`persist-cache warm`: prefill prompts ahead of traffic."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from persist_cache import Store, Tier
from persist_cache.entry import Match
from persist_cache.errors import ModelError, PersistCacheError
from persist_cache.fingerprint.identifier import Identifier
from persist_cache.fingerprint.loads import Unidentified
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.prefill.loading import load_model
from persist_cache.queries.schema import WarmJson
from persist_cache.server.rendering import Prompt, PromptRequest, system_only
from persist_cache.stability.names import DEFAULTS
from persist_cache.warm import WARM_STEP_TOKENS, Warmed, warm
from persist_cache_cli.output import format_bytes, print_json
from persist_cache_cli.parse import DURATION, LABEL, parse_duration, parse_label, parse_repairs
from persist_cache_cli.progress import bar
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
from persist_cache_cli.store_access import common_options, store_path


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt to keep warm.

    Attributes:
        whole: Store all of the conversation, not just its system part.
        ttl_s: Seconds until it expires, or None.
    """

    choice: ModelChoice
    template: Template
    request: PromptRequest
    whole: bool
    tier: Tier
    pin: bool
    ttl_s: float | None
    label: str


@click.command("warm")
@click.option("--model", metavar="PATH_OR_HUB_ID", help="The model, as the server is given it.")
@click.option("--system", metavar="TEXT", help="System prompt: the text, @FILE, or - for stdin.")
@click.option(
    "--messages",
    type=click.Path(path_type=Path),
    help="JSON file with a client's request to store as a whole, or just its messages.",
)
@click.option(
    "--tools",
    type=click.Path(path_type=Path),
    help="JSON file with tool definitions, instead of those in the request.",
)
@click.option(
    "--manifest",
    type=click.Path(path_type=Path),
    help="TOML file with several prompts, one [[prompt]] each.",
)
@protocol_option
@model_options
@template_options
@stabilize_option
@click.option("--tier", metavar="TIER", help="system, user or assistant.  [default: by content]")
@click.option("--pin", is_flag=True, help="Exempt it from eviction.")
@click.option("--ttl", type=DURATION, help="Let it expire after this time, such as 7d.")
@click.option("--label", type=LABEL, default="", help="A name for it.")
@click.option(
    "--prefill-step-size",
    type=click.IntRange(min=1),
    default=WARM_STEP_TOKENS,
    show_default=True,
    help="Tokens per step; an interruption loses one.",
)
@click.option("--check", is_flag=True, help="Only report; exit 3 if something is missing.")
@common_options()
@click.pass_obj
def command(
    store: str | None,
    /,
    *,
    model: str | None,
    system: str | None,
    messages: Path | None,
    tools: Path | None,
    manifest: Path | None,
    protocol: str | None,
    chat_template_args: str | None,
    chat_template: str | None,
    use_default_chat_template: bool,
    stabilize: frozenset[str],
    tier: str | None,
    pin: bool,
    ttl: float | None,
    label: str,
    prefill_step_size: int,
    check: bool,
    as_json: bool,
    quiet: bool,
    **model_choice: Any,
) -> None:
    """Prefill prompts and store them, so that the first request finds them.

    What is stored already is skipped. An interrupted run goes on where its last step ended.

    \b
    Examples:
      persist-cache warm --model mlx-community/Qwen3-4B-4bit --system @prompt.txt --pin
      persist-cache warm --manifest prompts.toml --check
    """
    if manifest is not None:
        if model or system or messages or tools or protocol:
            raise click.UsageError("--manifest says it all; leave out the options of one prompt.")
        jobs = [_job_of(prompt) for prompt in read_manifest(manifest).prompt]
    else:
        jobs = [
            _make_job(
                choose_model(_required(model), **model_choice),
                system=system,
                messages=messages,
                tools=tools,
                protocol=protocol,
                template=choose_template(
                    chat_template_args, chat_template, use_default_chat_template
                ),
                stabilize=stabilize,
                tier=tier,
                pin=pin,
                ttl_s=ttl,
                label=label,
            )
        ]
    reports: list[WarmJson] = []
    with Store.open(store_path(store)) as opened:
        run = _Run(opened, prefill_step_size, quiet=quiet or as_json)
        for job in jobs:
            reports.append(run.check(job) if check else run.warm(job))
    if as_json:
        print_json(reports)
    if any(report.missing_tokens for report in reports):
        sys.exit(3)


def _required(model: str | None) -> str:
    if not model:
        raise click.UsageError("Name the model with --model, or several prompts with --manifest.")
    return model


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
    return Job(choice, template, request, whole, parsed, pin, ttl_s, label)


class _Run:
    """Works through jobs, loading each model and tokenizer at most once in a row."""

    def __init__(self, store: Store, step_tokens: int, *, quiet: bool) -> None:
        self._store = store
        self._step_tokens = step_tokens
        self._quiet = quiet
        self._tokenizers: dict[tuple[str, str | None, bool], Any] = {}
        self._model: tuple[ModelChoice, Any, Identifier] | None = None

    def check(self, job: Job) -> WarmJson:
        """Report what is there, changing nothing."""
        tokens, match = self._find(job)
        missing = len(tokens) - match.num_tokens
        if missing:
            self._say(f"{_name(job)}: {match.num_tokens:,} of {len(tokens):,} tokens are stored.")
        else:
            self._say(f"{_name(job)}: all {len(tokens):,} tokens are stored.")
        return _report(job, match.entries[-1:], len(tokens), match.num_tokens, missing)

    def warm(self, job: Job) -> WarmJson:
        """Store what is missing."""
        expires = None if job.ttl_s is None else time.time() + job.ttl_s
        tokens, prompt = self._tokens(job)
        model: Any = None
        fingerprint = self._identify(job.choice)
        if isinstance(fingerprint, Unidentified):
            # A hub id that is not on this machine yet is fetched by loading it.
            model, fingerprint = self._load(job.choice)
        entry = self._stored_entry(fingerprint, tokens)
        if entry is None and model is None:
            # The files may have been replaced since: what is computed belongs to what was loaded.
            model, loaded = self._load(job.choice)
            if loaded != fingerprint:
                fingerprint = loaded
                entry = self._stored_entry(fingerprint, tokens)
        if entry is not None:
            self._mark(entry, job, expires)
            self._say(f"{_name(job)}: all {len(tokens):,} tokens were stored already.")
            return _report(job, (entry,), len(tokens), len(tokens), 0)
        with self._progress(job, len(tokens)) as progress:
            done = warm(
                self._store,
                fingerprint,
                model,
                tokens,
                tier=job.tier,
                label=job.label,
                pinned=job.pin,
                expires=expires,
                system_tokens=prompt.system_tokens,
                cuts=prompt.cuts,
                step_tokens=self._step_tokens,
                quantize=job.choice.quantize,
                progress=progress,
            )
        self._say(_sentence(job, done))
        entries = () if done.entry is None else (done.entry,)
        return _report(job, entries, done.num_tokens, done.found_tokens, 0, done)

    def _find(self, job: Job) -> tuple[list[int], Match]:
        tokens, _ = self._tokens(job)
        fingerprint = self._identify(job.choice)
        if isinstance(fingerprint, Unidentified):
            raise _unidentified(job.choice, fingerprint.reason)
        return tokens, self._store.match(fingerprint, tokens)

    def _identify(self, choice: ModelChoice) -> Fingerprint | Unidentified:
        """Identify the model that is loaded, or else its files as they are now."""
        if self._model is not None and self._model[0] == choice:
            return self._model[2].look_up(choice.key)
        return choice.identifier().look_up(choice.key)

    def _stored_entry(self, fingerprint: Fingerprint, tokens: list[int]) -> str | None:
        """The entry that ends exactly here, if there is one."""
        match = self._store.match(fingerprint, tokens)
        if match.num_tokens == len(tokens) and match.entries:
            entry = self._store.get(match.entries[-1])
            if entry.num_tokens == len(tokens):
                return entry.id
        return None

    def _mark(self, entry: str, job: Job, expires: float | None) -> None:
        """Give a stored entry the marks that were asked for."""
        if job.pin:
            self._store.pin(entry)
        if job.label:
            self._store.set_label(entry, job.label)
        if expires is not None:
            self._store.expire_at(entry, expires)

    def _tokens(self, job: Job) -> tuple[list[int], Prompt]:
        """What to store of a prompt, and all of it."""
        template = job.template
        name = (job.choice.model, template.text, template.use_default)
        if name not in self._tokenizers:
            self._tokenizers[name] = template.tokenizer(job.choice.model)
        prompt = template.render(self._tokenizers[name], job.request)
        if job.whole:
            # A request computes its last token itself.
            return prompt.tokens[:-1], prompt
        if not prompt.system_tokens:
            raise PersistCacheError(
                "This model's chat template puts nothing before the user message; "
                "there is no system part to store."
            )
        return prompt.tokens[: prompt.system_tokens], prompt

    def _load(self, choice: ModelChoice) -> tuple[Any, Fingerprint]:
        """Load a model; returns it with the identity of what was loaded."""
        if self._model is None or self._model[0] != choice:
            self._model = None  # free the old one before the new one is loaded
            self._say(f"Loading {choice.model} …")
            identifier = choice.identifier()
            model, _ = load_model(choice.model, choice.adapter_path, identifier=identifier)
            self._model = (choice, model, identifier)
        fingerprint = self._model[2].look_up(choice.key)
        if isinstance(fingerprint, Unidentified):
            raise _unidentified(choice, fingerprint.reason)
        return self._model[1], fingerprint

    @contextlib.contextmanager
    def _progress(self, job: Job, total: int) -> Iterator[Callable[[int], None] | None]:
        with bar(_name(job), silent=self._quiet, unit="tokens", total=total) as draw:
            yield None if draw is None else lambda done: draw(done, total)

    def _say(self, text: str) -> None:
        if not self._quiet:
            click.echo(text)


def _unidentified(choice: ModelChoice, reason: str) -> ModelError:
    return ModelError(f"The model {choice.model!r} cannot be identified: {reason}")


def _name(job: Job) -> str:
    return job.label or Path(job.choice.model).name


def _sentence(job: Job, done: Warmed) -> str:
    what = "this conversation" if job.whole else "this system prompt"
    computed = done.num_tokens - done.found_tokens
    rate = f" ({computed / done.seconds:,.0f} tokens/s)" if done.seconds and computed else ""
    before = f"{done.found_tokens:,} were stored already; " if done.found_tokens else ""
    return (
        f"{_name(job)}: requests with {what} will find {done.num_tokens:,} tokens. {before}"
        f"{computed:,} computed in {done.seconds:.1f} s{rate}, "
        f"{format_bytes(done.nbytes)} written."
    )


def _report(
    job: Job,
    entries: tuple[str, ...],
    num_tokens: int,
    found_tokens: int,
    missing_tokens: int,
    done: Warmed | None = None,
) -> WarmJson:
    return WarmJson(
        id=entries[-1] if entries else None,
        model=job.choice.model,
        label=job.label,
        tier=job.tier.label,
        num_tokens=num_tokens,
        found_tokens=found_tokens,
        missing_tokens=missing_tokens,
        written_bytes=0 if done is None else done.nbytes,
        prefill_s=0.0 if done is None else done.seconds,
    )
