"""Loss of the codec, and its initialization from a principal component analysis (PCA)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...models.codec import Codec
from ...models.spectral import FRAMES_PER_LATENT, POWER_FLOOR, band_centres, mel_density, mel_filters

MEL_COUNTS = (40, 80, 160)
SIDE_WEIGHT = 0.6
DB_PER_NAT = 8.686  # dB of a magnitude's natural logarithm


class LossParts(NamedTuple):
    """Scalars of one training step.

    Attributes:
        total: the loss to minimize; see `CodecLoss` for its terms, which follow.
        log: error of log-magnitudes.
        bands: error of mel bands.
        pooled: error of mel bands, averaged over a latent's frames.
        compressed: error of compressed magnitudes.
        kl: divergence of the posterior.
        mel: error of 80 mel bands of left and right, in dB, for the log only.
    """

    total: Tensor
    log: Tensor
    bands: Tensor
    pooled: Tensor
    compressed: Tensor
    kl: Tensor
    mel: Tensor


class CodecLoss(nn.Module):
    """Distances between predicted and true spectral frames, of mid, side, left and right.

    - log: L1 of log-magnitudes, weighted by the square root of each band's width in mel;
    - bands: L1 of the log-power in 40, 80 and 160 mel bands; the minimizer of the first term is a median, which loses
      energy;
    - pooled: the same, of power averaged over a latent's four frames;
    - compressed: L1 of magnitude^0.4, which weights loud partials;
    - kl: divergence of the posterior from a standard normal, summed over channels (Kingma & Welling 2014).

    Args:
        codec: codec to train; gives the band layout.
        kl_weight: weight of the divergence.
    """

    weights: Tensor
    mels: Tensor

    def __init__(self, codec: Codec, kl_weight: float = 1e-3) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        centres = band_centres(codec.config.break_hz)
        weights = torch.from_numpy(mel_density(centres)).float().sqrt()
        mels = [torch.from_numpy(mel_filters(count)).float() @ codec.frames.spread.T for count in MEL_COUNTS]
        self.register_buffer("weights", weights / weights.mean(), persistent=False)
        self.register_buffer("mels", torch.cat(mels).T.contiguous(), persistent=False)

    @staticmethod
    def powers(features: Tensor) -> Tensor:
        """Powers of mid, side, left and right, (B, F, 4, bands), of features (B, F, 3, bands), at least -90 dB."""
        mid, side = (2.0 * features[:, :, 0]).exp(), (2.0 * features[:, :, 1]).exp()
        cross = 2.0 * features[:, :, 2] * (features[:, :, 0] + features[:, :, 1]).exp()
        total = mid + side
        return torch.stack([mid, side, total + cross, total - cross], 2).clamp_min(POWER_FLOOR)

    def forward(self, codec: Codec, features: Tensor, noise: Tensor) -> LossParts:
        """Return the loss of one step on features (B, 4 T, 3, bands), with standard normal noise (B, T, C)."""
        features = features.float()
        mean, log_variance = codec.encoder(codec.normalize(features[:, :, :2]))
        z = mean + noise * torch.exp(0.5 * log_variance)
        predicted = codec.denormalize(codec.decoder(z))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(-1).mean()

        true_power, power = self.powers(features), self.powers(predicted)
        true_log, log = 0.5 * true_power.log(), 0.5 * power.log()
        channel = torch.tensor([1.0, SIDE_WEIGHT, 1.0, 1.0], device=log.device)[:, None]
        log_loss = ((log - true_log).abs() * (self.weights * channel)).mean()
        compressed = ((0.4 * log).exp() - (0.4 * true_log).exp()).abs().mul(channel).mean()

        true_mel, mel = true_power @ self.mels, power @ self.mels
        difference = 0.5 * (self.log(mel) - self.log(true_mel)).abs()
        decibels = difference[:, :, 2:, MEL_COUNTS[0] : MEL_COUNTS[0] + MEL_COUNTS[1]].mean() * DB_PER_NAT
        bands = self.mean_of_mel_sets(difference, channel)
        pooled_difference = 0.5 * (self.log(self.pool(mel)) - self.log(self.pool(true_mel))).abs()
        pooled = self.mean_of_mel_sets(pooled_difference, channel)
        total = 0.5 * log_loss + bands + 0.5 * pooled + 10.0 * compressed + self.kl_weight * kl
        return LossParts(total, log_loss, bands, pooled, compressed, kl, decibels)

    @staticmethod
    def log(power: Tensor) -> Tensor:
        """Natural logarithm of power plus the floor, in float32."""
        return torch.log(power.float() + POWER_FLOOR)

    @staticmethod
    def pool(power: Tensor) -> Tensor:
        """Mean over each latent's four frames, (B, F, ...) to (B, F / 4, ...)."""
        pooled: Tensor = power.unflatten(1, (-1, FRAMES_PER_LATENT)).mean(2)
        return pooled

    @staticmethod
    def mean_of_mel_sets(difference: Tensor, channel: Tensor) -> Tensor:
        """Mean of the means over each set of mel bands (..., 40 + 80 + 160), channels weighted by `channel` (4, 1)."""
        return torch.stack([(part * channel).mean() for part in difference.split(MEL_COUNTS, -1)]).mean()


@torch.no_grad()
def start_from_pca(codec: Codec, features: Tensor) -> float:
    """Initialize the codec's linear paths and feature mean from runs of four frames (n, 4, 3, bands).

    The principal components are those of features weighted by the square root of their loss weights. They are whitened,
    so that latents start uncorrelated and with unit variance. The cosine starts as its least-squares fit on them.

    Returns:
        Share of the weighted variance that the components retain.
    """
    features = features.to(codec.latent_mean.device)
    codec.feature_mean.copy_(features[:, :, :2].mean((0, 1)))
    flat = codec.normalize(features[:, :, :2]).flatten(1)
    weight = torch.from_numpy(mel_density(band_centres(codec.config.break_hz))).float().to(flat.device).sqrt()
    side = torch.tensor([[1.0], [SIDE_WEIGHT]], device=flat.device)
    weight = (weight * side).sqrt().flatten().repeat(FRAMES_PER_LATENT)
    center = flat.mean(0)
    weighted = (flat - center) * weight
    values, vectors = torch.linalg.eigh(weighted.T @ weighted / len(weighted))
    size = codec.config.latent_channels
    spread, axes = values[-size:].flip(0).clamp_min(1e-6).sqrt(), vectors[:, -size:].flip(1)
    codec.encoder.linear.weight.copy_((weight[:, None] * axes / spread).T)
    codec.encoder.linear.bias.copy_(-(codec.encoder.linear.weight @ center))
    z = weighted @ axes / spread
    cosine = features[:, :, 2].flatten(1)
    bands = features.shape[-1]
    out_weight = torch.empty(FRAMES_PER_LATENT, 3, bands, size, device=flat.device)
    out_bias = torch.empty(FRAMES_PER_LATENT, 3, bands, device=flat.device)
    out_weight[:, :2] = (axes * spread / weight[:, None]).view(FRAMES_PER_LATENT, 2, bands, size)
    out_bias[:, :2] = center.view(FRAMES_PER_LATENT, 2, bands)
    out_weight[:, 2] = ((cosine - cosine.mean(0)).T @ z / len(z)).view(FRAMES_PER_LATENT, bands, size)
    out_bias[:, 2] = cosine.mean(0).view(FRAMES_PER_LATENT, bands)
    codec.decoder.linear.weight.copy_(out_weight.view(-1, size))
    codec.decoder.linear.bias.copy_(out_bias.flatten())
    return float(values[-size:].sum() / values.sum())
