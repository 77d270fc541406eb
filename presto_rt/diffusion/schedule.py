"""Noise levels and layer schedules: everything about a trajectory that is known before its first step.

Levels (Karras et al. 2022, equation 5): sigma_i = (s_max^(1/rho) + i/(N-1) (s_min^(1/rho) - s_max^(1/rho)))^rho,
then 0. A layer schedule maps a noise level to the blocks that run there; it is data (JSON), saved with the weights,
and users name it by its budget: a share of the blocks ("70%"), one number for all steps (6), or one entry per step.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInputError

# p(s_train), ln sigma ~ N(P_MEAN, P_STD^2). EDM2's (-0.4, 1) has only 4 % above sigma 4, where everything that changes
# slowly over a clip is decided: see docs/training.md.
P_MEAN, P_STD = 0.4, 1.4


def karras_sigmas(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, end_at_zero: bool = True
) -> list[float]:
    """Return `steps` noise levels from sigma_max down to sigma_min, then 0.0 (the list has steps + 1 entries).

    Args:
        steps: number of steps, at least 1.
        sigma_min: last noise level before 0.
        sigma_max: first noise level.
        rho: exponent (Karras et al. 2022, equation 5).
        end_at_zero: append 0.0.
    """
    _check_steps(steps)
    return inference_sigmas(torch.linspace(0, 1, max(steps, 2), dtype=torch.float64)[:steps], sigma_min, sigma_max,
                            rho).tolist() + [0.0] * end_at_zero  # fmt: skip


def inference_sigmas(u: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Return the noise levels at positions u in [0, 1] of the sampler's ladder, p(s_inf); u = 0 is sigma_max."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas: Tensor = (high + u * (low - high)) ** rho
    return sigmas


def few_step_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> list[float]:
    """Return `steps` noise levels at u = i / steps of the ladder, then 0.0, for the few-step sampler.

    Unlike `karras_sigmas` it leaves out sigma_min, where a generator has nothing left to change.
    """
    _check_steps(steps)
    return [*karras_sigmas(steps + 1, sigma_min, sigma_max, rho, end_at_zero=False)[:-1], 0.0]


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidInputError(f"steps must be a whole number of at least 1, not {steps!r}")


def training_sigmas(u: Tensor, mean: float = P_MEAN, std: float = P_STD) -> Tensor:
    """Return training noise levels p(s_train), ln sigma ~ N(mean, std^2), from uniform u in (0, 1)."""
    sigmas: Tensor = (mean + std * torch.special.ndtri(u)).exp()
    return sigmas


@dataclass(frozen=True)
class LayerSchedule:
    """Blocks that run at each noise level.

    rows: (upper sigma, blocks) in rising order of sigma; a noise level uses the first row whose upper sigma is at least
    its own, and the last row's upper sigma is infinity. Blocks are indices in rising order. budget_input: the network
    was trained with the share of blocks as an input; one that was not (ASE) always gets a budget of 1.
    """

    depth: int
    rows: tuple[tuple[float, tuple[int, ...]], ...]
    budget_input: bool = True

    def __post_init__(self) -> None:
        bounds = [upper for upper, _ in self.rows]
        if not self.rows or bounds != sorted(bounds) or bounds[-1] != math.inf:
            raise InvalidInputError("a layer schedule's rows must rise in sigma and end with infinity")
        for upper, blocks in self.rows:
            if not blocks or list(blocks) != sorted(set(blocks)) or blocks[0] < 0 or blocks[-1] >= self.depth:
                raise InvalidInputError(
                    f"layer schedule up to sigma {upper:g}: blocks must rise within 0..{self.depth - 1}, not {blocks}"
                )

    @classmethod
    def full(cls, depth: int) -> LayerSchedule:
        """Return the schedule that runs all blocks at every noise level."""
        return cls(depth, ((math.inf, tuple(range(depth))),))

    def blocks(self, sigma: float) -> tuple[int, ...]:
        """Return the blocks that run at noise level `sigma`."""
        return next(blocks for upper, blocks in self.rows if sigma <= upper)

    def budget(self, sigma: float) -> float:
        """Return the layer-budget input of the network at noise level `sigma`: the share of blocks that run."""
        return len(self.blocks(sigma)) / self.depth if self.budget_input else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the schedule as JSON data: null for infinity; "told" is the budget input's key on disk."""
        rows = [[None if upper == math.inf else upper, list(blocks)] for upper, blocks in self.rows]
        return {"depth": self.depth, "rows": rows, "told": self.budget_input}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerSchedule:
        """Return the schedule of `to_json`'s data. Raises InvalidInputError for anything else."""
        try:
            rows = tuple((math.inf if u is None else float(u), tuple(int(b) for b in bs)) for u, bs in data["rows"])
            return cls(int(data["depth"]), rows, bool(data.get("told", True)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(f"not a layer schedule: {error}") from error


#: Argument `layers` of a request: a count, a share ("70%"), one of these per step, or a schedule
Layers = int | str | Sequence[int | str] | LayerSchedule | None


def keep_last(depth: int, count: int) -> tuple[int, ...]:
    """Return `count` of `depth` blocks: a prefix and always the last one (Presto-L's shifted drop)."""
    if not 1 <= count <= depth:
        raise InvalidInputError(f"between 1 and {depth} of {depth} blocks can run, not {count}")
    return (*range(count - 1), depth - 1)


def budget_schedule(
    depth: int,
    share: float,
    *,
    shifted: bool = True,
    parts: int = 10,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> LayerSchedule:
    """Return a schedule with fewer blocks at higher noise, `share` of them on average over the ladder p(s_inf).

    The number of blocks falls linearly from clean to noisy over `parts` equal parts, as ASE's published schedule does
    (28 28 24 24 20 20 16 16 12 12 of 28; Moon et al. 2024): from at most all blocks to at least a quarter. Counts are
    whole; rounding errors are carried to the next part, and the counts are put in falling order.

    Args:
        depth: blocks of the network.
        share: of the blocks that run on average, 0.25 to 1.
        shifted: the last block always runs and those before it are dropped (Presto-L); else a prefix runs (ASE).
        parts: of the ladder.
        sigma_min: lowest noise level of the ladder.
        sigma_max: highest noise level of the ladder.
        rho: exponent of the ladder.

    Raises:
        InvalidInputError: for other shares.
    """
    if not 0.25 <= share <= 1.0:
        raise InvalidInputError(f"a layer budget must be a share of the blocks from 25% to 100%, not {share:.0%}")
    low = max(2 * share - 1, 0.25)
    high = 2 * share - low
    sigmas = inference_sigmas(torch.arange(parts, -1, -1, dtype=torch.float64) / parts, sigma_min, sigma_max, rho)
    counts, carried = [], 0.0
    for part in range(parts):
        exact = depth * (high + (low - high) * part / (parts - 1)) + carried
        counts.append(min(max(round(exact), 1), depth))
        carried = exact - counts[-1]
    uppers = [*sigmas[1:-1].tolist(), float("inf")]
    blocks = [keep_last(depth, n) if shifted else tuple(range(n)) for n in sorted(counts, reverse=True)]
    return LayerSchedule(depth, tuple(zip(uppers, blocks, strict=True)))


def parse_layers(
    layers: Layers,
    depth: int,
    *,
    sigmas: Sequence[float] = (),
    saved: Mapping[str, LayerSchedule] | None = None,
    ladder: tuple[float, float, float] = (0.002, 80.0, 7.0),
) -> LayerSchedule:
    """Return the schedule of a `layers` argument.

    None or "100%": all blocks. 6: that number at every noise level, the last block always among them. "70%": that share
    on average over the ladder, fewer at high noise; the weights' own schedule where `saved` has one of that name.
    [8, 6, "50%"]: one entry for each step, as counts or shares of that step; "8,6,50%" is the same. A network without
    schedules of its own was only trained at budget 1, so that stays its budget input.

    Args:
        layers: the argument.
        depth: blocks of the network.
        sigmas: noise levels of the steps, for entries per step; a closing 0 is ignored.
        saved: layer schedules of the weights, by budget.
        ladder: sigma_min, sigma_max and rho.

    Raises:
        InvalidInputError: for any other argument.
    """
    if layers is None:
        return LayerSchedule.full(depth)
    if isinstance(layers, LayerSchedule):
        if layers.depth != depth:
            raise InvalidInputError(f"this layer schedule is for {layers.depth} blocks; the model has {depth}")
        return layers
    if isinstance(layers, str) and "," in layers:
        layers = layers.split(",")
    budget_input = bool(saved) and all(schedule.budget_input for schedule in (saved or {}).values())
    if isinstance(layers, list | tuple):
        return replace(_per_step(layers, depth, [s for s in sigmas if s > 0]), budget_input=budget_input)
    name = layers.strip() if isinstance(layers, str) else layers
    if isinstance(name, str) and name in (saved or {}):
        return (saved or {})[name]
    if isinstance(name, str) and (share := _share(name)) is not None:
        low, high, rho = ladder
        schedule = budget_schedule(depth, share, sigma_min=low, sigma_max=high, rho=rho)
        return replace(schedule, budget_input=budget_input)
    return LayerSchedule(depth, ((math.inf, keep_last(depth, _count(name, depth))),), budget_input)


def _per_step(entries: Sequence[int | str], depth: int, sigmas: Sequence[float]) -> LayerSchedule:
    """Rows that separate neighbouring steps at the geometric mean of their noise levels."""
    if len(entries) != len(sigmas):
        raise InvalidInputError(f"layers has {len(entries)} entries for {len(sigmas)} steps; give one for each step")
    middles = [math.sqrt(a * b) for a, b in itertools.pairwise(sigmas)]
    blocks = [keep_last(depth, _count(entry, depth)) for entry in entries]
    return LayerSchedule(depth, tuple(zip([*reversed(middles), math.inf], reversed(blocks), strict=True)))


def _share(text: str) -> float | None:
    """0.7 from "70%"; None for text of another form."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    return float(found[1]) / 100 if found else None


def _count(value: object, depth: int) -> int:
    """A number of blocks from 6, "6" or "75%" (rounded)."""
    if isinstance(value, str):
        share = _share(value)
        if share is not None:
            return round(share * depth)
        value = int(value) if value.strip().isdigit() else None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInputError(
            f'layers must be a number of blocks (1 to {depth}), a share such as "60%", or one of these for each step'
        )
    return value
