"""The error of a denoiser's window means: how wrong it is about what changes slowly.

Key, instruments and loudness show in the mean of a latent over seconds. That is a small part of the squared error, in
channels of small variance, and it is decided at high noise; so a network hears little of it from the denoising loss
alone. This term is the same squared error of the mean over WINDOW frames, each principal component in units of what the
best linear estimate would miss of it. Any positive quadratic form of the error has the same minimiser, E[x | noisy].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InvalidInputError

WINDOW = 128  # latent frames: 6 s
FLOOR = 1e-3  # components have at least this share of the largest one's variance


class SlowError:
    """Principal components of window means, from latents (frames, C) of any float dtype.

    Windows that span two pieces are too few to matter. Raises InvalidInputError for fewer than two windows.
    """

    def __init__(self, latents: Tensor) -> None:
        count = len(latents) // WINDOW
        if count < 2:
            raise InvalidInputError(f"{len(latents)} latent frames are too few for slow_weight; set it to 0")
        means = torch.stack([w.float().mean(0) for w in latents[: count * WINDOW].split(WINDOW)])
        covariance = torch.cov(means.double().T.cpu())
        variance, components = torch.linalg.eigh(covariance)
        self.variance = variance.clamp_min(FLOOR * float(variance[-1])).float().to(latents.device)
        self.components = components.float().to(latents.device)

    def __call__(self, error: Tensor, sigma: Tensor) -> Tensor:
        """Mean of |component of the mean error|^2 / (best linear estimate's) over a batch; 1 is as good as linear.

        error: D - x, (B, T, C), taken as one window where T is below WINDOW; sigma: (B,) noise levels.
        """
        length = min(WINDOW, error.shape[1])
        count = error.shape[1] // length
        means = error[:, : count * length].float().unflatten(1, (count, length)).mean(2)
        noise = (sigma.float() ** 2 / length)[:, None]
        linear = self.variance * noise / (self.variance + noise)
        return ((means @ self.components) ** 2 / linear[:, None]).mean()
