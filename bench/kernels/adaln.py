"""Norm and modulation around a branch: one pass of ours against six of eager torch; at the one width that it takes also
flashinfer's fused kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from presto_rt.kernels import adaln

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes

FLASHINFER_WIDTH = 3072


def cases(device: str, preset: str) -> Iterator[Case]:
    s = shapes(preset, device)
    widths = (s.width, FLASHINFER_WIDTH) if device == "cuda" and preset == "medium" else (s.width,)
    for width in widths:
        yield from at_width(s.tokens, width, device)


def at_width(tokens: int, width: int, device: str) -> Iterator[Case]:
    table = torch.randn(480, width, device=device)
    table16 = table.bfloat16()

    def randn() -> torch.Tensor:
        return torch.randn(1, tokens, width, device=device).bfloat16()

    def eager(residual: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r = residual + table16[2] * branch
        return r, F.layer_norm(r, (width,), eps=1e-6) * (1 + table16[4]) + table16[3]

    def presto(residual: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return adaln.gate_residual_norm_modulate(residual, branch, table, gate=2, shift=3, scale=4)

    ways = {"eager": eager, "presto": presto}
    if width == FLASHINFER_WIDTH:
        # it wants a gate, scale and shift for each token, so it moves more
        gate, scale, shift = (table16[row].expand(1, tokens, width).contiguous() for row in (2, 4, 3))

        def flashinfer(residual: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            peer = importlib.import_module("flashinfer.diffusion_ops")
            return peer.fused_dit_gate_residual_layernorm_scale_shift(branch, residual, gate, scale, shift)

        ways["flashinfer"] = flashinfer
    x = randn()
    moved = 4 * size(x) + 3 * size(table[0])
    name = f"gate_residual_norm_modulate {tokens}x{width}"
    yield Case("adaln", name, lambda: (randn(), randn()), ways, moved, 12 * x.numel())

    def eager_norm(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (width,), eps=1e-6) * (1 + table16[4]) + table16[3]

    ways = {"eager": eager_norm, "presto": lambda x: adaln.norm_modulate(x, table, shift=3, scale=4)}
    moved = 2 * size(x) + 2 * size(table[0])
    yield Case("adaln", f"norm_modulate {tokens}x{width}", lambda: (randn(),), ways, moved, 10 * x.numel())
