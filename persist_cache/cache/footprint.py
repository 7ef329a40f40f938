"""Bytes of buffers that several caches may share, each counted once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Footprint(Generic[K]):
    """Which key accounts for which buffers: each for those that no earlier key has.

    Thread safety: none. The caller holds its lock around every call.
    """

    def __init__(self) -> None:
        self._buffers: dict[K, Mapping[int, int]] = {}
        self._users: dict[int, dict[K, None]] = {}
        """Per buffer, the keys that use it, the one that accounts for it first."""

    def add(self, key: K, buffers: Mapping[int, int]) -> int:
        """Note what `key`, which is not here, uses; returns the bytes it accounts for."""
        self._buffers[key] = buffers
        nbytes = 0
        for buffer, size in buffers.items():
            users = self._users.setdefault(buffer, {})
            nbytes += 0 if users else size
            users[key] = None
        return nbytes

    def remove(self, key: K) -> Iterator[tuple[K, int]]:
        """Forget `key`; returns the keys that account for buffers of it now, and their bytes."""
        heirs: dict[K, None] = {}
        for buffer in self._buffers.pop(key):
            users = self._users[buffer]
            accounted = next(iter(users)) == key
            del users[key]
            if not users:
                del self._users[buffer]
            elif accounted:
                heirs[next(iter(users))] = None
        return ((heir, self.of(heir)) for heir in heirs)

    def of(self, key: K) -> int:
        """The bytes that `key` accounts for."""
        buffers = self._buffers[key]
        return sum(
            size for buffer, size in buffers.items() if next(iter(self._users[buffer])) == key
        )
