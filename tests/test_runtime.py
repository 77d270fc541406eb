"""The runtime: the forward pass over each table of operators against models/dit.py and the textbook samplers; plans,
costs, memory, edits.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from presto_rt import native
from presto_rt.checkpoints.house import network_spec
from presto_rt.diffusion import noise
from presto_rt.diffusion.guidance import Guidance
from presto_rt.diffusion.schedule import LayerSchedule, karras_sigmas, parse_layers
from presto_rt.diffusion.trajectory import SAMPLERS, NetworkCall, compile_trajectory, sample
from presto_rt.errors import GenerationError, InvalidInputError
from presto_rt.models.config import ModelConfig, preset
from presto_rt.models.dit import Condition, DiT
from presto_rt.runtime.backend import Backend
from presto_rt.runtime.cost import Cost, block_cost, plan_cost
from presto_rt.runtime.cpu.backend import CpuBackend
from presto_rt.runtime.cpu.ops import CpuOps
from presto_rt.runtime.dit import Memory, buffers
from presto_rt.runtime.eager.backend import EagerBackend
from presto_rt.runtime.eager.ops import ReferenceOps
from presto_rt.runtime.memory import Arena, Buffer, aliased, describe, place
from presto_rt.runtime.plan import LatentEdit
from presto_rt.runtime.precision import Precision
from tests.support.jobs import graph_backend, make_job, tiny_model
from tests.support.networks import (
    CONFIGS,
    SCHEDULES,
    Program,
    conditions,
    double,
    full_trajectory,
    random_dit,
    reference_trajectory,
    relative,
)

needs_native = pytest.mark.skipif(native.lib is None, reason=f"no C++ operators: {native.why}")
TABLES = ["reference", pytest.param("cpu", marks=needs_native)]
BACKENDS = ["eager", pytest.param("cpu", marks=needs_native), "graph"]


def table(name: str, dtype: torch.dtype = torch.float32, threads: int = 1) -> ReferenceOps | CpuOps:
    return ReferenceOps(dtype) if name == "reference" else CpuOps(dtype, threads)


def backend(name: str, threads: int = 1, dit: DiT | None = None) -> Backend:
    """Return a backend of a small random model, in fp32."""
    model = tiny_model(dit)
    if name == "graph":
        return graph_backend(model)
    if name == "cpu":
        weights, precision = model.transformer(torch.device("cpu")), Precision.of(torch.float32)
        return CpuBackend(
            weights, model.spec, model.autoencoder, model.conditioner, precision=precision, threads=threads
        )
    return EagerBackend(model.network, model.autoencoder, model.conditioner, channels=model.spec.channels)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("schedule", range(len(SCHEDULES)))
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_denoise_equals_the_model(name: str, schedule: int, config: ModelConfig, batch: int) -> None:
    model, frames, seeds = random_dit(config), 19, [7, 8][:batch]
    layers = SCHEDULES[schedule](config.blocks)
    c, u = conditions(model, batch, frames)
    program = Program(model, table(name))
    for guidance in (Guidance(), Guidance(2.0, (0.1, 3.0)), Guidance(3.0)):
        sigmas = karras_sigmas(3)
        calls = compile_trajectory("euler", sigmas, guidance, layers, config.network, config.sigma_data)
        got = program.run(program.plan(calls, c, u, frames), seeds)
        exact = reference_trajectory(
            model.double(), "euler", sigmas, guidance, layers, double(c), double(u), frames, seeds
        )
        eager = reference_trajectory(model.float(), "euler", sigmas, guidance, layers, c, u, frames, seeds)
        assert relative(got, exact) <= 2 * relative(eager, exact) + 2e-7


@pytest.mark.parametrize("name", TABLES)
@torch.inference_mode()
def test_denoise_in_bf16_is_as_close_as_torch(name: str) -> None:
    model, frames = random_dit(preset("tiny")), 33
    c, u = conditions(model, 1, frames)
    sigmas, layers, guidance = karras_sigmas(4), LayerSchedule.full(3), Guidance(2.0)
    program = Program(model, table(name, torch.bfloat16))
    got = program.run(program.plan(full_trajectory(3, "dpmpp_2m", sigmas, guidance), c, u, frames), [5])
    want = reference_trajectory(model, "dpmpp_2m", sigmas, guidance, layers, c, u, frames, [5])
    eager = reference_trajectory(model.bfloat16(), "dpmpp_2m", sigmas, guidance, layers, c, u, frames, [5])
    error = (got - want).square().mean().sqrt()
    assert error <= 1.2 * (eager - want).square().mean().sqrt()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["edm", "v", "rf"])
@torch.inference_mode()
def test_denoise_runs_every_sampler_as_the_textbook_does(sampler: str, prediction_type: str) -> None:
    model = random_dit(replace(preset("tiny"), network=prediction_type, blocks=1))
    c, u = conditions(model, 1, 11)
    program = Program(model, ReferenceOps())
    guidances = [Guidance(), Guidance(2.0, (0.05, 5.0))]
    if SAMPLERS[sampler].cfg_pp:
        guidances.append(Guidance(0.6, plus_plus=True))
    for guidance in guidances:
        for sigmas in ([80.0, 0.0], [20.0, 3.0, 0.7, 0.1, 0.0], [5.0, 1.0, 0.3]):
            layers = LayerSchedule.full(1)
            calls = full_trajectory(1, sampler, sigmas, guidance, prediction_type)
            got = program.run(program.plan(calls, c, u, 11), [3])
            exact = reference_trajectory(
                model.double(), sampler, sigmas, guidance, layers, double(c), double(u), 11, [3]
            )
            eager = reference_trajectory(model.float(), sampler, sigmas, guidance, layers, c, u, 11, [3])
            assert relative(got, exact) <= 2 * relative(eager, exact) + 1e-6
            assert [call.step for call in calls if call.step] == list(range(1, len(sigmas)))


@pytest.mark.parametrize("name", TABLES)
@torch.inference_mode()
def test_denoise_depends_on_its_inputs_and_not_on_memory(name: str) -> None:
    model = random_dit(preset("tiny"))
    c, u = conditions(model, 1, 12)
    program = Program(model, table(name))

    def run(c: Condition, guidance: float = 2.0, seed: int = 1, memory: Memory | None = None) -> Tensor:
        calls = full_trajectory(3, "few_step", [20.0, 2.0, 0.0], Guidance(guidance))
        return program.run(program.plan(calls, c, u, 12), [seed], memory)

    memory = Memory(program.plan(full_trajectory(3, "few_step", [20.0, 0.0], Guidance(2.0)), c, u, 12), program.ops)
    memory.arena.block.zero_()
    first = run(c, memory=memory)
    assert torch.equal(run(c, memory=memory), first)
    memory.arena.block.fill_(0xFF)  # NaN in every dtype
    assert torch.equal(run(c, memory=memory), first)
    assert not torch.equal(run(c, seed=2), first)
    assert not torch.equal(run(c, guidance=3.0), first)
    assert not torch.equal(run(replace(c, text=c.text + 1)), first)
    assert not torch.equal(run(replace(c, beat=c.beat + 1)), first)
    assert not torch.equal(run(replace(c, key=c.key + 1)), first)
    assert not torch.equal(run(replace(c, pooled=c.pooled + 1)), first)
    assert not torch.equal(run(replace(c, seconds=c.seconds + 1)), first)


def test_plan_ignores_text_beyond_its_mask_and_refuses_holes() -> None:
    model = random_dit(preset("tiny"))
    c, u = conditions(model, 2, 8)
    program = Program(model, ReferenceOps())
    calls = full_trajectory(3, "euler", [2.0, 0.0], Guidance(2.0))
    changed = replace(c, text=torch.where(c.text_mask[..., None], c.text, c.text + 9))
    first, second = (program.run(program.plan(calls, given, u, 8), [1, 2]) for given in (c, changed))
    assert torch.equal(first, second)
    with pytest.raises(InvalidInputError, match="first"):
        program.plan(calls, replace(c, text_mask=c.text_mask.flip(1)), u, 8)


@needs_native
def test_cpu_backend_gives_many_threads_the_clips_that_each_gets_alone() -> None:
    shared = backend("cpu", threads=2)
    jobs = [make_job(frames=frames, seeds=[seed]) for seed, frames in enumerate([9, 16, 9, 31] * 2)]
    alone = [shared.run(job) for job in jobs]
    together: dict[int, Tensor] = {}

    def work(i: int) -> None:
        together[i] = shared.run(jobs[i]).latents

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(together[i], alone[i].latents) for i in range(len(jobs)))


def test_denoise_reports_each_step_and_may_be_stopped() -> None:
    model = random_dit(preset("tiny"))
    c, u = conditions(model, 1, 8)
    program = Program(model, ReferenceOps())
    plan = program.plan(full_trajectory(3, "heun", [20.0, 2.0, 0.5, 0.0], Guidance()), c, u, 8)
    memory, seen = Memory(plan, program.ops), []
    whole = program.run(plan, [1], memory, lambda step, steps: seen.append((step, steps)))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(step: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        program.run(plan, [1], memory, stop)
    assert torch.equal(program.run(plan, [1], memory), whole)


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_reports_each_step(name: str) -> None:
    seen: list[tuple[int, int]] = []
    backend(name).run(make_job(steps=3, sampler="heun"), lambda step, steps: seen.append((step, steps)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", ["eager", pytest.param("cpu", marks=needs_native)])
def test_backend_may_be_stopped_and_used_again(name: str) -> None:
    model, job = backend(name), make_job()
    want = model.run(job).latents

    def stop(step: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.run(job, stop)
    assert torch.equal(model.run(job).latents, want)


# ---- backends against each other, and edits


@pytest.mark.parametrize("name", [pytest.param("cpu", marks=needs_native), "graph"])
@pytest.mark.parametrize("sampler", ["few_step", "dpmpp_2m"])
def test_backend_gives_the_latents_and_samples_of_the_eager_one(name: str, sampler: str) -> None:
    job = make_job(["piano", "drums"], bpm=90.0, key="D minor", sampler=sampler, negative="noise")
    got, want = backend(name).run(job), backend("eager").run(job)
    torch.testing.assert_close(got.latents, want.latents, rtol=1e-4, atol=1e-4)
    assert got.samples.shape == want.samples.shape == (2, 2, job.samples)
    assert abs(got.samples - want.samples).max() < 2e-3
    assert set(got.stage_seconds) == set(want.stage_seconds) == {"text", "denoise", "decode"}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("sampler", ["few_step", "dpmpp_2m", "heun"])
def test_edit_keeps_latents_to_the_bit(name: str, sampler: str) -> None:
    """And all backends agree on the rest, which differs from what the clip was and from a clip without the edit."""
    generator = torch.Generator().manual_seed(0)
    edit = LatentEdit(torch.randn(1, 21, 64, generator=generator) * 0.5, torch.zeros(1, 21))
    edit.keep[:, :9] = 1
    job = make_job(edit=edit, sampler=sampler, steps=3)
    result = backend(name).run(job).latents
    assert torch.equal(result[:, :9], edit.init[:, :9])
    assert float((result[:, 9:] - edit.init[:, 9:]).abs().max()) > 0.1
    without = backend(name).run(replace(job, edit=None)).latents
    assert float((result[:, 9:] - without[:, 9:]).abs().max()) > 0.01
    want = backend("eager").run(job).latents
    torch.testing.assert_close(result, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_edit_with_nothing_kept_makes_a_variation(name: str) -> None:
    """A start from a clip at a noise level is near the clip when the level is low."""
    generator = torch.Generator().manual_seed(0)
    edit = LatentEdit(torch.randn(1, 21, 64, generator=generator) * 0.5, torch.zeros(1, 21))
    model = backend(name)

    def distance(sigma: float) -> float:
        result = model.run(make_job(sigmas=[sigma, sigma / 4, 0.0], edit=edit, guidance=1.0))
        return float((result.latents - edit.init).square().mean().sqrt())

    near, middle, far = distance(0.01), distance(0.5), distance(40.0)
    assert near < 0.1 * middle < middle < far


@pytest.mark.parametrize("name", TABLES)
@torch.inference_mode()
def test_edit_follows_the_textbook_between_steps(name: str) -> None:
    """After each step the kept frames are init plus the first noise at the state's noise level."""
    model, frames = random_dit(preset("tiny")), 13
    c, u = conditions(model, 2, frames)
    edit = LatentEdit(torch.randn(2, frames, 64), torch.rand(2, frames))  # weights between 0 and 1, too
    calls = full_trajectory(3, "heun", [20.0, 2.0, 0.5, 0.0], Guidance(2.0))
    program = Program(model, table(name))
    got = program.run(program.plan(calls, c, u, frames, edit), [3, 4])
    both = c.cat(u).ports()

    def evaluate(call: NetworkCall, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = torch.cat([x, x])
        conditional, unconditional = model.raw(x, torch.full((4,), call.time), both, call.blocks, call.budget).chunk(2)
        return conditional, unconditional

    def fresh(stream: int) -> Tensor:
        return torch.stack([noise.normal(seed, (frames, 64), stream=stream) for seed in (3, 4)])

    want = sample(calls, evaluate, fresh, edit=(edit.init, edit.keep))
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_raises_where_the_sampler_diverged(name: str) -> None:
    model = random_dit(preset("tiny"))
    model.output.bias.fill_(torch.inf)
    with pytest.raises(GenerationError, match="diverged"):
        backend(name, dit=model).run(make_job())


# ---- costs and memory


def test_block_cost_equals_a_hand_count() -> None:
    config, t, s = preset("nano"), 689, 20
    cost = sum(block_cost(network_spec(config), 1, t, s, 2).values(), Cost(0, 0))
    products = 2 * t * (384 * 1152 + 3 * 384 * 384 + 2 * 384 * 1536)
    attention = 4 * t * t * 384 + 4 * t * s * 384
    assert cost.flops == products + attention
    weights = 2 * (384 * 1152 + 3 * 384 * 384 + 2 * 384 * 1536)
    activations = 2 * t * ((384 + 1152) + 3 * (384 + 384) + 2 * (384 + 1536))
    between = 3 * t * 384 * 12 + 4 * t * 384 * 2
    seen = 2 * 384 * (2 * t + 2 * t) + 2 * 384 * (2 * t + 2 * s)
    assert cost.bytes == weights + activations + between + seen


def test_plan_cost_counts_blocks_and_guidance() -> None:
    model = random_dit(preset("tiny"))
    c, u = conditions(model, 1, 8)
    program = Program(model, ReferenceOps())

    def cost(guidance: float, layers: int) -> Cost:
        calls = compile_trajectory("euler", [2.0, 1.0, 0.0], Guidance(guidance), parse_layers(layers, 3), "edm", 0.5)
        return plan_cost(program.plan(calls, c, u, 8), 4)

    ends = 2 * 2 * 2 * 8 * 64 * 64
    assert cost(2.0, 3).flops == 2 * cost(1.0, 3).flops
    assert cost(1.0, 3).flops - ends == 3 * (cost(1.0, 1).flops - ends)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("config", [*CONFIGS, preset("nano")], ids=lambda c: c.name)
def test_buffers_that_are_alive_together_share_no_memory(name: str, config: ModelConfig) -> None:
    model = random_dit(config)
    c, u = conditions(model, 1, 21)
    program = Program(model, table(name))
    calls = full_trajectory(config.blocks, "euler", [2.0, 0.0], Guidance(2.0))
    listed = buffers(program.plan(calls, c, u, 21), program.ops)
    offsets = place(listed)
    assert aliased(listed, offsets) == []
    assert max(offsets[b.name] + b.size for b in listed) < sum(b.size for b in listed)  # others do share
    lines = describe(listed, offsets).splitlines()
    assert len(lines) == len(listed) + 1
    assert all(any(line.startswith(b.name) for line in lines) for b in listed)


def test_aliased_finds_an_alias() -> None:
    a = Buffer("a", (16,), torch.float32, ((0, 2),))
    b = Buffer("b", (16,), torch.float32, ((2, 3),))
    c = Buffer("c", (16,), torch.float32, ((3, 4),))
    assert aliased([a, b, c], {"a": 0, "b": 32, "c": 0}) == [("a", "b"), ("b", "c")]
    arena = Arena([a, b, c])
    assert arena.size == 128
    assert arena.tensor("a").data_ptr() % 64 == 0
    assert arena.tensor("a").data_ptr() == arena.tensor("c").data_ptr() != arena.tensor("b").data_ptr()
