"""Linear layers with their epilogues. "presto" takes the faster of Triton and cuBLASLt; "presto triton" is our
kernel alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from presto_rt.kernels.gemm import linear, linear_gate_residual

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes

FP8 = torch.float8_e4m3fn


def cases(device: str, preset: str) -> Iterator[Case]:
    s = shapes(preset, device)
    wide, gpu = 4 * s.width, device == "cuda"
    up, up_bias = s.randn(wide, s.width) * s.width**-0.5, s.randn(wide)
    down, down_bias = s.randn(s.width, wide) * wide**-0.5, s.randn(s.width)
    table = s.randn(6, s.width, dtype=torch.float32)
    gate16 = table[5].bfloat16()

    def eager_up(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.linear(x, up, up_bias), approximate="tanh")

    presto_up = partial(linear, weight=up, bias=up_bias, activation="gelu_tanh")
    ways = {"eager": eager_up, "presto": presto_up}
    if gpu:
        ways["presto triton"] = partial(presto_up, backend="triton")
        x_scale, scales = 0.02, torch.full((wide,), 0.01, device=device)
        up8 = (up / 0.01).to(FP8)
        fp8 = partial(linear, weight=up8, bias=up_bias, activation="gelu_tanh", x_scale=x_scale, weight_scale=scales)
        ways["presto fp8"] = lambda x: fp8(x.to(FP8))  # counts the conversion that adaln's epilogue does for nothing
    operations = 2 * s.tokens * s.width * wide

    def make() -> tuple[torch.Tensor, ...]:
        return (s.randn(1, s.tokens, s.width),)

    moved = size(up, up_bias) + s.tokens * (s.width + wide) * 2
    yield Case("gemm", f"up gelu_tanh {s.tokens}x{s.width}x{wide}", make, ways, moved, operations)

    def eager_down(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + gate16 * F.linear(x, down, down_bias)

    def presto_down(x: torch.Tensor, residual: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        return linear_gate_residual(x, down, down_bias, residual, table, gate=5, backend=backend)

    ways = {"eager": eager_down, "presto": presto_down}
    if gpu:
        ways["presto triton"] = partial(presto_down, backend="triton")
    moved = size(down, down_bias) + s.tokens * (wide + 2 * s.width) * 2

    def make_down() -> tuple[torch.Tensor, ...]:
        return s.randn(1, s.tokens, wide), s.randn(1, s.tokens, s.width)

    yield Case("gemm", f"down gate residual {s.tokens}x{wide}x{s.width}", make_down, ways, moved, operations)
