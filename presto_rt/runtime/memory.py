"""Static memory of a plan: one block for all buffers that a forward pass writes, placed so that only buffers that never
live at the same time share bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True)
class Buffer:
    """A tensor in the arena and when it is alive: spans of (first, last) positions in the forward pass, both
    included."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    spans: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Bytes, rounded up to whole cache lines."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def meets(self, other: Buffer) -> bool:
        """Whether both are ever alive at once."""
        return any(a <= d and c <= b for a, b in self.spans for c, d in other.spans)


def place(buffers: Sequence[Buffer]) -> dict[str, int]:
    """The offset of each buffer: the largest first, each at the lowest place that is free while it lives."""
    placed: list[tuple[Buffer, int]] = []
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.name)):
        offset = 0
        for other, start in sorted(((o, s) for o, s in placed if o.meets(buffer)), key=lambda pair: pair[1]):
            if offset + buffer.size <= start:
                break
            offset = max(offset, start + other.size)
        placed.append((buffer, offset))
    return {buffer.name: offset for buffer, offset in placed}


def aliased(buffers: Sequence[Buffer], offsets: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of buffers that share bytes while both are alive; a sound plan has none."""
    out = []
    for i, a in enumerate(buffers):
        for b in buffers[i + 1 :]:
            apart = offsets[a.name] + a.size <= offsets[b.name] or offsets[b.name] + b.size <= offsets[a.name]
            if a.meets(b) and not apart:
                out.append((a.name, b.name))
    return out


def describe(buffers: Sequence[Buffer], offsets: dict[str, int]) -> str:
    """The buffer table for people, in order of address."""
    rows = sorted(buffers, key=lambda b: (offsets[b.name], b.name))
    lines = [f"{'buffer':<12} {'offset':>10} {'bytes':>10}  {'shape':<20} {'dtype':<10} alive"]
    for b in rows:
        shape, dtype = "x".join(map(str, b.shape)), str(b.dtype).removeprefix("torch.")
        alive = " ".join(f"{first}-{last}" for first, last in b.spans)
        lines.append(f"{b.name:<12} {offsets[b.name]:>10} {b.size:>10}  {shape:<20} {dtype:<10} {alive}")
    return "\n".join(lines)


class Arena:
    """The memory itself: `tensor(name)` is the buffer, a view that stays where it is. pinned: on the host, where a GPU
    may copy from and to it."""

    def __init__(self, buffers: Sequence[Buffer], device: torch.device | str = "cpu", pinned: bool = False) -> None:
        self.buffers = {b.name: b for b in buffers}
        self.offsets = place(buffers)
        self.size = max((self.offsets[b.name] + b.size for b in buffers), default=0)
        block = torch.empty(self.size + ALIGNMENT, dtype=torch.uint8, device=device, pin_memory=pinned)
        start = -block.data_ptr() % ALIGNMENT
        self.block = block[start : start + self.size]

    def tensor(self, name: str) -> Tensor:
        """The buffer called `name`, uninitialised at first."""
        buffer, offset = self.buffers[name], self.offsets[name]
        count = math.prod(buffer.shape) * buffer.dtype.itemsize
        return self.block[offset : offset + count].view(buffer.dtype).view(buffer.shape)
