"""Working through prompts that are to be kept warm, for `persist-cache warm`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec import Struct
from msgspec.structs import replace

from persist_cache import Store, Tier
from persist_cache.entry import NO_GROUP, Match
from persist_cache.errors import ModelError, PersistCacheError
from persist_cache.fingerprint.identifier import Identifier
from persist_cache.fingerprint.loads import Unidentified
from persist_cache.fingerprint.value import Fingerprint
from persist_cache.prefill.loading import load_model
from persist_cache.queries.schema import WarmJson
from persist_cache.remote import Brought, Published, PublishOutcome, Why
from persist_cache.server.rendering import Prompt, PromptRequest
from persist_cache.warm import Warmed, warm
from persist_cache_cli.blas import advice
from persist_cache_cli.output import format_bytes
from persist_cache_cli.progress import bar
from persist_cache_cli.prompts import ModelChoice, Template

if TYPE_CHECKING:
    from persist_cache.remote import Remote

Progress = Callable[[int], None]
"""Takes the tokens that are done so far."""


class Job(Struct, frozen=True):
    """One prompt to keep warm.

    Attributes:
        whole: Store all of the conversation, not just its system part.
        ttl_s: Seconds until it expires, or None.
        group: That it, and what it begins with, is to belong to; `NO_GROUP` for none.
        tokens: What is to be stored, where that is not what the request says.
    """

    choice: ModelChoice
    template: Template
    request: PromptRequest
    whole: bool
    tier: Tier
    pin: bool
    ttl_s: float | None
    label: str
    tokens: Sequence[int] | None = None
    group: str = NO_GROUP


class Run:
    """Works through jobs, loading each model and tokenizer at most once in a row."""

    def __init__(
        self,
        store: Store,
        step_tokens: int,
        *,
        quiet: bool,
        remote: Remote | None = None,
        publishes: bool = False,
    ) -> None:
        self._store = store
        self._remote = remote
        self._publishes = publishes
        self._step_tokens = step_tokens
        self._quiet = quiet
        self._tokenizers: dict[tuple[str, str | None, bool], Any] = {}
        self._model: tuple[ModelChoice, Any, Identifier] | None = None
        self._advised = False

    def check(self, job: Job) -> WarmJson:
        """Report what is there, changing nothing."""
        tokens, match = self._find(job)
        missing = len(tokens) - match.num_tokens
        if missing:
            self._say(f"{name_of(job)}: {match.num_tokens:,} of {len(tokens):,} tokens are stored.")
        else:
            self._say(f"{name_of(job)}: all {len(tokens):,} tokens are stored.")
        return _report(job, match.entries[-1:], len(tokens), match.num_tokens, missing)

    def warm(self, job: Job) -> WarmJson:
        """Store what is missing."""
        expires = None if job.ttl_s is None else time.time() + job.ttl_s
        if job.request.no_store:
            raise PersistCacheError(
                "Nothing of a request is kept that says no_store; leave it out."
            )
        tokens, prompt = self._tokens(job)
        model: Any = None
        fingerprint = self._identify(job)
        if isinstance(fingerprint, Unidentified):
            # A hub id that is not on this machine yet is fetched by loading it.
            model, fingerprint = self._load(job)
        way = self._stored(fingerprint, tokens)
        if not way:
            self._say_brought(job, self._bring(fingerprint, tokens))
            way = self._stored(fingerprint, tokens)
        if not way and model is None:
            # The files may have been replaced since: what is computed belongs to what was loaded.
            model, loaded = self._load(job)
            if loaded != fingerprint:
                fingerprint = loaded
                way = self._stored(fingerprint, tokens)
        if way:
            self._mark(way, job, expires)
            self._say(f"{name_of(job)}: all {len(tokens):,} tokens were stored already.")
            return self._published(_report(job, way, len(tokens), len(tokens), 0))
        with (
            self._progress(job, len(tokens)) as progress,
            _told_if_interrupted(job, tokens) as note,
        ):
            done = warm(
                self._store,
                fingerprint,
                model,
                tokens,
                tier=job.tier,
                label=job.label,
                pinned=job.pin,
                expires=expires,
                group=job.group,
                system_tokens=prompt.system_tokens,
                cuts=prompt.cuts,
                step_tokens=self._step_tokens,
                quantize=job.choice.quantize,
                progress=note(progress),
            )
        self._say(_sentence(job, done))
        entries = () if done.entry is None else (done.entry,)
        return self._published(_report(job, entries, done.num_tokens, done.found_tokens, 0, done))

    def bring(self, job: Job) -> tuple[int, int, Brought]:
        """Have in the store what the remote has of a prompt.

        Returns:
            The prompt's length, how much of it was stored before, and what was brought.
        """
        tokens, match = self._find(job)
        fingerprint = self._identify(job)
        assert isinstance(fingerprint, Fingerprint), "it was found"
        return len(tokens), match.num_tokens, self._bring(fingerprint, tokens, is_instead=False)

    def _bring(
        self, fingerprint: Fingerprint, tokens: Sequence[int], *, is_instead: bool = True
    ) -> Brought:
        if self._remote is None:
            return Brought(0, 0, 0.0, Why.CLOSED)
        return self._remote.bring(
            fingerprint,
            tokens,
            known=self._store.match(fingerprint, tokens).num_tokens,
            limit=len(tokens),
            ends=[len(tokens)],
            prefill_s=(lambda num_tokens: 0.0) if is_instead else None,
        )

    def _say_brought(self, job: Job, found: Brought) -> None:
        if found.is_hit:
            self._say(
                f"{name_of(job)}: {found.num_tokens:,} tokens came from the remote, "
                f"{format_bytes(found.nbytes)} in {found.seconds:.1f} s."
            )

    def _published(self, report: WarmJson) -> WarmJson:
        """Share an entry, if that was asked for."""
        if not self._publishes or self._remote is None or report.id is None:
            return report
        done = self._remote.publish(report.id)
        self._say(published_line(done))
        return replace(report, published=done.outcome.value)

    def _find(self, job: Job) -> tuple[list[int], Match]:
        tokens, _ = self._tokens(job)
        fingerprint = self._identify(job)
        if isinstance(fingerprint, Unidentified):
            raise _unidentified(job.choice, fingerprint.reason)
        return tokens, self._store.match(fingerprint, tokens)

    def _identify(self, job: Job) -> Fingerprint | Unidentified:
        """Identify the model that is loaded, or else its files as they are now."""
        choice = job.choice
        loaded = self._model is not None and self._model[0] == choice
        identifier = self._model[2] if self._model and loaded else choice.identifier()
        found = identifier.look_up(choice.key)
        return found if isinstance(found, Unidentified) else found.salted(job.request.salt)

    def _stored(self, fingerprint: Fingerprint, tokens: list[int]) -> tuple[str, ...]:
        """The entry that ends exactly here, behind those on the way to it; none without it."""
        match = self._store.match(fingerprint, tokens)
        if match.num_tokens == len(tokens) and match.entries:
            entry = self._store.get(match.entries[-1])
            if entry.num_tokens == len(tokens):
                return match.entries
        return ()

    def _mark(self, way: Sequence[str], job: Job, expires: float | None) -> None:
        """Give a stored entry, which ends this way, the marks that were asked for."""
        entry = way[-1]
        if job.pin:
            self._store.pin(entry)
        if job.label:
            self._store.set_label(entry, job.label)
        if expires is not None:
            self._store.expire_at(entry, expires)
        if job.group != NO_GROUP:
            for one in way:
                self._store.set_group(one, job.group)

    def _tokens(self, job: Job) -> tuple[list[int], Prompt]:
        """What to store of a prompt, and all of it."""
        if job.tokens is not None:
            head = 0 if job.whole else len(job.tokens)
            return list(job.tokens), Prompt(list(job.tokens), head)
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

    def _load(self, job: Job) -> tuple[Any, Fingerprint]:
        """Load a model; returns it with the identity of what was loaded."""
        choice = job.choice
        if self._model is None or self._model[0] != choice:
            self._model = None  # free the old one before the new one is loaded
            self._say(f"Loading {choice.model} …")
            if not self._quiet and not self._advised and (slow := advice("warm …")):
                click.echo(f"Note: {slow}", err=True)
            self._advised = True
            identifier = choice.identifier()
            model, _ = load_model(choice.model, choice.adapter_path, identifier=identifier)
            self._model = (choice, model, identifier)
        fingerprint = self._model[2].look_up(choice.key)
        if isinstance(fingerprint, Unidentified):
            raise _unidentified(choice, fingerprint.reason)
        return self._model[1], fingerprint.salted(job.request.salt)

    @contextlib.contextmanager
    def _progress(self, job: Job, total: int) -> Iterator[Progress | None]:
        with bar(name_of(job), silent=self._quiet, unit="tokens", total=total) as draw:
            yield None if draw is None else lambda done: draw(done, total)

    def _say(self, text: str) -> None:
        if not self._quiet:
            click.echo(text)


@contextlib.contextmanager
def _told_if_interrupted(
    job: Job, tokens: Sequence[int]
) -> Iterator[Callable[[Progress | None], Progress]]:
    """Say what was kept when a signal ends the prefill within.

    Yields:
        What makes a report of progress one that is noted.
    """
    kept = 0

    def noting(progress: Progress | None) -> Progress:
        def note(done: int) -> None:
            nonlocal kept
            kept = done
            if progress is not None:
                progress(done)

        return note

    try:
        yield noting
    except Exception:
        raise
    except BaseException:  # a signal
        click.echo(
            f"{name_of(job)}: {kept:,} of {len(tokens):,} tokens are stored; the same command "
            "goes on from there.",
            err=True,
        )
        raise


_OUTCOMES = {
    PublishOutcome.SENT: "published",
    PublishOutcome.THERE_ALREADY: "were published already",
    PublishOutcome.CLAIMED: "left to another process, which claimed them within 15 minutes",
}


def published_line(done: Published) -> str:
    """What publishing an entry did, in a sentence."""
    sent = f", {format_bytes(done.nbytes)} sent" if done.nbytes else ""
    return f"{done.entry[:12]}: {done.num_tokens:,} tokens {_OUTCOMES[done.outcome]}{sent}."


def _unidentified(choice: ModelChoice, reason: str) -> ModelError:
    return ModelError(f"The model {choice.model!r} cannot be identified: {reason}")


def name_of(job: Job) -> str:
    return job.label or Path(job.choice.model).name


def _sentence(job: Job, done: Warmed) -> str:
    what = "this conversation" if job.whole else "this system prompt"
    if job.tokens is not None:
        what = "this beginning" if job.whole else "this head"
    computed = done.num_tokens - done.found_tokens
    rate = f" ({computed / done.seconds:,.0f} tokens/s)" if done.seconds and computed else ""
    before = f"{done.found_tokens:,} were stored already; " if done.found_tokens else ""
    return (
        f"{name_of(job)}: requests with {what} will find {done.num_tokens:,} tokens. {before}"
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
