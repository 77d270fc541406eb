"""Estimates with 95 % intervals. Resampling is over clips, since windows of one clip are not independent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval over `n` units; NaN without units."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the fields for JSON, with None for NaN."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {**{k: float(v) if np.isfinite(v) else None for k, v in numbers.items()}, "n": self.n}


def bootstrap(statistic: Callable[[np.ndarray], float], n: int, rounds: int = 1000, seed: int = 0) -> Estimate:
    """Estimate `statistic(indices)` of units 0..n-1 with a percentile bootstrap interval (Efron 1979).

    Suitable for means and ranks, which allow repeated units.
    """
    rng = np.random.default_rng(seed)
    value = statistic(np.arange(n))
    draws = np.array([statistic(rng.integers(0, n, n)) for _ in range(rounds)])
    low, high = np.nanpercentile(draws, [2.5, 97.5]) if np.isfinite(draws).any() else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high), n)


def half_samples(statistic: Callable[[np.ndarray], float], n: int, rounds: int = 200, seed: int = 0) -> Estimate:
    """Estimate `statistic(indices)` with an interval from random halves drawn without replacement (Shao and Wu 1989).

    The spread of halves around their mean equals the sampling spread of the full set. Suitable for distances, where a
    repeated unit would be its own neighbor. The interval is centered on the value of the full set, since the bias of a
    distance depends on n.
    """
    rng = np.random.default_rng(seed)
    value = statistic(np.arange(n))
    draws = np.array([statistic(rng.permutation(n)[: n // 2]) for _ in range(rounds)])
    low, high = np.percentile(draws - draws.mean(), [2.5, 97.5])
    return Estimate(float(value), float(value + low), float(value + high), n)


def mean(values: np.ndarray, rounds: int = 1000, seed: int = 0) -> Estimate:
    """Estimate the mean of `values` (n,) without NaN, with its bootstrap interval."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    return bootstrap(lambda i: float(values[i].mean()), len(values), rounds, seed)
