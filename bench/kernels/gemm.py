"""Linear layers with their epilogues. "presto" takes the faster of Triton and cuBLASLt, "presto triton" our kernel."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from bench.kernels.harness import Case, size
from bench.kernels.shapes import shapes
from presto_rt.kernels.gemm import Fp8Scales, linear

FP8 = torch.float8_e4m3fn


def cases(device: str, preset: str) -> Iterator[Case]:
    """Yield the MLP's layers. The weights are inputs too, since in the network every layer's weights are cold."""
    s = shapes(preset, device)
    wide, gpu = 4 * s.width, device == "cuda"
    up_bias, down_bias = s.randn(wide), s.randn(s.width)
    operations = 2 * s.tokens * s.width * wide

    def make_up() -> tuple[torch.Tensor, ...]:
        return s.randn(1, s.tokens, s.width), s.randn(wide, s.width) * s.width**-0.5

    def eager_up(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.linear(x, weight, up_bias), approximate="tanh")

    presto_up = partial(linear, bias=up_bias, activation="gelu_tanh")
    ways = {"eager": eager_up, "presto": presto_up}
    if gpu:
        ways["presto triton"] = partial(presto_up, backend="triton")
        ways["cublaslt gelu"] = lambda x, weight: torch._addmm_activation(up_bias, x[0], weight.T, use_gelu=True)
    moved = size(*make_up(), up_bias) + s.tokens * wide * 2
    yield Case("gemm", f"up gelu_tanh {s.tokens}x{s.width}x{wide}", make_up, ways, moved, operations)

    if device != "cpu":
        weight_scale = torch.full((wide,), 0.01, device=device)

        def make_fp8() -> tuple[torch.Tensor, ...]:
            x, weight = make_up()
            return (x / 0.02).to(FP8), (weight / 0.01).to(FP8)

        def eager_fp8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ones = torch.full((s.tokens, 1), 0.02, device=device)
            z = torch._scaled_mm(x[0], weight.T, ones, weight_scale[None], bias=up_bias, out_dtype=torch.bfloat16)
            return (F.gelu(z, approximate="tanh") / 0.02).to(FP8)

        presto_fp8 = partial(presto_up, scales=Fp8Scales(0.02, weight_scale, 0.02), out_dtype=FP8)
        ways = {"eager": eager_fp8, "presto": presto_fp8, "presto triton": partial(presto_fp8, backend="triton")}
        moved = size(*make_fp8(), up_bias, weight_scale) + s.tokens * wide
        name = f"fp8 up gelu_tanh {s.tokens}x{s.width}x{wide}"
        yield Case("gemm", name, make_fp8, ways, moved, operations, rate=2.0)

    def make_down() -> tuple[torch.Tensor, ...]:
        return s.randn(1, s.tokens, wide), s.randn(s.width, wide) * wide**-0.5

    def eager_down(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, down_bias)

    presto_down = partial(linear, bias=down_bias)
    ways = {"eager": eager_down, "presto": presto_down}
    if gpu:
        ways["presto triton"] = partial(presto_down, backend="triton")
    moved = size(*make_down(), down_bias) + s.tokens * s.width * 2
    yield Case("gemm", f"down {s.tokens}x{wide}x{s.width}", make_down, ways, moved, operations)
