"""The cause why one prompt parts from another: their requests compared where their tokens part."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from msgspec import Struct

from persist_cache.stability.causes.differences import Difference, differences_of
from persist_cache.stability.causes.kinds import Kind
from persist_cache.stability.causes.reading import Reading
from persist_cache.stability.causes.shapes import shared
from persist_cache.stability.lookalike import common_text, shown_apart

GENERATION_TOKENS = 16
"""Behind a prompt's last message: what asks for an answer, which the next prompt may print
otherwise."""
_CONTEXT = 40
_SHOWN = 60
_MATCHED = 32
_SURE = 4
"""So many characters around a place say that it is the one where the tokens part."""
_MOVED = (Kind.DATE, Kind.ENV)


class Parting(Struct, frozen=True):
    """Where the tokens of two prompts part.

    Attributes:
        position: Tokens that both begin with.
        old_tokens: Length of the earlier prompt.
        new_tokens: Length of the later one.
        before: Text right before the parting, or "" if it is not known.
        old: The earlier prompt goes on so.
        new: The later one goes on so.
    """

    position: int
    old_tokens: int
    new_tokens: int
    before: str = ""
    old: str = ""
    new: str = ""

    @property
    def lost_tokens(self) -> int:
        """Tokens that would have been found, were the earlier prompt the beginning of this one."""
        return max(0, min(self.old_tokens, self.new_tokens - 1) - self.position)


class Cause(Struct, frozen=True):
    """Why a prompt parts from an earlier one, where, and what would mend it.

    Attributes:
        kind: What it is.
        where: The part of the request: `model`, `salt`, `option`, `tools`, `system`, `messages`, or
            "" if the requests do not differ.
        at: The place in the body, such as `messages.3.content.1`, or "".
        role: Of the message, or "".
        character: Of that text, where it differs; None where there is no text.
        position: The token.
        lost_tokens: Tokens behind it that the earlier prompt has, and that were not reused.
        before: Text in front of the place; on one line, with escapes for what cannot be seen.
        old: The earlier text from there.
        new: The later text from there.
        repairs: Options of `--stabilize` that would mend it.
        switches: What turns it off in the client.
        also: Kinds of what differs further on in the same text.
    """

    kind: Kind
    where: str
    at: str
    role: str
    character: int | None
    position: int
    lost_tokens: int
    before: str = ""
    old: str = ""
    new: str = ""
    repairs: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    also: tuple[Kind, ...] = ()

    @property
    def sentence(self) -> str:
        """What it is, for people."""
        said = self.kind.known.sentence
        return f"{said[:1].upper()}{said[1:]}."


def cause_of(old: Reading, new: Reading, parting: Parting) -> Cause | None:
    """Name why the later of two prompts parts from the earlier one.

    Args:
        old: The earlier request.
        new: The later one.
        parting: Where their tokens part.

    Returns:
        The cause; None if the later prompt goes on from the end of the earlier one.
    """
    repaired = old.repaired & new.repaired
    found = [one for one in differences_of(old, new) if not _is_undone(one, repaired)]
    first = _at_parting(found, parting)
    if first is not None:
        is_first = bool(new.messages) and f"{first.at}.".startswith(f"{new.messages[0].at}.")
        return _cause(first, parting, repaired, is_first=is_first)
    if parting.position >= min(parting.old_tokens - GENERATION_TOKENS, parting.new_tokens - 1):
        return None
    return _cause(Difference(_of_template(old, new, parting), "", ""), parting)


def _is_undone(one: Difference, repaired: Collection[str]) -> bool:
    """Whether repairs made the same of both texts; what they moved differs elsewhere now."""
    kinds = {one.kind, *one.also}
    return all(kind.known.repair in repaired for kind in kinds) and not kinds & set(_MOVED)


def _of_template(old: Reading, new: Reading, parting: Parting) -> Kind:
    """Why prompts part of which one request only goes on from the other."""
    texts = (
        f"{parting.before[-_CONTEXT:]}{parting.old}",
        f"{parting.before[-_CONTEXT:]}{parting.new}",
    )
    if any("think" in text or "reasoning" in text for text in texts):
        return Kind.THINKING
    later = [
        sum(message.role in ("system", "developer") for message in one.messages)
        for one in (old, new)
    ]
    if later[1] > later[0]:
        return Kind.INLINE_SYSTEM
    if old.has_thoughts or new.has_thoughts:
        return Kind.THINKING
    if later[1]:
        return Kind.INLINE_SYSTEM
    return Kind.TEMPLATE


def _at_parting(found: Sequence[Difference], parting: Parting) -> Difference | None:
    """The difference because of which the tokens part."""
    textless = next((one for one in found if one.where in ("model", "salt")), None)
    if textless is not None or len(found) < 2:
        return textless or next(iter(found), None)
    known = common_text(parting.before + parting.old, parting.before + parting.new)
    left = (parting.before + parting.old)[:known]
    old, new = (parting.before + parting.old)[known:], (parting.before + parting.new)[known:]
    scores = [0 if one.where == "option" else _matched(one, left, old, new) for one in found]
    best = max(scores)
    if best >= _SURE:
        return found[scores.index(best)]
    return found[0]


def _matched(one: Difference, left: str, old: str, new: str) -> int:
    """How many characters around a difference are those around the parting."""
    head = one.new[max(0, one.character - _MATCHED) : one.character]
    pairs = zip(reversed(head), reversed(left), strict=False)
    before = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    sides = ((one.old, old), (one.new, new))
    return before + sum(
        shared(text[one.character : one.character + _MATCHED], said[:_MATCHED])
        for text, said in sides
    )


def _cause(
    one: Difference, parting: Parting, repaired: Collection[str] = (), *, is_first: bool = False
) -> Cause:
    # It compiles what dates and folders look like, which no start of a server waits for.
    from persist_cache.stability.causes.mended import mends

    old, new = one.old[one.character :], one.new[one.character :]
    head = one.new[max(0, one.character - _CONTEXT) : one.character]
    shown = shown_apart(old[:_SHOWN], new[:_SHOWN])
    kinds = dict.fromkeys((one.kind, *one.also))
    position = 0 if one.where in ("model", "salt") else parting.position
    lost = max(0, min(parting.old_tokens, parting.new_tokens - 1) - position)
    has_text = bool(one.old or one.new) and one.where != "option"
    return Cause(
        kind=one.kind,
        where=one.where,
        at=one.at,
        role=one.role,
        character=one.character if has_text else None,
        position=position,
        lost_tokens=lost,
        before=shown_apart(head, "")[0],
        old=shown[0],
        new=shown[1],
        repairs=tuple(
            dict.fromkeys(
                kind.known.repair
                for kind in kinds
                if kind.known.repair not in repaired and mends(one, kind, is_first=is_first)
            )
        ),
        switches=tuple(kind.known.switch for kind in kinds if kind.known.switch),
        also=one.also,
    )
