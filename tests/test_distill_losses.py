"""Losses and options of step distillation, on 1-D Gaussian mixtures with closed-form denoisers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from presto_rt.errors import InvalidInputError
from presto_rt.lab.distill.losses import distribution_matching_gradient
from presto_rt.lab.distill.step_options import settings

WEIGHTS, MEANS, STD = torch.tensor([0.3, 0.7]), torch.tensor([-0.6, 0.4]), 0.1


def mixture_denoiser(weights: Tensor, means: Tensor, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        s2 = (sigma.view(-1, 1) ** 2) if x.dim() > 1 else sigma**2
        variance = std**2 + s2[..., None]
        share = (weights.log() - (x[..., None] - means) ** 2 / (2 * variance)).softmax(-1)
        return (share * (means * s2[..., None] + x[..., None] * std**2) / variance).sum(-1)

    return denoise


REAL = mixture_denoiser(WEIGHTS, MEANS, STD)


def test_distribution_matching_gradient_is_the_kl_gradient() -> None:
    """G(z) = a + b z has the distribution N(a, b^2), whose score and KL gradients in a and b are known."""
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor(0.4, dtype=torch.float64)
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)

    def log_real(x: Tensor) -> Tensor:
        variance = STD**2 + sigma**2
        return (WEIGHTS.double().log() - (x[..., None] - MEANS) ** 2 / (2 * variance)).logsumexp(-1)

    for a0, b0 in ((0.2, 0.5), (-0.5, 0.2), (0.0, 1.0)):
        a, b = torch.tensor([a0, b0], dtype=torch.float64).unbind()
        a.requires_grad_()
        b.requires_grad_()
        variance = b**2 + sigma**2
        density = torch.exp(-((grid - a) ** 2) / (2 * variance)) / (2 * torch.pi * variance).sqrt()
        divergence = (density * (density.clamp_min(1e-300).log() - log_real(grid))).sum() * (grid[1] - grid[0])
        exact = torch.stack(torch.autograd.grad(divergence, (a, b)))

        z = torch.randn(400_000, dtype=torch.float64, generator=generator)
        noise = torch.randn(400_000, dtype=torch.float64, generator=generator)
        x_hat = a + b * z
        fake = mixture_denoiser(torch.ones(1), torch.tensor([a0], dtype=torch.float64), b0)
        sigmas = torch.full_like(z, float(sigma))
        gradient = distribution_matching_gradient(x_hat.detach(), sigmas, noise, fake, REAL, sigmas**-2)
        estimate = torch.stack(torch.autograd.grad((gradient * x_hat).mean(), (a, b)))
        cosine = torch.cosine_similarity(exact, estimate, dim=0)
        assert cosine > 0.99, (a0, b0, exact, estimate)
        assert torch.allclose(exact, estimate, rtol=0.05, atol=0.01)


def test_step_settings_names_methods_and_rejects_unknown_values() -> None:
    assert settings("dmd2", 1.0).p_gen == "ladder:4"
    with pytest.raises(InvalidInputError, match="presto-s"):
        settings("magic", 1.0)
    with pytest.raises(InvalidInputError, match="ladder"):
        settings("presto-s", 1.0, p_gen="unknown")
