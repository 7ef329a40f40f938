from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from persist_cache import fs, tensors
from persist_cache.blobs.folder import BlobFolder
from persist_cache.blobs.header import DTYPE_BYTES, BlobHeader
from persist_cache.blobs.reader import BlobReader
from persist_cache.blobs.writer import BlobWriter
from persist_cache.codec import Payload
from persist_cache.errors import CorruptBlobError, MissingDependencyError, UnsupportedCacheError
from persist_cache.tensors import pool
from persist_cache.tensors.empty import empty
from persist_cache.tensors.layers import DTYPES
from tests import tiny_caches
from tests.examples import examples
from tests.tiny_caches import CACHES, MODELS, feed, new_cache
from tests.waiting import until


class Disk:
    """Blobs written and read as the store would."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.folder = BlobFolder(root)
        self.folder.create()
        self.stack = stack

    def write(self, source: tensors.CacheSource, payload: Payload, start: int, end: int) -> Path:
        header = BlobHeader(
            kind="run" if start < end else "checkpoint",
            complete=source.complete,
            fingerprint="",
            identity="{}",
            layout=source.layout,
            detail=payload.detail,
            start=start,
            end=end,
            prefix="",
            parent="",
            tier="user",
            entry=False,
            created=0.0,
        )
        with BlobWriter(self.folder) as writer:
            writer.write(header, payload.tensors)
            writer.publish()
            writer.keep()
            return writer.path

    def open(self, path: Path) -> BlobReader:
        return self.stack.enter_context(BlobReader(path))

    def runs(
        self, source: tensors.CacheSource, cuts: Sequence[int]
    ) -> list[tuple[BlobReader, int]]:
        """One run between each two cuts, used as a whole."""
        spans = list(itertools.pairwise(cuts))
        paths = [self.write(source, source.rows(start, end), start, end) for start, end in spans]
        return [
            (self.open(path), end - start) for path, (start, end) in zip(paths, spans, strict=True)
        ]

    def checkpoint(self, source: tensors.CacheSource) -> BlobReader | None:
        payload = source.checkpoint()
        if payload is None:
            return None
        end = source.num_tokens
        return self.open(self.write(source, payload, end, end))

    def round_trip(self, cache: list[Any], num_tokens: int, cuts: Sequence[int]) -> list[Any]:
        source = tensors.source(cache, num_tokens)
        return tensors.restore(self.runs(source, cuts), self.checkpoint(source), num_tokens)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    monkeypatch.setattr(fs, "sync", lambda fd: None)
    with ExitStack() as stack:
        yield Disk(tmp_path, stack)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """On the CPU, `mx.compile` starts a C++ compiler for every function."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def filled(name: str) -> tuple[list[Any], int]:
    """The cache `name` after its chunks, prepared, and the number of its tokens."""
    specs, chunks = CACHES[name]
    cache = new_cache(specs)
    for seed, num_tokens in enumerate(chunks):
        feed(cache, specs, num_tokens, seed)
    return cache, tensors.prepare(cache, sum(chunks))


def to_bytes(arrays: Sequence[Any]) -> list[tuple[tuple[int, ...], Any, bytes]]:
    """What makes arrays equal bit for bit, NaN included."""
    owned: list[Any] = [mx.contiguous(array) for array in arrays]
    mx.eval(owned)
    return [(tuple(a.shape), a.dtype, memoryview(a).tobytes()) for a in owned]


def held(cache: Sequence[Any]) -> list[Any]:
    """Classes, numbers and valid rows of a cache, as far as the next tokens can see them."""
    facts: list[Any] = []
    for layer in cache:
        facts.append(type(layer))
        if isinstance(layer, CacheList):
            facts.append(held(layer.caches))
        elif isinstance(layer, ArraysCache):
            facts.append([None if slot is None else to_bytes([slot]) for slot in layer.cache])
            facts += [layer.left_padding, layer.lengths]
        else:
            numbers = {name: value for name, value in vars(layer).items() if type(value) is int}
            rows = [] if layer.keys is None else _valid_rows(layer, numbers)
            facts += [numbers, to_bytes(rows)]
    return facts


def _valid_rows(layer: Any, numbers: dict[str, int]) -> list[Any]:
    if isinstance(layer, QuantizedKVCache):
        return [array[..., : layer.offset, :] for array in (*layer.keys, *layer.values)]
    both = [layer.keys, layer.values]
    if isinstance(layer, RotatingKVCache) and layer.keep == 0:
        # What is older than the window is dropped before anything reads it.
        numbers["_idx"] = min(layer._idx, layer.max_size)
        if layer._idx == layer.keys.shape[2] and layer.offset >= layer.max_size:
            return [array[..., -layer.max_size :, :] for array in both]
    num_rows = layer.offset - getattr(layer, "start_position", 0)
    return [array[..., :num_rows, :] for array in both]


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("num_runs", [1, 2, 7])
def test_restored_cache_holds_the_same_bits(disk: Disk, name: str, num_runs: int) -> None:
    cache, num_tokens = filled(name)
    cuts = [num_tokens * run // num_runs for run in range(num_runs + 1)]

    restored = disk.round_trip(cache, num_tokens, cuts)

    assert held(restored) == held(cache)
    assert tensors.num_tokens(restored) == tensors.num_tokens(cache)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("chunks", [(1, 1, 1, 9, 1, 40, 1), (5, 1, 1, 33, 1), (300, 1)])
def test_restored_cache_continues_bit_for_bit(
    disk: Disk, name: str, chunks: tuple[int, ...]
) -> None:
    specs, _ = CACHES[name]
    cache, num_tokens = filled(name)
    live = tensors.copy_cache(cache)

    restored = disk.round_trip(cache, num_tokens, [0, num_tokens // 3, num_tokens])

    for seed, length in enumerate(chunks):
        seen_live = feed(live, specs, length, 100 + seed)
        seen_restored = feed(restored, specs, length, 100 + seed)
        assert to_bytes(seen_restored) == to_bytes(seen_live)
    assert held(restored) == held(live)


@pytest.mark.parametrize("name", [name for name in CACHES if "wrapped" in name or "slid" in name])
def test_restored_window_can_be_stored_again(disk: Disk, name: str) -> None:
    specs, _ = CACHES[name]
    cache, num_tokens = filled(name)
    live = tensors.copy_cache(cache)

    restored = disk.round_trip(cache, num_tokens, [0, num_tokens])
    feed(restored, specs, 3, 7)
    again = disk.round_trip(
        restored, tensors.prepare(restored, num_tokens + 3), [0, num_tokens + 3]
    )

    feed(live, specs, 3, 7)
    assert to_bytes(feed(again, specs, 1, 8)) == to_bytes(feed(live, specs, 1, 8))


@pytest.mark.parametrize(
    "name", ["kv", "arrays-and-kv", *(name for name in CACHES if name.startswith("rotating-wr"))]
)
def test_restored_cache_joins_a_batch_like_the_live_one(disk: Disk, name: str) -> None:
    cache, num_tokens = filled(name)

    restored = disk.round_trip(cache, num_tokens, [0, num_tokens])

    for live, layer in zip(cache, restored, strict=True):
        if isinstance(live, ArraysCache):
            live.cache.pop()  # upstream cannot merge a slot that is None everywhere
            layer.cache.pop()
        merged = [type(one).merge([one, one]).extract(1) for one in (live, layer)]
        assert held(merged[1:]) == held(merged[:1])


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(255, 256), (256, 512), (300, 512)])
def test_restored_buffers_have_zeroed_room_for_the_next_token(
    disk: Disk, num_tokens: int, num_rows: int
) -> None:
    specs, _ = CACHES["kv"]
    cache = new_cache(specs)
    feed(cache, specs, num_tokens, 1)
    tensors.prepare(cache, num_tokens)

    restored = disk.round_trip(cache, num_tokens, [0, num_tokens])

    for layer in restored:
        assert layer.keys.shape[2] == layer.values.shape[2] == num_rows
        assert not layer.keys[..., num_tokens:, :].any()
        assert layer.keys is not layer.values


COMPLETE = [name for name in CACHES if tensors.source(*filled(name)).complete]


def test_classes_and_states_are_told_apart() -> None:
    assert set(CACHES) - set(COMPLETE) == {
        "rotating-full",
        "rotating-wrapped-by-chunks",
        "rotating-wrapped-by-chunks-keep-4",
        "rotating-wrapped-by-steps",
        "rotating-wrapped-by-steps-keep-4",
        "rotating-wrapped-by-both",
        "rotating-and-kv",
        "chunked-slid",
        "arrays",
        "arrays-and-kv",
        "list-of-arrays-and-kv",
        "list-of-arrays-and-wrapped",
    }


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.parametrize("num_tokens", [2, 17, 39])
def test_complete_cache_resumes_within_a_run(disk: Disk, name: str, num_tokens: int) -> None:
    specs, _ = CACHES[name]
    cache, length = filled(name)
    source = tensors.source(cache, length)
    runs = disk.runs(source, [0, 10, 20, length])
    needed = [run for run in runs if run[0].header.start < num_tokens]
    last = needed[-1][0]
    needed[-1] = (last, num_tokens - last.header.start)

    restored = tensors.restore(needed, None, num_tokens)

    assert tensors.trim(cache, length - num_tokens) == length - num_tokens
    assert held(restored) == held(cache)
    for seed, more in enumerate((1, 20, 1)):
        assert to_bytes(feed(restored, specs, more, seed)) == to_bytes(
            feed(cache, specs, more, seed)
        )


@pytest.fixture(scope="module")
def prefix_sources() -> list[tuple[list[Any], int, tensors.CacheSource]]:
    made = []
    for name in COMPLETE:
        cache, num_tokens = filled(name)
        made.append((cache, num_tokens, tensors.source(cache, num_tokens)))
    return made


@settings(
    max_examples=examples(20, 40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_cuts_and_any_length(disk: Disk, prefix_sources: Any, data: st.DataObject) -> None:
    cache, length, source = data.draw(st.sampled_from(prefix_sources))
    inner = data.draw(st.sets(st.integers(1, length - 1), max_size=5))
    num_tokens = data.draw(st.integers(2, length))
    cuts = [0, *sorted(cut for cut in inner if cut < num_tokens), length]
    runs = disk.runs(source, cuts)
    last = runs[-1][0]
    runs[-1] = (last, num_tokens - last.header.start)

    restored = tensors.restore(runs, None, num_tokens)

    expected = tensors.copy_cache(cache)
    tensors.trim(expected, length - num_tokens)
    assert held(restored) == held(expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prefill", [(30,), (20, 9, *[1] * 8)])
def test_model_gives_the_same_logits(
    disk: Disk, uncompiled: None, name: str, prefill: tuple[int, ...]
) -> None:
    """vllm-mlx: a rotating cache restored as a plain one."""
    model = tiny_caches.model(name)
    mx.random.seed(2)
    live = make_prompt_cache(model)
    for length in prefill:
        mx.eval(model(mx.random.randint(0, 64, (1, length)), cache=live))
    num_tokens = tensors.prepare(live, sum(prefill))

    restored = disk.round_trip(live, num_tokens, [0, 7, 21, num_tokens])

    for length in (1, 1, 12, 1, 1):
        tokens = mx.random.randint(0, 64, (1, length))
        assert to_bytes([model(tokens, cache=restored)]) == to_bytes([model(tokens, cache=live)])


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "deepseek_v32"])
def test_model_resumes_within_a_run_as_after_a_trim(
    disk: Disk, uncompiled: None, name: str
) -> None:
    model = tiny_caches.model(name)
    live = make_prompt_cache(model)
    mx.eval(model(mx.arange(30)[None], cache=live))
    source = tensors.source(live, tensors.prepare(live, 30))
    (reader, _), *_ = disk.runs(source, [0, 30])

    restored = tensors.restore([(reader, 11)], None, 11)

    tensors.trim(live, 19)
    for length in (1, 9, 1):
        tokens = mx.arange(length)[None]
        assert to_bytes([model(tokens, cache=restored)]) == to_bytes([model(tokens, cache=live)])


def test_quantized_model_gives_the_same_logits(disk: Disk, uncompiled: None) -> None:
    config = {**MODELS["llama"][1], "hidden_size": 128, "head_dim": 64}
    MODELS["llama-wide"] = ("llama", config, mx.bfloat16)
    model = tiny_caches.model("llama-wide")
    del MODELS["llama-wide"]
    live = make_prompt_cache(model)
    mx.eval(model(mx.arange(30)[None], cache=live))
    live = [layer.to_quantized(group_size=32, bits=4) for layer in live]
    num_tokens = tensors.prepare(live, 30)

    restored = disk.round_trip(live, num_tokens, [0, 11, 30])

    for length in (1, 12, 1):
        tokens = mx.arange(length)[None]
        assert to_bytes([model(tokens, cache=restored)]) == to_bytes([model(tokens, cache=live)])


def test_window_that_fills_up_between_two_turns(disk: Disk) -> None:
    specs = CACHES["rotating-and-kv"][0]
    live = new_cache(specs)
    feed(live, specs, 20, 1)
    first = tensors.source(live, tensors.prepare(live, 20))
    runs = disk.runs(first, [0, 20])
    feed(live, specs, 30, 2)
    second = tensors.source(live, tensors.prepare(live, 50))
    runs.append((disk.open(disk.write(second, second.rows(20, 50), 20, 50)), 30))

    restored = tensors.restore(runs, disk.checkpoint(second), 50)

    assert first.layout == second.layout
    assert (first.complete, second.complete) == (True, False)
    assert {tensor.name for tensor in second.rows(20, 50).tensors} == {
        "layers.1.keys",
        "layers.1.values",
    }
    assert to_bytes(feed(restored, specs, 1, 3)) == to_bytes(feed(live, specs, 1, 3))


def test_checkpoint_alone_restores_recurrent_layers(disk: Disk) -> None:
    cache, num_tokens = filled("arrays")
    cache[0].lengths = mx.array([7])
    cache[1].left_padding = mx.array([0, 3])
    tensors.prepare(cache, num_tokens)
    source = tensors.source(cache, num_tokens)

    restored = tensors.restore([], disk.checkpoint(source), num_tokens)

    assert source.rows(0, num_tokens).tensors == []
    assert restored[0].lengths.tolist() == [7]
    assert restored[1].left_padding.tolist() == [0, 3]
    assert restored[0].cache[2] is None
    assert to_bytes(restored[1].cache[:2]) == to_bytes(cache[1].cache[:2])


@pytest.mark.parametrize("name", CACHES)
def test_layout_does_not_change_during_a_conversation(name: str) -> None:
    specs, _ = CACHES[name]
    cache, num_tokens = filled(name)
    before = tensors.source(cache, num_tokens).layout

    feed(cache, specs, 300, 1)
    feed(cache, specs, 1, 2)

    assert tensors.source(cache, tensors.prepare(cache, num_tokens + 301)).layout == before


def test_layouts_differ_by_class_geometry_and_numbers() -> None:
    layouts = [tensors.source(*filled(name)).layout for name in CACHES]

    same = {
        layout: [name for name, other in zip(CACHES, layouts, strict=True) if other == layout]
        for layout in layouts
    }

    assert sorted(names for names in same.values() if len(names) > 1) == [
        ["chunked-long-first-chunk", "chunked-slid"],
        ["rotating-wrapped-by-chunks", "rotating-wrapped-by-steps"],
        [
            "rotating-wrapped-by-chunks-keep-4",
            "rotating-wrapped-by-steps-keep-4",
            "rotating-wrapped-by-both",
        ],
    ]
    assert all(json.loads(layout) for layout in layouts)


@pytest.mark.parametrize("name", CACHES)
def test_sizes_are_those_of_the_payloads(name: str) -> None:
    cache, num_tokens = filled(name)
    source = tensors.source(cache, num_tokens)

    payload = source.checkpoint()

    assert source.nbytes == tensors.nbytes(cache)
    assert source.checkpoint_nbytes == (payload.nbytes if payload else 0)
    with pytest.raises(ValueError, match="not within"):
        source.rows(0, num_tokens + 1)


def test_no_padding_and_no_trimmed_rows_are_stored() -> None:
    cache = [KVCache()]
    cache[0].update_and_fetch(mx.ones((1, 2, 9, 4)), mx.ones((1, 2, 9, 4)))
    tensors.trim(cache, 4)

    source = tensors.source(cache, tensors.prepare(cache, 5))

    assert source.rows(0, 5).nbytes == 2 * 2 * 5 * 4 * 4
    assert source.nbytes == 2 * 2 * 256 * 4 * 4


def test_window_stores_what_it_still_needs() -> None:
    cache = [RotatingKVCache(16)]
    cache[0].update_and_fetch(mx.ones((1, 1, 100, 4)), mx.ones((1, 1, 100, 4)))

    source = tensors.source(cache, tensors.prepare(cache, 100))

    assert source.checkpoint_nbytes == 2 * 16 * 4 * 4


@pytest.mark.parametrize("name", CACHES)
def test_source_keeps_its_bytes_while_the_cache_goes_on(name: str) -> None:
    specs, _ = CACHES[name]
    cache, num_tokens = filled(name)
    source = tensors.source(cache, num_tokens)
    payloads = [source.rows(0, num_tokens), source.checkpoint() or Payload([])]
    before = [b"".join(t.pieces) for payload in payloads for t in payload.tensors]

    for seed in range(3):
        feed(cache, specs, 1, seed)
    feed(cache, specs, 20, 9)

    assert [b"".join(t.pieces) for p in payloads for t in p.tensors] == before
    again = [source.rows(0, num_tokens), source.checkpoint() or Payload([])]
    assert [b"".join(t.pieces) for p in again for t in p.tensors] == before


def test_source_copies_nothing() -> None:
    cache = [KVCache() for _ in range(4)]
    for layer in cache:
        layer.update_and_fetch(mx.ones((1, 8, 2048, 64)), mx.ones((1, 8, 2048, 64)))
    tensors.prepare(cache, 2048)
    before = mx.get_active_memory()

    source = tensors.source(cache, 2048)
    payload = source.rows(100, 2000)

    assert payload.nbytes > 7_000_000
    assert mx.get_active_memory() == before


def _num_os_threads(expected: int = 0) -> int:
    """Threads of this process; one that was joined may take a moment to disappear."""

    def number() -> int:
        return sum(1 for _ in Path("/proc/self/task").iterdir())

    if expected:
        until(lambda: number() <= expected, f"more than {expected} threads stay")
    return number()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads by /proc")
def test_writing_runs_no_mlx_operation_and_reading_no_new_threads(disk: Disk) -> None:
    cache, num_tokens = filled("list-of-arrays-and-wrapped")
    source = tensors.source(cache, num_tokens)
    opened: list[Any] = []

    def write() -> None:
        opened.append(disk.runs(source, [0, 9, num_tokens]))
        opened.append(disk.checkpoint(source))

    def read() -> None:
        tensors.restore(opened[0], opened[1], num_tokens, threads=4)

    # Every thread that runs one operation leaves one of MLX's behind.
    threads = _num_os_threads()
    _in_thread(write)
    assert _num_os_threads(threads) == threads
    read()
    threads = _num_os_threads()
    for _ in range(3):
        _in_thread(read)
        read()
    assert _num_os_threads(threads) == threads


def test_cache_restored_on_one_thread_is_used_on_another(disk: Disk) -> None:
    specs, _ = CACHES["list-of-arrays-and-wrapped"]
    cache, num_tokens = filled("list-of-arrays-and-wrapped")
    source = tensors.source(cache, num_tokens)
    runs, checkpoint = disk.runs(source, [0, 9, num_tokens]), disk.checkpoint(source)
    restored: list[Any] = []

    _in_thread(lambda: restored.extend(tensors.restore(runs, checkpoint, num_tokens)))

    assert to_bytes(feed(restored, specs, 1, 3)) == to_bytes(feed(cache, specs, 1, 3))


def test_loads_at_the_same_time_do_not_mix(disk: Disk) -> None:
    names = ["kv", "quantized-8", "list-of-kv-and-kv", "arrays-and-kv"]
    caches = [filled(name) for name in names]
    sources = [tensors.source(*cache) for cache in caches]
    blobs = [(disk.runs(s, [0, 9, s.num_tokens]), disk.checkpoint(s)) for s in sources]
    wrong: list[str] = []

    def load(index: int) -> None:
        for _ in range(5):
            restored = tensors.restore(*blobs[index], sources[index].num_tokens, threads=2)
            if held(restored) != held(caches[index][0]):
                wrong.append(names[index])

    threads = [threading.Thread(target=load, args=(index,)) for index in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


@pytest.mark.parametrize("name", ["kv", "quantized-4", "list-of-arrays-and-wrapped"])
def test_every_flipped_byte_is_noticed(disk: Disk, name: str) -> None:
    cache, num_tokens = filled(name)
    source = tensors.source(cache, num_tokens)
    runs, checkpoint = disk.runs(source, [0, 9, num_tokens]), disk.checkpoint(source)

    for reader in [*(reader for reader, _ in runs), *([checkpoint] if checkpoint else [])]:
        for info in reader.header.tensors.values():
            for offset in (info.offset, info.offset + info.nbytes - 1):
                with reader.path.open("r+b") as file:
                    file.seek(offset)
                    byte = file.read(1)
                    file.seek(offset)
                    file.write(bytes([byte[0] ^ 1]))
                    file.flush()
                    with pytest.raises(CorruptBlobError) as caught:
                        tensors.restore(runs, checkpoint, num_tokens)
                    file.seek(offset)
                    file.write(byte)
                assert caught.value.path == reader.path

    assert held(tensors.restore(runs, checkpoint, num_tokens)) == held(cache)


def test_flipped_byte_in_rows_that_are_not_used_is_noticed(disk: Disk) -> None:
    cache, num_tokens = filled("kv")
    ((reader, _),) = disk.runs(tensors.source(cache, num_tokens), [0, num_tokens])
    info = reader.header.tensors["layers.1.values"]
    with reader.path.open("r+b") as file:
        file.seek(info.offset + info.nbytes - 1)
        file.write(b"\xa5")

    with pytest.raises(CorruptBlobError, match=r"layers\.1\.values"):
        tensors.restore([(reader, 5)], None, 5)


def test_file_cut_short_after_it_was_opened(disk: Disk) -> None:
    cache, num_tokens = filled("kv")
    ((reader, used),) = disk.runs(tensors.source(cache, num_tokens), [0, num_tokens])
    os.truncate(reader.path, reader.nbytes - 100)

    with pytest.raises(CorruptBlobError, match="ends within"):
        tensors.restore([(reader, used)], None, num_tokens)


def test_runs_that_do_not_fit_are_refused(disk: Disk) -> None:
    source = tensors.source(*filled("kv"))
    other = tensors.source(*filled("kv-float16"))
    runs = disk.runs(source, [0, 10, 20, 30])
    foreign = disk.runs(other, [0, 10])

    def refused(runs: Any, num_tokens: int) -> str:
        with pytest.raises(CorruptBlobError) as caught:
            tensors.restore(runs, None, num_tokens)
        return caught.value.reason

    assert "not 10 from 0 on" in refused(runs[1:], 20)
    assert "not 10 from 10 on" in refused([runs[0], runs[2]], 20)
    assert "not 10 from 5 on" in refused([(runs[0][0], 5), runs[1]], 15)
    assert "not 11 from 0 on" in refused([(runs[0][0], 11)], 11)
    assert "instead of 25" in refused(runs, 25)
    assert "layout" in refused([foreign[0], runs[1]], 20)
    with pytest.raises(ValueError, match="neither"):
        tensors.restore([], None, 0)


def test_missing_state_is_refused(disk: Disk) -> None:
    cache, num_tokens = filled("rotating-and-kv")
    source = tensors.source(cache, num_tokens)
    runs, checkpoint = disk.runs(source, [0, num_tokens]), disk.checkpoint(source)
    first = [(runs[0][0], 20)]

    with pytest.raises(CorruptBlobError, match=r"lacks tensor 'layers\.0\.keys'"):
        tensors.restore(runs, None, num_tokens)
    with pytest.raises(CorruptBlobError, match="another token"):
        tensors.restore(first, checkpoint, 20)
    with pytest.raises(CorruptBlobError, match="lacks the state of layer 1"):
        tensors.restore([], checkpoint, num_tokens)


def _edit_layout(layout: str, edit: Callable[[Any], None]) -> str:
    decoded = json.loads(layout)
    edit(decoded)
    return json.dumps(decoded)


@pytest.mark.parametrize(
    "edit",
    [
        lambda layers: layers[0].update({"class": "LayerCache"}),
        lambda layers: layers[0].update({"class": "KVCache", "scalars": {"max_size": 3}}),
        lambda layers: layers[0]["scalars"].pop("keep"),
        lambda layers: layers[0]["rows"]["keys"].update(dtype="F8_E4M3"),
        lambda layers: layers[0]["rows"]["keys"].update(dim=9),
        lambda layers: layers[0].update(lag=1),
        lambda layers: layers[0].update(lag=-1),
        lambda layers: layers[0].pop("class"),
        lambda layers: layers[1].update(surprise=1),
        lambda layers: layers.pop(0),
        lambda layers: layers.clear(),
    ],
)
def test_header_that_describes_another_cache_is_refused(
    disk: Disk, edit: Callable[[Any], None]
) -> None:
    cache, num_tokens = filled("rotating-and-kv")
    source = tensors.source(cache, num_tokens)
    source.layout = _edit_layout(source.layout, edit)
    runs, checkpoint = disk.runs(source, [0, num_tokens]), disk.checkpoint(source)

    with pytest.raises(CorruptBlobError):
        tensors.restore(runs, checkpoint, num_tokens)


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("rotating-full", "nonsense"),
        ("rotating-full", '{"states":{"0":{}}}'),
        ("rotating-full", '{"states":{"0":{"offset":39,"index":40}}}'),
        ("rotating-full", '{"states":{"0":{"offset":40,"index":41}}}'),
        ("chunked-slid", '{"states":{"0":{"offset":51,"start":0}}}'),
    ],
)
def test_checkpoint_that_contradicts_itself_is_refused(disk: Disk, name: str, detail: str) -> None:
    cache, num_tokens = filled(name)
    source = tensors.source(cache, num_tokens)
    payload = source.checkpoint()
    assert payload is not None
    path = disk.write(source, Payload(payload.tensors, detail), num_tokens, num_tokens)

    with pytest.raises(CorruptBlobError):
        tensors.restore(disk.runs(source, [0, num_tokens]), disk.open(path), num_tokens)


class LayerCache(KVCache):  # type: ignore[misc]
    """What a model may define for itself."""


class OpaqueCache:
    """The least that a test of upstream gives to `insert_cache`."""

    nbytes = 3

    def __init__(self, trimmable: bool = True) -> None:
        self.trimmable = trimmable
        self.trimmed = 0

    def is_trimmable(self) -> bool:
        return self.trimmable

    def trim(self, num_tokens: int) -> int:
        self.trimmed += num_tokens
        return num_tokens


def _with_attribute() -> Any:
    layer = KVCache()
    layer.pending = mx.zeros(3)
    return layer


@pytest.mark.parametrize(
    ("layer", "class_name"),
    [
        (LayerCache(), "LayerCache"),
        (BatchKVCache([0]), "BatchKVCache"),
        (BatchRotatingKVCache(8, [0]), "BatchRotatingKVCache"),
        (OpaqueCache(), "OpaqueCache"),
        (CacheList(KVCache(), LayerCache()), "LayerCache"),
        (_with_attribute(), "KVCache"),
        (None, "NoneType"),
    ],
)
def test_unknown_class_is_refused_by_name(layer: Any, class_name: str) -> None:
    cache = [KVCache(), layer]

    with pytest.raises(UnsupportedCacheError) as caught:
        tensors.source(cache, 0)

    assert caught.value.class_name == class_name
    assert tensors.supported(cache)[0] == tensors.LayerStatus("KVCache", "rows")
    assert tensors.supported(cache)[1].storage == "unsupported"


def test_layer_used_twice_is_refused() -> None:
    layer = KVCache()

    with pytest.raises(UnsupportedCacheError, match="twice"):
        tensors.source([layer, layer], 0)


def test_supported_names_the_way_each_layer_is_saved() -> None:
    cache = [
        KVCache(),
        RotatingKVCache(8),
        ChunkedKVCache(8),
        ArraysCache(2),
        CacheList(KVCache(), KVCache()),
        CacheList(ArraysCache(2), KVCache()),
    ]

    assert [status.storage for status in tensors.supported(cache)] == [
        "rows",
        "checkpoint",
        "checkpoint",
        "checkpoint",
        "rows",
        "checkpoint",
    ]


def test_prepare_copies_views_of_a_batch() -> None:
    batch = BatchKVCache([0, 3, 5])
    batch.update_and_fetch(mx.random.normal((3, 2, 50, 8)), mx.random.normal((3, 2, 50, 8)))
    # So large that each leaves more than the 16 KiB of others that `mx.contiguous` puts up with.
    states = ArraysCache(2)
    states[0] = mx.random.normal((3, 40, 500))
    states[1] = mx.random.normal((3, 40, 500))
    mx.eval(states.cache)
    cache = [batch.extract(1), states.extract(1)]
    expected = to_bytes([batch.keys[1:2, :, 3:50], states[0][1:2]])
    del batch, states
    mx.clear_cache()  # else MLX gives buffers of up to twice the size that it has kept

    num_tokens = tensors.prepare(cache, 47)

    arrays = [cache[0].keys, cache[0].values, *cache[1].cache]
    assert num_tokens == 47
    assert to_bytes([arrays[0], arrays[2]]) == expected
    assert mx.get_array_buffer_size(arrays) < 1.1 * tensors.nbytes(cache) + 1000
    tensors.source(cache, 47)


def test_prepare_makes_strided_rows_contiguous(disk: Disk) -> None:
    specs, _ = CACHES["concatenate"]
    cache = [ConcatenateKVCache(), KVCache()]
    # As a model makes them: (B, T, H, D), then transposed; ConcatenateKVCache keeps the view.
    rows = [mx.random.normal((1, 20, 2, 8)).transpose(0, 2, 1, 3) for _ in range(2)]
    for layer in cache:
        layer.update_and_fetch(*rows)

    restored = disk.round_trip(cache, tensors.prepare(cache, 20), [0, 20])

    assert to_bytes([restored[0].keys, restored[0].values]) == to_bytes(rows)
    assert to_bytes(feed(restored, specs, 3, 1)) == to_bytes(feed(cache, specs, 3, 1))


def test_prepare_does_not_copy_what_is_owned() -> None:
    cache, num_tokens = filled("kv")
    before = tensors.source(cache, num_tokens).rows(0, num_tokens)
    in_use = mx.get_active_memory()

    tensors.prepare(cache, num_tokens)

    assert mx.get_active_memory() == in_use
    del before


def _kv_with(*offsets: int) -> list[Any]:
    cache = []
    for offset in offsets:
        layer = KVCache()
        layer.update_and_fetch(mx.ones((1, 1, offset, 4)), mx.ones((1, 1, offset, 4)))
        cache.append(layer)
    return cache


@pytest.mark.parametrize(
    ("offsets", "num_tokens", "expected", "left"),
    [
        ((10, 10), 10, 10, [10, 10]),
        ((10, 9), 10, 10, [10, 9]),
        ((8, 8), 10, 8, [8, 8]),
        ((8, 7), 10, 8, [8, 7]),
        ((12, 12), 10, 10, [10, 10]),
        ((12, 11), 10, 10, [10, 9]),
    ],
)
def test_prepare_reconciles_key_and_offsets(
    offsets: tuple[int, ...], num_tokens: int, expected: int, left: list[int]
) -> None:
    cache = _kv_with(*offsets)

    assert tensors.prepare(cache, num_tokens) == expected
    assert [layer.offset for layer in cache] == left


def test_prepare_refuses_what_it_cannot_reconcile() -> None:
    far_apart = _kv_with(40, 10)
    recurrent = [*_kv_with(40), ArraysCache(1)]
    recurrent[1][0] = mx.ones((1, 3))
    slid, _ = filled("chunked-slid")

    for cache, num_tokens in ((far_apart, 40), (recurrent, 30), (slid, 50)):
        with pytest.raises(UnsupportedCacheError):
            tensors.prepare(cache, num_tokens)


def test_prepare_leaves_other_objects_alone() -> None:
    batch = BatchKVCache([0])
    batch.update_and_fetch(mx.ones((1, 1, 3, 4)), mx.ones((1, 1, 3, 4)))

    assert tensors.prepare([OpaqueCache()], 7) == 7
    assert tensors.prepare([object(), None], 7) == 7
    assert tensors.prepare([], 7) == 7
    assert tensors.prepare([batch], 3) == 3
    # Evaluated all the same: another thread may look at it.
    _in_thread(lambda: memoryview(batch.keys))


def test_prepare_of_an_empty_cache_stands_for_nothing() -> None:
    assert tensors.prepare([KVCache(), RotatingKVCache(8), CacheList(KVCache())], 7) == 0
    assert tensors.prepare([KVCache(), ArraysCache(2)], 7) == 7


def test_trim_is_all_or_nothing() -> None:
    cache = _kv_with(10, 9)

    assert tensors.trim(cache, 10) == 0
    assert [layer.offset for layer in cache] == [10, 9]
    assert tensors.trim(cache, 4) == 4
    assert [layer.offset for layer in cache] == [6, 5]
    assert tensors.trim(cache, 0) == 0
    assert tensors.trim([], 3) == 0


def test_trim_reaches_nested_and_foreign_layers() -> None:
    foreign = OpaqueCache()
    cache = [CacheList(*_kv_with(10, 10)), foreign]

    assert tensors.trim(cache, 4) == 4
    assert [layer.offset for layer in cache[0].caches] == [6, 6]
    assert foreign.trimmed == 4
    assert tensors.trim([*cache, OpaqueCache(trimmable=False)], 1) == 0


def test_trimmed_concatenating_layer_forgets_the_rows() -> None:
    cache = [ConcatenateKVCache()]
    cache[0].update_and_fetch(mx.ones((1, 1, 10, 4)), mx.ones((1, 1, 10, 4)))

    tensors.trim(cache, 4)
    keys, _ = cache[0].update_and_fetch(mx.zeros((1, 1, 1, 4)), mx.zeros((1, 1, 1, 4)))

    assert keys.shape[2] == cache[0].offset == 7


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kv", True),
        ("quantized-8", True),
        ("concatenate", True),
        ("rotating-almost-full", True),
        ("rotating-full", False),
        ("chunked", True),
        ("chunked-slid", False),
        ("arrays-and-kv", False),
        ("list-of-kv-and-kv", True),
        ("list-of-arrays-and-kv", False),
        ("draft-one-behind", True),
    ],
)
def test_can_trim_tells_the_truth(name: str, expected: bool) -> None:
    assert tensors.can_trim(filled(name)[0]) is expected


def test_can_trim_asks_foreign_layers() -> None:
    assert tensors.can_trim([KVCache(), OpaqueCache()])
    assert not tensors.can_trim([KVCache(), OpaqueCache(trimmable=False)])
    assert not tensors.can_trim([object()])


def test_num_tokens_and_nbytes_of_any_cache() -> None:
    cache = [*_kv_with(10, 9), OpaqueCache()]

    assert tensors.num_tokens(cache) == 10
    assert tensors.num_tokens([OpaqueCache(), ArraysCache(2), BatchKVCache([0])]) is None
    assert tensors.nbytes(cache) == 2 * 2 * 256 * 4 * 4 + 3
    assert tensors.nbytes([QuantizedKVCache(), ArraysCache(2), KVCache()]) == 0


def test_copy_of_a_cache_goes_its_own_way() -> None:
    specs, _ = CACHES["list-of-arrays-and-wrapped"]
    cache, _ = filled("list-of-arrays-and-wrapped")
    before = held(cache)

    feed(tensors.copy_cache(cache), specs, 5, 1)

    assert held(cache) == before


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_empty_arrays_own_the_memory_that_is_filled(dtype: str) -> None:
    made = empty({"a": (dtype, (2, 3), 6 * DTYPE_BYTES[dtype]), "b": (dtype, (0, 3), 0)})
    with memoryview(made["a"]) as view:
        view.cast("B")[:] = bytes(view.nbytes)

    wanted = next(one for one, name in DTYPES.items() if name == dtype)
    assert made["a"].dtype == wanted
    assert made["a"].tolist() == mx.zeros((2, 3), wanted, stream=mx.cpu).tolist()
    assert made["b"].shape == (0, 3)


def test_what_memory_held_before_is_never_in_a_cache(disk: Disk) -> None:
    """Rows behind the last token are zeros, although nothing is cleared in advance."""
    cache, num_tokens = filled("kv")
    source = tensors.source(cache, num_tokens)
    runs = disk.runs(source, [0, 9, num_tokens])
    dirty = [mx.full((1, 2, 256, 64), float("nan")) for _ in range(8)]
    mx.eval(dirty)
    del dirty

    for layer in tensors.restore(runs, None, num_tokens):
        for array in (layer.keys, layer.values):
            assert array.shape[2] > num_tokens
            assert not mx.any(array[:, :, num_tokens:] != 0).item()


def test_pool_waits_for_its_tasks_before_it_raises() -> None:
    ended: list[str] = []
    failed, raised = threading.Event(), threading.Event()

    def slow() -> None:
        assert failed.wait(60)
        ended.append("too late" if raised.wait(0.2) else "slow")

    def failing() -> None:
        failed.set()
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        pool.run([slow, failing, *[lambda: ended.append("late")] * 50], 2)
    raised.set()

    assert ended == ["slow"]
    pool.run([lambda: ended.append("next")], 2)
    assert ended[-1] == "next"


def test_pool_starts_anew_in_a_forked_process() -> None:
    pool.run([lambda: None], 1)

    child = os.fork()
    if child == 0:
        done: list[int] = []
        pool.run([lambda: done.append(1)], 2)
        os._exit(len(done) - 1)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_missing_mlx_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    path = Path(pool.__file__).with_name("_mlx.py")
    spec = importlib.util.spec_from_file_location("without_mlx", path)
    assert spec is not None
    assert spec.loader is not None

    with pytest.raises(MissingDependencyError, match="pip install mlx mlx-lm"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _in_thread(work: Callable[[], Any]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


MAKING_MEMORY_BESIDE_A_PREFILL = """
import threading
import mlx.core as mx
from persist_cache.tensors import pool
from persist_cache.tensors.empty import empty

def load():
    while True:
        pool.run_mlx(lambda: empty({"keys": ("F32", (1, 2, 256, 64), 1 << 17)}))

threading.Thread(target=load, daemon=True).start()
for number in range(3000):
    mx.eval(mx.ones((64, 64)) + number)
    mx.clear_cache()
"""


def test_memory_is_made_while_another_thread_prefills() -> None:
    """MLX would wait for a thread that waits for the GIL, and keep the GIL meanwhile."""
    program = [sys.executable, "-c", f"{MAKING_MEMORY_BESIDE_A_PREFILL}\nimport os; os._exit(0)"]

    assert subprocess.run(program, timeout=120).returncode == 0
