"""Real clients, installed and driven against a server of ours; run by `scripts/clients`."""
