"""A residual unit's convolution with Snake, at the rates of an Oobleck decoder's last stages."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes
from presto_rt.kernels.snake_conv1d import Snake, pack, snake_conv1d


def cases(device: str, preset: str) -> Iterator[Case]:
    """Yield the operator's cases at a preset's shapes."""
    s = shapes(preset, device)
    stages = ((128, 1), (512, 8)) if device != "cpu" else ((32, 8),)
    for channels, divisor in stages:
        length = s.samples // divisor
        weight = s.randn(channels, channels, 7) * (7 * channels) ** -0.5
        packed, bias = pack(weight), s.randn(channels)
        alpha = torch.rand(channels, device=device) + 0.5
        alpha16 = alpha.bfloat16()[:, None]

        def make(channels: int = channels, length: int = length) -> tuple[torch.Tensor, ...]:
            return (s.randn(1, channels, length),)

        def eager(x: torch.Tensor, w=weight, b=bias, a=alpha16) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return x + F.conv1d(x + (a * x).sin().square() / (a + 1e-9), w, b, padding=27, dilation=9)

        def presto(x: torch.Tensor, w=packed, b=bias, a=alpha) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return snake_conv1d(x, w, b, snake=Snake(a), dilation=9, padding=27, residual=x)

        moved = 2 * size(*make()) + size(weight)
        operations = 2 * 7 * channels * channels * length
        name = f"{channels} channels x {length}, 7 taps, dilation 9"
        yield Case("snake_conv1d", name, make, {"eager": eager, "presto": presto}, moved, operations)
