"""The CUDA table of operators against models/dit.py, in Triton's interpreter or on a GPU: `forward.py` over it is the
network that was trained, for every layer schedule, dtype and batch, with guidance, masks and editing.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from presto_rt.diffusion import noise
from presto_rt.diffusion.guidance import Guidance
from presto_rt.diffusion.schedule import LayerSchedule
from presto_rt.diffusion.trajectory import compile_trajectory
from presto_rt.errors import InvalidInputError
from presto_rt.models.config import ModelConfig, preset
from presto_rt.runtime.cuda.ops import OPERATORS, CudaOps, noise_of, unavailable
from presto_rt.runtime.dit import buffers, in_fp8
from presto_rt.runtime.eager.ops import ReferenceOps
from presto_rt.runtime.engine import Engine
from presto_rt.runtime.memory import aliased, place
from presto_rt.runtime.plan import Edit
from tests.support.networks import SCHEDULES, conditions, double, plainly, random_dit, relative

ODD = ModelConfig(name="odd", width=96, blocks=1, head_dim=48, mlp_ratio=3, latent_channels=13)
GUIDANCES = (Guidance(2.0), Guidance())


def all_but(name):
    return [other for other in OPERATORS if other != name]


def cuda_engine(model, device, dtype=torch.float32, plain=()):
    return Engine(model, CudaOps(dtype, device, plain, backend="triton"), threads=1)


def run(engine, runs, c, u, tokens, seeds, **changes):
    plan = engine.plan(runs, c.to(engine.device), u.to(engine.device), tokens)
    return engine.run(replace(plan, **changes), seeds).cpu()


@pytest.mark.parametrize("schedule", range(len(SCHEDULES)))
@torch.inference_mode()
def test_cuda_ops_equal_the_model_for_every_layer_schedule(device, schedule):
    config = replace(preset("tiny"), blocks=2)
    model, frames, batch = random_dit(config), 19, 1 + schedule // 2
    seeds, layers = [7, 2**64 - 1][:batch], SCHEDULES[schedule](config.blocks)
    c, u = conditions(model, batch, frames)
    # In the interpreter, products by Triton take as long as all else; the first schedule has them.
    engine = cuda_engine(model, device, plain=["gemm"] if schedule else [])
    levels, guidance = [5.0, 0.0], GUIDANCES[schedule % 2]
    runs = compile_trajectory("euler", levels, guidance, layers, config.network, config.sigma_data)
    got = run(engine, runs, c, u, frames, seeds)
    want = plainly(model.double(), "euler", levels, guidance, layers, double(c), double(u), frames, seeds)
    plain = plainly(model.float(), "euler", levels, guidance, layers, c, u, frames, seeds)
    assert relative(got, want) <= 2 * relative(plain, want) + 5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_cuda_ops_run_odd_sizes_with_guidance_in_every_dtype(device, dtype):
    """And nothing is left of what was in memory."""
    model, frames = random_dit(ODD), 21
    c, u = conditions(model, 2, frames)
    levels, layers, guidance = [4.0, 1.0, 0.0], LayerSchedule.full(1), Guidance(2.0, (2.0, 9.0))
    runs = compile_trajectory("few_step", levels, guidance, layers, "edm", 0.5)
    engine = cuda_engine(model, device, dtype, ["gemm"])
    got = run(engine, runs, c, u, frames, [5, 6])
    want = plainly(model, "few_step", levels, guidance, layers, c, u, frames, [5, 6])
    theirs = plainly(model.to(dtype), "few_step", levels, guidance, layers, c, u, frames, [5, 6])
    error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert error <= 1.3 * (theirs - want).square().mean().sqrt() / want.square().mean().sqrt() + 1e-6
    if dtype == torch.float32:
        for _, memory in engine._idle:
            memory.arena.block.fill_(0xFF)  # NaN in every dtype
        assert torch.equal(run(engine, runs, c, u, frames, [5, 6]), got)


@pytest.mark.parametrize(
    ("sampler", "network"), [("dpmpp_2m", "edm"), ("few_step", "edm"), ("heun", "v"), ("dpmpp_2s", "rf")]
)
@torch.inference_mode()
def test_cuda_ops_run_every_kind_of_sampler_step(device, sampler, network):
    """Samplers with fresh noise, with a memory, and with two evaluations a step."""
    model = random_dit(replace(preset("tiny"), blocks=1, network=network))
    c, u = conditions(model, 1, 11)
    levels, layers = [20.0, 3.0, 1.0, 0.0], LayerSchedule.full(1)
    for guidance in (Guidance(), Guidance(2.0)):
        runs = compile_trajectory(sampler, levels, guidance, layers, network, 0.5)
        got = run(cuda_engine(model, device, plain=all_but("step")), runs, c, u, 11, [3])
        want = plainly(model.double(), sampler, levels, guidance, layers, double(c), double(u), 11, [3])
        plain = plainly(model.float(), sampler, levels, guidance, layers, c, u, 11, [3])
        assert relative(got, want) <= 2 * relative(plain, want) + 2e-6


@torch.inference_mode()
def test_cuda_ops_ignore_padding_and_edit_as_the_reference(device):
    """A longer buffer with the frames that count told; and what an edit keeps is there at the end to the bit."""
    model, frames, padded = random_dit(replace(preset("tiny"), blocks=1)), 13, 21
    c, u = conditions(model, 2, padded)
    short = replace(c, beat=c.beat[:, :frames]), replace(u, beat=u.beat[:, :frames])
    runs = compile_trajectory("few_step", [5.0, 1.0, 0.0], Guidance(2.0), LayerSchedule.full(1), "edm", 0.5)
    init, keep = torch.randn(2, padded, 64), torch.rand(2, padded).round()
    engine = cuda_engine(model, device, plain=("norm", "qk", "cross", "gemm"))
    reference = Engine(model, ReferenceOps(), threads=1)
    counting = torch.full((4,), frames, dtype=torch.int32)
    for edited in (False, True):
        edit = Edit(init.to(device), keep.to(device)) if edited else None
        got = run(engine, runs, c, u, padded, [1, 2], frames=counting.to(device), edit=edit)[:, :frames]
        cut = Edit(init[:, :frames].contiguous(), keep[:, :frames].contiguous()) if edited else None
        want = run(reference, runs, *short, frames, [1, 2], edit=cut)
        assert relative(got, want) < 1e-5
        unmasked = run(engine, runs, c, u, padded, [1, 2], edit=edit)[:, :frames]
        assert relative(unmasked, want) > 1e-4  # so the mask did something
        if edited:
            kept = keep[:, :frames] == 1
            assert torch.equal(got[kept], init[:, :frames][kept])
            assert not torch.isclose(got[~kept], init[:, :frames][~kept]).all()


def test_noise_of_draws_each_clip_from_its_seed(device):
    drawn = noise_of([7, 2**64 - 1], (5, 3), device)
    for stream in (0, 4):
        want = torch.stack([noise.normal(seed, (5, 3), stream=stream) for seed in (7, 2**64 - 1)])
        assert torch.equal(drawn(stream).cpu(), want)


@torch.inference_mode()
def test_cuda_ops_can_run_each_operator_as_plain_torch(device):
    model = random_dit(replace(preset("tiny"), blocks=1))
    c, u = conditions(model, 1, 9)
    runs = compile_trajectory("few_step", [5.0, 0.0], Guidance(2.0), LayerSchedule.full(1), "edm", 0.5)
    want = run(Engine(model, ReferenceOps(), threads=1), runs, c, u, 9, [1])
    for name in OPERATORS:
        engine = cuda_engine(model, device, plain=all_but(name))
        assert relative(run(engine, runs, c, u, 9, [1]), want) < 1e-5
    with pytest.raises(InvalidInputError, match="norm"):
        CudaOps(torch.float32, device, ["magic"])


def test_cuda_ops_fp8_products_are_those_of_rounded_numbers(device):
    """On both sides of a block: norm to fp8 to product, and product with GELU to fp8."""
    ops = CudaOps(torch.bfloat16, device, backend="triton")
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    x = torch.randn(1, 37, 64, device=device)
    weight, bias = torch.randn(48, 64, device=device) / 8, torch.randn(48, device=device)
    plain = ops.pack(weight, bias)
    scale, out_scale = float(x.abs().max()) / 448, 0.02
    narrow = ops.narrow(plain, scale)
    x8 = (x / scale).to(torch.float8_e4m3fn)
    got = ops.linear(x8, narrow, torch.empty(1, 37, 48, dtype=torch.bfloat16, device=device), "gelu_tanh")
    w8 = narrow.weight.double() * narrow.weight_scale.double()[:, None]
    want = torch.nn.functional.gelu(x8.double() * scale @ w8.T + plain.bias.double(), approximate="tanh")
    assert relative(got, want) < 1e-2  # bf16's rounding of the result
    exact = torch.nn.functional.gelu(x.double() @ weight.double().T + bias.double(), approximate="tanh")
    assert 0.005 < float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < 0.08
    buffer = in_fp8(torch.empty(1, 37, 48, dtype=torch.bfloat16, device=device))
    hidden = ops.linear(x8, narrow, buffer, "gelu_tanh", out_scale)
    assert hidden.data_ptr() == buffer.data_ptr()
    assert float((hidden.double() * out_scale - want).abs().max()) < 0.07 * float(want.abs().max())
    table, base = torch.randn(1, 2, 64, device=device), torch.zeros(1, 37, 64, device=device)
    normed = in_fp8(torch.empty(1, 37, 64, dtype=torch.bfloat16, device=device))
    branch, residual = x.bfloat16(), torch.empty_like(base)
    ops.adaln(base, branch, table, None, 0, 1, residual, normed, 0.05)
    wide = torch.empty_like(branch)
    ops.adaln(base, branch, table, None, 0, 1, residual, wide)
    torch.testing.assert_close(normed.double() * 0.05, wide.double(), rtol=0.07, atol=0.05)


@pytest.mark.parametrize("config", [preset("tiny"), ODD, preset("nano")], ids=lambda c: c.name)
def test_cuda_ops_buffers_all_lie_in_the_arena(config):
    """Also the results of matrix products; and no two buffers that live together share a byte."""
    model = random_dit(config)
    c, u = conditions(model, 1, 21)
    engine = Engine(model, CudaOps(torch.bfloat16, "cpu", backend="torch"), threads=1)
    runs = compile_trajectory("euler", [2.0, 0.0], Guidance(2.0), LayerSchedule.full(config.blocks), "edm", 0.5)
    listed = buffers(engine.plan(runs, c, u, 21), engine.ops)
    assert {"packed", "branch", "hidden", "cross_q", "output"} <= {b.name for b in listed}
    offsets = place(listed)
    assert aliased(listed, offsets) == []
    ranges = {b.name: range(offsets[b.name], offsets[b.name] + b.size) for b in listed}
    for a, b in itertools.combinations(listed, 2):  # and once more, without the arena's own words for it
        together = any(x in range(p, q + 1) for p, q in a.spans for r, s in b.spans for x in range(r, s + 1))
        first, second = ranges[a.name], ranges[b.name]
        assert not together or first.stop <= second.start or second.stop <= first.start, (a.name, b.name)


def test_unavailable_gives_the_reason_in_one_line(monkeypatch):
    cpu = torch.device("cpu")
    assert unavailable(preset("small"), torch.bfloat16, cpu) is None
    assert "head dim 24" in str(unavailable(replace(ODD, head_dim=24), torch.bfloat16, cpu))
    assert "300 tokens" in str(unavailable(replace(ODD, text_tokens=300), torch.bfloat16, cpu))
    monkeypatch.setattr("presto_rt.kernels.runtime.triton", None)
    assert "pip install triton" in str(unavailable(preset("small"), torch.bfloat16, cpu))
