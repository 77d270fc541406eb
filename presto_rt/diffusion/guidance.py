"""Classifier-free guidance (Ho & Salimans 2022), CFG++ (Chung et al. 2024) and guidance intervals
(Kynkäänniemi et al. 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InvalidInputError


@dataclass(frozen=True)
class Guidance:
    """Guidance of a trajectory: D = D_u + scale (D_c - D_u).

    scale: 1 is no guidance; for CFG++ it lies in [0, 1]. interval: (low, high) noise levels between which guidance is
    active; outside only the conditional branch runs. plus_plus: CFG++, for the samplers that define it.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)
    plus_plus: bool = False

    def validate(self) -> None:
        """Raise InvalidInputError for a scale or an interval out of range."""
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

    def active(self, sigma: float) -> bool:
        """Return True if the unconditional branch runs at noise level `sigma`."""
        return (self.plus_plus or self.scale != 1.0) and self.interval[0] <= sigma <= self.interval[1]
