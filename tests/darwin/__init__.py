"""Tests of what differs on a Mac, as far as it can be emulated; run by `scripts/test --darwin`.

What is emulated: py-lmdb is built as it is on a Mac (named semaphores instead of robust mutexes);
the page size is 16 KiB for the whole process (`system.c`); `sys`, `os` and `fcntl` look as on a
Mac (`view.py`). What is not: APFS, Metal, the scheduler, file names, `multiprocessing`'s way to
start processes, the numbers of errors, and that a `flock` and an `fcntl` lock of the same file
exclude each other. Only a Mac can tell about these.
"""
