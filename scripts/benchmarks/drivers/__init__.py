"""The same conversation through each peer's public entry points.

A driver runs in a virtual environment of its own, as
`python -m scripts.benchmarks.drivers.NAME store|restore FOLDER`, and imports nothing of this
repository but `conversation`. It prints one JSON object.
"""
