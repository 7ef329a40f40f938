"""What a ticket needs to know of its request: its form, and what its client asks of the cache.

`server/form.py` makes both; here is only what they answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from persist_cache.entry import Tier
from persist_cache.stability.conversation import Stabilized
from persist_cache.stability.moved import Moves


class Wishes(Protocol):
    """What the client asks of the cache."""

    @property
    def group(self) -> str:
        """That the request belongs to, or ""."""

    @property
    def only_marked(self) -> bool:
        """Whether nothing is to be kept but what ends at a mark."""

    def moved(self, done: Stabilized, /) -> None:
        """Note how the conversation was repaired before it is rendered."""

    def take(self, messages: Any, tools: Any, template_args: Mapping[str, Any], /) -> None:
        """Note what the prompt was made of."""

    def cuts(
        self, tokenizer: Any, prompt: Sequence[int], system_tokens: int, /, *, trimmable: bool
    ) -> tuple[list[int], int]:
        """Further places where the prompt is to be kept, and how much of it is system part."""

    def marked(self, tokenizer: Any, prompt: Sequence[int], /) -> tuple[list[int], int]:
        """All places that are marked, and how much of the prompt is system part."""

    def keep_s(self, *, has_head: bool) -> Mapping[Tier, int]:
        """For how long the client asks to keep what is stored, by tier."""


class Form(Wishes, Protocol):
    """How a request of a protocol that is not upstream's is put before a chat template."""

    def stabilize(self, chosen: Collection[str], moves: Moves | None, /, *, keep: bool) -> None:
        """Repair what breaks the prefix that the client's requests have in common."""

    def fit(self, tokenizer: Any, /) -> Any:
        """The messages, the tools and the template's options, as the template takes them."""

    def refuse_unfit(self) -> None:
        """Refuse what the template lacks of what is asked for, as it was fitted."""

    @property
    def repaired(self) -> tuple[str, ...]:
        """Names of what was changed in the request."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of what was asked for and is not done."""
