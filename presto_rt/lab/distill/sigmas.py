"""Distributions of noise levels (sigmas) that the distillation losses draw from, by name.

- "train": p(s_train), ln s ~ N(P_MEAN, P_STD^2), the base model's training distribution;
- "inference": p(s_inf), uniform along the sampler's sigma schedule;
- "ladder:N": the N sigmas of an N-step sampler, as in DMD2 (Yin et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...diffusion.schedule import few_step_sigmas, inference_sigmas, training_sigmas
from ...errors import InvalidInputError
from ...models.config import ModelConfig


def check_distribution(name: str) -> None:
    """Raise InvalidInputError if `draw_sigmas` knows no distribution of this name."""
    kind, _, steps = name.partition(":")
    if name in ("train", "inference") or (kind == "ladder" and steps.isdigit() and int(steps) >= 1):
        return
    raise InvalidInputError(f"unknown distribution of sigmas {name!r}; choose from: train, inference, ladder:STEPS")


def draw_sigmas(name: str, u: Tensor, config: ModelConfig) -> Tensor:
    """Map uniform numbers u (B,) in (0, 1) to sigmas (B,) of the named distribution.

    Raises:
        InvalidInputError: unknown name.
    """
    check_distribution(name)
    if name == "train":
        return training_sigmas(u).clamp(config.sigma_min, config.sigma_max)
    if name == "inference":
        return inference_sigmas(u, config.sigma_min, config.sigma_max, config.rho)
    steps = int(name.partition(":")[2])
    sigmas = few_step_sigmas(steps, config.sigma_min, config.sigma_max, config.rho)[:-1]
    return torch.tensor(sigmas, device=u.device)[(u * steps).long().clamp_max(steps - 1)]
