"""Loss on window means: its unit, its invariances, and its error for too few frames."""

from __future__ import annotations

import pytest
import torch

from presto_rt.errors import InvalidInputError
from presto_rt.lab.training.window_mean_loss import WINDOW, WindowMeanLoss


def slowly_varying_latents(windows: int, channels: int = 6) -> torch.Tensor:
    """Frames whose window means have known, unequal spreads: 1, 1/2, 1/4, ... in rotated axes."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(windows, channels, generator=generator) * 2.0 ** -torch.arange(channels)
    rotation = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0]
    frames = (means @ rotation)[:, None] + 0.3 * torch.randn(windows, WINDOW, channels, generator=generator)
    return frames.flatten(0, 1)


def test_window_mean_loss_of_best_linear_estimate_is_one() -> None:
    """The posterior mean of a Gaussian prior, component by component, has the error that the loss divides by."""
    latents = slowly_varying_latents(4000)
    loss = WindowMeanLoss(latents)
    x = latents.view(-1, WINDOW, 6)
    for sigma in (0.5, 3.0, 20.0):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * sigma
        center = x.mean((0, 1))
        shrink = loss.variance / (loss.variance + sigma**2 / WINDOW)
        estimate = ((x + noise).mean(1) - center) @ loss.components * shrink @ loss.components.T + center
        error = (estimate - x.mean(1))[:, None].expand(-1, WINDOW, -1)
        assert float(loss(error, torch.full((len(x),), sigma))) == pytest.approx(1.0, abs=0.03)


def test_window_mean_loss_ignores_zero_mean_errors_and_weighs_components_equally() -> None:
    loss = WindowMeanLoss(slowly_varying_latents(2000))
    sigma = torch.full((1,), 1000.0)
    zero_mean = torch.linspace(-1, 1, WINDOW)[None, :, None].expand(1, WINDOW, 6)
    assert float(loss(zero_mean, sigma)) < 1e-9
    for component in (0, 5):
        error = loss.components[:, component] * loss.variance[component].sqrt()
        assert float(loss(error.expand(1, WINDOW, 6), sigma)) == pytest.approx(1 / 6, rel=0.02)


def test_window_mean_loss_rejects_fewer_than_two_windows() -> None:
    with pytest.raises(InvalidInputError, match="window_mean_weight"):
        WindowMeanLoss(torch.zeros(WINDOW, 4))
