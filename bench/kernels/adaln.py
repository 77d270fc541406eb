"""Norm and modulation around a branch: one pass of ours against six of eager torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from presto_rt.kernels import adaln

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes


def cases(device: str, preset: str) -> Iterator[Case]:
    s = shapes(preset, device)
    table = s.randn(480, s.width, dtype=torch.float32)
    table16 = table.bfloat16()

    def make() -> tuple[torch.Tensor, ...]:
        return s.randn(1, s.tokens, s.width), s.randn(1, s.tokens, s.width)

    def eager(residual: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r = residual + table16[2] * branch
        return r, F.layer_norm(r, (s.width,), eps=1e-6) * (1 + table16[4]) + table16[3]

    def presto(residual: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return adaln.gate_residual_norm_modulate(residual, branch, table, gate=2, shift=3, scale=4)

    x = make()[0]
    moved = 4 * size(x) + 3 * size(table[0])
    name = f"gate_residual_norm_modulate {s.tokens}x{s.width}"
    yield Case("adaln", name, make, {"eager": eager, "presto": presto}, moved, 12 * x.numel())

    def eager_norm(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (s.width,), eps=1e-6) * (1 + table16[4]) + table16[3]

    ways = {"eager": eager_norm, "presto": lambda x: adaln.norm_modulate(x, table, shift=3, scale=4)}
    moved = 2 * size(x) + 2 * size(table[0])
    yield Case("adaln", f"norm_modulate {s.tokens}x{s.width}", lambda: make()[:1], ways, moved, 10 * x.numel())
