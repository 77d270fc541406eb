"""One guided few-step update with fresh noise: one pass against eager torch's eight and its own generator."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from presto_rt.kernels.edm_step import coefficients, edm_step, seeds_tensor

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes


def cases(device: str, preset: str) -> Iterator[Case]:
    s = shapes(preset, device)
    made = coefficients(0.1, 0.4, 0.0, guidance=2.0, noise=0.8, c_in_next=1.1).to(device)
    seeds = seeds_tensor([7], device)
    doubled = s.randn(2, s.tokens, 64)

    def make() -> tuple[torch.Tensor, ...]:
        return s.randn(1, s.tokens, 64, dtype=torch.float32), s.randn(1, s.tokens, 64), s.randn(1, s.tokens, 64)

    def eager(x: torch.Tensor, conditional: torch.Tensor, unconditional: torch.Tensor) -> tuple[torch.Tensor, ...]:
        d_c, d_u = 0.1 * x + 0.4 * conditional.float(), 0.1 * x + 0.4 * unconditional.float()
        x = d_u + 2.0 * (d_c - d_u) + 0.8 * torch.randn_like(x)
        scaled = (1.1 * x).bfloat16()
        return x, torch.cat([scaled, scaled])

    def presto(x: torch.Tensor, conditional: torch.Tensor, unconditional: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return edm_step(x, conditional, made, unconditional=unconditional, seeds=seeds, stream=2, input_out=doubled)

    x, f, _ = make()
    ways = {"eager": eager, "presto": presto}
    yield Case("edm_step", f"{s.tokens}x64 guided", make, ways, 2 * size(x) + 4 * size(f), 60 * x.numel())
