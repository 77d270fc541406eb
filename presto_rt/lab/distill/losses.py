"""Losses of step and layer distillation, as functions of denoisers.

Notation: G is the few-step generator and x_hat = G(x + s_g n; s_g) its output; mu_real is the frozen, guided teacher;
mu_fake is the denoiser of the generator's own distribution; s and e are a loss's noise level and noise; sg stops the
gradient. Samples have shape (B, ...), noise levels and weights (B,). Combinations are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: D(x, sigma) with x (B, ...) and sigma (B,), returning the estimate of x_0 (B, ...)
Denoiser = Callable[[Tensor, Tensor], Tensor]


def corrupt(x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Return x + s e."""
    return x + _column(sigma, x) * noise


@torch.no_grad()
def distribution_matching_gradient(
    x_hat: Tensor, sigma: Tensor, noise: Tensor, fake: Denoiser, real: Denoiser, weight: Tensor | None
) -> Tensor:
    """Return w(s) [mu_fake(x_hat + s e; s) - mu_real(x_hat + s e; s)], the gradient of the KL divergence in x_hat.

    (mu_fake - mu_real) / s^2 is the difference of the two scores, hence the gradient of KL(fake_s || real_s) in the
    sample (DMD, Yin et al. 2024, equation 7).

    Args:
        x_hat: generated samples, (B, ...).
        sigma: noise levels s, (B,).
        noise: standard normal e, (B, ...).
        fake: mu_fake.
        real: mu_real.
        weight: w(s), (B,). None for 1 / mean |x_hat - mu_real| of each sample (DMD, equation 8). That weight depends on
            the noise, which biases the expectation if samples have few dimensions, and it is unbounded where the
            teacher agrees with the generator. `matching_weight` has the same magnitude without these two defects.
    """
    noisy = corrupt(x_hat, sigma, noise)
    mu_fake, mu_real = fake(noisy, sigma), real(noisy, sigma)
    if weight is None:
        weight = 1 / (x_hat - mu_real).abs().flatten(1).mean(1).clamp_min(1e-4)
    return (mu_fake - mu_real) * _column(weight, x_hat)


def matching_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """Return w(s) = 1 / c_out(s), (B,): the gradient becomes the difference F_fake - F_real of the raw EDM networks."""
    return (sigma**2 + sigma_data**2).sqrt() / (sigma * sigma_data)


def gradient_as_loss(x_hat: Tensor, gradient: Tensor) -> Tensor:
    """Return a scalar whose gradient in x_hat is `gradient` / numel: half the squared distance to one step along it."""
    return 0.5 * ((x_hat - (x_hat - gradient).detach()) ** 2).mean()


def denoising_score_matching(x_hat: Tensor, sigma: Tensor, noise: Tensor, fake: Denoiser, weight: Tensor) -> Tensor:
    """Return E lambda(s) |mu_fake(sg(x_hat) + s e; s) - sg(x_hat)|^2.

    Args:
        x_hat: generated samples, (B, ...).
        sigma: noise levels s, (B,).
        noise: standard normal e, (B, ...).
        fake: mu_fake.
        weight: lambda(s), (B,).
    """
    target = x_hat.detach()
    return weighted_error(fake(corrupt(target, sigma, noise), sigma), target, weight)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the least-squares loss: real logits towards 1, logits of generated samples towards 0 (Mao et al. 2017)."""
    return ((real_logits - 1) ** 2).mean() + (fake_logits**2).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the generator's least-squares loss: logits of generated samples towards 1 (Mao et al. 2017)."""
    return ((fake_logits - 1) ** 2).mean()


def consistency_loss(x_hat: Tensor, target: Tensor, c: float = 0.03) -> Tensor:
    """Return the pseudo-Huber distance sqrt(d^2 + c^2) - c to `target`, which receives no gradient.

    d^2 is the mean squared difference of a sample (Song & Dhariwal 2023).
    """
    squared = ((x_hat - target.detach()) ** 2).flatten(1).mean(1)
    return ((squared + c**2).sqrt() - c).mean()


def weighted_error(denoised: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return E lambda(s) |D - sg(target)|^2 with weight lambda(s) (B,).

    The target is the data in denoising, and D of all blocks for Presto-L's self-teacher.
    """
    error = (denoised - target.detach()) ** 2
    return (_column(weight, error) * error).mean()


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.dim() - 1))
