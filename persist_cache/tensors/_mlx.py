"""The one place that imports MLX, so that its absence is told in one sentence."""

from persist_cache.errors import MissingDependencyError

try:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import cache as mlx_cache
except ImportError as error:
    raise MissingDependencyError(
        f"KV caches need MLX, which cannot be imported ({error}): pip install mlx mlx-lm"
    ) from error

__all__ = ["mlx_cache", "mx", "tree_flatten"]
