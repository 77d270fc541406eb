"""Rotary positions (RoFormer, Su et al. 2021), in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(frames: int, dim: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles, (frames, dim / 2) fp32 each."""
    inverse = 10_000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angles = torch.arange(frames, device=device, dtype=torch.float32)[:, None] * inverse
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, H, T, D), first half of the channels against the second half; returns fp32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
