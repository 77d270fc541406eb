"""Static memory: one block for all buffers that a forward pass writes, placed so that only buffers that are never alive
at the same time share bytes; and a pool of such blocks for concurrent requests.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
POOL_SIZE = 4  # blocks of different shapes that a pool keeps for later requests

T = TypeVar("T")


@dataclass(frozen=True)
class Buffer:
    """A tensor of the arena and its life time: spans of (first, last) positions in the forward pass, both included."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    spans: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Bytes, rounded up to whole cache lines."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def overlaps(self, other: Buffer) -> bool:
        """Return True if the two buffers are ever alive at once."""
        return any(a <= d and c <= b for a, b in self.spans for c, d in other.spans)


def place(buffers: Sequence[Buffer]) -> dict[str, int]:
    """Return the offset of each buffer: largest first, each at the lowest address that is free during its life."""
    placed: list[tuple[Buffer, int]] = []
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.name)):
        offset = 0
        for other, start in sorted(((o, s) for o, s in placed if o.overlaps(buffer)), key=lambda pair: pair[1]):
            if offset + buffer.size <= start:
                break
            offset = max(offset, start + other.size)
        placed.append((buffer, offset))
    return {buffer.name: offset for buffer, offset in placed}


def aliased(buffers: Sequence[Buffer], offsets: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of buffers that share bytes while both are alive; a valid placement has none."""
    pairs = []
    for i, a in enumerate(buffers):
        for b in buffers[i + 1 :]:
            disjoint = offsets[a.name] + a.size <= offsets[b.name] or offsets[b.name] + b.size <= offsets[a.name]
            if a.overlaps(b) and not disjoint:
                pairs.append((a.name, b.name))
    return pairs


def describe(buffers: Sequence[Buffer], offsets: dict[str, int]) -> str:
    """Return the buffer table as text, in order of address."""
    rows = sorted(buffers, key=lambda b: (offsets[b.name], b.name))
    lines = [f"{'buffer':<12} {'offset':>10} {'bytes':>10}  {'shape':<20} {'dtype':<10} alive"]
    for b in rows:
        shape, dtype = "x".join(map(str, b.shape)), str(b.dtype).removeprefix("torch.")
        alive = " ".join(f"{first}-{last}" for first, last in b.spans)
        lines.append(f"{b.name:<12} {offsets[b.name]:>10} {b.size:>10}  {shape:<20} {dtype:<10} {alive}")
    return "\n".join(lines)


class Arena:
    """One block of memory for a set of buffers; `tensor(name)` is a view that keeps its address.

    pinned: page-locked host memory, which a GPU copies from and to.
    """

    def __init__(self, buffers: Sequence[Buffer], device: torch.device | str = "cpu", pinned: bool = False) -> None:
        self.buffers = {b.name: b for b in buffers}
        self.offsets = place(buffers)
        self.size = max((self.offsets[b.name] + b.size for b in buffers), default=0)
        block = torch.empty(self.size + ALIGNMENT, dtype=torch.uint8, device=device, pin_memory=pinned)
        start = -block.data_ptr() % ALIGNMENT
        self.block = block[start : start + self.size]

    def tensor(self, name: str) -> Tensor:
        """Return the buffer called `name`, uninitialized at first."""
        buffer, offset = self.buffers[name], self.offsets[name]
        count = math.prod(buffer.shape) * buffer.dtype.itemsize
        return self.block[offset : offset + count].view(buffer.dtype).view(buffer.shape)

    def find(self, name: str) -> Tensor | None:
        """Return the buffer called `name`, or None if the arena has none of that name."""
        return self.tensor(name) if name in self.buffers else None


class Pool(Generic[T]):
    """Reusable objects by shape for concurrent callers; the least recently used ones are dropped."""

    def __init__(self, size: int = POOL_SIZE) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._idle: list[tuple[Hashable, T]] = []

    @contextlib.contextmanager
    def take(self, key: Hashable, create: Callable[[], T]) -> Iterator[T]:
        """Lend an object for `key` to the caller alone; `create` makes one where none is idle."""
        with self._lock:
            index = next((i for i, (idle_key, _) in enumerate(self._idle) if idle_key == key), None)
            found = None if index is None else self._idle.pop(index)[1]
        lent = create() if found is None else found
        try:
            yield lent
        finally:
            with self._lock:
                self._idle.append((key, lent))
                del self._idle[: -self.size]
