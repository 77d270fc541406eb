"""Classifier-free guidance (Ho & Salimans 2022), CFG++ (Chung et al. 2024) and guidance intervals
(Kynkäänniemi et al. 2024), around a denoiser that takes a condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import InvalidInputError
from .samplers import CFG_PP_SAMPLERS, SAMPLERS, Denoise, Denoised


@dataclass(frozen=True)
class Guidance:
    """scale: D = D_u + scale (D_c - D_u), 1 is none; for CFG++ scale lies in [0, 1].

    interval: (low, high) noise levels between which guidance acts; outside only the conditional branch runs.
    plus_plus: CFG++, for the samplers that define it.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)
    plus_plus: bool = False

    def check(self, sampler: str) -> None:
        """Raises InvalidInputError where the numbers or the combination with `sampler` make no sense."""
        if sampler not in SAMPLERS:
            raise InvalidInputError(f"unknown sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
        limit = 1.0 if self.plus_plus else 100.0
        if not (isinstance(self.scale, int | float) and 0 <= self.scale <= limit):
            raise InvalidInputError(f"guidance must be a number from 0 to {limit:g}, not {self.scale!r}")
        try:
            low, high = self.interval
            rising = 0 <= low < high
        except (TypeError, ValueError):
            rising = False
        if not rising:
            raise InvalidInputError(
                f"the guidance interval must be (low, high) with 0 <= low < high, not {self.interval!r}"
            )
        if self.plus_plus and sampler not in CFG_PP_SAMPLERS:
            raise InvalidInputError(f"CFG++ is defined for {', '.join(CFG_PP_SAMPLERS)}, not for {sampler}")

    def active(self, sigma: float) -> bool:
        return (self.plus_plus or self.scale != 1.0) and self.interval[0] <= sigma <= self.interval[1]


def guided(
    conditional: Callable[[Tensor, float], Tensor],
    both: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    guidance: Guidance,
) -> Denoise:
    """A denoiser for the samplers. `conditional(x, sigma)` gives D_c; `both` gives (D_c, D_u) at once."""

    def denoise(x: Tensor, sigma: float) -> Denoised:
        if not guidance.active(sigma):
            x0 = conditional(x, sigma)
            return Denoised(x0, x0)
        d_c, d_u = both(x, sigma)
        x0 = d_u + guidance.scale * (d_c - d_u)
        return Denoised(x0, d_u if guidance.plus_plus else x0)

    return denoise
