"""Loss on the window means of a denoiser's error, for features that change slowly over a clip.

Key, instruments and loudness are visible in the mean of the latents over seconds. They account for a small part of the
squared error, in channels of small variance, and are decided at high noise, so the denoising loss gives them small
gradients. This loss is the squared error of the mean over WINDOW frames, with each principal component divided by the
error of the best linear estimate. Like any positive quadratic form of the error, it has the same minimizer as the
denoising loss, E[x_0 | x].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InvalidInputError

WINDOW = 128  # latent frames: 6 s
FLOOR = 1e-3  # smallest variance of a component, as a share of the largest component's


class WindowMeanLoss:
    """Squared error of window means in units of the best linear estimate's error.

    The principal components are those of the means of consecutive windows of `latents`; windows that span two pieces
    are included, as they are rare.

    Args:
        latents: (frames, C) of any floating dtype, all training pieces concatenated.

    Raises:
        InvalidInputError: `latents` holds fewer than two windows.
    """

    def __init__(self, latents: Tensor) -> None:
        count = len(latents) // WINDOW
        if count < 2:
            raise InvalidInputError(
                f"{len(latents)} latent frames are fewer than two windows of {WINDOW}; set window_mean_weight to 0"
            )
        means = torch.stack([w.float().mean(0) for w in latents[: count * WINDOW].split(WINDOW)])
        covariance = torch.cov(means.double().T.cpu())
        variance, components = torch.linalg.eigh(covariance)
        self.variance: Tensor = variance.clamp_min(FLOOR * float(variance[-1])).float().to(latents.device)
        self.components: Tensor = components.float().to(latents.device)

    def __call__(self, error: Tensor, sigma: Tensor) -> Tensor:
        """Return the mean over batch, windows and components; 1 for an estimator as good as the best linear one.

        Args:
            error: D - x_0, (B, T, C); one window if T < WINDOW, else the remainder after the last full window is
                ignored.
            sigma: noise levels, (B,).
        """
        length = min(WINDOW, error.shape[1])
        count = error.shape[1] // length
        means: Tensor = error[:, : count * length].float().unflatten(1, (count, length)).mean(2)
        noise = (sigma.float() ** 2 / length)[:, None]
        linear = self.variance * noise / (self.variance + noise)
        return ((means @ self.components) ** 2 / linear[:, None]).mean()
