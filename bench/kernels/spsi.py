"""Phases for a clip's magnitudes: rounds over all frames at once, against a loop over frames in eager torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes
from presto_rt.kernels.spsi import spsi, spsi_reference


def cases(device: str, preset: str) -> Iterator[Case]:
    """Yield the operator's cases at a preset's shapes."""
    s = shapes(preset, device)
    frames = min(s.samples // 512, 344)  # 4 s: the loop launches several kernels for each frame

    def make() -> tuple[torch.Tensor, ...]:
        return (torch.rand(1, frames, 1025, device=device),)

    ways = {"eager": lambda m: spsi_reference(m, 512, 2048), "presto": lambda m: spsi(m, 512, 2048)}
    magnitude = size(*make())
    # magnitudes in, phasors out; every round reads and writes peak and turn: 12 bytes a bin
    yield Case("spsi", f"{frames}x1025", make, ways, 3 * magnitude, 40 * frames * 1025)
