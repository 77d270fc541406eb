"""Spectral head: magnitude and phase to samples, 1024-point frames with a hop of 256, stereo."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from presto_rt.kernels.istft_head import istft_head

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes

SIZE, HOP = 1024, 256


def cases(device: str, preset: str) -> Iterator[Case]:
    s = shapes(preset, device)
    frames = s.samples // HOP + 1
    window = torch.hann_window(SIZE, device=device)

    def make() -> tuple[torch.Tensor, ...]:
        return (s.randn(2, frames, SIZE + 2),)

    def eager(head: torch.Tensor) -> torch.Tensor:
        magnitude, phase = head.float().chunk(2, -1)
        spectrum = torch.polar(magnitude.exp().clamp(max=100.0), phase)
        return torch.istft(spectrum.transpose(1, 2), SIZE, HOP, window=window)

    ways = {"eager": eager, "presto": lambda head: istft_head(head, window, HOP, padding="center")}
    moved = size(*make()) + 2 * 4 * (frames - 1) * HOP  # the FFT between the kernels moves more, and is not ours
    yield Case("istft_head", f"2x{frames}x{SIZE + 2}", make, ways, moved, 2 * frames * (5 * SIZE * 5 + 40 * SIZE))
