"""Arenas kept from one request to the next: any number of threads may ask, each has its own meanwhile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence

from .memory import Arena, Buffer

KEPT = 4  # arenas of different shapes that wait for the next request


class Pool:
    """Hands out arenas by shape; the ones used longest ago are dropped."""

    def __init__(self, kept: int = KEPT) -> None:
        self.kept = kept
        self._lock = threading.Lock()
        self._idle: list[tuple[Hashable, Arena]] = []

    @contextlib.contextmanager
    def arena(self, shape: Hashable, buffers: Callable[[], Sequence[Buffer]]) -> Iterator[Arena]:
        """An arena of `buffers()` for this shape, which nobody else uses meanwhile."""
        with self._lock:
            at = next((i for i, (key, _) in enumerate(self._idle) if key == shape), None)
            found = None if at is None else self._idle.pop(at)[1]
        arena = found or Arena(buffers())
        try:
            yield arena
        finally:
            with self._lock:
                self._idle.append((shape, arena))
                del self._idle[: -self.kept]
