"""The latest requests as the admin API tells them."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from persist_cache.cache.stats import FromRemote
from persist_cache.server.recent.records import Parted, Record


class PartedJson(Struct, frozen=True, kw_only=True):
    """From which earlier request one parts, and why.

    Attributes:
        id: Of the earlier request.
        response_id: Of its answer.
        shared_tokens: Tokens that both prompts begin with.
        cause: Why it is no more, such as `date`; None where the later prompt goes on from the end
            of the earlier one.
        code: Its number in docs/agents.md, such as `T4`, or None.
        sentence: The cause in words.
        where: The part of the request: `model`, `salt`, `option`, `tools`, `system`, `messages`.
        at: The place in the body, such as `messages.3.content.1`.
        role: Of the message.
        character: Of the text at that place, where it differs.
        also: Causes for which that text differs further on.
        lost_tokens: Tokens of the earlier prompt behind the parting, that were computed again.
        lost_s: Seconds that took, by the prefills of this server; None where too few were timed.
        repairs: Options of `--stabilize` that mend it.
        switches: What turns it off in the client.
        is_new: Whether nothing went wrong: what follows is new.
        before: Text right before the place.
        old: The earlier text from there.
        new: The later one.
    """

    id: str
    response_id: str
    shared_tokens: int
    cause: str | None
    code: str | None
    sentence: str
    where: str
    at: str
    role: str
    character: int | None
    also: list[str]
    lost_tokens: int
    lost_s: float | None
    repairs: list[str]
    switches: list[str]
    is_new: bool = False
    before: str | UnsetType = UNSET
    old: str | UnsetType = UNSET
    new: str | UnsetType = UNSET


class WentOnJson(Struct, frozen=True, kw_only=True):
    """The entry that a request went on from."""

    id: str
    tier: str
    num_tokens: int
    label: str


class RemoteSaidJson(Struct, frozen=True, kw_only=True):
    """What a remote said of a request's prompt.

    Attributes:
        why: How it ended, a word.
        num_tokens: That the store has of the prompt because of that; 0 for nothing more.
        seconds: What asking took.
    """

    why: str
    num_tokens: int
    seconds: float


class RequestJson(Struct, frozen=True, kw_only=True):
    """A request that was answered.

    Attributes:
        id: Ours.
        number: Of the requests of this server.
        response_id: What its protocol calls the answer.
        time: When it came.
        path: That it was sent to.
        model: That it named, or "".
        client: Its `User-Agent`.
        state: `done`, `failed`, or `left`: its client closed the connection.
        source: `memory`, `disk`, `remote` or `miss`; None where the cache was not asked.
        num_tokens: Of its prompt.
        cached_tokens: Of these, that were found.
        computed_tokens: Of these, that were computed.
        written_tokens: Of these, that went to the disk.
        output_tokens: Of the answer.
        first_token_s: Seconds from its arrival to the first token, or None.
        total_s: Seconds that it took.
        reason: Why no more was found, or "".
        repaired: Names of what was changed in it.
        parted: From which earlier request it parts; None where none is like it.
        reused_tokens: Tokens that were not computed, by where they came from.
        waited_s: Seconds until the cache was asked for it, or None: it was tokenized, stood in the
            line, and a remote was asked.
        restore_s: Seconds that the look-up took, reading from the disk included, or None.
        saved_s: Seconds that this saved, less what reading took; None where nobody measured.
        replayable: Whether its body is remembered, so that it can be warmed.
        entry: The stored entry that it went on from, as of now; it may be longer, and then its
            beginning was used. None where none is stored any more. Of one request alone.
        remote: What the remote said of its prompt; None where it was not asked.
    """

    id: str
    number: int
    response_id: str
    time: float
    path: str
    model: str
    client: str
    state: str
    source: str | None
    num_tokens: int
    cached_tokens: int
    computed_tokens: int
    written_tokens: int
    output_tokens: int
    first_token_s: float | None
    total_s: float
    reason: str
    repaired: list[str]
    parted: PartedJson | None
    reused_tokens: dict[str, int]
    waited_s: float | None
    restore_s: float | None
    saved_s: float | None
    replayable: bool
    entry: WentOnJson | UnsetType | None = UNSET
    remote: RemoteSaidJson | None = None


def request_json(
    record: Record, *, texts: bool, entry: WentOnJson | UnsetType | None = UNSET
) -> RequestJson:
    """A request.

    Args:
        record: What is remembered of it.
        texts: Whether to quote the prompts where they part.
        entry: What it went on from, where that was asked for.
    """
    about, outcome, fetch = record.about, record.outcome, record.outcome.fetch
    found = 0 if fetch is None else fetch.num_tokens
    return RequestJson(
        id=about.id,
        number=record.number,
        response_id=about.response_id,
        time=about.at,
        path=about.path,
        model=record.named,
        client=about.client,
        state=outcome.state,
        source=None if fetch is None else fetch.source,
        num_tokens=record.num_tokens,
        cached_tokens=found,
        computed_tokens=0 if fetch is None else record.num_tokens - found,
        written_tokens=outcome.written_tokens,
        output_tokens=outcome.output_tokens,
        first_token_s=outcome.first_token_s,
        total_s=outcome.total_s,
        reason="" if fetch is None else fetch.reason,
        repaired=list(outcome.repaired),
        parted=None if record.parted is None else _parted_json(record.parted, about.client, texts),
        reused_tokens=outcome.reused_tokens,
        waited_s=outcome.waited_s,
        restore_s=None if fetch is None else fetch.seconds,
        saved_s=outcome.saved_s,
        replayable=bool(record.body),
        entry=entry,
        remote=_remote_said(outcome.remote),
    )


def _remote_said(remote: FromRemote | None) -> RemoteSaidJson | None:
    if remote is None:
        return None
    return RemoteSaidJson(why=remote.why, num_tokens=remote.num_tokens, seconds=remote.seconds)


def _parted_json(parted: Parted, client: str, texts: bool) -> PartedJson:
    cause = parted.cause
    quoted = texts and cause is not None and cause.character is not None
    return PartedJson(
        id=parted.id,
        response_id=parted.response_id,
        shared_tokens=parted.shared_tokens,
        cause=None if cause is None else cause.kind.value,
        code=None if cause is None else cause.kind.known.code or None,
        sentence="" if cause is None else cause.sentence,
        where="" if cause is None else cause.where,
        at="" if cause is None else cause.at,
        role="" if cause is None else cause.role,
        character=None if cause is None else cause.character,
        also=[] if cause is None else [one.value for one in cause.also],
        lost_tokens=0 if cause is None else cause.lost_tokens,
        lost_s=parted.lost_s,
        repairs=[] if cause is None else list(cause.repairs),
        switches=[] if cause is None or "claude" not in client.lower() else list(cause.switches),
        is_new=cause is not None and cause.kind.is_new,
        before=cause.before if quoted and cause is not None else UNSET,
        old=cause.old if quoted and cause is not None else UNSET,
        new=cause.new if quoted and cause is not None else UNSET,
    )
