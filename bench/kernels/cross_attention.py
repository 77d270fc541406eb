"""Cross-attention to a held prompt, from query projection to the input of the output projection."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes
from presto_rt.kernels.cross_attention import cross_attention


def cases(device: str, preset: str) -> Iterator[Case]:
    """Yield the operator's cases at a preset's shapes."""
    s = shapes(preset, device)
    weight = s.randn(s.head_dim, dtype=torch.float32)
    weight16 = weight.bfloat16()
    lengths = torch.tensor([40], dtype=torch.int32, device=device)
    mask = (torch.arange(s.text, device=device) < lengths[:, None])[:, None, None]

    def make() -> tuple[torch.Tensor, ...]:
        kv = s.randn(2, 1, s.heads, s.text, s.head_dim)
        return s.randn(1, s.tokens, s.width), kv[0], kv[1]

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        queries = F.rms_norm(q.unflatten(-1, (s.heads, s.head_dim)).transpose(1, 2), (s.head_dim,), weight16, eps=1e-6)
        return F.scaled_dot_product_attention(queries, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def presto(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return cross_attention(q, k, v, q_weight=weight, key_lengths=lengths)

    q, k, v = make()
    name = f"{s.tokens}x{s.heads}x{s.head_dim}, {s.text} keys"
    operations = 4 * s.tokens * s.text * s.width
    yield Case("cross_attention", name, make, {"eager": eager, "presto": presto}, 2 * size(q) + size(k, v), operations)
