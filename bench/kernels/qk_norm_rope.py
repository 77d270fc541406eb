"""QK-norm, rotary positions and the head-major layout from packed QKV."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from presto_rt.kernels.qk_norm_rope import qk_norm_rope, rotary_table

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes


def cases(device: str, preset: str) -> Iterator[Case]:
    s = shapes(preset, device)
    dim = s.head_dim
    cos, sin = rotary_table(s.tokens, dim, device=device)
    weight = s.randn(dim, dtype=torch.float32)
    weight16 = weight.bfloat16()

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = F.rms_norm(x, (dim,), weight16, eps=1e-6).float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    def eager(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = qkv.unflatten(-1, (3, s.heads, dim)).permute(2, 0, 3, 1, 4)
        return turn(q), turn(k), v

    def presto(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return qk_norm_rope(qkv, s.heads, cos, sin, q_weight=weight, k_weight=weight)

    def make() -> tuple[torch.Tensor, ...]:
        return (s.randn(1, s.tokens, 3 * s.width),)

    moved = size(*make()) * 4 // 3 + size(cos, sin)  # Q and K read and written; V stays
    operations = 2 * s.tokens * s.width * 8
    yield Case(
        "qk_norm_rope", f"{s.tokens}x{s.heads}x{dim}", make, {"eager": eager, "presto": presto}, moved, operations
    )
