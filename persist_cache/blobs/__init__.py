"""Blobs: immutable safetensors files, each with the KV of one run or the state at one position.

`header` is what a blob says of itself, `writer` and `reader` are its two uses, `folder` is where
all of them lie. `rows` cuts and joins stored rows; `layout` says which tensors a cache's layout
asks for.
"""
