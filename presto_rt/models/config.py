"""Model configurations: one dataclass, one table of presets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import InvalidInputError

SAMPLE_RATE = 44_100
HOP = 2_048  # samples per latent frame: 21.53 frames a second
MAX_SECONDS = 120.0


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a diffusion transformer and the noise range that it was trained for.

    `network` names what the raw network predicts: "edm" (F of Karras et al. 2022), "v" (velocity of a
    variance-preserving path) or "rf" (rectified flow). `diffusion.precond` turns each into the same denoiser.
    """

    name: str = "nano"
    width: int = 384
    blocks: int = 8
    head_dim: int = 64
    mlp_ratio: int = 4
    latent_channels: int = 64
    text_dim: int = 384
    text_tokens: int = 96  # longer prompts are cut here, with a warning
    network: str = "edm"
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if self.width % self.head_dim:
            raise InvalidInputError(f"width {self.width} must be a multiple of head_dim {self.head_dim}")
        if self.network not in ("edm", "v", "rf"):
            raise InvalidInputError(f'network must be "edm", "v" or "rf", not {self.network!r}')

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InvalidInputError(f"unknown model configuration keys {unknown}; known are {sorted(known)}")
        return cls(**values)


#: `nano` ships with weights; `small` and `medium` are for benchmarks and for people with data.
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(name="tiny", width=64, blocks=3, head_dim=32),  # tests
    "nano": ModelConfig(),
    "small": ModelConfig(name="small", width=1024, blocks=20),
    "medium": ModelConfig(name="medium", width=1536, blocks=24),
}


def preset(name: str) -> ModelConfig:
    """The preset called `name`. Raises InvalidInputError, listing the presets, for any other name."""
    if name not in PRESETS:
        raise InvalidInputError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
