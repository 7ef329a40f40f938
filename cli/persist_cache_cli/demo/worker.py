"""One process of the demo: loads the model, answers questions through a `PromptCache`, ends.

It reads a job as a line of JSON from its standard input and writes one JSON object a line:
progress while it prefills, then the answers. It ends when its standard input does, so that it does
not outlive the process that asks, whatever becomes of that.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persist_cache import PromptCache


def main() -> None:
    line = sys.stdin.readline()
    # Before anything else is imported, which takes longer than all the rest of the start.
    threading.Thread(target=_end_with_input, name="end-with-parent", daemon=True).start()
    work(json.loads(line))


def _end_with_input() -> None:
    # Not by sys.stdin, whose lock a waiting thread would hold at the end.
    while os.read(0, 4096):
        pass
    os._exit(1)


def work(job: dict[str, Any]) -> None:
    """Do what a job says, and print what comes of it."""
    from persist_cache import PromptCache, Store
    from persist_cache.prefill.loading import load_model

    started = time.monotonic()
    model, tokenizer = load_model(job["model"])
    say(event="loaded", seconds=time.monotonic() - started)
    key = (job["model"], None, None)
    with Store.open(job["store"], min_free_bytes=0) as store:
        cache = PromptCache(store=store, leave_tokens=1)
        for chat in job["chats"]:
            # The same conversation goes into a memory that no restart interrupts, too.
            memory = PromptCache(leave_tokens=1) if job["uninterrupted"] else None
            session = Session(model, tokenizer, key, [cache] if memory is None else [cache, memory])
            answer = session.answer(chat, job["max_tokens"])
            cache.flush()
            answer["written_bytes"] = cache.stats().written_bytes
            say(event="answer", **answer)
            if memory is None:
                continue
            for later in job["uninterrupted"]:
                for message in later:
                    if message["content"] is None:
                        message["content"] = answer["text"]
                session = Session(model, tokenizer, key, [memory])
                reference = session.answer(later, job["max_tokens"])
                say(event="reference", written_bytes=None, **reference)
        cache.close()


class Session:
    """Answers with the first of several caches; all of them are told what was computed."""

    def __init__(self, model: Any, tokenizer: Any, key: Any, caches: Sequence[PromptCache]) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._key = key
        self._caches = caches

    def answer(self, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        """Answer greedily, keeping the system part, the prompt and the reply as the server does."""
        from mlx_lm import stream_generate

        from persist_cache.prefill.run import new_cache, snapshot
        from persist_cache.server.rendering import render_chat

        prompt = render_chat(self._tokenizer, messages)
        started = time.monotonic()
        kv, rest = self._caches[0].fetch_nearest_cache(self._key, prompt.tokens)
        restored_s = time.monotonic() - started
        kv = new_cache(self._model) if kv is None else kv
        position = cached = len(prompt.tokens) - len(rest)
        ends = [(prompt.system_tokens, "system"), (len(prompt.tokens) - 1, "user")]
        for end, tier in ends:
            if end > position:
                self._prefill(kv, prompt.tokens[:end], position)
                position = end
                self._keep(prompt.tokens[:end], snapshot(kv), tier)
        say(event="answering")
        first_token_s = 0.0
        text, tokens = "", []
        for piece in stream_generate(
            self._model,
            self._tokenizer,
            prompt.tokens[position:],
            max_tokens=max_tokens,
            prompt_cache=kv,
        ):
            first_token_s = first_token_s or time.monotonic() - started
            text += piece.text
            tokens.append(piece.token)
        self._keep([*prompt.tokens, *tokens], kv, "assistant")
        return {
            "text": text,
            "prompt_tokens": len(prompt.tokens),
            "system_tokens": prompt.system_tokens,
            "cached_tokens": cached,
            "source": self._caches[0].last_fetch.source,
            "restored_s": restored_s,
            "first_token_s": first_token_s,
        }

    def _prefill(self, kv: list[Any], tokens: Sequence[int], start: int) -> None:
        from persist_cache.prefill.run import prefill

        done = start
        say(event="prefill", done=done, total=len(tokens))

        def report(count: int) -> None:
            nonlocal done
            done += count
            say(event="prefill", done=done, total=len(tokens))

        prefill(self._model, kv, tokens[start:], step_tokens=256, progress=report)

    def _keep(self, tokens: Sequence[int], kv: list[Any], tier: str) -> None:
        from persist_cache.prefill.run import snapshot

        for cache in self._caches[1:]:
            cache.insert_cache(self._key, tokens, snapshot(kv), cache_type=tier)
        self._caches[0].insert_cache(self._key, tokens, kv, cache_type=tier)


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
