"""Hidden-state variance after each block: full depth, and with blocks dropped.

The final norm and the output layer were trained on activations of a certain variance. A prefix (ASE) hands them those
of an early block; Presto-L's shifted drop always ends with the last block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...diffusion.precond import coefficients
from ...diffusion.schedule import LayerSchedule
from ...models.dit import Condition, DiT
from ..training.conditions import LatentSet


@torch.inference_mode()
def hidden_variance(
    model: DiT, x: Tensor, sigma: float, condition: Condition, layers: LayerSchedule
) -> dict[int, float]:
    """{block: variance of the activations (B, T, width) after it} for the blocks that run at `sigma`, in order.

    x: clean latents (B, T, C), noised here with a fixed seed.
    """
    found: dict[int, float] = {}

    def listen(index: int) -> Any:
        return lambda block, given, out: found.__setitem__(index, float(out.float().var()))

    handles = [block.register_forward_hook(listen(i)) for i, block in enumerate(model.blocks)]
    try:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
        levels = torch.full((len(x),), sigma, device=x.device)
        _, _, c_in, time = coefficients(levels, model.config.network, model.config.sigma_data)
        model(c_in[:, None, None] * (x + sigma * noise), time, condition, layers.blocks(sigma), layers.budget(sigma))
    finally:
        for handle in handles:
            handle.remove()
    return found


def curves(models: dict[str, tuple[DiT, LayerSchedule]], held_out: LatentSet, sigmas: tuple[float, ...],
           clips: int = 16, frames: int = 128) -> list[dict[str, Any]]:  # fmt: skip
    """One record per model and noise level: {"model", "sigma", "blocks", "variance"}, on the same held-out crops."""
    x, condition = held_out.batch(np.random.default_rng(1), clips, frames, control_dropout=0.0)
    records = []
    for name, (model, layers) in models.items():
        for sigma in sigmas:
            found = hidden_variance(model.eval(), x, sigma, condition, layers)
            record = {"model": name, "sigma": sigma, "blocks": list(found), "variance": list(found.values())}
            records.append(record)
    return records
