"""Shapes of the presets, for 32 s of music (689 latent frames)."""

from __future__ import annotations

import dataclasses

import torch

from presto_rt.models.config import PRESETS

SECONDS = 32


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Shapes of one preset on one device, as the operators' cases need them."""

    width: int
    head_dim: int
    tokens: int
    text: int
    samples: int
    device: str

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)


def shapes(preset: str, device: str) -> Shapes:
    """Return the shapes of "nano", "small", "medium" or, for dry runs with one second of sound, "tiny"."""
    config = PRESETS[preset]
    seconds = 1 if preset == "tiny" else SECONDS
    return Shapes(config.width, config.head_dim, seconds * 689 // 32, 64, seconds * 44_100, device)
