"""A sampler written out before its first step: for each run of the network its noise level, its blocks, and the numbers
of the update that follows.

Every sampler in `diffusion/samplers.py`, with any guidance and preconditioner, is linear in the state x, the raw
network outputs F_c and F_u, fresh noise n and one tensor H that is carried on. So a step is

    x'  = a x + b F_c + c F_u + h H + s n          H' = p x + q F_c + r F_u          input' = c_in' x'

and nine numbers, made here in fp64, are all that the hot path needs to know.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import InvalidInputError
from .guidance import Guidance
from .precond import coefficients as precondition
from .schedule import LayerSchedule

Form = np.ndarray  # (4,) fp64: how much of x, F_c, F_u and H

X, H = np.array([1.0, 0.0, 0.0, 0.0]), np.array([0.0, 0.0, 0.0, 1.0])
NONE = np.zeros(4)


@dataclass(frozen=True)
class Evaluation:
    """One run of the network and the update after it.

    time: what the network is told of sigma; c_in: factor of its input; blocks: which run; budget: the share that it is
    told will run; guided: with the unconditional branch; update: (a, b, c, h, s, p, q, r, c_in'); stream: of the fresh
    noise, None for none; step: the sampler step that ends here, counted from 1, or 0 in the middle of one; after: the
    noise level of the state then.
    """

    sigma: float
    time: float
    c_in: float
    blocks: tuple[int, ...]
    budget: float
    guided: bool
    update: tuple[float, ...]
    stream: int | None
    step: int
    after: float


@dataclass(frozen=True)
class _Move:
    """What a sampler does after one evaluation, as linear forms."""

    sigma: float
    x: Form
    kept: Form
    noise: float = 0.0
    stream: int | None = None
    step: int = 0


class _Network:
    """The denoiser as linear forms of the raw outputs."""

    def __init__(self, guidance: Guidance, network: str, sigma_data: float) -> None:
        self.guidance, self.network, self.sigma_data = guidance, network, sigma_data

    def numbers(self, sigma: float) -> tuple[float, float, float, float]:
        """c_skip, c_out, c_in and the time."""
        values = precondition(torch.tensor(sigma, dtype=torch.float64), self.network, self.sigma_data)
        return tuple(float(value) for value in values)  # type: ignore[return-value]

    def denoised(self, sigma: float) -> tuple[Form, Form]:
        """x0 and the anchor of the noise estimate."""
        skip, out, _, _ = self.numbers(sigma)
        if not self.guidance.active(sigma):
            x0 = np.array([skip, out, 0.0, 0.0])
            return x0, x0
        w = self.guidance.scale
        x0 = np.array([skip, out * w, out * (1.0 - w), 0.0])
        return x0, np.array([skip, 0.0, out, 0.0]) if self.guidance.plus_plus else x0


def _euler(network: _Network, levels: Sequence[float]) -> Iterator[_Move]:
    for i, (s, s_next) in enumerate(itertools.pairwise(levels)):
        x0, anchor = network.denoised(s)
        yield _Move(s, x0 + s_next / s * (X - anchor), NONE, step=i + 1)


def _heun(network: _Network, levels: Sequence[float]) -> Iterator[_Move]:
    for i, (s, s_next) in enumerate(itertools.pairwise(levels)):
        slope = (X - network.denoised(s)[0]) / s
        if s_next == 0:
            yield _Move(s, X - s * slope, NONE, step=i + 1)
            continue
        half = 0.5 * (s_next - s)
        yield _Move(s, X + 2 * half * slope, X + half * slope)
        yield _Move(s_next, H + half * (X - network.denoised(s_next)[0]) / s_next, NONE, step=i + 1)


def _dpmpp_2m(network: _Network, levels: Sequence[float]) -> Iterator[_Move]:
    pairs = list(itertools.pairwise(levels))
    # How far step i extrapolates from the step before: half the ratio of the two steps in lambda.
    reach = [0.0] + [
        0.5 * math.log(s / s_next) / math.log(levels[i] / s) if s_next > 0 else 0.0
        for i, (s, s_next) in enumerate(pairs[1:])
    ]
    for i, (s, s_next) in enumerate(pairs):
        x0, anchor = network.denoised(s)
        ratio, k = s_next / s, reach[i]
        kept = NONE
        if i + 1 < len(pairs) and reach[i + 1]:
            after = pairs[i + 1]
            kept = reach[i + 1] * (after[1] / after[0] * anchor - x0)
        yield _Move(s, (1 + k) * (x0 - ratio * anchor) + ratio * X + (H if k else NONE), kept, step=i + 1)


def _dpmpp_2s(network: _Network, levels: Sequence[float]) -> Iterator[_Move]:
    for i, (s, s_next) in enumerate(itertools.pairwise(levels)):
        x0 = network.denoised(s)[0]
        if s_next == 0:
            yield _Move(s, x0, NONE, step=i + 1)
            continue
        middle = math.sqrt(s * s_next)
        yield _Move(s, x0 + middle / s * (X - x0), X)
        x0 = network.denoised(middle)[0]
        yield _Move(middle, x0 + s_next / s * (H - x0), NONE, step=i + 1)


def _few_step(network: _Network, levels: Sequence[float]) -> Iterator[_Move]:
    for i, (s, s_next) in enumerate(itertools.pairwise(levels)):
        fresh = i + 1 if s_next > 0 else None
        yield _Move(s, network.denoised(s)[0], NONE, noise=s_next, stream=fresh, step=i + 1)


SAMPLERS = {"euler": _euler, "heun": _heun, "dpmpp_2m": _dpmpp_2m, "dpmpp_2s": _dpmpp_2s, "few_step": _few_step}


def compile_trajectory(
    sampler: str, levels: Sequence[float], guidance: Guidance, layers: LayerSchedule, network: str, sigma_data: float
) -> tuple[Evaluation, ...]:
    """Every evaluation of the sampler in order. Raises InvalidInputError for an unknown sampler or network."""
    if sampler not in SAMPLERS:
        raise InvalidInputError(f"unknown sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
    denoiser = _Network(guidance, network, sigma_data)
    moves = list(SAMPLERS[sampler](denoiser, levels))
    out = []
    for i, move in enumerate(moves):
        _, _, c_in, time = denoiser.numbers(move.sigma)
        following = denoiser.numbers(moves[i + 1].sigma)[2] if i + 1 < len(moves) else 1.0
        update = (*move.x, move.noise, *move.kept[:3], following)
        out.append(
            Evaluation(move.sigma, time, c_in, layers.blocks(move.sigma), layers.budget(move.sigma),
                       guidance.active(move.sigma),
                       tuple(float(u) for u in update), move.stream, move.step, float(levels[move.step]))
        )  # fmt: skip
    return tuple(out)
