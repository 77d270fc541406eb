"""Discriminator of Presto-S: a small head on activations of the fake score network."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn


class DiscriminatorHead(nn.Module):
    """Strided 1-D convolutions over time, each with group norm and SiLU, and one logit per output frame.

    Args:
        width: channels of the activations.
        hidden: channels of the convolutions.
        layers: number of convolutions, each of which halves the frames.
    """

    def __init__(self, width: int, hidden: int = 128, layers: int = 2) -> None:
        super().__init__()
        sizes = [width] + [hidden] * layers
        self.convolutions = nn.ModuleList(
            nn.Conv1d(a, b, kernel_size=4, stride=2, padding=1) for a, b in itertools.pairwise(sizes)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(min(32, hidden), hidden) for _ in range(layers))
        self.logit = nn.Conv1d(hidden, 1, kernel_size=3, padding=1)

    def forward(self, activations: Tensor) -> Tensor:
        """Map activations (B, T, width) to logits (B, T / 2^layers), float32."""
        x = activations.transpose(1, 2)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.silu(norm(convolution(x)))
        logits: Tensor = self.logit(x)
        return logits[:, 0].float()
