"""`python -m persist_cache_cli` is `persist-cache`."""

from persist_cache_cli.start import start

start()
