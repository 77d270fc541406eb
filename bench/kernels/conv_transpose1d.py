"""Upsampling with Snake, as in an Oobleck decoder: kernel twice the stride."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes
from presto_rt.kernels.conv_transpose1d import conv_transpose1d, pack
from presto_rt.kernels.snake_conv1d import Snake


def cases(device: str, preset: str) -> Iterator[Case]:
    """Yield the operator's cases at a preset's shapes."""
    s = shapes(preset, device)
    stages = ((1024, 8, 256), (256, 2, 8)) if device != "cpu" else ((64, 4, 64),)
    for channels, stride, divisor in stages:
        length = max(1, s.samples // divisor)
        weight = s.randn(channels, channels // 2, 2 * stride) * (2 * channels) ** -0.5
        packed, bias = pack(weight, stride), s.randn(channels // 2)
        alpha = torch.rand(channels, device=device) + 0.5
        alpha16 = alpha.bfloat16()[:, None]

        def make(channels: int = channels, length: int = length) -> tuple[torch.Tensor, ...]:
            return (s.randn(1, channels, length),)

        def eager(x: torch.Tensor, w=weight, b=bias, a=alpha16, k: int = stride) -> torch.Tensor:  # type: ignore[no-untyped-def]
            s = x + (a * x).sin().square() / (a + 1e-9)
            return F.conv_transpose1d(s, w, b, stride=k, padding=k // 2)

        def presto(x: torch.Tensor, w=packed, b=bias, a=alpha, k: int = stride) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return conv_transpose1d(x, w, b, snake=Snake(a), stride=k, kernel_size=2 * k, padding=k // 2)

        moved = size(*make()) * (1 + stride // 2) + size(weight)
        operations = 2 * channels * channels // 2 * 2 * stride * length
        name = f"{channels} channels x {length}, stride {stride}"
        yield Case("conv_transpose1d", name, make, {"eager": eager, "presto": presto}, moved, operations)
