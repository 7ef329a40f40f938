"""The server: it comes up without waiting for names, and saves when it is told to end."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

from persist_cache.entry import Tier
from persist_cache.selftest import material, parts
from persist_cache.selftest.checks import Failed, Result, Setting
from persist_cache.server.listening import NamelessServer
from persist_cache.system import endings

_BIND_LIMIT_S = 1.0
_LOOK_UP_LIMIT_S = 60.0
_START_LIMIT_S = 120.0
_STOP_LIMIT_S = 30.0
_WORDS = 90


def names_are_not_waited_for(setting: Setting) -> Result:
    """Time how long a server takes to bind, and how long it would if it looked its name up."""
    started = time.monotonic()
    with NamelessServer(("127.0.0.1", 0), BaseHTTPRequestHandler):
        bound_s = time.monotonic() - started
    if bound_s > _BIND_LIMIT_S:
        raise Failed(f"a server took {bound_s:.1f} s to bind to its port")
    took: list[float] = []

    def look_up() -> None:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            socket.getfqdn("127.0.0.1")
        took.append(time.monotonic() - began)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(_LOOK_UP_LIMIT_S)
    looked_up_s = took[0] if took else _LOOK_UP_LIMIT_S
    return Result(
        f"binding takes {bound_s * 1000:.1f} ms; looking its own name up would take "
        f"{looked_up_s:.3f} s",
        {"bind_s": bound_s, "look_up_s": looked_up_s},
    )


def sigterm_saves(setting: Setting) -> Result:
    """Serve a tiny model, ask it something, end it by SIGTERM, and find the answer on disk."""
    model = setting.folder / "model"
    write_model(model)
    port = free_port()
    started = time.monotonic()
    server = parts.start("serving:serve_model", setting.folder, port=port)
    drains = [drain(server.stdout), drain(server.stderr)]
    try:
        wait_for(server, port)
        up_s = time.monotonic() - started
        ask(port)
        started = time.monotonic()
        server.send_signal(signal.SIGTERM)
        try:
            status = server.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Failed(f"the server did not end within {_STOP_LIMIT_S:.0f} s") from None
        down_s = time.monotonic() - started
    finally:
        server.kill()
        server.wait()
        for thread in drains:
            thread.join(5)
    if status:
        raise Failed(f"the server ended with status {status}")
    with material.opened(setting.folder) as store:
        tiers = {entry.tier for entry in store.entries()}
        problems = store.check(read_data=True)
    if Tier.ASSISTANT not in tiers:
        raise Failed("what was answered before SIGTERM is not on disk")
    if problems:
        raise Failed(f"check found {len(problems)} problems: {problems[0].message}")
    return Result(
        f"up after {up_s:.1f} s, ended and saved {down_s:.2f} s after SIGTERM",
        {"up_s": up_s, "down_s": down_s, "entries": len(tiers)},
    )


def serve_model(folder: Path, port: int) -> None:
    """Part: serve the tiny model."""
    from persist_cache.server.launch import ServeOptions
    from persist_cache.server.run import serve

    serve(
        ["--model", str(folder / "model"), "--host", "127.0.0.1", "--port", str(port)],
        ServeOptions(store=str(folder / "store"), min_free_bytes=0),
    )


def write_model(folder: Path) -> None:
    """Write a random model of a few thousand weights, whose tokens are words, into `folder`."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.models import llama
    from mlx_lm.utils import save_config, save_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|start|>", "<|end|>", "system", "user", "assistant"]
    words = [*special, *(f"w{number}" for number in range(_WORDS))]
    tokenizer = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<|pad|>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=(
            "{% for message in messages %}<|start|> {{ message.role }} {{ message.content }} "
            "<|end|> {% endfor %}{% if add_generation_prompt %}<|start|> assistant{% endif %}"
        ),
    ).save_pretrained(folder)
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(words),
        "tie_word_embeddings": True,
        "eos_token_id": special.index("<|end|>"),
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = tree_flatten(model.parameters())
    keys = mx.random.split(mx.random.key(0), len(weights))
    model.update(
        tree_unflatten(
            [
                (name, array if array.ndim < 2 else mx.random.normal(array.shape, key=key) / 8)
                for (name, array), key in zip(weights, keys, strict=True)
            ]
        )
    )
    save_model(folder, model)
    save_config(config, folder / "config.json")


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(server: subprocess.Popen[str], port: int) -> None:
    """Wait until a server answers.

    Raises:
        Failed: It ended, or takes too long.
    """
    give_up = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < give_up:
        if endings.has_ended(server):
            raise Failed(f"the server ended with status {server.returncode}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            if request(port, "GET", "/health")[0].status == 200:
                return
        time.sleep(0.05)
    raise Failed(f"the server did not answer within {_START_LIMIT_S:.0f} s")


class Answer(NamedTuple):
    """What a server answered.

    Attributes:
        text: Of the model.
        cached_tokens: Of the prompt, that were not computed.
        found: The header that says where they came from.
    """

    text: str
    cached_tokens: int
    found: str


def ask(port: int) -> Answer:
    """Ask the tiny model something.

    Raises:
        Failed: There is no answer.
    """
    words = " ".join(f"w{number % _WORDS}" for number in range(60))
    body = {
        "messages": [
            {"role": "system", "content": words},
            {"role": "user", "content": "w1 w2 w3"},
        ],
        "max_tokens": 8,
        "logit_bias": {"2": -100.0},  # so that it does not end at once
    }
    answer, raw = request(port, "POST", "/v1/chat/completions", json.dumps(body))
    if answer.status != 200:
        raise Failed(f"the server answered with status {answer.status}")
    said = json.loads(raw)
    return Answer(
        said["choices"][0]["message"]["content"],
        said["usage"]["prompt_tokens_details"]["cached_tokens"],
        answer.getheader("x-persist-cache", ""),
    )


def request(
    port: int, method: str, path: str, body: str = ""
) -> tuple[http.client.HTTPResponse, bytes]:
    """Send a request; returns the answer and its body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    connection.request(method, path, body.encode() or None, headers)
    answer = connection.getresponse()
    return answer, answer.read()


def drain(stream: Any) -> threading.Thread:
    """Read what a process prints, so that it never waits for a reader."""
    thread = threading.Thread(target=lambda: [None for _ in stream], daemon=True)
    thread.start()
    return thread
