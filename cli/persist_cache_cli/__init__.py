"""The `persist-cache` command."""
