"""Samplers of `diffusion.trajectory` against the textbook loops, and against the truth: a 1-D Gaussian mixture, whose
denoiser and whose exact ODE solution are known.

In one dimension the probability-flow ODE keeps quantiles, so x(s') = Q_{s'}(P_s(x)) with the mixture's distribution
function P_s at noise level s and its inverse Q_s. That gives an exact answer for every start.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from presto_rt.diffusion.guidance import Guidance
from presto_rt.diffusion.precond import coefficients, precondition
from presto_rt.diffusion.schedule import LayerSchedule, karras_sigmas
from presto_rt.diffusion.trajectory import (
    SAMPLERS,
    NetworkCall,
    Progress,
    check_guidance,
    compile_trajectory,
    evaluated_sigmas,
    find_sampler,
    sample,
    sampling_sigmas,
)
from presto_rt.errors import InvalidInputError
from tests.support import textbook_samplers
from tests.support.textbook_samplers import CFG_PP_SAMPLERS, ODE_SAMPLERS, guided

Denoiser = Callable[[Tensor, float], Tensor]

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


def no_noise(stream: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def starts(count: int, sigma: float) -> Tensor:
    return quantile((torch.arange(count, dtype=torch.float64) + 0.5) / count, sigma)


def run(
    name: str,
    conditional: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Callable[[int], Tensor] = no_noise,
    *,
    guidance: Guidance | None = None,
    unconditional: Denoiser | None = None,
    prediction_type: str = "edm",
    progress: Progress | None = None,
) -> Tensor:
    """Run the trajectory of a sampler from x, with raw networks that have these denoisers."""
    calls = compile_trajectory(name, sigmas, guidance or Guidance(), LayerSchedule.full(1), prediction_type, 0.5)

    def evaluate(call: NetworkCall, network_input: Tensor) -> tuple[Tensor, Tensor | None]:
        sigma = torch.tensor(call.sigma, dtype=torch.float64)
        c_skip, c_out, c_in, _ = coefficients(sigma, prediction_type, 0.5)
        state = network_input / c_in

        def raw(denoiser: Denoiser) -> Tensor:
            return (denoiser(state, call.sigma) - c_skip * state) / c_out

        return raw(conditional), raw(unconditional) if call.guided and unconditional is not None else None

    return sample(calls, evaluate, lambda stream: noise(stream) if stream else x / sigmas[0], progress)


# ---- against the textbook


GUIDANCES = {
    "none": Guidance(),
    "cfg": Guidance(3.0),
    "interval": Guidance(2.0, (0.05, 5.0)),
    "cfg++": Guidance(0.6, plus_plus=True),
    "cfg++ interval": Guidance(0.6, (0.05, 5.0), plus_plus=True),
}
LADDERS = ([80.0, 0.0], [20.0, 3.0, 0.7, 0.1, 0.0], [5.0, 1.0, 0.3], karras_sigmas(12))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", GUIDANCES)
@pytest.mark.parametrize("prediction_type", ["edm", "v", "rf"])
def test_sample_equals_the_textbook(name: str, kind: str, prediction_type: str) -> None:
    guidance = GUIDANCES[kind]
    if guidance.plus_plus and name not in CFG_PP_SAMPLERS:
        with pytest.raises(InvalidInputError, match=r"CFG\+\+"):
            check_guidance(name, guidance)
        return
    check_guidance(name, guidance)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 8, 8, dtype=torch.float64, generator=generator) / 3
    noises = torch.randn(20, 2, 5, 8, dtype=torch.float64, generator=generator)

    def raw(branch: int, x: Tensor, time: Tensor) -> Tensor:
        return torch.tanh(x @ weights[branch] + time)

    def denoiser(branch: int, x: Tensor, sigma: float) -> Tensor:
        column = torch.full((len(x),), sigma, dtype=torch.float64)
        return precondition(
            lambda scaled, time: raw(branch, scaled, time[:, None, None]),
            x,
            column,
            kind=prediction_type,
            sigma_data=0.5,
        )

    def evaluate(call: NetworkCall, x: Tensor) -> tuple[Tensor, Tensor | None]:
        time = torch.tensor(call.time, dtype=torch.float64)
        return raw(0, x, time), raw(1, x, time) if call.guided else None

    denoise = guided(lambda x, s: denoiser(0, x, s), lambda x, s: (denoiser(0, x, s), denoiser(1, x, s)), guidance)
    for sigmas in LADDERS:
        calls = compile_trajectory(name, sigmas, guidance, LayerSchedule.full(1), prediction_type, 0.5)
        got = sample(calls, evaluate, lambda stream: noises[stream])
        want = textbook_samplers.sample(name, denoise, sigmas[0] * noises[0], sigmas, lambda stream: noises[stream])
        assert float((got - want).abs().max()) < 1e-10 * float(want.abs().max())
        if name == "few_step" and len(sigmas) > 2:  # so the noise was there at all
            quiet = textbook_samplers.sample(name, denoise, sigmas[0] * noises[0], sigmas, lambda k: 0 * noises[k])
            assert not torch.allclose(want, quiet, rtol=1e-3)


def test_sampler_tables_have_the_same_names() -> None:
    assert list(SAMPLERS) == list(textbook_samplers.SAMPLERS)
    assert tuple(name for name, entry in SAMPLERS.items() if entry.cfg_pp) == CFG_PP_SAMPLERS


# ---- against the truth


@pytest.mark.parametrize("name", ODE_SAMPLERS)
def test_sample_reaches_the_distribution(name: str) -> None:
    """Quantile starts end on the data's quantiles, and the weight of each mode is kept."""
    x = run(name, posterior_mean, starts(2_001, 80.0), karras_sigmas(200))
    truth = starts(2_001, 0.0)
    tolerance = 2e-2 if name == "euler" else 2e-3
    assert (x - truth).abs().mean() < tolerance
    assert abs((x < -0.2).double().mean() - (truth < -0.2).double().mean()) < 0.005


def test_few_step_reaches_the_distribution() -> None:
    """With a perfect generator (the ODE's own end point) fresh noise at every step keeps the distribution."""
    generator = torch.Generator().manual_seed(0)

    def end_point(x: Tensor, sigma: float) -> Tensor:
        return quantile(distribution(x, sigma), 0.0)

    def noise(stream: int) -> Tensor:
        return torch.randn(20_000, dtype=torch.float64, generator=generator)

    for steps in (1, 2, 4):
        x = run("few_step", end_point, 80.0 * noise(0), karras_sigmas(steps), noise).sort().values
        # Kolmogorov-Smirnov distance of 20,000 draws: 1.63 / sqrt(n) = 0.0115 at the 1 % level
        gap = (distribution(x, 0.0) - torch.linspace(0, 1, len(x), dtype=torch.float64)).abs().max()
        assert gap < 0.0115


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("dpmpp_2s", 2)])
def test_sample_converges_with_the_order_of_the_sampler(name: str, order: int) -> None:
    """Halving the steps multiplies the error by 2^order, from sigma 10 to 0.05 against the exact solution."""
    x, truth = starts(101, 10.0), starts(101, 0.05)
    errors = []
    for steps in (64, 128, 256):
        sigmas = karras_sigmas(steps + 1, 0.05, 10.0, end_at_zero=False)
        errors.append(float((run(name, posterior_mean, x, sigmas) - truth).abs().mean()))
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(m - order) < 0.3 for m in measured), (measured, errors)


# ---- calls, progress, guidance


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_evaluated_sigmas_are_those_of_the_network_calls(name: str, steps: int) -> None:
    seen: list[float] = []
    textbook: list[float] = []

    def recording(x: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        return 0.5 * x

    def recording_textbook(x: Tensor, sigma: float) -> textbook_samplers.Denoised:
        textbook.append(sigma)
        return textbook_samplers.Denoised(0.5 * x, 0.5 * x)

    ticks: list[tuple[int, int]] = []
    sigmas, ones = karras_sigmas(steps), torch.ones(3)
    run(name, recording, ones, sigmas, lambda stream: torch.zeros(3), progress=lambda i, n: ticks.append((i, n)))
    textbook_samplers.sample(name, recording_textbook, ones, sigmas, lambda stream: torch.zeros(3))
    assert seen == pytest.approx(evaluated_sigmas(name, sigmas))
    assert seen == pytest.approx(textbook)
    assert ticks == [(i + 1, steps) for i in range(steps)]


def test_guidance_combines_and_respects_its_interval() -> None:
    d_c, d_u, x = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([5.0])
    guidance = Guidance(3.0, (0.5, 2.0))
    denoise = guided(lambda x, s: d_c, lambda x, s: (d_c, d_u), guidance)
    for sigma, want in ((1.0, 4.0), (3.0, 2.0), (0.1, 2.0)):
        assert denoise(x, sigma) == (want, want)
        end = run("euler", lambda x, s: d_c, x, [sigma, 0.0], guidance=guidance, unconditional=lambda x, s: d_u)
        assert float(end) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_cfg_plus_plus_is_exact_at_its_ends(name: str) -> None:
    """At scale 1 CFG++ ends at D_c of the last step; at scale 0 it is unconditional sampling."""
    x = torch.tensor([3.0, -1.0], dtype=torch.float64)
    sigmas = karras_sigmas(6, 0.01, 5.0)

    def conditional(x: Tensor, s: float) -> Tensor:
        return x * 0.2 + 1

    def both(name: str, scale: float, sigmas: Sequence[float]) -> Tensor:
        guidance = Guidance(scale, plus_plus=True)
        return run(name, conditional, x, sigmas, guidance=guidance, unconditional=posterior_mean)

    assert torch.allclose(both(name, 0.0, sigmas), run(name, posterior_mean, x, sigmas), atol=1e-12)
    expected = conditional(x, 5.0) + sigmas[1] / 5.0 * (x - posterior_mean(x, 5.0))
    assert torch.allclose(both("euler", 1.0, sigmas[:2]), expected)


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
def test_check_guidance_refuses(guidance: Guidance, sampler: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words.replace("+", r"\+")):
        check_guidance(sampler, guidance)


def test_unknown_samplers_are_answered_with_the_known_ones() -> None:
    with pytest.raises(InvalidInputError, match="few_step"):
        find_sampler("magic")
    with pytest.raises(InvalidInputError, match="few_step"):
        compile_trajectory("magic", [1.0, 0.0], Guidance(), LayerSchedule.full(1), "edm", 0.5)
    with pytest.raises(InvalidInputError, match="few_step"):
        evaluated_sigmas("magic", [1.0, 0.0])
    with pytest.raises(InvalidInputError, match="few_step"):
        sampling_sigmas("magic", 4, 0.002, 80.0, 7.0)
