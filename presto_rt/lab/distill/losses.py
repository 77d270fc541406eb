"""The losses of step and layer distillation, as pure functions of denoisers: the equations, and nothing else.

Notation: G the few-step generator, x_hat = G(x + s_g n; s_g) its output; mu_real the frozen, guided teacher;
mu_fake the score of the generator's own distribution; s, e a noise level and noise of the loss at hand.
Shapes: samples (B, ...), noise levels (B,). All combinations are done in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: D(x, sigma) -> x_0, sigma of shape (B,)
Denoiser = Callable[[Tensor, Tensor], Tensor]


def corrupt(x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x + s e."""
    return x + _column(sigma, x) * noise


@torch.no_grad()
def distribution_matching_gradient(x_hat: Tensor, sigma: Tensor, noise: Tensor, fake: Denoiser, real: Denoiser,
                                   weight: Tensor | None) -> Tensor:  # fmt: skip
    """w(s) [mu_fake(x_hat + s e; s) - mu_real(x_hat + s e; s)], the descent direction of the KL divergence.

    (mu_fake - mu_real) / s^2 is the difference of the two scores, the gradient of KL(fake_s || real_s) with respect
    to the sample (Yin et al. 2024, DMD, equation 7). weight: w(s), (B,). None takes DMD's equation 8,
    w = 1 / mean |x_hat - mu_real| of each sample, which depends on the noise: over few dimensions that tilts the
    expectation, and it diverges where the teacher agrees. `matching_weight` is the same size without that.
    """
    noisy = corrupt(x_hat, sigma, noise)
    mu_fake, mu_real = fake(noisy, sigma), real(noisy, sigma)
    if weight is None:
        weight = 1 / (x_hat - mu_real).abs().flatten(1).mean(1).clamp_min(1e-4)
    return (mu_fake - mu_real) * _column(weight, x_hat)


def matching_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """w(s) = 1 / c_out(s) (B,): the gradient is then the difference of two raw EDM networks, F_fake - F_real."""
    return (sigma**2 + sigma_data**2).sqrt() / (sigma * sigma_data)


def follow(x_hat: Tensor, gradient: Tensor) -> Tensor:
    """Half the squared distance to one step along `gradient`: its gradient in x_hat is `gradient` / numel."""
    return 0.5 * ((x_hat - (x_hat - gradient).detach()) ** 2).mean()


def denoising_score_matching(x_hat: Tensor, sigma: Tensor, noise: Tensor, fake: Denoiser, weight: Tensor) -> Tensor:
    """E lambda(s) |mu_fake(sg(x_hat) + s e; s) - sg(x_hat)|^2. weight: (B,)."""
    target = x_hat.detach()
    return weighted_error(fake(corrupt(target, sigma, noise), sigma), target, weight)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Least squares (Mao et al. 2017): real towards 1, generated towards 0."""
    return ((real_logits - 1) ** 2).mean() + (fake_logits**2).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Least squares: generated towards 1."""
    return ((fake_logits - 1) ** 2).mean()


def consistency_loss(x_hat: Tensor, target: Tensor, c: float = 0.03) -> Tensor:
    """Pseudo-Huber distance (Song & Dhariwal 2023) between neighbouring points' outputs; `target` gets no gradient."""
    squared = ((x_hat - target.detach()) ** 2).flatten(1).mean(1)
    return ((squared + c**2).sqrt() - c).mean()


def weighted_error(answer: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """E lambda(s) |D - sg(target)|^2: denoising with the data as target, Presto-L's self-teacher with D_full. weight:
    (B,)."""
    error = (answer - target.detach()) ** 2
    return (_column(weight, error) * error).mean()


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.dim() - 1))
