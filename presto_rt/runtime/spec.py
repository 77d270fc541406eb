"""`NetworkSpec`: the shape of a diffusion transformer, as plans, buffers, forward passes and costs read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..errors import InvalidInputError


@dataclass(frozen=True)
class NetworkSpec:
    """Shape of a diffusion transformer and the signal that its latents stand for.

    Args:
        width: channels of the residual stream.
        blocks: number of transformer blocks.
        heads: attention heads.
        head_dim: channels of a head.
        hidden: hidden width of the MLP.
        channels: latent channels.
        max_cross_tokens: longest token sequence of cross-attention.
        prediction_type: output of the raw network: "edm", "v" or "rf" (`diffusion.precond`).
        sigma_data: standard deviation of the latents.
        sigma_min: lowest noise level of the sampler's ladder.
        sigma_max: highest noise level of the sampler's ladder.
        rho: exponent of the ladder (Karras et al. 2022, equation 5).
        hop: audio samples of a latent frame.
        sample_rate: of the audio, in Hz.
        max_seconds: longest clip in seconds.
        norm_eps: epsilon of layer norms and of the RMS norms of queries and keys.
    """

    width: int
    blocks: int
    heads: int
    head_dim: int
    hidden: int
    channels: int
    max_cross_tokens: int
    prediction_type: str
    sigma_data: float
    sigma_min: float
    sigma_max: float
    rho: float
    hop: int
    sample_rate: int
    max_seconds: float
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name not in ("prediction_type", "blocks") and not value > 0:
                raise InvalidInputError(f"{name} of a network must be greater than 0, not {value!r}")
        if self.prediction_type not in ("edm", "v", "rf"):
            raise InvalidInputError(f'prediction_type must be "edm", "v" or "rf", not {self.prediction_type!r}')

    def frames(self, samples: int) -> int:
        """Latent frames that hold `samples` audio samples."""
        return -(-samples // self.hop)
