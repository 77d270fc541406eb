"""Small random transformers and conditionings, the runtime's program of a transformer, and the same trajectory by
models/dit.py and the textbook samplers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from presto_rt.checkpoints.house import network_spec, transformer_weights
from presto_rt.conditioning.ports import Conditioning
from presto_rt.diffusion import noise
from presto_rt.diffusion.guidance import Guidance
from presto_rt.diffusion.precond import precondition
from presto_rt.diffusion.schedule import LayerSchedule, budget_schedule, parse_layers
from presto_rt.diffusion.trajectory import NetworkCall, compile_trajectory
from presto_rt.models.config import ModelConfig, preset
from presto_rt.models.dit import Condition, DiT
from presto_rt.runtime.dit import Memory, denoise, pack_transformer
from presto_rt.runtime.ops import Ops
from presto_rt.runtime.plan import CompiledPlan, LatentEdit, Planner

from .textbook_samplers import guided, sample

CONFIGS = [preset("tiny"), ModelConfig(name="odd", width=72, blocks=2, head_dim=24, mlp_ratio=3, latent_channels=13)]
SCHEDULES: list[Callable[[int], LayerSchedule]] = [
    LayerSchedule.full,
    lambda depth: parse_layers(1, depth),
    lambda depth: parse_layers(f"{round(100 * max(1, depth - 1) / depth)}%", depth),
    lambda depth: budget_schedule(depth, 0.7),
]


def random_dit(config: ModelConfig) -> DiT:
    """Return a transformer with every parameter random, so that no part of its output is zero."""
    torch.manual_seed(0)
    model = DiT(config).eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model


def conditions(model: DiT, batch: int, frames: int) -> tuple[Condition, Condition]:
    """Return conditions with texts of different lengths, and the unconditional ones."""
    lengths = torch.arange(3, 3 + 2 * batch, 2)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    text = torch.randn(batch, mask.shape[1], model.config.text_dim)
    pooled, seconds = torch.randn(batch, model.config.text_dim), torch.full((batch,), 3.0)
    c = Condition(text, mask, pooled, seconds, torch.randn(batch, frames, 5), torch.randn(batch, 24))
    return c, model.null(c)


def full_trajectory(
    depth: int, sampler: str, sigmas: Sequence[float], guidance: Guidance, prediction_type: str = "edm"
) -> tuple[NetworkCall, ...]:
    """Return the network calls of a trajectory in which every block runs."""
    return compile_trajectory(sampler, sigmas, guidance, LayerSchedule.full(depth), prediction_type, 0.5)


class Program:
    """A transformer packed for a table of operators, as backends run it."""

    def __init__(self, model: DiT, ops: Ops) -> None:
        weights = transformer_weights(model, ops.device)
        self.ops, self.planner = ops, Planner(weights, network_spec(model.config), ops.device)
        self.packed = pack_transformer(weights, ops)

    def plan(
        self,
        calls: Sequence[NetworkCall],
        conditional: Condition | Conditioning,
        unconditional: Condition | Conditioning,
        frames: int,
        edit: LatentEdit | None = None,
    ) -> CompiledPlan:
        """Return the plan of a conditioning, which may be on any device."""
        c, u = (x.ports() if isinstance(x, Condition) else x for x in (conditional, unconditional))
        device = self.ops.device
        return self.planner.plan(calls, c.to(device), u.to(device), frames, self.ops.dtype, edit)

    @torch.inference_mode()
    def run(
        self,
        plan: CompiledPlan,
        seeds: Sequence[int],
        memory: Memory | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Return latents (B, T, C) on the CPU; memory: None for new memory, full of NaN."""
        if memory is None:
            memory = Memory(plan, self.ops)
            memory.arena.block.fill_(0xFF)  # NaN in every dtype
        return denoise(self.ops, self.packed, plan, memory, seeds, on_step).cpu().clone()


def reference_trajectory(
    model: DiT,
    sampler: str,
    sigmas: Sequence[float],
    guidance: Guidance,
    layers: LayerSchedule,
    c: Condition,
    u: Condition,
    frames: int,
    seeds: Sequence[int],
) -> Tensor:
    """Return latents (B, T, C) by models/dit.py and the textbook samplers alone, in the model's dtype, at least fp32.

    Args:
        model: in any floating-point dtype.
        sampler: name of a sampler.
        sigmas: falling noise levels.
        guidance: scale, interval and kind.
        layers: blocks of each noise level.
        c: conditions of B clips.
        u: the unconditional ones.
        frames: latent frames.
        seeds: one for each clip.
    """
    config, both, dtype = model.config, c.cat(u), torch.promote_types(model.input.weight.dtype, torch.float32)

    def fresh(stream: int) -> Tensor:
        shape = (frames, config.latent_channels)
        return torch.stack([noise.normal(seed, shape, stream=stream) for seed in seeds]).to(dtype)

    def denoiser(x: Tensor, sigma: float, condition: Condition) -> Tensor:
        blocks, budget = layers.blocks(sigma), layers.budget(sigma)
        column = torch.full((len(x),), sigma, dtype=dtype)
        return precondition(
            model, x, column, condition, blocks, budget, kind=config.network, sigma_data=config.sigma_data
        )

    def guided_pair(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        d_c, d_u = denoiser(torch.cat([x, x]), sigma, both).chunk(2)
        return d_c, d_u

    denoise = guided(lambda x, sigma: denoiser(x, sigma, c), guided_pair, guidance)
    return sample(sampler, denoise, sigmas[0] * fresh(0), sigmas, fresh)


def relative(got: Tensor, want: Tensor) -> float:
    """Return the largest error over the largest value."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def double(c: Condition) -> Condition:
    """Return the same condition with text, pooled, beat and key in fp64."""
    return replace(c, text=c.text.double(), pooled=c.pooled.double(), beat=c.beat.double(), key=c.key.double())
