"""The codec: 44.1 kHz stereo <-> 64 numbers at 21.53 Hz, a variational autoencoder on spectral magnitudes.

Both sides are a linear map, started from a weighted principal component analysis of the training features, plus a
residual network whose last layer starts at zero. All layers work at frame rate (21.5 and 86 Hz) and are matrix
products over frames; nothing runs at sample rate except FFTs. Phase is not coded: see codec_features.

`Codec.encode` and `Codec.decode` are the whole interface. A better decoder may replace this one as long as the
encoder is frozen; a new encoder means new latents, and a new diffusion model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GenerationError, InvalidInputError
from .spectral import FRAME_HOP, FRAMES_PER_LATENT, LATENT_HOP, SAMPLE_RATE, SpectralFrames

SIGMA_DATA = 0.5
SAVED_NAME = "ceiling"  # name of max_log_magnitude in weights files


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of the codec. Widths count channels, blocks count residual blocks."""

    latent_channels: int = 64
    break_hz: float = 2500.0
    encoder_width: int = 640
    encoder_blocks: int = 4
    decoder_width: int = 640
    decoder_blocks: int = 2
    frame_width: int = 384
    frame_blocks: int = 4
    griffin_lim: int = 2

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CodecConfig:
        """From a dict; raises InvalidInputError on unknown names."""
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise InvalidInputError(f"unknown codec settings {sorted(unknown)}: known are {sorted(known)}")
        return cls(**values)


class Block(nn.Module):
    """Residual block on (B, T, width): depthwise convolution over time (5 frames), layer norm, two-layer perceptron."""

    kernel = 5

    def __init__(self, width: int, expansion: int = 3) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(self.kernel, width))
        nn.init.ones_(self.mix[self.kernel // 2 : self.kernel // 2 + 1])
        nn.init.trunc_normal_(self.mix[: self.kernel // 2], std=0.1)
        nn.init.trunc_normal_(self.mix[self.kernel // 2 + 1 :], std=0.1)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)
        nn.init.normal_(self.down.weight, std=0.2 * (expansion * width) ** -0.5)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        # Shifted multiply-adds: on a CPU a depthwise convolution in this layout is several times slower.
        count, half = x.shape[1], self.kernel // 2
        padded = F.pad(x, (0, 0, half, half))
        mixed = padded[:, :count] * self.mix[0]
        for k in range(1, self.kernel):
            mixed = mixed + padded[:, k : k + count] * self.mix[k]
        result: Tensor = x + self.down(F.silu(self.up(self.norm(mixed))))
        return result


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Encoder(nn.Module):
    """Normalised log-magnitudes (B, 4 T, 2, bands) -> mean and log-variance of the latents, (B, T, C) each."""

    def __init__(self, config: CodecConfig, bands: int) -> None:
        super().__init__()
        size = FRAMES_PER_LATENT * 2 * bands
        self.linear = nn.Linear(size, config.latent_channels)
        self.stem = nn.Linear(size, config.encoder_width)
        self.blocks = nn.Sequential(*(Block(config.encoder_width) for _ in range(config.encoder_blocks)))
        self.norm = nn.LayerNorm(config.encoder_width)
        self.head = _zero(nn.Linear(config.encoder_width, 2 * config.latent_channels))
        nn.init.constant_(self.head.bias[config.latent_channels :], -4.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.reshape(x.shape[0], -1, FRAMES_PER_LATENT * x.shape[2] * x.shape[3])
        mean, log_variance = self.head(self.norm(self.blocks(self.stem(x)))).float().chunk(2, -1)
        return self.linear(x).float() + mean, log_variance.clamp(-12.0, 4.0)


class Decoder(nn.Module):
    """Latents (B, T, C), standard scale -> normalised log-magnitudes of mid and side and raw cosine, (B, 4 T, 3,
    bands)."""

    def __init__(self, config: CodecConfig, bands: int) -> None:
        super().__init__()
        self.bands = bands
        self.frame_width = config.frame_width
        self.linear = nn.Linear(config.latent_channels, FRAMES_PER_LATENT * 3 * bands)
        self.stem = nn.Linear(config.latent_channels, config.decoder_width)
        self.blocks = nn.Sequential(*(Block(config.decoder_width) for _ in range(config.decoder_blocks)))
        self.split = nn.Linear(config.decoder_width, FRAMES_PER_LATENT * config.frame_width)
        self.frame_blocks = nn.Sequential(*(Block(config.frame_width) for _ in range(config.frame_blocks)))
        self.norm = nn.LayerNorm(config.frame_width)
        self.head = _zero(nn.Linear(config.frame_width, 3 * bands))

    def forward(self, z: Tensor) -> Tensor:
        count = z.shape[1] * FRAMES_PER_LATENT
        x = self.split(self.blocks(self.stem(z)))
        x = self.norm(self.frame_blocks(x.view(z.shape[0], count, self.frame_width)))
        result: Tensor = (self.linear(z).view(z.shape[0], count, -1).float() + self.head(x).float()).unflatten(
            -1, (3, self.bands)
        )
        return result


class Codec(nn.Module):
    """Autoencoder between stereo samples and latents.

    Buffers: mean of the features per band; mean and scale of the latents; synthesis_gain per band (nats), which makes
    up for the cancellation between neighbouring frames of imperfect phase; max_log_magnitude, the largest log-magnitude
    of the training audio per band, which decoding never exceeds: sampled latents are not exactly those of any sound,
    and an error in a logarithm is audible as a burst.
    """

    feature_mean: Tensor
    latent_mean: Tensor
    latent_scale: Tensor
    synthesis_gain: Tensor
    max_log_magnitude: Tensor

    def __init__(self, config: CodecConfig | None = None) -> None:
        super().__init__()
        self.config = config or CodecConfig()
        self.frames = SpectralFrames(self.config.break_hz)
        bands = self.frames.bands
        self.encoder = Encoder(self.config, bands)
        self.decoder = Decoder(self.config, bands)
        self.register_buffer("feature_mean", torch.full((2, bands), -8.0))
        self.register_buffer("latent_mean", torch.zeros(self.config.latent_channels))
        self.register_buffer("latent_scale", torch.full((self.config.latent_channels,), SIGMA_DATA))
        self.register_buffer("synthesis_gain", torch.zeros(bands))
        self.register_buffer("max_log_magnitude", torch.full((2, bands), 20.0))  # nats; 20 limits nothing

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}{SAVED_NAME}"] = destination.pop(f"{prefix}max_log_magnitude")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}{SAVED_NAME}" in state_dict:
            state_dict[f"{prefix}max_log_magnitude"] = state_dict.pop(f"{prefix}{SAVED_NAME}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    feature_scale = 0.5  # log-magnitudes in nats spread by about 2

    def normalize(self, features: Tensor) -> Tensor:
        """Log-magnitudes (B, F, 2, bands) -> about zero mean and unit spread."""
        return (features - self.feature_mean) * self.feature_scale

    def denormalize(self, output: Tensor) -> Tensor:
        """Decoder output -> features with the cosine limited to (-1, 1)."""
        logs = output[:, :, :2] / self.feature_scale + self.feature_mean
        return torch.cat([logs, torch.tanh(output[:, :, 2:])], 2)

    def _device(self) -> torch.device:
        return self.latent_mean.device

    @torch.inference_mode()
    def encode(self, samples: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Samples (B, 2 or 1, N) or (2 or 1, N), float in [-1, 1] at 44.1 kHz -> latents (B, ceil(N / 2048), C)
        float32, std about 0.5.

        Mono is doubled; the end is padded with silence. Deterministic: the posterior's mean, unless `sample` asks for
        a draw. Raises InvalidInputError on other shapes, no samples, or values that are not finite.
        """
        if samples.ndim == 2:
            samples = samples[None]
        if samples.ndim != 3 or samples.shape[1] not in (1, 2) or samples.shape[2] == 0:
            raise InvalidInputError(f"samples must have the shape (batch, 1 or 2, frames), got {tuple(samples.shape)}")
        samples = samples.to(self._device(), torch.float32)
        if not torch.isfinite(samples).all():
            raise InvalidInputError("samples hold NaN or infinity: check the audio before encoding")
        samples = F.pad(samples.expand(-1, 2, -1), (0, -samples.shape[2] % LATENT_HOP))
        mean, log_variance = self.encoder(self.normalize(self.frames.features(samples)))
        if sample:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device if generator else None)
            mean = mean + torch.exp(0.5 * log_variance) * noise.to(mean)
        result: Tensor = (mean - self.latent_mean) * self.latent_scale
        return result

    def decode_features(self, latents: Tensor) -> Tensor:
        """Latents (B, T, C) at std 0.5 -> log-magnitudes of mid and side and their cosine, (B, 4 T, 3, bands).
        Network only."""
        features = self.denormalize(self.decoder(latents / self.latent_scale + self.latent_mean))
        return torch.cat([torch.minimum(features[:, :, :2], self.max_log_magnitude), features[:, :, 2:]], 2)

    @torch.inference_mode()
    def decode(
        self, latents: Tensor, frames: int | None = None, griffin_lim: int | None = None, clamp: bool = True
    ) -> Tensor:
        """Return stereo samples (B, 2, frames) fp32 of latents (B, T, C) or (T, C) at standard deviation 0.5.

        Args:
            latents: from `encode` or a sampler.
            frames: number of samples; None for T * 2048.
            griffin_lim: iterations of fast Griffin-Lim; None for the config's number.
            clamp: limit the samples to [-1, 1].

        Raises:
            InvalidInputError: for other shapes, or more frames than the latents hold.
            GenerationError: for values that are not finite.
        """
        if latents.ndim == 2:
            latents = latents[None]
        if latents.ndim != 3 or latents.shape[2] != self.config.latent_channels or latents.shape[1] == 0:
            raise InvalidInputError(
                f"latents must have the shape (batch, time, {self.config.latent_channels}), got {tuple(latents.shape)}"
            )
        most = latents.shape[1] * LATENT_HOP
        frames = most if frames is None else frames
        if not 0 < frames <= most:
            raise InvalidInputError(f"frames must be in 1 .. {most} for {latents.shape[1]} latent frames, got {frames}")
        iterations = self.config.griffin_lim if griffin_lim is None else griffin_lim
        if iterations < 0:
            raise InvalidInputError(f"griffin_lim must be 0 or more, got {iterations}")
        latents = latents.to(self._device(), torch.float32)
        if not torch.isfinite(latents).all():
            raise GenerationError("latents hold NaN or infinity: the sampler diverged; try more steps or less guidance")
        samples = self.frames.synthesize(self.decode_features(latents), iterations, self.synthesis_gain)
        samples = samples[..., :frames]
        return samples.clamp(-1.0, 1.0) if clamp else samples

    def release_decoder(self) -> None:
        """Free the decoder's weights, once a backend has packed them; `decode` is not available afterwards."""
        self.decoder = nn.Identity()  # type: ignore[assignment]

    def freeze_encoder(self) -> None:
        """Stop all gradients of the encoder, so that training the decoder on keeps the latents as they are."""
        self.encoder.requires_grad_(False)

    @property
    def latent_rate(self) -> float:
        """Latent frames per second."""
        return SAMPLE_RATE / LATENT_HOP

    @property
    def frame_rate(self) -> float:
        """Spectral frames per second."""
        return SAMPLE_RATE / FRAME_HOP
