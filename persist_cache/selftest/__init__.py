"""What only a user's own machine can tell: checks of disk, index, processes, device and server.

Each check is a function of one module of this package. `runner` starts each in a process of its
own, in a temporary folder, so that one that hangs or crashes is red and the others go on.
"""

from persist_cache.selftest.checks import CHECKS, Check, Outcome, as_json
from persist_cache.selftest.runner import run
from persist_cache.selftest.words import meaning, verdict

__all__ = ["CHECKS", "Check", "Outcome", "as_json", "meaning", "run", "verdict"]
