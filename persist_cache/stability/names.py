"""Names of the repairs: what options, headers, counters and explanations call them."""

from __future__ import annotations

import difflib

BILLING = "billing"
COUNTDOWN = "countdown"
INLINE_SYSTEM = "inline-system"
DATE = "date"
TOOLS = "tools"
REMINDERS = "reminders"
CLEARED = "cleared"
ENV = "env"
THINKING = "thinking"

REPAIRS = (BILLING, COUNTDOWN, INLINE_SYSTEM, DATE, TOOLS, REMINDERS, CLEARED, ENV, THINKING)
DEFAULTS = frozenset({BILLING, COUNTDOWN, INLINE_SYSTEM})
"""Done unless a request or the server says `none`; the others have to be asked for."""
ALL, NONE = "all", "none"


def parse_names(text: str) -> frozenset[str]:
    """The repairs that may be done, from a list of names.

    Args:
        text: Names separated by commas, which add to those that are done anyway; or `all`, or
            `none`.

    Raises:
        ValueError: There is no such repair; with a sentence that names the nearest.
    """
    names = [name.strip() for name in text.split(",")]
    if names == [NONE]:
        return frozenset()
    if names == [ALL]:
        return frozenset(REPAIRS)
    for name in names:
        if name in (ALL, NONE):
            raise ValueError(f"{name!r} stands alone; leave out the other names.")
        if name not in REPAIRS:
            known = f"one of {', '.join(REPAIRS)}, or {ALL}, or {NONE}"
            if not name:
                raise ValueError(f"a name is missing; it is {known}.")
            near = difflib.get_close_matches(name.lower(), (*REPAIRS, ALL, NONE), 1, cutoff=0.0)
            meant = f"did you mean {near[0]!r}? It is " if near else "it is "
            raise ValueError(f"there is no repair {name[:40]!r}; {meant}{known}.")
    return DEFAULTS.union(names)
