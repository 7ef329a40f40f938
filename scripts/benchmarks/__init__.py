"""Benchmarks: `scripts/bench`, or `python -m scripts.benchmarks`.

One module a benchmark, each with `run(context) -> Report`. Whatever allocates much runs in a fresh
process, since memory that was used before is faster than new memory. Cases that are compared take
turns within one run, and are compared by the ratio of their medians.
"""
