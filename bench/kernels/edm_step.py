"""One guided few-step update with fresh noise: one pass against eager torch's eight and its own generator."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from presto_rt.kernels.edm_step import coefficients, edm_step, seeds_tensor, trajectory_step

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

    update = torch.rand(9, device=device)

    def eager_step(x: torch.Tensor, history: torch.Tensor, f_c: torch.Tensor, f_u: torch.Tensor) -> None:
        a, b, c, h, _, p, q, r, c_in = update
        result = a * x + b * f_c.float() + c * f_u.float() + h * history
        history.copy_(p * x + q * f_c.float() + r * f_u.float())
        x.copy_(result)
        doubled.copy_((c_in * result).expand(2, -1, -1))

    def presto_step(x: torch.Tensor, history: torch.Tensor, f_c: torch.Tensor, f_u: torch.Tensor) -> None:
        trajectory_step(x, history, f_c, update, unconditional=f_u, network_input=doubled, copies=2)

    def make_step() -> tuple[torch.Tensor, ...]:
        return *(s.randn(1, s.tokens, 64, dtype=torch.float32) for _ in range(2)), *make()[1:]

    ways = {"eager": eager_step, "presto": presto_step}
    moved = 4 * size(x) + 4 * size(f)
    yield Case("edm_step", f"{s.tokens}x64 with a memory", make_step, ways, moved, 15 * x.numel())
