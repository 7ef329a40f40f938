"""A `PromptCache` with a remote behind it: what it lacks is brought, what is used is published.

The cache knows of no remote, and a remote of no requests; here they meet. A server has one
`Sharing`, and so may any program:

    sharing = Sharing(cache)                      # the remote that the cache's store remembers
    brought = sharing.bring(model_key, tokens)    # for `cache.look_up(…, remote=brought)`
"""

from typing import TYPE_CHECKING, Any

from persist_cache.sharing.choice import NO_REMOTE, TIERS, RemoteChoice

if TYPE_CHECKING:
    from persist_cache.sharing.behind import Sharing, Shown

__all__ = ["NO_REMOTE", "TIERS", "RemoteChoice", "Sharing", "Shown"]


def __getattr__(name: str) -> Any:
    """Import what needs a cache when it is asked for: commands have settings alone."""
    if name in ("Sharing", "Shown"):
        from persist_cache.sharing import behind

        return getattr(behind, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
