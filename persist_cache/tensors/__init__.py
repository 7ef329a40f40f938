"""mlx-lm caches as named tensors, and back.

A cache is a list of layers. Each layer either has *rows* (row `i` of its buffers belongs to token
`i`, so any run of tokens can be cut out, and any position resumed) or a *state* that is good at
one position only. `source` turns a cache into bytes without copying them, `restore` reads bytes
into new caches that are ready to decode; `layers` holds all that is known of each cache class.

This package is the only importer of `mlx.core` and `mlx_lm.models.cache` in the library.
"""

from persist_cache.tensors.live import (
    LayerStatus,
    buffers,
    can_trim,
    copy_cache,
    group_size,
    nbytes,
    num_tokens,
    prepare,
    supported,
    trim,
)
from persist_cache.tensors.restore import restore
from persist_cache.tensors.sharing import condense, extract, is_pieced, join, known_rows
from persist_cache.tensors.source import CacheSource, source
from persist_cache.tensors.witness import Witness, address_of, witness

__all__ = [
    "CacheSource",
    "LayerStatus",
    "Witness",
    "address_of",
    "buffers",
    "can_trim",
    "condense",
    "copy_cache",
    "extract",
    "group_size",
    "is_pieced",
    "join",
    "known_rows",
    "nbytes",
    "num_tokens",
    "prepare",
    "restore",
    "source",
    "supported",
    "trim",
    "witness",
]
