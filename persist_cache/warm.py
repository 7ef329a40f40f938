"""Prefilling: what a prompt's system part is, and how a model is run over a prompt ahead of time.

The server, `warm` and the demo cut prompts at the same places and in chunks of the same size, so
that what one stores the others find.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persist_cache.entry import Tier
from persist_cache.errors import MissingDependencyError, ModelError
from persist_cache.fingerprint.value import Fingerprint, Identifier
from persist_cache.prefill import loading
from persist_cache.prefill.clock import PrefillClock, Rate, whole_s
from persist_cache.server import rendering
from persist_cache.server.rendering import Prompt, PromptRequest
from persist_cache.server.validation import RefusedError
from persist_cache.store.evict import REPLACED
from persist_cache.store.store import Store

DEFAULT_STEP_TOKENS = 2048
"""Tokens per model call while prefilling: `mlx_lm.server`'s default."""
WARM_STEP_TOKENS = 512
"""Tokens per call and commit of `warm`: smaller, since an interruption loses one step."""
PARTIAL_LABEL = "(partial)"
"""Label of an entry whose prefill was interrupted; the next `warm` goes on there."""

Message = Mapping[str, Any]


def load_model(
    model: str, adapter_path: str | None = None, *, identifier: Identifier | None = None
) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a folder or a hub id, and settle its identity.

    Args:
        model: Folder or hub id.
        adapter_path: Folder of an adapter, or None.
        identifier: Where the identity of `(model, adapter_path, None)` is settled; without one,
            for the whole process, as `persist_cache.load` does.

    Raises:
        ModelError: It cannot be found or loaded.
        MissingDependencyError: mlx-lm is not installed.
    """
    with model_errors(model):
        if identifier is None:
            return loading.load(model, adapter_path=adapter_path)
        import mlx_lm

        def read() -> tuple[Any, Any]:
            loaded = mlx_lm.load(model, adapter_path=adapter_path)
            loading.evaluate(loaded[0])
            return loaded[0], loaded[1]

        # First, or a hub id that is not here yet would be loaded twice.
        loading.fetch(model)
        return identifier.around_load((model, adapter_path, None), read)


def load_tokenizer(model: str, *, chat_template: str | None = None) -> Any:
    """Load a model's tokenizer without its weights.

    Args:
        model: Folder or hub id.
        chat_template: What to use instead of the model's own, or None.

    Raises:
        ModelError: It cannot be found or loaded.
        MissingDependencyError: mlx-lm is not installed.
    """
    with model_errors(model):
        from mlx_lm.utils import load_tokenizer

        return load_tokenizer(model, {"chat_template": chat_template} if chat_template else None)


@contextlib.contextmanager
def model_errors(model: str) -> Iterator[None]:
    """mlx-lm, transformers and the hub raise whatever they like; the user gets one sentence."""
    try:
        yield
    except MissingDependencyError:
        raise
    except ImportError as error:
        raise MissingDependencyError(
            "Running a model needs MLX and mlx-lm: pip install mlx mlx-lm."
        ) from error
    except Exception as error:
        if not Path(model).exists():
            raise ModelError(
                f"The model {model!r} is no folder here, and the hub does not know it or cannot be "
                "reached; name a folder with a model's files, or a hub id."
            ) from error
        said = str(error).strip().splitlines()
        detail = said[0].rstrip(".") if said else type(error).__name__
        raise ModelError(f"The model in {model} cannot be loaded: {detail}.") from error


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> Prompt:
    """Render a chat request as `mlx_lm.server` does, and find its system part.

    Raises:
        ModelError: The model has no chat template, or the template refuses the messages.
    """
    asked = PromptRequest(
        [dict(message) for message in messages],
        tools=[dict(tool) for tool in tools] if tools else None,
    )
    try:
        return rendering.render(tokenizer, asked, template_args=template_args)
    except RefusedError as refusal:
        raise ModelError(str(refusal)) from refusal


def common_prefix(*sequences: Sequence[int]) -> int:
    """Number of leading tokens that all sequences share."""
    count = 0
    for together in zip(*sequences, strict=False):
        if len(set(together)) > 1:
            break
        count += 1
    return count


@dataclass(frozen=True, slots=True)
class KVQuantization:
    """`mlx_lm.server`'s `--kv-bits`, `--kv-group-size` and `--quantized-kv-start`.

    Attributes:
        bits: Bits per element.
        group_size: Elements that share a scale.
        start: Tokens from which on the cache is quantized.
    """

    bits: int
    group_size: int = 64
    start: int = 5000


def new_cache(model: Any) -> list[Any]:
    """An empty cache for `model`, as mlx-lm makes it."""
    from mlx_lm.models.cache import make_prompt_cache

    return list(make_prompt_cache(model))


def prefill(
    model: Any,
    cache: list[Any],
    tokens: Sequence[int],
    *,
    step_tokens: int = DEFAULT_STEP_TOKENS,
    quantize: KVQuantization | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Run `model` over `tokens`, so that `cache` has seen all of them.

    Args:
        model: An mlx-lm model.
        cache: Its cache; changed in place, and evaluated.
        tokens: What comes next.
        step_tokens: Tokens per model call.
        quantize: Quantize the cache as `mlx_lm.generate` does, or not.
        progress: Called after each call with the tokens of it.
    """
    import mlx.core as mx
    from mlx_lm.generate import maybe_quantize_kv_cache

    for start in range(0, len(tokens), step_tokens):
        chunk = mx.array(list(tokens[start : start + step_tokens]))
        model(chunk[None], cache=cache)
        if quantize is not None:
            maybe_quantize_kv_cache(cache, quantize.start, quantize.group_size, quantize.bits)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
        if progress is not None:
            progress(chunk.size)


def snapshot(cache: list[Any]) -> list[Any]:
    """A copy to hand over while decoding goes on with the original; shared until then."""
    return copy.deepcopy(cache)


@dataclass(frozen=True, slots=True)
class Warmed:
    """What `warm` did.

    Attributes:
        entry: Id of the entry.
        num_tokens: Tokens that requests will find.
        found_tokens: Of these, stored before.
        nbytes: Bytes written.
        seconds: Time the prefill of the others took.
    """

    entry: str | None
    num_tokens: int
    found_tokens: int
    nbytes: int
    seconds: float


def warm(
    store: Store,
    fingerprint: Fingerprint,
    model: Any,
    tokens: Sequence[int],
    *,
    tier: Tier | str = Tier.SYSTEM,
    label: str = "",
    pinned: bool = False,
    expires: float | None = None,
    system_tokens: int = 0,
    step_tokens: int = WARM_STEP_TOKENS,
    quantize: KVQuantization | None = None,
    progress: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Warmed:
    """Prefill `tokens` and store them, chunk by chunk, so that an interruption loses one chunk.

    Args:
        store: An open store.
        fingerprint: Identity that `model` was loaded with, its KV options included.
        model: The model.
        tokens: The prefix to store.
        tier, label, pinned, expires: As in `Store.put`.
        system_tokens: Length of the system part of `tokens`. Where they go on behind it, an entry
            of its own is left there, as a server does: not every cache can be cut there later.
        step_tokens: Tokens per model call and per commit.
        quantize: How the server that will use it quantizes its KV, or None.
        progress: Called with the tokens done so far, those found on disk included.
        clock: Seconds by which prefill is timed.

    Raises:
        StoreError: The disk is full or failed; what was stored before stays.
        UnsupportedCacheError: The model's cache cannot be saved.
    """
    from persist_cache import tensors

    found = store.fetch(fingerprint, tokens, tensors.restore)
    cache, done = (new_cache(model), 0) if found is None else (found[0], found[1].num_tokens)
    found_s = 0.0 if found is None else found[1].saved_s
    timer, rate = PrefillClock(clock), Rate()
    found_tokens, nbytes = done, 0
    if progress is not None:
        progress(done)
    while True:
        end = min(done + step_tokens, len(tokens))
        if done < system_tokens:
            end = min(end, system_tokens)
        before = timer()
        with timer.running():
            prefill(model, cache, tokens[done:end], step_tokens=step_tokens, quantize=quantize)
        rate.add(end - done, timer() - before)
        last = end == len(tokens)
        tensors.prepare(cache, end)
        lasts = last or end == system_tokens
        computed = end - found_tokens
        result = store.put(
            fingerprint,
            tokens[:end],
            tensors.source(cache, end),
            tier=Tier.SYSTEM if lasts and not last else tier,
            prefill_s=whole_s(found_tokens, found_s, computed, timer(), rate) if computed else 0.0,
            label=label if last else "" if lasts else PARTIAL_LABEL,
            pinned=pinned and last,
            expires=expires if last else None,
        )
        nbytes += result.nbytes
        _drop_partial(store, fingerprint, tokens[:end], keep=result.entry)
        done = end
        if progress is not None:
            progress(done)
        if last:
            return Warmed(result.entry, len(tokens), found_tokens, nbytes, timer())


def _drop_partial(
    store: Store, fingerprint: Fingerprint, tokens: Sequence[int], keep: str | None
) -> None:
    """Forget the marks that earlier chunks left; their rows now belong to the longer entry."""
    for entry in store.match(fingerprint, tokens).entries:
        if entry != keep:
            with contextlib.suppress(KeyError):
                if store.get(entry).label == PARTIAL_LABEL:
                    store.evict([entry], reason=REPLACED)
