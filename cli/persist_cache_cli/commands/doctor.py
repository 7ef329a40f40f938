"""`persist-cache doctor`: the environment in one page, and what is wrong with it."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import msgspec

from persist_cache import Store, StoreStats
from persist_cache.doctor import facts, judgement
from persist_cache.doctor.facts import BreakEven, DiskSpeed, Folder, ModelCache
from persist_cache.doctor.judgement import Finding
from persist_cache.doctor.template import TemplateReport, judge_template, look_at_template
from persist_cache.errors import PersistCacheError, RemoteError, StoreError
from persist_cache.prefill.loading import load_tokenizer
from persist_cache.queries.totals import Survey, quarantined
from persist_cache.sharing.as_json import settings_json
from persist_cache.store.budget import DEFAULT_MAX_BYTES, DEFAULT_MIN_FREE_BYTES
from persist_cache_cli import left_behind
from persist_cache_cli.blas import advice
from persist_cache_cli.output import (
    Painter,
    format_bytes,
    format_duration,
    painter,
    pairs,
    plural,
    print_json,
    printable,
    terminal_width,
)
from persist_cache_cli.prompts import ModelChoice, choose_model, model_options
from persist_cache_cli.remote_report import RemoteReport, look_at_remote, open_secret, remote_line
from persist_cache_cli.store_access import common_options, reading, store_path


@click.command("doctor")
@click.option("--model", metavar="PATH_OR_HUB_ID", help="Can the caches of this model be stored?")
@model_options
@common_options(quiet="Print what is wrong only.")
@click.pass_obj
def command(
    store: str | None, /, *, model: str | None, as_json: bool, quiet: bool, **model_choice: Any
) -> None:
    """Look at versions, disk, limits, and at a model's caches.

    The speed of the disk is measured with a small file in the store's folder. The weights of
    --model are not loaded, but may have to be read once to identify it.

    Exit status 1 says that something is wrong.

    \b
    Examples:
      persist-cache doctor
      persist-cache doctor --model mlx-community/Qwen3-4B-4bit
    """
    choice = None if model is None else choose_model(model, **model_choice)
    report = _examine(store, choice)
    if as_json:
        print_json(report.as_json())
    elif quiet:
        for finding in report.problems:
            click.echo(printable(finding.message), err=True)
    else:
        click.echo("\n".join(report.lines(painter())))
    if report.problems:
        sys.exit(1)


@dataclass
class _Report:
    """Everything that was found."""

    folder: Folder
    stats: StoreStats | None = None
    speed: DiskSpeed | None = None
    model: ModelCache | None = None
    template: TemplateReport | None = None
    remote: RemoteReport | None = None
    break_even: list[BreakEven] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=facts.versions)
    open_files: tuple[int, int] = field(default_factory=facts.open_files_limit)
    machine: facts.Machine = field(default_factory=facts.machine)

    @property
    def problems(self) -> list[Finding]:
        return [one for one in self.findings if one.level == "problem"]

    @property
    def limits(self) -> tuple[int, int]:
        if self.stats is None:
            return DEFAULT_MAX_BYTES, DEFAULT_MIN_FREE_BYTES
        return self.stats.max_bytes, self.stats.min_free_bytes

    def as_json(self) -> dict[str, Any]:
        folder, stats, speed, model = self.folder, self.stats, self.speed, self.model
        max_bytes, min_free_bytes = self.limits
        soft, hard = (None if limit < 0 else limit for limit in self.open_files)
        return {
            "ok": not self.problems,
            "findings": [{"level": one.level, "message": one.message} for one in self.findings],
            "versions": {name: version or None for name, version in self.versions.items()},
            "machine": {
                "system": self.machine.system,
                "machine": self.machine.machine,
                "cpus": self.machine.cpus,
                "memory_bytes": self.machine.memory_bytes,
            },
            "store": {
                "path": folder.path,
                "exists": folder.exists,
                "owner": folder.owner,
                "is_ours": folder.is_ours,
                "mode": None if folder.mode is None else f"{folder.mode:04o}",
                "writable": folder.writable,
                "file_system": folder.file_system,
                "free_bytes": folder.free_bytes,
                "total_bytes": folder.total_bytes,
                "entries": 0 if stats is None else stats.entries,
                "blobs": 0 if stats is None else stats.blobs,
                "used_bytes": 0 if stats is None else stats.usage.total,
                "max_bytes": max_bytes,
                "min_free_bytes": min_free_bytes,
            },
            "disk": None
            if speed is None
            else {
                "probe_bytes": speed.nbytes,
                "write_bytes_per_s": round(speed.write_bytes_per_s),
                "read_bytes_per_s": round(speed.read_bytes_per_s),
                "sync_s": speed.sync_s,
            },
            "open_files": {"soft": soft, "hard": hard},
            "model": None
            if model is None
            else {
                "model": model.model,
                "fingerprint": model.fingerprint or None,
                "storable": model.storable,
                "reason": model.reason,
                "device": model.device or None,
                "layers": [
                    {"class": layer.class_name, "storage": layer.storage} for layer in model.layers
                ],
            },
            "template": None if self.template is None else _template_json(self.template),
            "remote": None
            if self.remote is None
            else {
                **msgspec.to_builtins(settings_json(self.remote.settings)),
                "probe": self.remote.probe,
            },
            "break_even": [
                {
                    "fingerprint": one.fingerprint,
                    "model": one.model,
                    "tokens": one.tokens,
                    "prefill_tokens_per_s": one.prefill_tokens_per_s,
                    "kv_bytes_per_token": one.bytes_per_token,
                }
                for one in self.break_even
            ],
        }

    def lines(self, paint: Painter) -> list[str]:
        lines = self._sections(paint)
        lines.append("")
        for one in self.findings:
            mark = paint("problem", "bad") if one.level == "problem" else paint("note", "heading")
            lines.append(f"{mark}: {printable(one.message)}")
        if not self.problems:
            lines.append(paint("Nothing is wrong.", "good"))
        return lines

    def _sections(self, paint: Painter) -> list[str]:
        machine, folder, stats = self.machine, self.folder, self.stats
        max_bytes, min_free_bytes = self.limits
        used = 0 if stats is None else stats.usage.total
        versions = ", ".join(f"{name} {text or 'none'}" for name, text in self.versions.items())
        kind = f"{folder.file_system}, " if folder.file_system else ""
        mode = "" if folder.mode is None else f", mode {folder.mode:04o}"
        holds = "" if stats is None else f", {plural(stats.entries, 'entry', 'entries')}"
        memory = f", {format_bytes(machine.memory_bytes)}" if machine.memory_bytes else ""
        soft, hard = ("unlimited" if one < 0 else f"{one:,}" for one in self.open_files)
        return pairs(
            [
                ("versions", versions),
                ("machine", f"{machine.system} {machine.machine}, {machine.cpus} CPUs{memory}"),
                (
                    "store",
                    printable(folder.path) + (holds if folder.exists else ", not there yet"),
                ),
                ("owner", printable(folder.owner) + (mode if folder.exists else "")),
                (
                    "disk",
                    f"{kind}{format_bytes(folder.free_bytes)} free of "
                    f"{format_bytes(folder.total_bytes)}",
                ),
                ("speed", self._speed()),
                (
                    "budget",
                    f"{format_bytes(used)} of {format_bytes(max_bytes)} used, "
                    f"{format_bytes(min_free_bytes)} of the disk are left alone",
                ),
                ("open files", f"{soft} (at most {hard})"),
                ("remote", "" if self.remote is None else remote_line(self.remote)),
                *self._model_pairs(),
                *self._break_even_pairs(),
            ],
            width=terminal_width(),
            paint=paint,
        )

    def _speed(self) -> str:
        speed = self.speed
        if speed is None:
            return "not measured"
        return (
            f"{format_bytes(round(speed.write_bytes_per_s))}/s written and synced, "
            f"{format_bytes(round(speed.read_bytes_per_s))}/s read, "
            f"{format_duration(speed.sync_s)} a sync"
        )

    def _model_pairs(self) -> list[tuple[str, str]]:
        model = self.model
        if model is None:
            return []
        counts = Counter((layer.class_name, layer.storage) for layer in model.layers)
        layers = ", ".join(f"{count} {name} ({how})" for (name, how), count in counts.items())
        return [
            ("model", printable(model.model) + (f" on {model.device}" if model.device else "")),
            ("fingerprint", model.fingerprint[:16]),
            ("layers", layers),
            ("template", "" if model.reason else _template_line(self.template)),
        ]

    def _break_even_pairs(self) -> list[tuple[str, str]]:
        if not self.break_even:
            missing = "no prefill was timed yet" if self.speed else "the disk was not measured"
            return [("break-even", f"unknown: {missing}")]
        return [
            (
                "break-even" if place == 0 else "",
                f"{printable(one.model)}: "
                + (
                    "prefill is faster than the disk at any length"
                    if one.tokens is None
                    else f"disk is faster from {plural(one.tokens, 'token')} on"
                )
                + f" (prefill {one.prefill_tokens_per_s:,.0f} tokens/s, "
                f"{format_bytes(round(one.bytes_per_token))} per token)",
            )
            for place, one in enumerate(self.break_even)
        ]


def _examine(store: str | None, choice: ModelChoice | None) -> _Report:
    """Look at everything; what goes wrong becomes a finding."""
    root = store_path(store)
    report = _Report(facts.look_at_folder(root))
    failures: list[str] = []
    if report.folder.exists and report.folder.is_ours:
        try:
            with reading(store) as opened:
                if opened is not None:
                    _look_into(opened, report, store)
                    report.remote = look_at_remote(opened)
        except (StoreError, RemoteError) as error:
            failures.append(str(error))
        try:
            _measure(store, root, report)
        except StoreError as error:
            failures.append(str(error))
        except OSError as error:
            failures.append(
                f"A file of {format_bytes(facts.PROBE_BYTES)} cannot be written to "
                f"{root} ({error.strerror}); free some space, or use --store PATH."
            )
    max_bytes, min_free_bytes = report.limits
    report.findings += [Finding("problem", one) for one in failures]
    report.findings += judgement.judge(
        report.folder,
        limits=report.open_files,
        packages=report.versions,
        max_bytes=max_bytes,
        min_free_bytes=min_free_bytes,
        used_bytes=0 if report.stats is None else report.stats.usage.total,
    )
    if report.remote is not None and report.remote.trouble:
        report.findings.append(Finding("problem", report.remote.trouble))
    if report.remote is not None and (said := open_secret(report.remote.settings)):
        report.findings.append(Finding("note", said))
    if slow := advice("serve …"):
        report.findings.append(Finding("note", slow))
    if choice is not None:
        report.model = _look_at_model(choice)
        report.findings += judgement.judge_model(report.model)
        _look_at_template(choice, report)
    return report


def _measure(store: str | None, root: Path, report: _Report) -> None:
    """Measure the disk, if it may be written and the limits have room for that.

    Raises:
        OSError: It cannot be written.
        StoreError: The store cannot be read any more.
    """
    stats = report.stats
    if not report.folder.writable:
        return
    if stats is not None and (
        stats.usage.total + facts.PROBE_BYTES > stats.max_bytes
        or stats.free_bytes - facts.PROBE_BYTES < stats.min_free_bytes
    ):
        report.findings.append(
            Finding(
                "note",
                "The speed of the disk was not measured: the store has no room for "
                f"{format_bytes(facts.PROBE_BYTES)} within its limits.",
            )
        )
        return
    report.speed = facts.measure_disk(root)
    if stats is not None:
        with reading(store) as opened:
            if opened is not None:
                report.break_even = facts.break_even(opened, Survey(opened), report.speed)


def _look_into(store: Store, report: _Report, given: str | None) -> None:
    report.stats = store.stats()
    if why := report.stats.eviction_paused:
        report.findings.append(Finding("note", f"{why[0].upper()}{why[1:]}."))
    aside = quarantined(store)
    if aside:
        report.findings.append(
            Finding(
                "note",
                f"{plural(len(aside), 'damaged blob')} in quarantine; `persist-cache check` says "
                "why, and eviction removes them first.",
            )
        )
    report.findings += [
        Finding("note", sentence) for sentence in left_behind.sentences(Survey(store), given)
    ]


def _look_at_template(choice: ModelChoice, report: _Report) -> None:
    if report.model is None or report.model.reason:
        return  # which says what is wrong with it
    try:
        report.template = look_at_template(load_tokenizer(choice.model))
    except PersistCacheError as error:
        report.findings.append(Finding("note", f"The chat template was not looked at: {error}"))
        return
    if report.template is not None:
        report.findings += judge_template(choice.model, report.template)


def _template_line(found: TemplateReport | None) -> str:
    if found is None:
        return "none"
    said = dict.fromkeys(("appends", "parts", "refused"), "")
    for outcome in said:
        said[outcome] = ", ".join(one.kind for one in found.checks if one.outcome == outcome)
    words = {"appends": "appends", "parts": "does not only append", "refused": "refuses"}
    return "; ".join(f"{words[outcome]}: {kinds}" for outcome, kinds in said.items() if kinds)


def _template_json(found: TemplateReport) -> dict[str, Any]:
    return {
        "appends": found.appends,
        "conversations": [
            {
                "kind": one.kind,
                "outcome": one.outcome,
                "before_text": one.before,
                "earlier_text": one.earlier,
                "later_text": one.later,
                "lost_characters": one.lost_characters,
                "reason": one.reason,
            }
            for one in found.checks
        ],
        "mends": found.mends,
        "prints_date": found.prints_date,
        "date_option": found.date_option or None,
    }


def _look_at_model(choice: ModelChoice) -> ModelCache:
    identifier = choice.identifier()
    found = identifier(choice.key)
    if found is None:
        return ModelCache(choice.model, "", identifier.reason(choice.key))
    return facts.look_at_model(choice.model, Path(found.info["path"]), found.hex)
