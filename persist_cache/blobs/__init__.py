"""Blobs: immutable safetensors files with the KV of one run, or the state at one position."""
