"""What a remote costs and saves: bytes against KV bytes, memory, requests, and seconds.

The remote is a folder, and a small HTTP server in another process: what is told here is what
persist-cache does, not what a network does. Everything runs in a fresh process.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.benchmarks import common, kv
from scripts.benchmarks.common import Context, Report, Table, fresh

MEMORY_BYTES = 64 << 20
"""What publishing or pulling may take beside the cache."""
SECRET = "the secret of the benchmark's machines"


def run(context: Context) -> Report:
    from persist_cache_cli.demo.openblas import preload_env

    cases = [
        (kv.SMALL, 2_000),
        *context.pick([], [(kv.LARGE, 4_500)]),
    ]
    found = []
    for shape, num_tokens in cases:
        for kind in ("folder", "http"):
            common.say(f"remote: {shape.name}, {num_tokens:,} tokens, {kind}")
            with context.scratch() as scratch, _remote(kind, scratch) as (url, environment):
                arguments = {
                    "folder": str(scratch),
                    "url": url,
                    "num_tokens": num_tokens,
                    "environment": environment,
                }
                found.append(
                    {
                        "shape": shape.name,
                        "tokens": num_tokens,
                        "kv_bytes": num_tokens * shape.bytes_per_token,
                        "kind": kind,
                        "published": fresh(publish, large=shape is kv.LARGE, **arguments),
                        "pulled": fresh(pull, **arguments),
                    }
                )
    with context.scratch() as scratch:
        real = common.run_python(
            "scripts.benchmarks.remote",
            "with_a_real_model",
            {"folder": str(scratch), "num_tokens": context.pick(600, 2_000)},
            preload_env(),
        )
    values = {"cases": found, "real": real}
    return Report("remote", "A shared remote", values, _tables(found, real))


@contextmanager
def _remote(kind: str, scratch: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A remote's URL, and what must be in the environment of those that use it."""
    if kind == "folder":
        (scratch / "bucket").mkdir()
        yield f"file://{scratch / 'bucket'}", {}
        return
    import subprocess

    serve = (
        "from tests.s3_like import s3_like\n"
        "import sys\n"
        "with s3_like() as server:\n"
        "    print(server.port, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", serve],
        cwd=common.REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        port = server.stdout.readline().strip()
        yield (
            "s3://bucket/prefix",
            {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "id",
                "AWS_SECRET_ACCESS_KEY": "key",
                "AWS_REGION": "us-east-1",
            },
        )
    finally:
        server.stdin.close()
        server.wait()


def _settings(folder: str, url: str) -> Any:
    from persist_cache.remote import RemoteSettings

    secret = Path(folder) / "secret"
    secret.write_text(SECRET)
    return RemoteSettings(url=url, secret_file=str(secret), publish_plain=True)


def publish(
    folder: str, url: str, num_tokens: int, environment: dict[str, str], large: bool
) -> dict[str, Any]:
    """Publish one prompt; what it took."""
    os.environ.update(environment)
    from persist_cache import Store
    from persist_cache.remote import Remote

    shape = kv.LARGE if large else kv.SMALL
    path = Path(folder) / "first"
    fresh(kv.fill_store, path=path, shape=shape, num_tokens=num_tokens, num_runs=2)
    with Store.open(path, min_free_bytes=0) as store:
        remote = Remote.open(store, _settings(folder, url))
        entry = max(store.entries(), key=lambda one: one.num_tokens)
        memory = _Memory()
        started = time.perf_counter()
        done = remote.publish(entry.id)
        seconds = time.perf_counter() - started
        peak = memory.peak_bytes()
        remote.close()
    return {
        "s": seconds,
        "peak_bytes": peak,
        "sent_bytes": done.nbytes,
        "requests": done.requests,
        "blobs": done.blobs,
    }


def pull(folder: str, url: str, num_tokens: int, environment: dict[str, str]) -> dict[str, Any]:
    """Pull it into an empty store; what it took."""
    os.environ.update(environment)
    from persist_cache import Store
    from persist_cache.remote import Remote, Why

    with Store.open(Path(folder) / "second", min_free_bytes=0) as store:
        remote = Remote.open(store, _settings(folder, url))
        tokens = [*kv.prompt(num_tokens), 1]
        memory = _Memory()
        brought = remote.bring(kv.FINGERPRINT, tokens, known=0, limit=num_tokens)
        peak = memory.peak_bytes()
        assert brought.why == Why.BROUGHT, brought
        assert brought.num_tokens == num_tokens
        missed = time.perf_counter()
        nothing = remote.bring(kv.FINGERPRINT, kv.prompt(num_tokens, 1), known=0, limit=num_tokens)
        missed = time.perf_counter() - missed
        assert nothing.why == Why.NOT_FOUND, nothing
        counters = remote.status().counters
        remote.close()
    return {
        "s": brought.seconds,
        "peak_bytes": peak,
        "received_bytes": brought.nbytes,
        "requests": counters["requests"],
        "miss_s": missed,
    }


class _Memory:
    """The most memory that this process takes from now on, above what it has now."""

    def __init__(self) -> None:
        import gc

        gc.collect()
        if sys.platform == "linux":
            # Begin the peak of the resident memory anew.
            Path("/proc/self/clear_refs").write_text("5")
        self._before = self._peak()

    def peak_bytes(self) -> int:
        return self._peak() - self._before

    def _peak(self) -> int:
        if sys.platform == "linux":
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def with_a_real_model(folder: str, num_tokens: int) -> dict[str, Any]:
    """A prefill by a real model, against pulling and restoring what it computed elsewhere."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.models.cache import make_prompt_cache

    from persist_cache import Store, tensors
    from persist_cache.remote import Remote, Why
    from persist_cache_cli.demo.model import smollm2

    model, tokenizer, *_ = load(str(smollm2("float32")))
    text = (common.REPOSITORY / "docs" / "design.md").read_text()
    tokens = tokenizer.encode(text)[:num_tokens]
    (Path(folder) / "bucket").mkdir()
    settings = _settings(folder, f"file://{Path(folder) / 'bucket'}")
    cache = make_prompt_cache(model)
    started = time.perf_counter()
    for start in range(0, num_tokens, 512):
        mx.eval(model(mx.array([tokens[start : start + 512]]), cache=cache))
    prefill_s = time.perf_counter() - started
    length = tensors.prepare(cache, num_tokens)
    with Store.open(Path(folder) / "first", min_free_bytes=0) as store:
        entry = store.put(kv.FINGERPRINT, tokens, tensors.source(cache, length)).entry
        remote = Remote.open(store, settings)
        assert entry is not None
        sent = remote.publish(entry).nbytes
        remote.close()
    with Store.open(Path(folder) / "second", min_free_bytes=0) as store:
        remote = Remote.open(store, settings)
        started = time.perf_counter()
        brought = remote.bring(kv.FINGERPRINT, [*tokens, 1], known=0, limit=num_tokens)
        assert brought.why == Why.BROUGHT, brought
        found = store.fetch(kv.FINGERPRINT, tokens, tensors.restore)
        assert found is not None
        remote_s = time.perf_counter() - started
        remote.close()
    last = mx.array([[tokens[-1]]])
    same = mx.array_equal(model(last, cache=found[0]), model(last, cache=cache)).item()
    return {
        "tokens": num_tokens,
        "prefill_s": prefill_s,
        "remote_s": remote_s,
        "sent_bytes": sent,
        "same_logits": bool(same),
    }


def _tables(found: list[dict[str, Any]], real: dict[str, Any]) -> list[Table]:
    mib = 2**20

    def row(one: dict[str, Any]) -> list[str]:
        sent, got = one["published"], one["pulled"]
        size = one["kv_bytes"]
        return [
            f"{one['shape']}, {one['tokens']:,} tokens, {one['kind']}",
            f"{size / mib:.0f}",
            f"{sent['sent_bytes'] / size:.3f}",
            f"{got['received_bytes'] / size:.3f}",
            f"{sent['requests']} + {got['requests']}",
            f"{sent['peak_bytes'] / mib:.0f}",
            f"{got['peak_bytes'] / mib:.0f}",
            f"{sent['s']:.2f}",
            f"{got['s']:.2f}",
            f"{got['miss_s'] * 1000:.0f}",
        ]

    tables = [
        Table(
            "Publishing a prompt, and pulling it into another store",
            [
                "prompt",
                "KV, MiB",
                "sent / KV",
                "received / KV",
                "requests",
                "peak, publish, MiB",
                "peak, pull, MiB",
                "publish, s",
                "pull, s",
                "a miss, ms",
            ],
            [row(one) for one in found],
            "Peaks are of resident memory, above that before the call; "
            f"{MEMORY_BYTES // mib} MiB are allowed. Requests of a pull include those of a miss.",
        )
    ]
    if real:
        tables.append(
            Table(
                "Against a prefill by a real model (135M, CPU)",
                ["tokens", "prefill, s", "from the remote, s", "ratio", "same logits"],
                [
                    [
                        f"{real['tokens']:,}",
                        f"{real['prefill_s']:.2f}",
                        f"{real['remote_s']:.2f}",
                        f"{real['remote_s'] / real['prefill_s']:.3f}",
                        "yes" if real["same_logits"] else "NO",
                    ]
                ],
                "From the remote: looking up, pulling, storing and restoring; the remote is a "
                "folder.",
            )
        )
    return tables
