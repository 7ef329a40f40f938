"""Torture of a store: kills, faults and damage, and a judge who trusts nothing the store says.

`scripts/torture` runs it; `docs/reliability.md` says what it proves. The runner never opens a
store itself: it forks a child for everything that does, so that a kill costs a fork and not a
start of Python, and a process that a damaged index takes down is not the runner.
"""
