"""Models without training, for timing: every weight random, so that no part of the work is left out.

They are loaded by a preset's name and "-random", so that nobody takes their noise for music.
"""

from __future__ import annotations

import torch

from ..config import ModelConfig
from .dit import DiT

SUFFIX = "-random"


def untrained(config: ModelConfig, device: torch.device | str = "cpu", seed: int = 0) -> DiT:
    """A transformer of that shape in fp32, matrices of spread 1 / sqrt(inputs), made on the device. The same seed
    gives the same weights on the same kind of device."""
    with torch.device("meta"):
        model = DiT(config)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.02
            parameter.normal_(0.0, spread, generator=generator)
    return model
