"""The engine: forward.py over each table of operators against models/dit.py and the samplers; plans, costs, memory."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from presto_rt import native
from presto_rt.diffusion.guidance import Guidance
from presto_rt.diffusion.samplers import SAMPLERS
from presto_rt.diffusion.schedule import LayerSchedule, karras_sigmas, parse_layers
from presto_rt.diffusion.trajectory import compile_trajectory
from presto_rt.errors import InvalidInputError
from presto_rt.models.config import ModelConfig, preset
from presto_rt.models.dit import Condition
from presto_rt.runtime.cpu.ops import CpuOps
from presto_rt.runtime.dit import buffers
from presto_rt.runtime.eager.ops import ReferenceOps
from presto_rt.runtime.engine import Engine
from presto_rt.runtime.memory import Arena, Buffer, aliased, describe, place
from presto_rt.runtime.plan import Cost, block_cost, plan_cost
from tests.support.networks import CONFIGS, SCHEDULES, conditions, double, plainly, random_dit, relative

needs_native = pytest.mark.skipif(native.lib is None, reason=f"no C++ operators: {native.why}")
TABLES = ["reference", pytest.param("cpu", marks=needs_native)]


def table(name: str, dtype: torch.dtype = torch.float32, threads: int = 1) -> ReferenceOps | CpuOps:
    return ReferenceOps(dtype) if name == "reference" else CpuOps(dtype, threads)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("schedule", range(len(SCHEDULES)))
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_forward_equals_the_model(name: str, schedule: int, config: ModelConfig, batch: int) -> None:
    model, frames, seeds = random_dit(config), 19, [7, 8][:batch]
    layers = SCHEDULES[schedule](config.blocks)
    c, u = conditions(model, batch, frames)
    engine = Engine(model, table(name), threads=1)
    for guidance in (Guidance(), Guidance(2.0, (0.1, 3.0)), Guidance(3.0)):
        levels = karras_sigmas(3)
        runs = compile_trajectory("euler", levels, guidance, layers, config.network, config.sigma_data)
        got = engine.run(engine.plan(runs, c, u, frames), seeds)
        want = plainly(model.double(), "euler", levels, guidance, layers, double(c), double(u), frames, seeds)
        plain = plainly(model.float(), "euler", levels, guidance, layers, c, u, frames, seeds)
        assert relative(got, want) <= 2 * relative(plain, want) + 2e-7


@pytest.mark.parametrize("name", TABLES)
@torch.inference_mode()
def test_bf16_is_as_close_as_torch(name: str) -> None:
    model, frames = random_dit(preset("tiny")), 33
    c, u = conditions(model, 1, frames)
    levels, layers, guidance = karras_sigmas(4), LayerSchedule.full(3), Guidance(2.0)
    runs = compile_trajectory("dpmpp_2m", levels, guidance, layers, "edm", 0.5)
    engine = Engine(model, table(name, torch.bfloat16), threads=1)
    got = engine.run(engine.plan(runs, c, u, frames), [5])
    want = plainly(model, "dpmpp_2m", levels, guidance, layers, c, u, frames, [5])
    torch_bf16 = plainly(model.bfloat16(), "dpmpp_2m", levels, guidance, layers, c, u, frames, [5])
    error = (got - want).square().mean().sqrt()
    assert error <= 1.2 * (torch_bf16 - want).square().mean().sqrt()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("network", ["edm", "v", "rf"])
@torch.inference_mode()
def test_written_out_samplers_are_the_samplers(sampler: str, network: str) -> None:
    model = random_dit(replace(preset("tiny"), network=network, blocks=1))
    c, u = conditions(model, 1, 11)
    engine = Engine(model, ReferenceOps(), threads=1)
    choices = [Guidance(), Guidance(2.0, (0.05, 5.0))]
    if sampler in ("euler", "dpmpp_2m"):
        choices.append(Guidance(0.6, plus_plus=True))
    for guidance in choices:
        for levels in ([80.0, 0.0], [20.0, 3.0, 0.7, 0.1, 0.0], [5.0, 1.0, 0.3]):
            layers = LayerSchedule.full(1)
            runs = compile_trajectory(sampler, levels, guidance, layers, network, 0.5)
            got = engine.run(engine.plan(runs, c, u, 11), [3])
            want = plainly(model.double(), sampler, levels, guidance, layers, double(c), double(u), 11, [3])
            plain = plainly(model.float(), sampler, levels, guidance, layers, c, u, 11, [3])
            assert relative(got, want) <= 2 * relative(plain, want) + 1e-6
            assert [r.step for r in runs if r.step] == list(range(1, len(levels)))


@pytest.mark.parametrize("name", TABLES)
@torch.inference_mode()
def test_result_depends_on_its_inputs_and_not_on_what_was_in_memory(name: str) -> None:
    model = random_dit(preset("tiny"))
    c, u = conditions(model, 1, 12)
    engine = Engine(model, table(name), threads=1)
    layers = LayerSchedule.full(3)

    def run(c: Condition, guidance: float = 2.0, seed: int = 1) -> Tensor:
        runs = compile_trajectory("few_step", [20.0, 2.0, 0.0], Guidance(guidance), layers, "edm", 0.5)
        return engine.run(engine.plan(runs, c, u, 12), [seed])

    first = run(c)
    for _, memory in engine._idle:
        memory.arena.block.fill_(0xFF)  # NaN in every dtype
    assert torch.equal(run(c), first)
    assert not torch.equal(run(c, seed=2), first)
    assert not torch.equal(run(c, guidance=3.0), first)
    assert not torch.equal(run(replace(c, text=c.text + 1)), first)
    assert not torch.equal(run(replace(c, beat=c.beat + 1)), first)
    assert not torch.equal(run(replace(c, key=c.key + 1)), first)


def test_text_beyond_a_mask_is_not_seen_and_holes_are_refused() -> None:
    model = random_dit(preset("tiny"))
    c, u = conditions(model, 2, 8)
    engine = Engine(model, ReferenceOps(), threads=1)
    runs = compile_trajectory("euler", [2.0, 0.0], Guidance(2.0), LayerSchedule.full(3), "edm", 0.5)
    changed = replace(c, text=torch.where(c.text_mask[..., None], c.text, c.text + 9))
    first, second = (engine.run(engine.plan(runs, given, u, 8), [1, 2]) for given in (c, changed))
    assert torch.equal(first, second)
    with pytest.raises(InvalidInputError, match="first"):
        engine.plan(runs, replace(c, text_mask=c.text_mask.flip(1)), u, 8)


@needs_native
def test_many_threads_on_one_engine_get_what_they_would_get_alone() -> None:
    model = random_dit(preset("tiny"))
    engine = Engine(model, CpuOps(threads=2), threads=2)
    runs = compile_trajectory("euler", [20.0, 2.0, 0.0], Guidance(2.0), LayerSchedule.full(3), "edm", 0.5)
    sizes = enumerate([9, 16, 9, 31] * 2)
    requests = [(engine.plan(runs, *conditions(model, 1, frames), frames), seed) for seed, frames in sizes]
    alone = [engine.run(plan, [seed]) for plan, seed in requests]
    together: dict[int, Tensor] = {}

    def work(i: int) -> None:
        together[i] = engine.run(requests[i][0], [requests[i][1]])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(requests))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(together[i], alone[i]) for i in range(len(requests)))


def test_callback_comes_after_each_step_and_may_stop_the_run() -> None:
    model = random_dit(preset("tiny"))
    c, u = conditions(model, 1, 8)
    engine = Engine(model, ReferenceOps(), threads=1)
    runs = compile_trajectory("heun", [20.0, 2.0, 0.5, 0.0], Guidance(), LayerSchedule.full(3), "edm", 0.5)
    plan, seen = engine.plan(runs, c, u, 8), []
    engine.run(plan, [1], lambda i, n: seen.append((i, n)))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(step: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run(plan, [1], stop)
    assert torch.isfinite(engine.run(plan, [1])).all()


def test_costs_equal_a_hand_count_of_one_block() -> None:
    config, t, s = preset("nano"), 689, 20
    cost = sum(block_cost(config, 1, t, s, 2).values(), Cost(0, 0))
    products = 2 * t * (384 * 1152 + 3 * 384 * 384 + 2 * 384 * 1536)
    attention = 4 * t * t * 384 + 4 * t * s * 384
    assert cost.flops == products + attention
    weights = 2 * (384 * 1152 + 3 * 384 * 384 + 2 * 384 * 1536)
    activations = 2 * t * ((384 + 1152) + 3 * (384 + 384) + 2 * (384 + 1536))
    between = 3 * t * 384 * 12 + 4 * t * 384 * 2
    seen = 2 * 384 * (2 * t + 2 * t) + 2 * 384 * (2 * t + 2 * s)
    assert cost.bytes == weights + activations + between + seen


def test_a_plan_costs_its_blocks_and_its_guidance() -> None:
    model = random_dit(preset("tiny"))
    c, u = conditions(model, 1, 8)
    engine = Engine(model, ReferenceOps(), threads=1)

    def cost(guidance: float, layers: int) -> Cost:
        runs = compile_trajectory("euler", [2.0, 1.0, 0.0], Guidance(guidance), parse_layers(layers, 3), "edm", 0.5)
        return plan_cost(engine.plan(runs, c, u, 8), 4)

    ends = 2 * 2 * 2 * 8 * 64 * 64
    assert cost(2.0, 3).flops == 2 * cost(1.0, 3).flops
    assert cost(1.0, 3).flops - ends == 3 * (cost(1.0, 1).flops - ends)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("config", [*CONFIGS, preset("nano")], ids=lambda c: c.name)
def test_no_two_live_buffers_share_memory(name: str, config: ModelConfig) -> None:
    model = random_dit(config)
    c, u = conditions(model, 1, 21)
    engine = Engine(model, table(name), threads=1)
    runs = compile_trajectory("euler", [2.0, 0.0], Guidance(2.0), LayerSchedule.full(config.blocks), "edm", 0.5)
    listed = buffers(engine.plan(runs, c, u, 21), engine.ops)
    offsets = place(listed)
    assert aliased(listed, offsets) == []
    assert max(offsets[b.name] + b.size for b in listed) < sum(b.size for b in listed)  # what can share does
    lines = describe(listed, offsets).splitlines()
    assert len(lines) == len(listed) + 1
    assert all(any(line.startswith(b.name) for line in lines) for b in listed)


def test_the_alias_check_finds_an_alias() -> None:
    a = Buffer("a", (16,), torch.float32, ((0, 2),))
    b = Buffer("b", (16,), torch.float32, ((2, 3),))
    c = Buffer("c", (16,), torch.float32, ((3, 4),))
    assert aliased([a, b, c], {"a": 0, "b": 32, "c": 0}) == [("a", "b"), ("b", "c")]
    arena = Arena([a, b, c])
    assert arena.size == 128
    assert arena.tensor("a").data_ptr() % 64 == 0
    assert arena.tensor("a").data_ptr() == arena.tensor("c").data_ptr() != arena.tensor("b").data_ptr()
