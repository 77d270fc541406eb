"""The codec's loss and its PCA start."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...models.codec import Codec
from ...models.spectral import FRAMES_PER_LATENT, POWER_FLOOR, band_centres, mel_density, mel_filters

MEL_COUNTS = (40, 80, 160)
SIDE_WEIGHT = 0.6


class LossParts(NamedTuple):
    """Scalars of one step: `total` to minimise, the rest to log. `mel` is in dB: 80 mel bands, left and right."""

    total: Tensor
    log: Tensor
    bands: Tensor
    pooled: Tensor
    compressed: Tensor
    kl: Tensor
    mel: Tensor


class CodecLoss(nn.Module):
    """Distances between predicted and true frames, on mid, side, left and right.

    - log: L1 of log-magnitudes, weighted by the square root of each band's width in mel;
    - bands: L1 of the log-power in 40, 80 and 160 mel bands. The L1 of log-magnitudes alone is a median, which loses
      energy;
    - pooled: the same, of power averaged over a latent's four frames;
    - compressed: L1 of magnitude^0.4, which holds on to the loud partials;
    - kl: divergence of the posterior from a standard normal, summed over channels.
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
    def four(features: Tensor) -> Tensor:
        """Features (B, F, 3, bands) -> powers of mid, side, left, right, (B, F, 4, bands), floored at -90 dB."""
        mid, side = (2.0 * features[:, :, 0]).exp(), (2.0 * features[:, :, 1]).exp()
        cross = 2.0 * features[:, :, 2] * (features[:, :, 0] + features[:, :, 1]).exp()
        both = mid + side
        return torch.stack([mid, side, both + cross, both - cross], 2).clamp_min(POWER_FLOOR)

    def forward(self, codec: Codec, features: Tensor, noise: Tensor) -> LossParts:
        """Features (B, 4 T, 3, bands) and standard normal noise (B, T, C) -> loss of one training step."""
        features = features.float()
        mean, log_variance = codec.encoder(codec.normalize(features[:, :, :2]))
        z = mean + noise * torch.exp(0.5 * log_variance)
        predicted = codec.denormalize(codec.decoder(z))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(-1).mean()

        true_power, power = self.four(features), self.four(predicted)
        true_log, log = 0.5 * true_power.log(), 0.5 * power.log()
        channel = torch.tensor([1.0, SIDE_WEIGHT, 1.0, 1.0], device=log.device)[:, None]
        log_loss = ((log - true_log).abs() * (self.weights * channel)).mean()
        compressed = ((0.4 * log).exp() - (0.4 * true_log).exp()).abs().mul(channel).mean()

        true_mel, mel = true_power @ self.mels, power @ self.mels
        difference = 0.5 * (self.log(mel) - self.log(true_mel)).abs()
        decibels = difference[:, :, 2:, MEL_COUNTS[0] : MEL_COUNTS[0] + MEL_COUNTS[1]].mean() * 8.686
        bands = self.balance(difference, channel)
        pooled = self.balance(0.5 * (self.log(self.pool(mel)) - self.log(self.pool(true_mel))).abs(), channel)
        total = 0.5 * log_loss + bands + 0.5 * pooled + 10.0 * compressed + self.kl_weight * kl
        return LossParts(total, log_loss, bands, pooled, compressed, kl, decibels)

    @staticmethod
    def log(power: Tensor) -> Tensor:
        """Natural log over the floor, in float32."""
        return torch.log(power.float() + POWER_FLOOR)

    @staticmethod
    def pool(power: Tensor) -> Tensor:
        """Mean over each latent's four frames."""
        return power.unflatten(1, (-1, FRAMES_PER_LATENT)).mean(2)

    @staticmethod
    def balance(difference: Tensor, channel: Tensor) -> Tensor:
        """Mean over the sets of mel bands of the mean in each set."""
        return torch.stack([(part * channel).mean() for part in difference.split(MEL_COUNTS, -1)]).mean()


@torch.no_grad()
def start_from_pca(codec: Codec, features: Tensor) -> float:
    """Set the linear paths and the feature mean from runs of four frames (n, 4, 3, bands); returns the share of
    variance kept.

    Principal components are taken of features weighted by the square root of their loss weights, and whitened:
    latents start with unit variance and uncorrelated. The cosine starts as the least-squares fit on them.
    """
    features = features.to(codec.latent_mean.device)
    codec.feature_mean.copy_(features[:, :, :2].mean((0, 1)))
    flat = codec.normalize(features[:, :, :2]).flatten(1)
    weight = torch.from_numpy(mel_density(band_centres(codec.config.break_hz))).float().to(flat.device).sqrt()
    weight = (
        (weight * torch.tensor([[1.0], [SIDE_WEIGHT]], device=flat.device)).sqrt().flatten().repeat(FRAMES_PER_LATENT)
    )
    centre = flat.mean(0)
    weighted = (flat - centre) * weight
    values, vectors = torch.linalg.eigh(weighted.T @ weighted / len(weighted))
    size = codec.config.latent_channels
    spread, axes = values[-size:].flip(0).clamp_min(1e-6).sqrt(), vectors[:, -size:].flip(1)
    codec.encoder.linear.weight.copy_((weight[:, None] * axes / spread).T)
    codec.encoder.linear.bias.copy_(-(codec.encoder.linear.weight @ centre))
    z = weighted @ axes / spread
    cosine = features[:, :, 2].flatten(1)
    bands = features.shape[-1]
    out_weight = torch.empty(FRAMES_PER_LATENT, 3, bands, size, device=flat.device)
    out_bias = torch.empty(FRAMES_PER_LATENT, 3, bands, device=flat.device)
    out_weight[:, :2] = (axes * spread / weight[:, None]).view(FRAMES_PER_LATENT, 2, bands, size)
    out_bias[:, :2] = centre.view(FRAMES_PER_LATENT, 2, bands)
    out_weight[:, 2] = ((cosine - cosine.mean(0)).T @ z / len(z)).view(FRAMES_PER_LATENT, bands, size)
    out_bias[:, 2] = cosine.mean(0).view(FRAMES_PER_LATENT, bands)
    codec.decoder.linear.weight.copy_(out_weight.view(-1, size))
    codec.decoder.linear.bias.copy_(out_bias.flatten())
    return float(values[-size:].sum() / values.sum())
