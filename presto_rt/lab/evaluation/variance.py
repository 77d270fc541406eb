"""Variance of the hidden states after each block, at full depth and with dropped blocks.

The final norm and the output layer are trained on the last block's activations. A prefix of the blocks (ASE) passes
them those of an early block; Presto-L's layer dropping always keeps the last block.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...diffusion.precond import coefficients
from ...diffusion.schedule import LayerSchedule
from ...models.dit import Condition, DiT
from ..training.conditions import LatentSet

SIGMAS = (0.2, 1.6, 8.0)  # noise levels of the published figures


@torch.inference_mode()
def hidden_variance(
    model: DiT, x: Tensor, sigma: float, condition: Condition, layers: LayerSchedule
) -> dict[int, float]:
    """Measure the variance of the activations (B, T, width) after each block that runs.

    Args:
        model: the transformer.
        x: clean latents (B, T, C), to which noise of a fixed seed is added.
        sigma: standard deviation of the noise.
        condition: conditions of the batch.
        layers: layer schedule, which selects the blocks at `sigma`.

    Returns:
        Variance by index of the block, in the order of the blocks.
    """
    variances: dict[int, float] = {}

    def record(index: int, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        variances[index] = float(output.float().var())

    handles = [block.register_forward_hook(partial(record, i)) for i, block in enumerate(model.blocks)]
    try:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
        sigmas = torch.full((len(x),), sigma, device=x.device)
        _, _, c_in, time = coefficients(sigmas, model.config.network, model.config.sigma_data)
        model(c_in[:, None, None] * (x + sigma * noise), time, condition, layers.blocks(sigma), layers.budget(sigma))
    finally:
        for handle in handles:
            handle.remove()
    return variances


def curves(
    models: dict[str, tuple[DiT, LayerSchedule]],
    held_out: LatentSet,
    sigmas: tuple[float, ...],
    clips: int = 16,
    frames: int = 128,
) -> list[dict[str, Any]]:
    """Measure the variance curves of several models on the same held-out crops.

    Args:
        models: transformer and layer schedule by name.
        held_out: latents of a held-out split.
        sigmas: noise levels.
        clips: number of crops.
        frames: latent frames of each crop.

    Returns:
        A record {"model", "sigma", "blocks", "variance"} for each model and noise level.
    """
    x, condition = held_out.batch(np.random.default_rng(1), clips, frames, control_dropout=0.0)
    records = []
    for name, (model, layers) in models.items():
        for sigma in sigmas:
            curve = hidden_variance(model.eval(), x, sigma, condition, layers)
            records.append({"model": name, "sigma": sigma, "blocks": list(curve), "variance": list(curve.values())})
    return records
