"""Noise levels of the distillation losses: which distribution each loss draws from, by name.

"train"      p(s_train): ln s ~ N(P_mean, P_std^2)
"inference"  p(s_inf): uniform along the sampler's ladder
"ladder:N"   the N levels that an N-step sampler visits, as DMD2 does
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...diffusion.schedule import few_step_sigmas, inference_sigmas, training_sigmas
from ...errors import InvalidInputError
from ...models.config import ModelConfig


def check_levels(name: str) -> None:
    """Raises InvalidInputError for a name that `draw_levels` would not know."""
    kind, _, steps = name.partition(":")
    if name in ("train", "inference") or (kind == "ladder" and steps.isdigit() and int(steps) >= 1):
        return
    raise InvalidInputError(f'noise levels are "train", "inference" or "ladder:STEPS", not {name!r}')


def draw_levels(name: str, u: Tensor, config: ModelConfig) -> Tensor:
    """Noise levels from uniform numbers u (B,) in (0, 1)."""
    check_levels(name)
    if name == "train":
        return training_sigmas(u).clamp(config.sigma_min, config.sigma_max)
    if name == "inference":
        return inference_sigmas(u, config.sigma_min, config.sigma_max, config.rho)
    steps = int(name.partition(":")[2])
    ladder = torch.tensor(few_step_sigmas(steps, config.sigma_min, config.sigma_max, config.rho)[:-1], device=u.device)
    return ladder[(u * steps).long().clamp_max(steps - 1)]
