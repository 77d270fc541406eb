"""Noise levels and layer schedules: everything about a trajectory that is known before its first step.

Levels (Karras et al. 2022, equation 5): sigma_i = (s_max^(1/rho) + i/(N-1) (s_min^(1/rho) - s_max^(1/rho)))^rho,
then 0. A layer schedule maps a noise level to the blocks that run there; it is data (JSON), saved with the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput


def karras_levels(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, end_at_zero: bool = True
) -> list[float]:
    """`steps` noise levels from sigma_max down to sigma_min, then 0.0 (the list has steps + 1 entries)."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidInput(f"steps must be a whole number of at least 1, not {steps!r}")
    return inference_levels(torch.linspace(0, 1, max(steps, 2), dtype=torch.float64)[:steps], sigma_min, sigma_max,
                            rho).tolist() + [0.0] * end_at_zero  # fmt: skip


def inference_levels(u: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """p(s_inf): noise levels at positions u in [0, 1] of the sampler's ladder (u = 0 is sigma_max)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + u * (low - high)) ** rho


def training_levels(u: Tensor, mean: float = -0.4, std: float = 1.0) -> Tensor:
    """p(s_train): ln sigma ~ N(mean, std^2), from uniform u in (0, 1) (stratify u for lower variance)."""
    return (mean + std * torch.special.ndtri(u)).exp()


@dataclass(frozen=True)
class LayerSchedule:
    """Blocks that run at each noise level.

    `rows`: (upper sigma, blocks) in rising order of sigma; a level uses the first row whose upper sigma is at least
    its own, and the last row's upper sigma is infinity. Blocks are indices in rising order.
    """

    depth: int
    rows: tuple[tuple[float, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        bounds = [upper for upper, _ in self.rows]
        if not self.rows or bounds != sorted(bounds) or bounds[-1] != float("inf"):
            raise InvalidInput("a layer schedule's rows must rise in sigma and end with infinity")
        for upper, blocks in self.rows:
            if not blocks or list(blocks) != sorted(set(blocks)) or blocks[0] < 0 or blocks[-1] >= self.depth:
                raise InvalidInput(
                    f"layer schedule up to sigma {upper:g}: blocks must rise within 0..{self.depth - 1}, not {blocks}"
                )

    @classmethod
    def full(cls, depth: int) -> LayerSchedule:
        return cls(depth, ((float("inf"), tuple(range(depth))),))

    def blocks(self, sigma: float) -> tuple[int, ...]:
        """The blocks that run at noise level `sigma`."""
        return next(blocks for upper, blocks in self.rows if sigma <= upper)

    def to_json(self) -> dict[str, Any]:
        rows = [[None if upper == float("inf") else upper, list(blocks)] for upper, blocks in self.rows]
        return {"depth": self.depth, "rows": rows}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerSchedule:
        try:
            rows = tuple((float("inf") if u is None else float(u), tuple(int(b) for b in bs)) for u, bs in data["rows"])
            return cls(int(data["depth"]), rows)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"not a layer schedule: {error}") from error


def keep_last(depth: int, count: int) -> tuple[int, ...]:
    """`count` of `depth` blocks: a prefix and always the last one (Presto-L's shifted drop)."""
    if not 1 <= count <= depth:
        raise InvalidInput(f"between 1 and {depth} of {depth} blocks can run, not {count}")
    return (*range(count - 1), depth - 1)


def budget_schedule(
    depth: int, share: float, *, shifted: bool = True, parts: int = 10, sigma_min: float = 0.002,
    sigma_max: float = 80.0, rho: float = 7.0,
) -> LayerSchedule:  # fmt: skip
    """Fewer blocks at higher noise, `share` of them on average over the ladder p(s_inf), in `parts` equal parts.

    The ramp from clean to noisy falls linearly, as ASE's published schedule does (28 28 24 24 20 20 16 16 12 12 of 28;
    Moon et al. 2024): from at most all blocks to at least a quarter. Counts are whole; what rounding leaves over is
    carried on to the next part, and the counts are put in falling order. shifted: the last block always runs
    and those before it are dropped (Presto-L); else a prefix runs (ASE). Raises InvalidInput for other shares.
    """
    if not 0.25 <= share <= 1.0:
        raise InvalidInput(f"a layer budget must be a share from 25% to 100%, not {share:.0%}")
    low = max(2 * share - 1, 0.25)
    high = 2 * share - low
    levels = inference_levels(torch.arange(parts, -1, -1, dtype=torch.float64) / parts, sigma_min, sigma_max, rho)
    counts, carried = [], 0.0
    for part in range(parts):
        wanted = depth * (high + (low - high) * part / (parts - 1)) + carried
        counts.append(min(max(round(wanted), 1), depth))
        carried = wanted - counts[-1]
    uppers = [*levels[1:-1].tolist(), float("inf")]
    chosen = [keep_last(depth, n) if shifted else tuple(range(n)) for n in sorted(counts, reverse=True)]
    return LayerSchedule(depth, tuple(zip(uppers, chosen, strict=True)))


def parse_layers(layers: object, depth: int) -> LayerSchedule:
    """A schedule from what a user writes: None, a count (6), a share ("60%"), or a LayerSchedule."""
    if layers is None:
        return LayerSchedule.full(depth)
    if isinstance(layers, LayerSchedule):
        if layers.depth != depth:
            raise InvalidInput(f"this layer schedule is for {layers.depth} blocks; the model has {depth}")
        return layers
    if isinstance(layers, str) and layers.strip().endswith("%"):
        try:
            layers = round(float(layers.strip()[:-1]) / 100 * depth)
        except ValueError:
            layers = None
    elif isinstance(layers, str) and layers.strip().isdigit():
        layers = int(layers)
    if isinstance(layers, bool) or not isinstance(layers, int):
        raise InvalidInput(f'layers must be a number of blocks (1 to {depth}) or a share such as "60%"')
    return LayerSchedule(depth, ((float("inf"), keep_last(depth, layers)),))
