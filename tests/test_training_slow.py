"""The error of window means: what it counts, and that it leaves the minimiser alone."""

from __future__ import annotations

import pytest
import torch

from presto_rt.errors import InvalidInputError
from presto_rt.lab.training.slow import WINDOW, SlowError


def slow_latents(windows: int, channels: int = 6) -> torch.Tensor:
    """Frames whose window means have known, unequal spreads: 1, 1/2, 1/4, ... in rotated axes."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(windows, channels, generator=generator) * 2.0 ** -torch.arange(channels)
    rotation = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0]
    frames = (means @ rotation)[:, None] + 0.3 * torch.randn(windows, WINDOW, channels, generator=generator)
    return frames.flatten(0, 1)


def test_the_best_linear_estimate_scores_one() -> None:
    """An estimator with the prior's own shrinkage per component misses exactly what the term takes as its unit."""
    latents = slow_latents(4000)
    slow = SlowError(latents)
    x = latents.view(-1, WINDOW, 6)
    for level in (0.5, 3.0, 20.0):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * level
        center = x.mean((0, 1))
        shrink = slow.variance / (slow.variance + level**2 / WINDOW)
        estimate = ((x + noise).mean(1) - center) @ slow.components * shrink @ slow.components.T + center
        error = (estimate - x.mean(1))[:, None].expand(-1, WINDOW, -1)
        assert float(slow(error, torch.full((len(x),), level))) == pytest.approx(1.0, abs=0.03)


def test_it_sees_means_alone_and_weak_components_as_much_as_strong_ones() -> None:
    slow = SlowError(slow_latents(2000))
    sigma = torch.full((1,), 1000.0)
    wiggle = torch.linspace(-1, 1, WINDOW)[None, :, None].expand(1, WINDOW, 6)
    assert float(slow(wiggle, sigma)) < 1e-9
    for component in (0, 5):
        one_spread = slow.components[:, component] * slow.variance[component].sqrt()
        assert float(slow(one_spread.expand(1, WINDOW, 6), sigma)) == pytest.approx(1 / 6, rel=0.02)


def test_too_few_frames() -> None:
    with pytest.raises(InvalidInputError, match="slow_weight"):
        SlowError(torch.zeros(WINDOW, 4))
