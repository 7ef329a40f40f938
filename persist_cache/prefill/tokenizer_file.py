"""tokenizer.json, parsed no further than mlx-lm looks: at one field.

By itself mlx-lm parses all of the file, and keeps that while transformers makes the tokenizer of
the same file: 5 bytes of Python objects for each byte of the file. The process keeps much of that
memory after they are freed, because what is made meanwhile lies among them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, TextIO

import msgspec

_lock = threading.Lock()
_users = 0


class TokenizerFile(Mapping[str, Any]):
    """The content of a tokenizer.json, which is parsed as far as it is asked for."""

    def __init__(self, text: str) -> None:
        """Look for the field that mlx-lm wants.

        Raises:
            json.JSONDecodeError: `text` is not JSON.
        """
        self._text = text
        try:
            self._decoder = msgspec.json.decode(text, type=_Decoder).decoder
        except msgspec.DecodeError:
            self._decoder = self._all.get("decoder", msgspec.UNSET)

    @functools.cached_property
    def _all(self) -> dict[str, Any]:
        content = json.loads(self._text)
        # What is no object has no decoder; transformers says what is wrong with it.
        return content if isinstance(content, dict) else {}

    def __getitem__(self, name: str) -> Any:
        if name == "decoder" and self._decoder is not msgspec.UNSET:
            return self._decoder
        return self._all[name]

    def __contains__(self, name: object) -> bool:
        if name == "decoder":
            return self._decoder is not msgspec.UNSET
        return name in self._all

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


class _Decoder(msgspec.Struct):
    decoder: Any = msgspec.UNSET


def _load(file: TextIO) -> TokenizerFile:
    return TokenizerFile(file.read())


@contextlib.contextmanager
def read_in_part() -> Iterator[None]:
    """Have mlx-lm, in any thread, parse no more of a tokenizer.json than it looks at."""
    global _users
    from mlx_lm import tokenizer_utils

    with _lock:
        _users += 1
        tokenizer_utils.json = SimpleNamespace(**vars(json) | {"load": _load})
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                tokenizer_utils.json = json
