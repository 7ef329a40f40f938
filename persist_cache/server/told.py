"""What a server's log says of a request: one line, without a word of the prompt."""

from __future__ import annotations

from persist_cache.server.recent.records import Outcome

_ENDS = {"done": "", "failed": "; it failed", "left": "; its client left"}


def line_of(path: str, outcome: Outcome) -> str:
    """One line about a request that is over: what was reused, tokens, seconds, why not more.

    Args:
        path: That it was sent to.
        outcome: What came of it.
    """
    fetch, total = outcome.fetch, len(outcome.tokens)
    reason = ""
    if fetch is None:
        found = "it did not come to a prompt" if not total else "it was not begun"
    elif fetch.num_tokens:
        found = f"{fetch.source} hit, {fetch.num_tokens:,} of {total:,} prompt tokens reused"
        reason = fetch.reason
    else:
        found, reason = f"miss, {total:,} prompt tokens computed", fetch.reason
    first = outcome.first_token_s
    after = "" if first is None else f"first after {first:.2f} s, "
    said = f"{path}: {found}, {outcome.output_tokens:,} generated, {after}{outcome.total_s:.2f} s"
    if outcome.repaired:
        said += f"; repaired: {', '.join(outcome.repaired)}"
    return f"{said}{f'; {reason}' if reason else ''}{_ENDS[outcome.state]}"
