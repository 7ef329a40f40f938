"""Agents connected to a server of ours: what each needs, the server for it, and becoming it."""
