"""Samples to dithered, interleaved int16."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes
from presto_rt.kernels.pcm import pcm
from presto_rt.kernels.sampler_step import seeds_tensor


def cases(device: str, preset: str) -> Iterator[Case]:
    """Yield the operator's cases at a preset's shapes."""
    s = shapes(preset, device)
    seeds = seeds_tensor([7], device)

    def make() -> tuple[torch.Tensor, ...]:
        return (s.randn(1, 2, s.samples, dtype=torch.float32) * 0.3,)

    def eager(x: torch.Tensor) -> torch.Tensor:
        dither = torch.rand_like(x) - torch.rand_like(x)
        return (x * 32768 + dither).round().clamp(-32768, 32767).to(torch.int16).transpose(1, 2).contiguous()

    moved = size(*make()) * 3 // 2
    ways = {"eager": eager, "presto": lambda x: pcm(x, seeds)}
    yield Case("pcm", f"2x{s.samples}", make, ways, moved, 20 * 2 * s.samples)
