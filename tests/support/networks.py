"""Shared by the engine's tests: small random networks and conditions, and the trajectory as models/ and diffusion/ have
it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from presto_rt.diffusion import noise
from presto_rt.diffusion.guidance import Guidance, guided
from presto_rt.diffusion.precond import precondition
from presto_rt.diffusion.samplers import sample
from presto_rt.diffusion.schedule import LayerSchedule, budget_schedule, parse_layers
from presto_rt.models.config import ModelConfig, preset
from presto_rt.models.dit import Condition, DiT

CONFIGS = [preset("tiny"), ModelConfig(name="odd", width=72, blocks=2, head_dim=24, mlp_ratio=3, latent_channels=13)]
SCHEDULES: list[Callable[[int], LayerSchedule]] = [
    LayerSchedule.full,
    lambda depth: parse_layers(1, depth),
    lambda depth: parse_layers(f"{round(100 * max(1, depth - 1) / depth)}%", depth),
    lambda depth: budget_schedule(depth, 0.7),
]


def random_dit(config: ModelConfig) -> DiT:
    torch.manual_seed(0)
    model = DiT(config).eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model


def conditions(model: DiT, batch: int, frames: int) -> tuple[Condition, Condition]:
    """Texts of different lengths, and the unconditional twin."""
    lengths = torch.arange(3, 3 + 2 * batch, 2)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    text = torch.randn(batch, mask.shape[1], model.config.text_dim)
    pooled, seconds = torch.randn(batch, model.config.text_dim), torch.full((batch,), 3.0)
    c = Condition(text, mask, pooled, seconds, torch.randn(batch, frames, 5), torch.randn(batch, 24))
    return c, model.null(c)


def plainly(model: DiT, sampler: str, levels: list[float], guidance: Guidance, layers: LayerSchedule,
            c: Condition, u: Condition, frames: int, seeds: list[int]) -> Tensor:  # fmt: skip
    """The trajectory by models/dit.py, diffusion/ and nothing else."""
    config, both, dtype = model.config, c.cat(u), torch.promote_types(model.input.weight.dtype, torch.float32)

    def fresh(stream: int) -> Tensor:
        return torch.stack([noise.normal(s, (frames, config.latent_channels), stream=stream) for s in seeds]).to(dtype)

    def denoiser(x: Tensor, sigma: float, given: Condition) -> Tensor:
        blocks, told = layers.blocks(sigma), layers.budget(sigma)
        sigmas = torch.full((len(x),), sigma, dtype=dtype)
        return precondition(model, x, sigmas, given, blocks, told, kind=config.network, sigma_data=config.sigma_data)

    denoise = guided(
        lambda x, s: denoiser(x, s, c), lambda x, s: denoiser(torch.cat([x, x]), s, both).chunk(2), guidance
    )
    return sample(sampler, denoise, levels[0] * fresh(0), levels, fresh)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def double(c: Condition) -> Condition:
    """The same condition; text, pooled, beat and key in fp64."""
    return replace(c, text=c.text.double(), pooled=c.pooled.double(), beat=c.beat.double(), key=c.key.double())
