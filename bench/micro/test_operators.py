"""Time of each C++ operator, of torch, and of copying as many bytes: `python -m bench.operators` runs this through
pytest-benchmark and keeps the medians. In bf16 at nano's shapes for 32 s of stereo.

An operator must first equal torch's result; a wrong one is an error, not a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from presto_rt import native
from presto_rt.models.rotary import rotary_angles
from presto_rt.models.spectral import SpectralFrames
from presto_rt.runtime.cpu.ops import CpuOps
from presto_rt.runtime.cpu.threads import thread_limit
from presto_rt.runtime.eager.ops import ReferenceOps
from presto_rt.runtime.ops import Modulation, SamplerBuffers
from presto_rt.runtime.plan import PlannedCall

if native.lib is None:
    pytest.skip(f"no C++ operators: {native.why}", allow_module_level=True)

THREADS = int(os.environ.get("PRESTO_RT_BENCH_THREADS", torch.get_num_threads()))
TOKENS = int(os.environ.get("PRESTO_RT_BENCH_TOKENS", 690))
HEADS, DIM, BANDS = 6, 64, 371
WIDTH, BF16 = HEADS * DIM, torch.bfloat16


@dataclass
class Case:
    """Two functions with one result.

    ours: runs the C++ operator. plain: runs torch. moved: bytes, each input read once and each output written once.
    difference: the largest allowed, relative to the largest value; None where tests alone check it.
    """

    ours: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    moved: int
    difference: float | None = 0.02


def norms() -> Case:
    residual, rows = torch.randn(1, TOKENS, WIDTH), torch.randn(1, 3, WIDTH)
    branch = torch.randn(1, TOKENS, WIDTH).to(BF16)
    out, after, ops = torch.empty_like(branch), torch.empty_like(residual), CpuOps(BF16, THREADS)

    def ours() -> Tensor:
        ops.adaln(residual, branch, Modulation(rows, 0, 1, 2), after, out, 1e-6)
        return out

    def plain() -> Tensor:
        r = residual + rows[:, 0] * branch
        return (F.layer_norm(r, (WIDTH,), eps=1e-6) * (1 + rows[:, 2]) + rows[:, 1]).to(BF16)

    return Case(ours, plain, 12 * TOKENS * WIDTH)


def rope() -> Case:
    qkv, angles, ones = torch.randn(1, TOKENS, 3 * WIDTH).to(BF16), rotary_angles(TOKENS, DIM), torch.ones(DIM)
    q, k = (torch.empty(1, HEADS, TOKENS, DIM, dtype=BF16) for _ in range(2))
    ops, cos, sin = CpuOps(BF16, THREADS), *angles

    def ours() -> Tensor:
        ops.qk_norm_rope(qkv, angles, (ones, ones), q, k, 1e-6)
        return q

    def plain() -> Tensor:
        part = F.rms_norm(qkv.unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)[:2].float(), (DIM,))
        a, b = part.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(BF16)[0]

    return Case(ours, plain, 8 * TOKENS * WIDTH)


def attention() -> Case:
    q, k, v = (torch.randn(1, HEADS, TOKENS, DIM).to(BF16) for _ in range(3))
    ops = CpuOps(BF16, THREADS)
    scratch = torch.empty(ops.scratch_bytes(1, HEADS, TOKENS, DIM), dtype=torch.uint8)
    out = torch.empty(1, TOKENS, WIDTH, dtype=BF16)
    return Case(
        lambda: ops.attention(q, k, v, scratch, out),
        lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2),
        8 * TOKENS * WIDTH,
    )


def cross_attention() -> Case:
    q, weight = torch.randn(1, TOKENS, WIDTH).to(BF16), torch.ones(DIM)
    k, v = (torch.randn(1, HEADS, 20, DIM).to(BF16) for _ in range(2))
    lengths, ops = torch.tensor([20], dtype=torch.int32), CpuOps(BF16, THREADS)
    scratch = torch.empty(ops.scratch_bytes(1, HEADS, TOKENS, DIM), dtype=torch.uint8)
    out, plain = torch.empty_like(q), ReferenceOps(BF16)
    return Case(
        lambda: ops.cross_attention(q, k, v, weight, lengths, scratch, out),
        lambda: plain.cross_attention(q, k, v, weight, lengths, None, torch.empty_like(q)),
        4 * TOKENS * WIDTH,
    )


def mix_norm() -> Case:
    frames = 4 * TOKENS
    source, branch = torch.randn(1, frames, WIDTH), torch.randn(1, frames, WIDTH).to(BF16)
    mix, norm = torch.randn(5, WIDTH), (torch.ones(WIDTH), torch.zeros(WIDTH))
    residual, out = torch.empty_like(source), torch.empty_like(branch)
    ops, plain = CpuOps(BF16, THREADS), ReferenceOps(BF16)
    return Case(
        lambda: ops.mix_norm(source, branch, mix, norm, residual, out),
        lambda: plain.mix_norm(source, branch, mix, norm, torch.empty_like(source), torch.empty_like(branch)),
        12 * frames * WIDTH,
    )


def features() -> Case:
    frames, stride = 4 * TOKENS, 1120
    halves = [torch.randn(1, frames, stride).to(BF16) for _ in range(2)]
    mean, ceiling = torch.zeros(2, BANDS), torch.ones(2, BANDS)
    out, ops, plain = torch.empty(1, frames, 3, BANDS), CpuOps(BF16, THREADS), ReferenceOps(BF16)
    return Case(
        lambda: ops.features(*halves, mean, ceiling, 2.0, out),
        lambda: plain.features(*halves, mean, ceiling, 2.0, torch.empty_like(out)),
        frames * (4 * stride + 12 * BANDS),
    )


def sampler_step() -> Case:
    x, history = torch.randn(1, TOKENS, 64), torch.zeros(1, TOKENS, 64)
    call = PlannedCall((0,), False, 0, None, 1, 1, torch.rand(9) * 0.1, torch.zeros(1))
    raw, fed = torch.randn(1, TOKENS, 64).to(BF16), torch.empty(1, TOKENS, 64, dtype=BF16)
    buffers = SamplerBuffers(x, history, torch.empty_like(x), fed)
    ops, plain = CpuOps(BF16, THREADS), ReferenceOps(BF16)

    def run(table: Any) -> Tensor:
        table.update_state(buffers, raw, None, None, call)
        return fed

    return Case(lambda: run(ops), lambda: run(plain), 20 * TOKENS * 64, None)  # both change x


def quantize() -> Case:
    x, ops = torch.randn(1, TOKENS, WIDTH).to(BF16), CpuOps(BF16, THREADS, int8=True, exact_int8=True)

    def plain() -> Tensor:
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        return ((x.float() / scale).round() + 128).to(torch.uint8)[0]

    return Case(lambda: ops.quantize(x)[0], plain, 3 * TOKENS * WIDTH)


def spectra() -> Case:
    frames = SpectralFrames(2500.0)
    given = torch.randn(1, 4 * TOKENS, 3, frames.bands) - 4.0
    moved = 4 * (given.numel() + 4096 * TOKENS)
    return Case(lambda: frames.synthesize(given, 2), lambda: frames.synthesize_torch(given, 2), moved, None)


CASES = {
    "gate, residual, norm, modulate": norms,
    "QK-norm and rotary positions": rope,
    "attention": attention,
    "cross-attention, 20 keys": cross_attention,
    "residual, mix of 5 frames, norm": mix_norm,
    "decoder's output to features": features,
    "sampler step": sampler_step,
    "to int8 by tokens": quantize,
    "spectra to samples, 2 Griffin-Lim": spectra,
}


@pytest.mark.parametrize("way", ["ours", "torch", "copy"])
@pytest.mark.parametrize("name", CASES)
def test_operator(benchmark: Any, name: str, way: str) -> None:
    torch.manual_seed(0)
    with thread_limit(THREADS), torch.inference_mode():
        case = CASES[name]()
        if way == "ours" and case.difference is not None:
            got, want = case.ours().float(), case.plain().float()
            assert (got - want).abs().max() <= case.difference * want.abs().max()
        source = torch.zeros(max(case.moved // 2, 1), dtype=torch.uint8)
        target = torch.empty_like(source)
        ways = {"ours": case.ours, "torch": case.plain, "copy": lambda: target.copy_(source)}
        benchmark.extra_info.update(operator=name, way=way, moved=case.moved, threads=THREADS)
        benchmark(ways[way])
