"""Entries outside of a store, on their way from one machine to another.

What a bundle and a remote have in common: verified blobs that are no part of the store's folder,
the entry that they make up, and what the store lacks of it.
"""
