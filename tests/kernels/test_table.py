"""The CUDA table of operators against models/dit.py, in Triton's interpreter or on a GPU: `runtime.dit` over it is the
network that was trained, for every layer schedule, dtype and batch, with guidance, masks and edits.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from presto_rt.checkpoints.house import network_spec
from presto_rt.diffusion import noise
from presto_rt.diffusion.guidance import Guidance
from presto_rt.diffusion.schedule import LayerSchedule
from presto_rt.diffusion.trajectory import NetworkCall, compile_trajectory
from presto_rt.errors import InvalidInputError
from presto_rt.models.config import ModelConfig, preset
from presto_rt.models.dit import Condition, DiT
from presto_rt.runtime.cuda.ops import OPERATORS, CudaOps, unsupported_reason
from presto_rt.runtime.dit import Memory, as_fp8, buffers
from presto_rt.runtime.eager.ops import ReferenceOps
from presto_rt.runtime.memory import aliased, place
from presto_rt.runtime.ops import Modulation
from presto_rt.runtime.plan import LatentEdit
from tests.support.networks import (
    SCHEDULES,
    Program,
    conditions,
    double,
    full_trajectory,
    random_dit,
    reference_trajectory,
    relative,
)

ODD = ModelConfig(name="odd", width=96, blocks=1, head_dim=48, mlp_ratio=3, latent_channels=13)
GUIDANCES = (Guidance(2.0), Guidance())


def all_but(name: str) -> list[str]:
    return [other for other in OPERATORS if other != name]


def cuda_program(model: DiT, device: str, dtype: torch.dtype = torch.float32, unfused: Collection[str] = ()) -> Program:
    return Program(model, CudaOps(dtype, device, unfused, backend="triton"))


def run(
    program: Program,
    calls: Sequence[NetworkCall],
    c: Condition,
    u: Condition,
    frames: int,
    seeds: Sequence[int],
    memory: Memory | None = None,
    **changes: Any,
) -> Tensor:
    return program.run(replace(program.plan(calls, c, u, frames), **changes), seeds, memory)


@pytest.mark.parametrize("schedule", range(len(SCHEDULES)))
@torch.inference_mode()
def test_cuda_ops_equal_the_model_for_every_layer_schedule(device: str, schedule: int) -> None:
    config = replace(preset("tiny"), blocks=2)
    model, frames, batch = random_dit(config), 19, 1 + schedule // 2
    seeds, layers = [7, 2**64 - 1][:batch], SCHEDULES[schedule](config.blocks)
    c, u = conditions(model, batch, frames)
    # In the interpreter, products by Triton take as long as all else; the first schedule has them.
    program = cuda_program(model, device, unfused=["gemm"] if schedule else [])
    sigmas, guidance = [5.0, 0.0], GUIDANCES[schedule % 2]
    calls = compile_trajectory("euler", sigmas, guidance, layers, config.network, config.sigma_data)
    got = run(program, calls, c, u, frames, seeds)
    exact = reference_trajectory(model.double(), "euler", sigmas, guidance, layers, double(c), double(u), frames, seeds)
    eager = reference_trajectory(model.float(), "euler", sigmas, guidance, layers, c, u, frames, seeds)
    assert relative(got, exact) <= 2 * relative(eager, exact) + 5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_cuda_ops_run_odd_sizes_with_guidance_in_every_dtype(device: str, dtype: torch.dtype) -> None:
    """And nothing that was in memory remains."""
    model, frames = random_dit(ODD), 21
    c, u = conditions(model, 2, frames)
    sigmas, layers, guidance = [4.0, 1.0, 0.0], LayerSchedule.full(1), Guidance(2.0, (2.0, 9.0))
    calls = full_trajectory(1, "few_step", sigmas, guidance)
    program = cuda_program(model, device, dtype, ["gemm"])
    memory = Memory(program.plan(calls, c, u, frames), program.ops)
    memory.arena.block.zero_()
    got = run(program, calls, c, u, frames, [5, 6], memory)
    want = reference_trajectory(model, "few_step", sigmas, guidance, layers, c, u, frames, [5, 6])
    eager = reference_trajectory(model.to(dtype), "few_step", sigmas, guidance, layers, c, u, frames, [5, 6])
    error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert error <= 1.3 * (eager - want).square().mean().sqrt() / want.square().mean().sqrt() + 1e-6
    if dtype == torch.float32:
        memory.arena.block.fill_(0xFF)  # NaN in every dtype
        assert torch.equal(run(program, calls, c, u, frames, [5, 6], memory), got)


@pytest.mark.parametrize(
    ("sampler", "prediction_type"), [("dpmpp_2m", "edm"), ("few_step", "edm"), ("heun", "v"), ("dpmpp_2s", "rf")]
)
@torch.inference_mode()
def test_cuda_ops_run_every_kind_of_sampler_step(device: str, sampler: str, prediction_type: str) -> None:
    """Samplers with fresh noise, with a history, and with two network calls a step."""
    model = random_dit(replace(preset("tiny"), blocks=1, network=prediction_type))
    c, u = conditions(model, 1, 11)
    sigmas, layers = [20.0, 3.0, 1.0, 0.0], LayerSchedule.full(1)
    for guidance in (Guidance(), Guidance(2.0)):
        calls = full_trajectory(1, sampler, sigmas, guidance, prediction_type)
        got = run(cuda_program(model, device, unfused=all_but("sampler_step")), calls, c, u, 11, [3])
        exact = reference_trajectory(model.double(), sampler, sigmas, guidance, layers, double(c), double(u), 11, [3])
        eager = reference_trajectory(model.float(), sampler, sigmas, guidance, layers, c, u, 11, [3])
        assert relative(got, exact) <= 2 * relative(eager, exact) + 2e-6


@torch.inference_mode()
def test_cuda_ops_ignore_padding_and_edit_as_the_reference(device: str) -> None:
    """A clip in a longer buffer equals the clip alone; and what an edit keeps is in the result to the bit."""
    model, frames, padded = random_dit(replace(preset("tiny"), blocks=1)), 13, 21
    c, u = conditions(model, 2, padded)
    short = replace(c, beat=c.beat[:, :frames]), replace(u, beat=u.beat[:, :frames])
    calls = full_trajectory(1, "few_step", [5.0, 1.0, 0.0], Guidance(2.0))
    init, keep = torch.randn(2, padded, 64), torch.rand(2, padded).round()
    program = cuda_program(model, device, unfused=("adaln", "qk_norm_rope", "cross_attention", "gemm"))
    reference = Program(model, ReferenceOps())
    valid = torch.full((4,), frames, dtype=torch.int32)
    for edited in (False, True):
        edit = LatentEdit(init.to(device), keep.to(device)) if edited else None
        got = run(program, calls, c, u, padded, [1, 2], valid_frames=valid.to(device), edit=edit)[:, :frames]
        cut = LatentEdit(init[:, :frames].contiguous(), keep[:, :frames].contiguous()) if edited else None
        want = run(reference, calls, *short, frames, [1, 2], edit=cut)
        assert relative(got, want) < 1e-5
        unmasked = run(program, calls, c, u, padded, [1, 2], edit=edit)[:, :frames]
        assert relative(unmasked, want) > 1e-4  # so the mask had an effect
        if edited:
            kept = keep[:, :frames] == 1
            assert torch.equal(got[kept], init[:, :frames][kept])
            assert not torch.isclose(got[~kept], init[:, :frames][~kept]).all()


def test_cuda_ops_normal_draws_each_clip_from_its_seed(device: str) -> None:
    ops = CudaOps(torch.float32, device, backend="triton")
    for stream in (0, 4):
        drawn = ops.normal([7, 2**64 - 1], stream, torch.full((2, 5, 3), float("nan"), device=device))
        want = torch.stack([noise.normal(seed, (5, 3), stream=stream) for seed in (7, 2**64 - 1)])
        assert torch.equal(drawn.cpu(), want)


@torch.inference_mode()
def test_cuda_ops_can_run_each_operator_as_plain_torch(device: str) -> None:
    model = random_dit(replace(preset("tiny"), blocks=1))
    c, u = conditions(model, 1, 9)
    calls = full_trajectory(1, "few_step", [5.0, 0.0], Guidance(2.0))
    want = run(Program(model, ReferenceOps()), calls, c, u, 9, [1])
    for name in OPERATORS:
        program = cuda_program(model, device, unfused=all_but(name))
        assert relative(run(program, calls, c, u, 9, [1]), want) < 1e-5
    with pytest.raises(InvalidInputError, match="adaln"):
        CudaOps(torch.float32, device, ["magic"])


def test_cuda_ops_fp8_products_are_those_of_rounded_numbers(device: str) -> None:
    """On both sides of a block: norm to fp8 to product, and product with GELU to fp8."""
    ops = CudaOps(torch.bfloat16, device, backend="triton")
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    x = torch.randn(1, 37, 64, device=device)
    weight, bias = torch.randn(48, 64, device=device) / 8, torch.randn(48, device=device)
    packed = ops.pack(weight, bias)
    scale, out_scale = float(x.abs().max()) / 448, 0.02
    narrow = ops.to_fp8(packed, scale)
    x8 = (x / scale).to(torch.float8_e4m3fn)
    got = ops.linear(x8, narrow, torch.empty(1, 37, 48, dtype=torch.bfloat16, device=device), "gelu_tanh")
    w8 = narrow.weight.double() * narrow.weight_scale.double()[:, None]
    want = torch.nn.functional.gelu(x8.double() * scale @ w8.T + packed.bias.double(), approximate="tanh")
    assert relative(got, want) < 1e-2  # bf16's rounding of the result
    exact = torch.nn.functional.gelu(x.double() @ weight.double().T + bias.double(), approximate="tanh")
    assert 0.005 < float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < 0.08
    buffer = as_fp8(torch.empty(1, 37, 48, dtype=torch.bfloat16, device=device))
    hidden = ops.linear(x8, narrow, buffer, "gelu_tanh", out_scale)
    assert hidden.data_ptr() == buffer.data_ptr()
    assert float((hidden.double() * out_scale - want).abs().max()) < 0.07 * float(want.abs().max())
    table, base = torch.randn(1, 2, 64, device=device), torch.zeros(1, 37, 64, device=device)
    normed = as_fp8(torch.empty(1, 37, 64, dtype=torch.bfloat16, device=device))
    branch, residual = x.bfloat16(), torch.empty_like(base)
    modulation = Modulation(table, None, 0, 1)
    ops.adaln(base, branch, modulation, residual, normed, 1e-6, 0.05)
    wide = torch.empty_like(branch)
    ops.adaln(base, branch, modulation, residual, wide, 1e-6)
    torch.testing.assert_close(normed.double() * 0.05, wide.double(), rtol=0.07, atol=0.05)


@pytest.mark.parametrize("config", [preset("tiny"), ODD, preset("nano")], ids=lambda c: c.name)
def test_cuda_ops_buffers_all_lie_in_the_arena(config: ModelConfig) -> None:
    """Also the results of matrix products; and no two buffers that are alive together share a byte."""
    model = random_dit(config)
    c, u = conditions(model, 1, 21)
    program = Program(model, CudaOps(torch.bfloat16, "cpu", backend="torch"))
    calls = full_trajectory(config.blocks, "euler", [2.0, 0.0], Guidance(2.0))
    listed = buffers(program.plan(calls, c, u, 21), program.ops)
    assert {"qkv", "branch", "hidden", "cross_q", "output"} <= {b.name for b in listed}
    offsets = place(listed)
    assert aliased(listed, offsets) == []
    ranges = {b.name: range(offsets[b.name], offsets[b.name] + b.size) for b in listed}
    for a, b in itertools.combinations(listed, 2):  # once more, without the arena's own definition of an overlap
        together = any(x in range(p, q + 1) for p, q in a.spans for r, s in b.spans for x in range(r, s + 1))
        first, second = ranges[a.name], ranges[b.name]
        assert not together or first.stop <= second.start or second.stop <= first.start, (a.name, b.name)


def test_unsupported_reason_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, small, odd = torch.device("cpu"), network_spec(preset("small")), network_spec(ODD)
    assert unsupported_reason(small, torch.bfloat16, cpu) is None
    assert "head dim 24" in str(unsupported_reason(replace(odd, head_dim=24), torch.bfloat16, cpu))
    assert "300 tokens" in str(unsupported_reason(replace(odd, max_cross_tokens=300), torch.bfloat16, cpu))
    monkeypatch.setattr("presto_rt.kernels.runtime.triton", None)
    assert "pip install triton" in str(unsupported_reason(small, torch.bfloat16, cpu))
