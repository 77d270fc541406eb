"""The update after a guided network call: one kernel against eager torch's eight and its own generator."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes
from presto_rt.kernels.sampler_step import NoiseStream, sampler_step, seeds_tensor


def cases(device: str, preset: str) -> Iterator[Case]:
    """Yield a guided multistep update without fresh noise and a guided few-step update with it."""
    s = shapes(preset, device)
    doubled = s.randn(2, s.tokens, 64)

    def make() -> tuple[torch.Tensor, ...]:
        state = (s.randn(1, s.tokens, 64, dtype=torch.float32) for _ in range(2))
        return *state, *(s.randn(1, s.tokens, 64) for _ in range(2))

    def case(name: str, noise: NoiseStream | None, operations: int) -> Case:
        coefficients = torch.rand(9, device=device)

        def eager(x: torch.Tensor, history: torch.Tensor, f_c: torch.Tensor, f_u: torch.Tensor) -> None:
            a, b, c, h, s, p, q, r, c_in = coefficients
            x_next = a * x + b * f_c.float() + c * f_u.float() + h * history
            if noise is not None:
                x_next = x_next + s * torch.randn_like(x)
            history.copy_(p * x + q * f_c.float() + r * f_u.float())
            x.copy_(x_next)
            doubled.copy_((c_in * x_next).expand(2, -1, -1))

        def presto(x: torch.Tensor, history: torch.Tensor, f_c: torch.Tensor, f_u: torch.Tensor) -> None:
            sampler_step(x, history, f_c, coefficients, network_input=doubled, copies=2, unconditional=f_u, noise=noise)

        x, _, f, _ = make()
        moved = 4 * size(x) + 4 * size(f)
        ways = {"eager": eager, "presto": presto}
        return Case("sampler_step", f"{s.tokens}x64 {name}", make, ways, moved, operations * x.numel())

    yield case("guided", None, 15)
    yield case("guided, fresh noise", NoiseStream(seeds_tensor([7], device), 2), 65)
