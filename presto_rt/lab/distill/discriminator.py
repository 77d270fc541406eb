"""The discriminator of Presto-S: a small head on the fake score's activations, one logit per latent frame."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """1-D convolutions over time on activations (B, T, width), group norm and SiLU, logits (B, T')."""

    def __init__(self, width: int, hidden: int = 128, layers: int = 2) -> None:
        super().__init__()
        sizes = [width] + [hidden] * layers
        self.convolutions = nn.ModuleList(
            nn.Conv1d(a, b, kernel_size=4, stride=2, padding=1) for a, b in itertools.pairwise(sizes)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(min(32, hidden), hidden) for _ in range(layers))
        self.logit = nn.Conv1d(hidden, 1, kernel_size=3, padding=1)

    def forward(self, activations: Tensor) -> Tensor:
        x = activations.transpose(1, 2)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.silu(norm(convolution(x)))
        return self.logit(x)[:, 0].float()
