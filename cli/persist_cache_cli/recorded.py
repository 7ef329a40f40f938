"""Recorded requests: what clients sent, and which beginnings of it are worth storing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from persist_cache.errors import ModelError
from persist_cache.server.rendering import Prompt, PromptRequest
from persist_cache.server.validation import RefusedError, decode_json
from persist_cache.stability.prefixes import Known, Prefix, worth_keeping
from persist_cache_cli.parse import parse_label
from persist_cache_cli.prompts import request_of

_SUFFIXES = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Recorded:
    """A request that was read.

    Attributes:
        name: Of its client or, where that is not recorded, of its file.
        place: Where it was read, for sentences about it.
        request: What shapes its prompt.
    """

    name: str
    place: str
    request: PromptRequest


@dataclass(slots=True)
class Recordings:
    """What was read.

    Attributes:
        requests: Those that were understood.
        complaints: A sentence for each of the others.
        files: How many files there are.
    """

    requests: list[Recorded] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    files: int = 0


@dataclass(frozen=True, slots=True)
class Beginning:
    """A beginning that is worth storing.

    Attributes:
        name: For its label.
        tokens: Token ids.
        found: What is known of it.
    """

    name: str
    tokens: Sequence[int]
    found: Prefix


def read_recordings(path: Path, *, protocol: str | None, stabilize: frozenset[str]) -> Recordings:
    """Read the requests in a file, or in the files of a folder.

    Args:
        path: A file with one request as JSON, or with one on each line; or a folder of such files.
        protocol: Of all of them; None to tell it for each.
        stabilize: Names of the repairs that may be done.

    Raises:
        click.ClickException: There is no such file, or nothing in the folder has such a name.
    """
    found = Recordings()
    try:
        files = [path]
        if path.is_dir():
            files = sorted(one for one in path.iterdir() if one.suffix in _SUFFIXES)
            if not files:
                raise click.UsageError(f"--requests: {path} has no file *.json or *.jsonl.")
        elif not path.exists():
            raise click.UsageError(f"--requests: {path} does not exist.")
    except OSError as error:
        raise click.UsageError(f"--requests: {path} cannot be read ({error.strerror}).") from None
    for file in files:
        found.files += 1
        try:
            raw = file.read_bytes()
        except OSError as error:
            found.complaints.append(f"{file} cannot be read ({error.strerror}).")
            continue
        for place, said in _requests_in(file, raw):
            if isinstance(said, str):
                found.complaints.append(said)
                continue
            try:
                request = request_of(said, protocol, stabilize)
            except RefusedError as refusal:
                found.complaints.append(f"{place} has the wrong shape: {refusal}")
            else:
                found.requests.append(Recorded(_name_of(said, file), place, request))
    return found


def _requests_in(file: Path, raw: bytes) -> Iterator[tuple[str, Any]]:
    """Each request of a file with its place, or a sentence instead of it."""
    if not raw.strip():
        yield str(file), f"{file} is empty."
        return
    try:
        whole = decode_json(raw)
    except RefusedError as refusal:
        lines = [line for line in enumerate(raw.splitlines(), start=1) if line[1].strip()]
        if len(lines) < 2 or file.suffix == ".json":
            yield str(file), str(refusal).replace("The body", str(file), 1)
            return
    else:
        is_bodies = isinstance(whole, list) and not any(
            isinstance(one, dict) and "role" in one for one in whole
        )
        lines = []
        for number, one in enumerate(whole if is_bodies else [whole], start=1):
            place = f"{file}, request {number}" if is_bodies else str(file)
            yield place, one if isinstance(one, (dict, list)) else f"{place} is no object."
    for number, line in lines:
        place = f"{file}, line {number}"
        try:
            one = decode_json(line)
        except RefusedError as refusal:
            yield place, str(refusal).replace("The body", place, 1)
        else:
            yield place, one if isinstance(one, (dict, list)) else f"{place} is no object."


def _name_of(said: Any, file: Path) -> str:
    name = said.get("client") if isinstance(said, dict) else None
    try:
        return parse_label(name) if isinstance(name, str) and name else parse_label(file.stem)
    except click.BadParameter:
        return ""


def beginnings(
    recordings: Recordings, render: Callable[[PromptRequest], Prompt]
) -> list[Beginning]:
    """Find what is worth storing of requests; complains of those that cannot be rendered.

    Args:
        recordings: What was read.
        render: Makes a prompt of a request.
    """
    rendered: list[tuple[Recorded, Prompt]] = []
    for one in recordings.requests:
        try:
            rendered.append((one, render(one.request)))
        except ModelError as error:
            recordings.complaints.append(f"{one.place}: {error}")
    known = [Known(prompt.tokens, prompt.system_tokens) for _, prompt in rendered]
    return [
        Beginning(rendered[one.prompt][0].name, known[one.prompt].tokens[: one.num_tokens], one)
        for one in worth_keeping(known)
    ]
