"""Samplers as textbook loops over a denoiser: the oracle of `diffusion.trajectory`.

Each takes `denoise(x, sigma) -> Denoised`, `x` at noise level sigmas[0], and falling `sigmas` (the last is 0 for a
finished sample). In the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, equation 1
with s(t) = 1). The anchor of a noise estimate is D itself, or with CFG++ (Chung et al. 2024) the unconditional D.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from presto_rt.diffusion.guidance import Guidance


class Denoised(NamedTuple):
    """Output of a denoiser at one noise level: clean latents `x0`, and the `anchor` of the noise estimate."""

    x0: Tensor
    anchor: Tensor


Denoise = Callable[[Tensor, float], Denoised]
Noise = Callable[[int], Tensor]
Progress = Callable[[int, int], None]


def _tick(progress: Progress | None, step: int, total: int) -> None:
    if progress is not None:
        progress(step, total)


def euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float], progress: Progress | None = None) -> Tensor:
    """First order: x' = D + s'/s (x - anchor). One network call a step."""
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        d = denoise(x, s)
        x = d.x0 + (s_next / s) * (x - d.anchor)
        _tick(progress, i + 1, len(sigmas) - 1)
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], progress: Progress | None = None) -> Tensor:
    """Second order (Karras et al. 2022, algorithm 1 without churn): two network calls a step, one in a step to 0."""
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        slope = (x - denoise(x, s).x0) / s
        x_next = x + (s_next - s) * slope
        if s_next > 0:
            slope_next = (x_next - denoise(x_next, s_next).x0) / s_next
            x_next = x + (s_next - s) * (slope + slope_next) / 2
        x = x_next
        _tick(progress, i + 1, len(sigmas) - 1)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float], progress: Progress | None = None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) with lambda = -ln sigma: second order, one network call a step."""
    previous: Denoised | None = None
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        d = denoise(x, s)
        x0, anchor = d
        if previous is not None and s_next > 0:
            # r = (previous step) / (this step) in lambda; D is extrapolated to the middle of the step
            r = math.log(sigmas[i - 1] / s) / math.log(s / s_next)
            x0 = d.x0 + (d.x0 - previous.x0) / (2 * r)
            anchor = d.anchor + (d.anchor - previous.anchor) / (2 * r)
        x = x0 + (s_next / s) * (x - anchor)
        previous = d
        _tick(progress, i + 1, len(sigmas) - 1)
    return x


def dpmpp_2s(denoise: Denoise, x: Tensor, sigmas: Sequence[float], progress: Progress | None = None) -> Tensor:
    """DPM-Solver++(2S) (Lu et al. 2022, algorithm 1, r = 1/2): second order, two network calls a step, single step."""
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        d = denoise(x, s).x0
        if s_next > 0:
            s_mid = math.sqrt(s * s_next)  # the middle in lambda
            x_mid = d + (s_mid / s) * (x - d)
            d = denoise(x_mid, s_mid).x0
        x = d + (s_next / s) * (x - d)
        _tick(progress, i + 1, len(sigmas) - 1)
    return x


def few_step(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, progress: Progress | None = None
) -> Tensor:
    """The few-step stochastic sampler of distilled models: x_0 = D(x; s), x' = x_0 + s' n with fresh noise."""
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        x = denoise(x, s).x0
        if s_next > 0:
            x = x + s_next * noise(i + 1)
        _tick(progress, i + 1, len(sigmas) - 1)
    return x


#: Deterministic solvers, by name.
ODE_SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2s": dpmpp_2s,
}
#: Samplers that add fresh noise, by name.
STOCHASTIC_SAMPLERS: dict[str, Callable[..., Tensor]] = {"few_step": few_step}
SAMPLERS = (*ODE_SAMPLERS, *STOCHASTIC_SAMPLERS)
CFG_PP_SAMPLERS = ("euler", "dpmpp_2m")


def sample(
    name: str, denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, progress: Progress | None = None
) -> Tensor:
    """Run the sampler called `name`. noise: fresh noise of a stream, for the stochastic ones."""
    if name in STOCHASTIC_SAMPLERS:
        return STOCHASTIC_SAMPLERS[name](denoise, x, sigmas, noise, progress)
    return ODE_SAMPLERS[name](denoise, x, sigmas, progress)


def guided(
    conditional: Callable[[Tensor, float], Tensor],
    both: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    guidance: Guidance,
) -> Denoise:
    """Return a guided denoiser. conditional: (x, sigma) -> D_c. both: (x, sigma) -> (D_c, D_u)."""

    def denoise(x: Tensor, sigma: float) -> Denoised:
        if not guidance.active(sigma):
            x0 = conditional(x, sigma)
            return Denoised(x0, x0)
        d_c, d_u = both(x, sigma)
        x0 = d_u + guidance.scale * (d_c - d_u)
        return Denoised(x0, d_u if guidance.plus_plus else x0)

    return denoise
