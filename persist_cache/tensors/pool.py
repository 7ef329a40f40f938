"""A few long-lived threads that make and fill buffers.

One of them makes the buffers: every Python thread that runs one MLX operation leaves a thread of
its own behind for ever. The others only read files into memory.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue

MAX_THREADS = 4


class _Batch:
    """Tasks that are run together, and their first error."""

    def __init__(self, tasks: Iterable[Callable[[], None]], num_threads: int) -> None:
        self._tasks = deque(tasks)
        self._running = num_threads
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._error: BaseException | None = None

    def work(self) -> None:
        """Run tasks until none is left."""
        while True:
            try:
                task = self._tasks.popleft()
            except IndexError:
                break
            try:
                task()
            except BaseException as error:
                self._tasks.clear()
                with self._lock:
                    self._error = self._error or error
        with self._lock:
            self._running -= 1
            if self._running == 0:
                self._done.set()

    def wait(self) -> None:
        """Return when no task runs any more; raise the first error there was."""
        try:
            self._done.wait()
        except BaseException:
            # Ctrl-C: the buffers belong to the tasks until the last of them has ended.
            self._tasks.clear()
            self._done.wait()
            raise
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback names this frame: a cycle would keep the buffers alive


class Pool:
    """At most `MAX_THREADS` daemon threads, started when they are needed.

    Thread safety: `run` may be called from several threads; its batches then share the threads.
    `_lock` guards the start of threads only.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._num_threads = 0

    def run(self, tasks: Iterable[Callable[[], None]], num_threads: int) -> None:
        """Run `tasks` on `num_threads` threads and wait for them.

        Raises:
            BaseException: The first that a task raised; no task runs any more then.
        """
        num_threads = max(1, min(num_threads, MAX_THREADS))
        batch = _Batch(tasks, num_threads)
        self._start(num_threads)
        for _ in range(num_threads):
            self._jobs.put(batch.work)
        batch.wait()

    def _start(self, num_threads: int) -> None:
        with self._lock:
            while self._num_threads < num_threads:
                name = f"persist-cache-read-{self._num_threads}"
                threading.Thread(target=self._serve, name=name, daemon=True).start()
                self._num_threads += 1

    def _serve(self) -> None:
        while True:
            job = self._jobs.get()
            job()
            del job  # it would keep the last batch's buffers alive


_readers = Pool()
_allocator = Pool()


def run(tasks: Iterable[Callable[[], None]], num_threads: int) -> None:
    """Run `tasks`, none of which may be an operation of MLX; see `Pool.run`."""
    _readers.run(tasks, num_threads)


def run_mlx(task: Callable[[], None]) -> None:
    """Run operations of MLX on the one thread of the process that is for them; see `Pool.run`."""
    _allocator.run([task], 1)


def _after_fork() -> None:
    global _readers, _allocator
    _readers, _allocator = Pool(), Pool()  # the parent's threads do not exist here


os.register_at_fork(after_in_child=_after_fork)
