"""These tests need the Darwin lane's LMDB, pages and view; without it there is nothing to try."""

from __future__ import annotations

import sys

_is_lane = any(hasattr(finder, "is_darwin_view") for finder in sys.meta_path)
collect_ignore_glob = [] if _is_lane else ["test_*.py"]
