"""Self-attention: our Triton kernel and every backend that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes
from presto_rt.kernels.attention import attention


def cases(device: str, preset: str) -> Iterator[Case]:
    """Yield the operator's cases at a preset's shapes."""
    s = shapes(preset, device)
    for dim in (s.head_dim, 2 * s.head_dim):
        heads = s.width // dim
        if not heads:
            continue

        def make(heads: int = heads, dim: int = dim) -> tuple[torch.Tensor, ...]:
            return tuple(s.randn(1, heads, s.tokens, dim) for _ in range(3))

        gpu = device == "cuda"
        names = ["triton", "sdpa-flash", "sdpa-cudnn", "flash-attn", "flash-attn-4"] if gpu else []
        ways = {"eager": F.scaled_dot_product_attention, "presto": attention}
        ways |= {f"presto {name}": partial(attention, backend=name) for name in names}
        operations = 4 * heads * s.tokens**2 * dim
        yield Case("attention", f"{s.tokens}x{heads}x{dim}", make, ways, 4 * size(make()[0]), operations)
