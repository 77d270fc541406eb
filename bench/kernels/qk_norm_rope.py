"""QK-norm, rotary positions and the head-major layout from packed QKV."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes
from presto_rt.kernels.qk_norm_rope import QKNorm, Rotary, qk_norm_rope
from presto_rt.models.dit import rotary_table


def cases(device: str, preset: str) -> Iterator[Case]:
    """Yield the operator's cases at a preset's shapes."""
    s = shapes(preset, device)
    dim = s.head_dim
    cos, sin = rotary_table(s.tokens, dim, device)
    rotary = Rotary(cos, sin)
    weight = s.randn(dim, dtype=torch.float32)
    norm = QKNorm(q_weight=weight, k_weight=weight)
    weight16, wide16 = weight.bfloat16(), weight.bfloat16().repeat(s.heads)

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = F.rms_norm(x, (dim,), weight16, eps=1e-6).float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    def eager(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = qkv.unflatten(-1, (3, s.heads, dim)).permute(2, 0, 3, 1, 4)
        return turn(q), turn(k), v

    def presto(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return qk_norm_rope(qkv, s.heads, rotary, norm=norm)

    def flashinfer(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Normalize across all heads and copy V: the same reads, a third more writes."""
        peer = importlib.import_module("flashinfer.diffusion_ops").fused_qk_rmsnorm_rope
        counts = {f"num_heads_{part}": s.heads for part in "qkv"}
        axes = {"ppf": s.tokens, "pph": 1, "ppw": 1}
        channels = {"num_frame_channels": dim, "num_height_channels": 0, "num_width_channels": 0}
        return peer(qkv, wide16, wide16, **axes, **channels, **counts, head_dim=dim, interleave=False)

    def make() -> tuple[torch.Tensor, ...]:
        return (s.randn(1, s.tokens, 3 * s.width),)

    moved = size(*make()) * 4 // 3 + size(cos, sin)  # Q and K read and written; V stays
    operations = 2 * s.tokens * s.width * 8
    ways = {"eager": eager, "presto": presto} | ({"flashinfer": flashinfer} if device == "cuda" else {})
    yield Case("qk_norm_rope", f"{s.tokens}x{s.heads}x{dim}", make, ways, moved, operations)
