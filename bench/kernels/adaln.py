"""Gated residual, norm and modulation: one kernel against six of eager torch, and flashinfer's at its one width."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes
from presto_rt.kernels.adaln import Modulation, adaln

FLASHINFER_WIDTH = 3072


def cases(device: str, preset: str) -> Iterator[Case]:
    """Yield the preset's width and, on a GPU, flashinfer's."""
    s = shapes(preset, device)
    widths = (s.width, FLASHINFER_WIDTH) if device == "cuda" and preset == "medium" else (s.width,)
    for width in widths:
        yield at_width(s.tokens, width, device)


def at_width(tokens: int, width: int, device: str) -> Case:
    """Return the case of one row width."""
    table = torch.randn(480, width, device=device)
    table16 = table.bfloat16()
    modulation = Modulation(table, gate=2, shift=3, scale=4)

    def randn() -> torch.Tensor:
        return torch.randn(1, tokens, width, device=device).bfloat16()

    def eager(residual: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r = residual + table16[2] * branch
        return r, F.layer_norm(r, (width,), eps=1e-6) * (1 + table16[4]) + table16[3]

    def presto(residual: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return adaln(residual, branch, modulation)

    ways = {"eager": eager, "presto": presto}
    if width == FLASHINFER_WIDTH:
        # flashinfer takes a gate, scale and shift for each token, so it moves more bytes.
        gate, scale, shift = (table16[row].expand(1, tokens, width).contiguous() for row in (2, 4, 3))

        def flashinfer(residual: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            peer = importlib.import_module("flashinfer.diffusion_ops")
            return peer.fused_dit_gate_residual_layernorm_scale_shift(branch, residual, gate, scale, shift)

        ways["flashinfer"] = flashinfer
    x = randn()
    moved = 4 * size(x) + 3 * size(table[0])
    return Case("adaln", f"{tokens}x{width}", lambda: (randn(), randn()), ways, moved, 12 * x.numel())
