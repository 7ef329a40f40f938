"""Private and stored requests mixed, clients that leave, kills: of the former nothing is left."""

from __future__ import annotations

import contextlib
import random
import threading
from pathlib import Path

import pytest
import requests

from persist_cache.prefill.loading import load_tokenizer
from tests.scripted_model import build_scripted_model
from tests.searched import SearchedServer, in_folder, patterns
from tests.test_caching_server import PATHS, SYSTEM, body_of, entries, flush
from tests.waiting import until

HEADER = {"x-persist-cache": "no-store"}


class Storm:
    """Requests from several threads; remembers what was private, and whether it was answered."""

    def __init__(self, seed: int, total: int) -> None:
        self._dice = random.Random(seed)
        self._left = total
        self._lock = threading.Lock()
        self.secrets: list[str] = []

    def next(self) -> tuple[str, str, bool, float | None, bool] | None:
        with self._lock:
            if not self._left:
                return None
            self._left -= 1
            number, private = self._left, self._dice.random() < 0.5
            words = f"zq{number}xjk vow gnu {number * 7}qzx" if private else f"plain {number % 9}"
            if private:
                self.secrets.append(words)
            # Some give up while their prompt is computed.
            leaves_s = self._dice.choice([None, None, 0.02, 0.2])
            return self._dice.choice(PATHS), words, private, leaves_s, self._dice.random() < 0.5

    def run(self, server: SearchedServer) -> None:
        """Ask from three threads until nothing is left, or the server is gone."""

        def ask() -> None:
            while (one := self.next()) is not None:
                path, words, private, leaves_s, stream = one
                body = body_of(path, words * (1 + len(words) % 5), system=SYSTEM, stream=stream)
                try:
                    server.request(
                        "POST",
                        path,
                        json=body,
                        headers=HEADER if private else {},
                        timeout=leaves_s or 60,
                    )
                except requests.ReadTimeout:
                    continue
                except requests.RequestException:
                    return

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()


@pytest.mark.parametrize(
    ("total", "kills"),
    [(24, 1), pytest.param(200, 6, marks=pytest.mark.long)],  # long: seven servers
)
def test_nothing_of_private_requests_is_anywhere_after_a_storm(
    tmp_path: Path, total: int, kills: int
) -> None:
    model = build_scripted_model(tmp_path / "model")
    tokenizer = load_tokenizer(str(model))
    folder, store = tmp_path / "run", tmp_path / "store"
    secrets: list[str] = []
    for round_ in range(kills + 1):
        storm = Storm(round_, total // (kills + 1))
        with SearchedServer(model, store, folder, min_free_bytes=0) as server:
            if round_ < kills:
                killer = threading.Timer(1.0 + round_ / 4, server.kill)
                killer.start()
            storm.run(server)
            secrets += storm.secrets
            if round_ < kills:
                killer.join()
                continue
            flush(server)
            ids = [tokenizer.encode(one, add_special_tokens=False)[2:-2] for one in secrets]
            until(lambda: not server.in_memory(secrets, ids), timeout_s=20)  # noqa: B023
            stored = {one["id"] for one in entries(server)}
            for path in PATHS:
                body = body_of(path, secrets[0])
                assert server.request("POST", path, json=body, headers=HEADER).ok
            flush(server)
            assert {one["id"] for one in entries(server)} == stored
    with contextlib.suppress(FileNotFoundError):
        (folder / "search.json").unlink()
    wanted = patterns(secrets, [one[:6] for one in ids])
    assert in_folder(store, wanted) == []
    assert in_folder(folder, wanted) == []
