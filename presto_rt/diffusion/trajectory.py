"""Samplers, compiled before their first step: each network call with its noise level, its blocks and the coefficients
of the update that follows.

Every sampler of the table, with any guidance and preconditioner, is linear in the state x, the raw network outputs F_c
and F_u, fresh noise n and one tensor H that is carried on. One update is

    x'  = a x + b F_c + c F_u + h H + s n          H' = p x + q F_c + r F_u          input' = c_in' x'

and its nine coefficients, computed here in fp64, are all that the loop over calls needs. This is the only definition of
the samplers: the eager loop (`sample`), the C++ and Triton operators and captured graphs all read `StepCoefficients`.

In the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, equation 1 with s(t) = 1). The
anchor of a noise estimate is D itself, or with CFG++ (Chung et al. 2024) the unconditional D, so that guidance moves
the estimate of x_0 and not the noise that is put back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInputError
from .guidance import Guidance
from .precond import coefficients as precond_coefficients
from .schedule import LayerSchedule, few_step_sigmas, karras_sigmas

#: (4,) fp64: the factors of x, F_c, F_u and H
LinearForm = np.ndarray
Sigmas = Sequence[float]
Progress = Callable[[int, int], None]

X, H = np.array([1.0, 0.0, 0.0, 0.0]), np.array([0.0, 0.0, 0.0, 1.0])
ZERO = np.zeros(4)


class StepCoefficients(NamedTuple):
    """Factors of one update, in the order that every backend's sampler step reads.

    x' = x_from_x x + x_from_cond F_c + x_from_uncond F_u + x_from_history H + x_from_noise n
    H' = history_from_x x + history_from_cond F_c + history_from_uncond F_u
    input' = next_c_in x'
    """

    x_from_x: float
    x_from_cond: float
    x_from_uncond: float
    x_from_history: float
    x_from_noise: float
    history_from_x: float
    history_from_cond: float
    history_from_uncond: float
    next_c_in: float


@dataclass(frozen=True)
class NetworkCall:
    """One call of the network and the update after it.

    Args:
        sigma: noise level of the state.
        time: the network's noise-level input.
        c_in: factor of the network's input.
        blocks: indices of the blocks that run.
        budget: layer-budget input of the network, the share of blocks that run.
        guided: the unconditional branch runs too.
        coefficients: of the update.
        noise_stream: stream of the fresh noise; None for no noise.
        step: sampler step that ends with this call, counted from 1; 0 in the middle of a step.
        next_sigma: noise level of the state after the update.
    """

    sigma: float
    time: float
    c_in: float
    blocks: tuple[int, ...]
    budget: float
    guided: bool
    coefficients: StepCoefficients
    noise_stream: int | None
    step: int
    next_sigma: float


@dataclass(frozen=True)
class Update:
    """The update after the call at `sigma`, as linear forms; x and history see the values before the update."""

    sigma: float
    x: LinearForm
    history: LinearForm
    noise: float = 0.0
    noise_stream: int | None = None
    step: int = 0


class LinearDenoiser:
    """The guided, preconditioned denoiser as linear forms of the state and the raw network outputs."""

    def __init__(self, guidance: Guidance, prediction_type: str, sigma_data: float) -> None:
        self.guidance, self.prediction_type, self.sigma_data = guidance, prediction_type, sigma_data

    def precond(self, sigma: float) -> tuple[float, float, float, float]:
        """Return c_skip, c_out, c_in and the time input."""
        values = precond_coefficients(torch.tensor(sigma, dtype=torch.float64), self.prediction_type, self.sigma_data)
        c_skip, c_out, c_in, time = (float(value) for value in values)
        return c_skip, c_out, c_in, time

    def denoised(self, sigma: float) -> tuple[LinearForm, LinearForm]:
        """Return x_0 and the anchor of the noise estimate."""
        c_skip, c_out, _, _ = self.precond(sigma)
        if not self.guidance.active(sigma):
            x0 = np.array([c_skip, c_out, 0.0, 0.0])
            return x0, x0
        w = self.guidance.scale
        x0 = np.array([c_skip, c_out * w, c_out * (1.0 - w), 0.0])
        return x0, np.array([c_skip, 0.0, c_out, 0.0]) if self.guidance.plus_plus else x0


def euler(denoiser: LinearDenoiser, sigmas: Sigmas) -> Iterator[Update]:
    """First order: x' = D + s'/s (x - anchor). One call a step."""
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        x0, anchor = denoiser.denoised(s)
        yield Update(s, x0 + s_next / s * (X - anchor), ZERO, step=i + 1)


def heun(denoiser: LinearDenoiser, sigmas: Sigmas) -> Iterator[Update]:
    """Second order (Karras et al. 2022, algorithm 1 without churn): two calls a step, one in a step to 0."""
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        slope = (X - denoiser.denoised(s)[0]) / s
        if s_next == 0:
            yield Update(s, X - s * slope, ZERO, step=i + 1)
            continue
        half = 0.5 * (s_next - s)
        yield Update(s, X + 2 * half * slope, X + half * slope)
        yield Update(s_next, H + half * (X - denoiser.denoised(s_next)[0]) / s_next, ZERO, step=i + 1)


def dpmpp_2m(denoiser: LinearDenoiser, sigmas: Sigmas) -> Iterator[Update]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) with lambda = -ln sigma: second order, one call a step."""
    pairs = list(itertools.pairwise(sigmas))
    # How far step i extrapolates from the step before: half the ratio of the two steps in lambda.
    reach = [0.0] + [
        0.5 * math.log(s / s_next) / math.log(sigmas[i] / s) if s_next > 0 else 0.0
        for i, (s, s_next) in enumerate(pairs[1:])
    ]
    for i, (s, s_next) in enumerate(pairs):
        x0, anchor = denoiser.denoised(s)
        ratio, k = s_next / s, reach[i]
        history = ZERO
        if i + 1 < len(pairs) and reach[i + 1]:
            following = pairs[i + 1]
            history = reach[i + 1] * (following[1] / following[0] * anchor - x0)
        yield Update(s, (1 + k) * (x0 - ratio * anchor) + ratio * X + (H if k else ZERO), history, step=i + 1)


def dpmpp_2s(denoiser: LinearDenoiser, sigmas: Sigmas) -> Iterator[Update]:
    """DPM-Solver++(2S) (Lu et al. 2022, algorithm 1, r = 1/2): second order, two calls a step, single step."""
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        x0 = denoiser.denoised(s)[0]
        if s_next == 0:
            yield Update(s, x0, ZERO, step=i + 1)
            continue
        middle = math.sqrt(s * s_next)
        yield Update(s, x0 + middle / s * (X - x0), X)
        x0 = denoiser.denoised(middle)[0]
        yield Update(middle, x0 + s_next / s * (H - x0), ZERO, step=i + 1)


def few_step(denoiser: LinearDenoiser, sigmas: Sigmas) -> Iterator[Update]:
    """The stochastic sampler of distilled models: x_0 = D(x; s), x' = x_0 + s' n with fresh noise."""
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        stream = i + 1 if s_next > 0 else None
        yield Update(s, denoiser.denoised(s)[0], ZERO, noise=s_next, noise_stream=stream, step=i + 1)


@dataclass(frozen=True)
class Sampler:
    """Entry of the table of samplers.

    updates: the sampler as linear forms. ladder: noise levels (steps, sigma_min, sigma_max, rho) -> steps + 1 sigmas.
    cfg_pp: CFG++ is defined for it.
    """

    updates: Callable[[LinearDenoiser, Sigmas], Iterator[Update]]
    ladder: Callable[[int, float, float, float], list[float]] = karras_sigmas
    cfg_pp: bool = False


#: The samplers by the name that users write. A new sampler is one entry here.
SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler, cfg_pp=True),
    "heun": Sampler(heun),
    "dpmpp_2m": Sampler(dpmpp_2m, cfg_pp=True),
    "dpmpp_2s": Sampler(dpmpp_2s),
    "few_step": Sampler(few_step, few_step_sigmas),
}


def find_sampler(name: str) -> Sampler:
    """Return the sampler called `name`. Raises InvalidInputError, listing the samplers, for any other name."""
    if name not in SAMPLERS:
        raise InvalidInputError(f"unknown sampler {name!r}; choose from: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def check_guidance(sampler: str, guidance: Guidance) -> None:
    """Raise InvalidInputError for guidance that is out of range or not defined for the sampler."""
    entry = find_sampler(sampler)
    guidance.validate()
    if guidance.plus_plus and not entry.cfg_pp:
        defined = ", ".join(name for name, other in SAMPLERS.items() if other.cfg_pp)
        raise InvalidInputError(f"CFG++ is defined for {defined}, not for {sampler}")


def sampling_sigmas(sampler: str, steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """Return the sampler's ladder: `steps` falling noise levels, then 0.0.

    Args:
        sampler: name in `SAMPLERS`.
        steps: number of steps.
        sigma_min: lowest noise level of the ladder.
        sigma_max: highest noise level of the ladder.
        rho: exponent of the ladder (Karras et al. 2022, equation 5).
    """
    return find_sampler(sampler).ladder(steps, sigma_min, sigma_max, rho)


def evaluated_sigmas(sampler: str, sigmas: Sigmas) -> list[float]:
    """Return the noise level of every network call of the sampler, in order."""
    denoiser = LinearDenoiser(Guidance(), "edm", 0.5)
    return [update.sigma for update in find_sampler(sampler).updates(denoiser, sigmas)]


def compile_trajectory(
    sampler: str,
    sigmas: Sigmas,
    guidance: Guidance,
    layers: LayerSchedule,
    prediction_type: str,
    sigma_data: float,
) -> tuple[NetworkCall, ...]:
    """Return every network call of a sampler in order.

    Args:
        sampler: name in `SAMPLERS`.
        sigmas: falling noise levels, the last one usually 0.
        guidance: scale, interval and kind.
        layers: blocks of each noise level.
        prediction_type: "edm", "v" or "rf" (`precond`).
        sigma_data: standard deviation of the data.

    Raises:
        InvalidInputError: for an unknown sampler or prediction type.
    """
    denoiser = LinearDenoiser(guidance, prediction_type, sigma_data)
    updates = list(find_sampler(sampler).updates(denoiser, sigmas))
    calls = []
    for i, update in enumerate(updates):
        _, _, c_in, time = denoiser.precond(update.sigma)
        next_c_in = denoiser.precond(updates[i + 1].sigma)[2] if i + 1 < len(updates) else 1.0
        coefficients = (*update.x, update.noise, *update.history[:3], next_c_in)
        calls.append(
            NetworkCall(
                sigma=update.sigma,
                time=time,
                c_in=c_in,
                blocks=layers.blocks(update.sigma),
                budget=layers.budget(update.sigma),
                guided=guidance.active(update.sigma),
                coefficients=StepCoefficients(*(float(value) for value in coefficients)),
                noise_stream=update.noise_stream,
                step=update.step,
                next_sigma=float(sigmas[update.step]),
            )
        )
    return tuple(calls)


#: (call, network input c_in x) -> raw outputs F_c and, where the call is guided, F_u
Evaluate = Callable[[NetworkCall, Tensor], tuple[Tensor, Tensor | None]]


def sample(
    calls: Sequence[NetworkCall],
    evaluate: Evaluate,
    noise: Callable[[int], Tensor],
    progress: Progress | None = None,
    edit: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Run a compiled trajectory over plain tensors.

    Args:
        calls: from `compile_trajectory`.
        evaluate: the raw network.
        noise: standard normal noise of a stream, shaped like the state; stream 0 is the start.
        progress: called with (step, steps) after each step.
        edit: init, shaped like the state, and keep (B, T), 1 where init stays, 0 where it may change; None for none.

    Returns:
        The final state, with the noise's shape and dtype.
    """
    x = calls[0].sigma * noise(0)
    if edit is not None:
        x = x + edit[0]
    history: Tensor | None = None
    for call in calls:
        conditional, unconditional = evaluate(call, call.c_in * x)
        c = call.coefficients
        raw = conditional.to(x.dtype)
        following, kept = c.x_from_x * x + c.x_from_cond * raw, c.history_from_x * x + c.history_from_cond * raw
        if unconditional is not None:
            raw = unconditional.to(x.dtype)
            following, kept = following + c.x_from_uncond * raw, kept + c.history_from_uncond * raw
        if history is not None:
            following = following + c.x_from_history * history
        if call.noise_stream is not None:
            following = following + c.x_from_noise * noise(call.noise_stream)
        x, history = following, kept
        if edit is not None and call.step:
            init, keep = edit[0], edit[1][..., None]
            x = keep * (init + call.next_sigma * noise(0)) + (1.0 - keep) * x
        if progress is not None and call.step:
            progress(call.step, calls[-1].step)
    return x
