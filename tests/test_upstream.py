"""mlx-lm's own tests pass with our `PromptCache`, and with our generation loop around it.

Every case of every upstream class that names `LRUPromptCache` runs under its own test id: the
cache's own tests, and those of the server, which use it behind live HTTP, here with a tiny
random model because they are about the protocol, not about what the model says.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models, upstream

CACHE_CLASS = "LRUPromptCache"

EXCUSED: dict[str, str] = {}
"""`Class.method` to the reason why it cannot pass here; mlx-lm's own cache must fail it too."""

RACES = {"TestServerKVCacheQuantization.test_completion_quantizes_the_cache": 3}
"""Cases that look into the cache right after an answer, and how often they may try: upstream
sends the answer before it inserts, so on a busy machine its own cache is late as well."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    try:
        cases = upstream.cases_using({CACHE_CLASS})
    except upstream.UpstreamUnavailableError as error:
        skip = pytest.mark.skip(reason=str(error))
        metafunc.parametrize("case", [pytest.param(None, id="unavailable", marks=skip)])
    else:
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face cache that holds one model: upstream's tests assume a download."""
    hub = tmp_path_factory.mktemp("hub")
    repository = hub / "models--tests--tiny-llama"
    commit = "0" * 40
    tiny_models.build_model_dir(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return hub


@pytest.mark.parametrize("generator", ["upstream", "ours"])
def test_upstream_case(
    case: Any, generator: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx_lm.server
    from huggingface_hub import scan_cache_dir

    import persist_cache
    from persist_cache.server.upstream.generator import Generator

    module = upstream.load_module(case.file)
    (model_dir,) = hub.glob("models--*/snapshots/*")
    monkeypatch.setattr(module, "load", upstream.local_load(model_dir), raising=False)
    # GET /v1/models lists the hub's cache, of which a clean machine has none.
    monkeypatch.setattr(mlx_lm.server, "scan_cache_dir", lambda: scan_cache_dir(hub))

    if case.name in EXCUSED:
        assert not upstream.run_case(module, case).wasSuccessful(), "passes: excuse it no longer"
        pytest.skip(EXCUSED[case.name])
    monkeypatch.setattr(module, CACHE_CLASS, persist_cache.PromptCache)
    if case.name in RACES:
        monkeypatch.setattr(module, CACHE_CLASS, _patient(persist_cache.PromptCache))
    if generator == "ours":
        monkeypatch.setattr(module, "ResponseGenerator", Generator)
    for _ in range(RACES.get(case.name, 1)):
        result = upstream.run_case(module, case)
        if result.wasSuccessful():
            break

    for _, reason in result.skipped:
        pytest.skip(f"upstream skips it: {reason}")
    for _, traceback in [*result.errors, *result.failures]:
        pytest.fail(traceback, pytrace=False)
    # A set-up that failed runs nothing, and must not look like a pass.
    assert result.testsRun == 1


def _patient(cache_class: Any) -> Any:
    """A cache whose look-ups by a test wait for the insert that follows an answer."""

    class Patient(cache_class):  # type: ignore[misc]
        def fetch_nearest_cache(self, model: Any, tokens: Any) -> Any:
            give_up = time.monotonic() + 20
            while True:
                found = super().fetch_nearest_cache(model, tokens)
                by_server = threading.current_thread() is not threading.main_thread()
                if found[0] is not None or by_server or time.monotonic() > give_up:
                    return found
                time.sleep(0.02)

    return Patient


def test_discovery_finds_the_cases_of_the_cache() -> None:
    try:
        names = {case.name for case in upstream.cases_using({CACHE_CLASS})}
    except upstream.UpstreamUnavailableError as error:
        pytest.skip(str(error))

    # An upstream that renames its class must not turn this file into an empty pass.
    assert "TestLRUPromptCache.test_lru" in names
    assert any(name.startswith("TestServer.") for name in names)
    assert set(EXCUSED) <= names
