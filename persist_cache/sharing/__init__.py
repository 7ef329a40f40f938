"""A `PromptCache` with a remote behind it: what it lacks is brought, what is used is published.

The cache knows of no remote, and a remote of no requests; here they meet. A server has one
`Sharing`, and so may any program:

    sharing = Sharing(cache)                      # the remote that the cache's store remembers
    brought = sharing.bring(model_key, tokens)    # before `cache.look_up`
"""

from persist_cache.sharing.behind import Sharing, Shown
from persist_cache.sharing.choice import NO_REMOTE, TIERS, RemoteChoice

__all__ = ["NO_REMOTE", "TIERS", "RemoteChoice", "Sharing", "Shown"]
