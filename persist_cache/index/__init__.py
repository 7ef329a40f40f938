"""The index in LMDB: what is stored, as a tree of prompts, in records of fixed form."""
