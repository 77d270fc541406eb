"""Deadlines: a table of measured costs, and the choice of the best plan that ends in time.

One row for each clip length and batch size; times in seconds, the slowest of the repeats:

    total = text + start + sum over network calls (evaluation + block * blocks) * (guided, where guidance is active)
            + decode

Everything here is pure: `measure` takes the function that runs, and `latency_store` keeps tables in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from .diffusion.schedule import Layers, LayerSchedule
from .diffusion.trajectory import evaluated_sigmas
from .errors import InvalidInputError
from .request import Defaults, SamplingPlan, SamplingSettings

MARGIN = 1.05  # predictions are raised by this factor before they are compared with a deadline
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class CostRow:
    """Costs in seconds of a batch of `clips` clips of `seconds` each.

    text, start, decode: once a batch. evaluation: of a network call without blocks. block: of one block. guided: factor
    of a guided call.
    """

    seconds: float
    text: float
    start: float
    evaluation: float
    block: float
    guided: float
    decode: float
    clips: int = 1


@dataclass(frozen=True)
class LatencyTable:
    """Measured rows of one model on one machine."""

    rows: tuple[CostRow, ...] = ()

    def merged(self, rows: Iterable[CostRow]) -> LatencyTable:
        """Return the table with rows added; a row of the same length and batch is replaced."""
        by_shape = {(row.seconds, row.clips): row for row in (*self.rows, *rows)}
        return LatencyTable(tuple(by_shape[shape] for shape in sorted(by_shape)))

    def covers(self, seconds: float) -> bool:
        """Return True if rows of lengths below and above (or at) `seconds` exist."""
        lengths = [row.seconds for row in self.rows]
        return bool(lengths) and min(lengths) <= seconds <= max(lengths)

    def at(self, seconds: float, clips: int = 1) -> CostRow:
        """Return the costs at a length and batch size, interpolated between measured ones.

        Larger batches than measured cost in proportion. Raises InvalidInputError where the table does not cover the
        length.
        """
        if not self.covers(seconds):
            raise InvalidInputError(
                f"no timings for clips of {seconds:g} s on this machine: run `presto-rt tune --seconds {seconds:g}`, "
                "or load the model with auto_tune=True"
            )
        lower = max(row.seconds for row in self.rows if row.seconds <= seconds)
        upper = min(row.seconds for row in self.rows if row.seconds >= seconds)
        low, high = (self._batch([row for row in self.rows if row.seconds == s], clips) for s in (lower, upper))
        share = (seconds - lower) / max(upper - lower, 1e-9)
        return replace(_blend(low, high, share), clips=clips)

    @staticmethod
    def _batch(rows: list[CostRow], clips: int) -> CostRow:
        """Costs of a batch at one length."""
        below = max((row for row in rows if row.clips <= clips), key=lambda row: row.clips, default=None)
        above = min((row for row in rows if row.clips >= clips), key=lambda row: row.clips, default=None)
        if below is None or above is None:
            nearest = above or below
            assert nearest is not None
            factor = max(clips / nearest.clips, 1.0)
            scaled = {name: getattr(nearest, name) * factor for name in ("start", "evaluation", "block", "decode")}
            return replace(nearest, **scaled)
        return _blend(below, above, (clips - below.clips) / max(above.clips - below.clips, 1))


def _blend(low: CostRow, high: CostRow, share: float) -> CostRow:
    values = {
        f.name: getattr(low, f.name) + share * (getattr(high, f.name) - getattr(low, f.name)) for f in fields(low)
    }
    return CostRow(**values | {"clips": low.clips})


def predict(row: CostRow, plan: SamplingPlan) -> float:
    """Return the seconds that a plan takes for one batch of the row."""
    calls = [
        (row.evaluation + row.block * len(plan.layers.blocks(s))) * (row.guided if plan.guidance.active(s) else 1.0)
        for s in evaluated_sigmas(plan.sampler, plan.sigmas)
    ]
    return row.text + row.start + sum(calls) + row.decode


def predict_clips(table: LatencyTable, plan: SamplingPlan, seconds: float, clips: int, max_batch: int) -> float:
    """Return the seconds that a plan takes for several clips, which run in batches.

    Args:
        table: measured costs.
        plan: of each clip.
        seconds: length of a clip.
        clips: number of clips.
        max_batch: largest batch of the backend.
    """
    whole, rest = divmod(clips, max_batch)
    total = whole * predict(table.at(seconds, max_batch), plan) if whole else 0.0
    return total + (predict(table.at(seconds, rest), plan) if rest else 0.0)


def candidates(
    steps: int | None,
    layers: Layers,
    *,
    quality: Sequence[Mapping[str, Any]],
    schedules: Mapping[str, LayerSchedule],
    defaults: Defaults,
    blocks_run: Callable[[int, Layers], int],
) -> list[tuple[int, Layers]]:
    """Return (steps, layers) of the plans to choose from, the best first; given values stay.

    Measured figures of the weights decide, where there are any. Without figures the best plan runs the most blocks in
    all, over steps up to twice the default and the budgets that the weights were trained for.

    Args:
        steps: given number of steps, or None.
        layers: given layer budget, or None.
        quality: measured figures of plans, each {"steps", "layers", "kid"}.
        schedules: layer schedules of the weights, by budget.
        defaults: of the weights.
        blocks_run: number of blocks that a plan runs.

    Raises:
        InvalidInputError: if steps and layers leave no single choice for each step.
    """
    per_step = isinstance(layers, list | tuple) or (steps is None and isinstance(layers, str) and "," in layers)
    if not isinstance(steps, int | None) or per_step:
        raise InvalidInputError(
            "with deadline_ms, steps is a whole number or left out, and layers has no entry per step"
        )
    measured = [
        (entry["kid"], entry["steps"], entry.get("layers"))
        for entry in quality
        if steps in (None, entry["steps"]) and layers in (None, entry.get("layers"))
    ]
    if measured:
        return [(count, budget) for _, count, budget in sorted(measured, key=lambda entry: entry[0])]
    budgets = [layers] if layers is not None else list(schedules) or ["100%"]
    counts = [steps] if steps is not None else [count for count in STEPS if count <= 2 * defaults.steps]
    pairs = [(count, budget) for count in counts for budget in budgets]
    return sorted(pairs, key=lambda pair: (blocks_run(*pair), pair[0]), reverse=True)


def choose(plans: Sequence[SamplingPlan], costs: Sequence[float], limit: float) -> SamplingPlan:
    """Return the first plan whose cost is within `limit` seconds.

    Raises InvalidInputError, with the fastest plan's cost, when none is. costs: seconds of each plan.
    """
    for plan, cost in zip(plans, costs, strict=True):
        if MARGIN * cost <= limit:
            return plan
    cost, fastest = min(zip(costs, plans, strict=True), key=lambda pair: pair[0])
    raise InvalidInputError(
        f"nothing fits {1000 * limit:g} ms here: the fastest plan, {fastest.steps} steps, takes about "
        f"{1000 * MARGIN * cost:.0f} ms; allow that much, or ask for a shorter clip"
    )


def plan_within(
    limit: float,
    settings: SamplingSettings,
    clips: int,
    *,
    plan: Callable[[SamplingSettings], SamplingPlan],
    table: LatencyTable,
    max_batch: Callable[[int], int],
    quality: Sequence[Mapping[str, Any]],
    schedules: Mapping[str, LayerSchedule],
    defaults: Defaults,
) -> SamplingPlan:
    """Return the best plan whose clips end within `limit` seconds.

    Args:
        limit: seconds for all clips.
        settings: of the call; given steps and layers stay.
        clips: number of clips.
        plan: makes a plan of settings.
        table: measured costs.
        max_batch: largest batch of the backend at a number of latent frames.
        quality: measured figures of plans, each {"steps", "layers", "kid"}.
        schedules: layer schedules of the weights, by budget.
        defaults: of the weights.

    Raises:
        InvalidInputError: where nothing fits, the table does not cover the length, or nothing is left to choose.
    """

    def blocks_run(steps: int, layers: Layers) -> int:
        return plan(replace(settings, seconds=1.0, steps=steps, layers=layers)).blocks_run

    pairs = candidates(
        settings.steps,
        settings.layers,
        quality=quality,
        schedules=schedules,
        defaults=defaults,
        blocks_run=blocks_run,
    )
    plans = [plan(replace(settings, steps=steps, layers=layers)) for steps, layers in pairs]
    batch = max_batch(plans[0].frames)
    return choose(plans, [predict_clips(table, one, settings.seconds, clips, batch) for one in plans], limit)


@dataclass(frozen=True)
class Probe:
    """Settings of one short run: clips of `seconds`, steps, blocks of every step, guidance scale."""

    seconds: float
    clips: int
    steps: int
    blocks: int
    guidance: float


#: Runs a probe; returns the seconds of the stages "text", "denoise" and "decode".
Run = Callable[[Probe], Mapping[str, float]]


def measure(run: Run, seconds: float, depth: int, *, clips: int = 1, repeats: int = 3) -> CostRow:
    """Return a row from short runs: one step and three, a quarter of the blocks and all, guided and not.

    Args:
        run: runs a probe.
        seconds: length of the clips.
        depth: blocks of the network.
        clips: batch size.
        repeats: the slowest of this many runs counts.
    """
    few = max(1, depth // 4)

    def timings(steps: int, blocks: int, guidance: float) -> dict[str, float]:
        runs = [run(Probe(seconds, clips, steps, blocks, guidance)) for _ in range(repeats)]
        return {name: max(one[name] for one in runs) for name in ("text", "denoise", "decode")}

    run(Probe(seconds, clips, 1, depth, 1.0))  # the first run loads and compiles
    one, three, guided = timings(1, depth, 1.0), timings(3, depth, 1.0), timings(3, depth, 2.0)
    full = max((three["denoise"] - one["denoise"]) / 2, 1e-6)
    start = max(one["denoise"] - full, 0.0)
    block = 0.0
    if few < depth:
        short = max((timings(3, few, 1.0)["denoise"] - start) / 3, 0.0)
        block = max((full - short) / (depth - few), 0.0)
    factor = max((guided["denoise"] - start) / (3 * full), 1.0)
    return CostRow(seconds, one["text"], start, max(full - block * depth, 0.0), block, factor, one["decode"], clips)
