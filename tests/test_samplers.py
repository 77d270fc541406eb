"""Samplers against the truth: a 1-D Gaussian mixture, whose denoiser and whose exact ODE solution are known.

In one dimension the probability-flow ODE keeps quantiles, so x(s') = Q_{s'}(P_s(x)) with the mixture's distribution
function P_s at noise level s and its inverse Q_s. That gives an exact answer for every start.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from presto_rt.diffusion.guidance import Guidance, guided
from presto_rt.diffusion.samplers import ODE_SAMPLERS, SAMPLERS, Denoised, evaluated_sigmas, sample
from presto_rt.diffusion.schedule import karras_sigmas
from presto_rt.errors import InvalidInputError

WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([-0.8, 0.5], dtype=torch.float64)
STDS = torch.tensor([0.15, 0.25], dtype=torch.float64)


def distribution(x: Tensor, sigma: float) -> Tensor:
    z = (x[..., None] - MEANS) / (STDS**2 + sigma**2).sqrt()
    return (WEIGHTS * torch.special.ndtr(z)).sum(-1)


def quantile(p: Tensor, sigma: float) -> Tensor:
    low, high = torch.full_like(p, -600.0), torch.full_like(p, 600.0)
    for _ in range(90):
        middle = (low + high) / 2
        below = distribution(middle, sigma) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def posterior_mean(x: Tensor, sigma: float) -> Tensor:
    variance = STDS**2 + sigma**2
    log_weight = WEIGHTS.log() - (x[..., None] - MEANS) ** 2 / (2 * variance) - variance.log() / 2
    mean = (MEANS * sigma**2 + x[..., None] * STDS**2) / variance
    return (log_weight.softmax(-1) * mean).sum(-1)


def exact_denoise(x: Tensor, sigma: float) -> Denoised:
    x0 = posterior_mean(x, sigma)
    return Denoised(x0, x0)


def no_noise(stream: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def starts(count: int, sigma: float) -> Tensor:
    return quantile((torch.arange(count, dtype=torch.float64) + 0.5) / count, sigma)


@pytest.mark.parametrize("name", ODE_SAMPLERS)
def test_reaches_the_distribution(name: str) -> None:
    """Quantile starts end on the data's quantiles, and the weight of each mode is kept."""
    x = sample(name, exact_denoise, starts(2_001, 80.0), karras_sigmas(200), no_noise)
    truth = starts(2_001, 0.0)
    tolerance = 2e-2 if name == "euler" else 2e-3
    assert (x - truth).abs().mean() < tolerance
    assert abs((x < -0.2).double().mean() - (truth < -0.2).double().mean()) < 0.005


def test_few_step_reaches_the_distribution() -> None:
    """With a perfect generator (the ODE's own end point) fresh noise at every step keeps the distribution."""
    generator = torch.Generator().manual_seed(0)

    def end_point(x: Tensor, sigma: float) -> Denoised:
        x0 = quantile(distribution(x, sigma), 0.0)
        return Denoised(x0, x0)

    def noise(stream: int) -> Tensor:
        return torch.randn(20_000, dtype=torch.float64, generator=generator)

    for steps in (1, 2, 4):
        x = sample("few_step", end_point, 80.0 * noise(0), karras_sigmas(steps), noise).sort().values
        # Kolmogorov-Smirnov distance of 20,000 draws: 1.63 / sqrt(n) = 0.0115 at the 1 % level
        gap = (distribution(x, 0.0) - torch.linspace(0, 1, len(x), dtype=torch.float64)).abs().max()
        assert gap < 0.0115


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("dpmpp_2s", 2)])
def test_convergence_order(name: str, order: int) -> None:
    """Halving the steps multiplies the error by 2^order, from sigma 10 to 0.05 against the exact solution."""
    x, truth = starts(101, 10.0), starts(101, 0.05)
    errors = []
    for steps in (64, 128, 256):
        levels = karras_sigmas(steps + 1, 0.05, 10.0, end_at_zero=False)
        errors.append(float((sample(name, exact_denoise, x, levels, no_noise) - truth).abs().mean()))
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(m - order) < 0.3 for m in measured), (measured, errors)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_plans_its_evaluations(name: str, steps: int) -> None:
    """evaluated_sigmas tells beforehand which noise levels the denoiser will be asked for."""
    seen: list[float] = []

    def recording(x: Tensor, sigma: float) -> Denoised:
        seen.append(sigma)
        return Denoised(0.5 * x, 0.5 * x)

    ticks: list[tuple[int, int]] = []
    levels = karras_sigmas(steps)
    sample(name, recording, torch.ones(3), levels, lambda k: torch.zeros(3), lambda i, n: ticks.append((i, n)))
    assert seen == pytest.approx(evaluated_sigmas(name, levels))
    assert ticks == [(i + 1, steps) for i in range(steps)]


def test_guidance_combines_and_respects_its_interval() -> None:
    d_c, d_u, x = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([5.0])
    denoise = guided(lambda x, s: d_c, lambda x, s: (d_c, d_u), Guidance(3.0, (0.5, 2.0)))
    assert denoise(x, 1.0) == (4.0, 4.0)
    assert denoise(x, 3.0) == (2.0, 2.0)
    assert denoise(x, 0.1) == (2.0, 2.0)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_cfg_plus_plus(name: str) -> None:
    """At scale 1 CFG++ ends at D_c of the last step; at scale 0 it is unconditional sampling."""
    x = torch.tensor([3.0, -1.0], dtype=torch.float64)
    levels = karras_sigmas(6, 0.01, 5.0)

    def conditional(x: Tensor, s: float) -> Tensor:
        return x * 0.2 + 1

    def both(x: Tensor, s: float) -> tuple[Tensor, Tensor]:
        return conditional(x, s), posterior_mean(x, s)

    plus = sample(name, guided(conditional, both, Guidance(0.0, plus_plus=True)), x, levels, no_noise)
    plain = sample(name, exact_denoise, x, levels, no_noise)
    assert torch.allclose(plus, plain, atol=1e-12)
    one = sample("euler", guided(conditional, both, Guidance(1.0, plus_plus=True)), x, levels[:2], no_noise)
    expected = conditional(x, 5.0) + levels[1] / 5.0 * (x - posterior_mean(x, 5.0))
    assert torch.allclose(one, expected)


@pytest.mark.parametrize(
    ("guidance", "sampler", "words"),
    [
        (Guidance(math.nan), "heun", "guidance"),
        (Guidance(-1), "heun", "guidance"),
        (Guidance(1.5, plus_plus=True), "euler", "0 to 1"),
        (Guidance(0.5, plus_plus=True), "heun", "CFG++"),
        (Guidance(2, (1, 1)), "heun", "interval"),
        (Guidance(2), "leapfrog", "dpmpp_2m"),
    ],
)
def test_bad_guidance(guidance: Guidance, sampler: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words.replace("+", r"\+")):
        guidance.check(sampler)


def test_unknown_sampler_lists_the_known() -> None:
    with pytest.raises(InvalidInputError, match="few_step"):
        sample("magic", exact_denoise, torch.zeros(1), [1.0, 0.0], no_noise)
