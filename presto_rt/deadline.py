"""Which plan ends in time? A table of what the parts of a generation cost on this machine, and the choice from it.

One row for each clip length; times in seconds, the slowest of the repeats:

    total = text + start + sum over evaluations (evaluation + block * blocks) * (guided, where guidance acts) + decode

The table is measured by `presto-rt tune`, or quickly when a deadline is first asked for, and kept in the user's cache
folder under a key of weights, device, dtype, threads, backend and torch version.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .diffusion.samplers import evaluated_sigmas
from .errors import InvalidInputError

if TYPE_CHECKING:
    from .diffusion.schedule import Layers
    from .pipeline import Pipeline, Plan

log = logging.getLogger("presto_rt")

PROMPT = "calm piano with warm strings, 84 bpm"
MARGIN = 1.05  # predictions are raised by this much before they are held against a deadline
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Row:
    """Costs in seconds of clips of `seconds`; `guided` is how much longer a guided evaluation takes (a factor)."""

    seconds: float
    text: float
    start: float
    evaluation: float
    block: float
    guided: float
    decode: float


def key(model: Pipeline) -> dict[str, Any]:
    """What a table depends on."""
    cuda = model.device.type == "cuda"
    weights = model.digest or hashlib.sha256(json.dumps(model.config.to_dict()).encode()).hexdigest()
    device = torch.cuda.get_device_name(model.device) if cuda else f"{platform.machine()}, {os.cpu_count()} cores"
    threads = getattr(getattr(model, "engine", None), "threads", torch.get_num_threads())
    return {"weights": weights, "device": device, "dtype": model.precision, "threads": threads,
            "backend": getattr(model, "backend", "torch"), "torch": torch.__version__}  # fmt: skip


def table_path(model: Pipeline) -> Path:
    """The file of this model's table: below $XDG_CACHE_HOME or ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(json.dumps(key(model), sort_keys=True).encode()).hexdigest()[:16]
    return base / "presto-rt" / f"tune-{name}.json"


def load_table(model: Pipeline) -> list[Row]:
    """The rows measured so far, by rising length; none where there is no readable table."""
    try:
        data = json.loads(table_path(model).read_text())
        return [Row(**row) for row in data["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def tune(model: Pipeline, lengths: Iterable[float], repeats: int = 3) -> list[Row]:
    """Measure rows for clips of `lengths` seconds and keep them beside the others. Returns the whole table."""
    rows = {row.seconds: row for row in load_table(model)}
    for seconds in lengths:
        rows[float(seconds)] = measure(model, float(seconds), repeats)
    table = [rows[s] for s in sorted(rows)]
    path = table_path(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.tmp")
        fresh.write_text(json.dumps({"key": key(model), "rows": [asdict(row) for row in table]}, indent=1) + "\n")
        fresh.replace(path)
    except OSError as error:
        log.warning("the table of timings cannot be kept in %s (%s)", path.parent, error.strerror)
    return table


def measure(model: Pipeline, seconds: float, repeats: int = 3) -> Row:
    """A row from a few short generations: one step and three, few blocks and all, guided and not."""
    depth = model.config.blocks
    few = max(1, depth // 4)

    def timings(steps: int, blocks: int, guidance: float) -> dict[str, float]:
        settings = {"seconds": seconds, "steps": steps, "layers": blocks, "guidance": guidance, "sampler": "euler",
                    "guidance_interval": (0.0, float("inf")), "seed": 0}  # fmt: skip
        runs = [model.generate(PROMPT, **settings).timings for _ in range(repeats)]
        return {name: max(run[name] for run in runs) for name in runs[0]}

    model.generate(PROMPT, seconds=seconds, steps=1, seed=0)  # first calls load and compile
    one, three, guided = timings(1, depth, 1.0), timings(3, depth, 1.0), timings(3, depth, 2.0)
    full = max((three["denoise"] - one["denoise"]) / 2, 1e-6)
    start = max(one["denoise"] - full, 0.0)
    block = 0.0
    if few < depth:
        short = max((timings(3, few, 1.0)["denoise"] - start) / 3, 0.0)
        block = max((full - short) / (depth - few), 0.0)
    factor = max((guided["denoise"] - start) / (3 * full), 1.0)
    return Row(seconds, one["text"], start, max(full - block * depth, 0.0), block, factor, one["decode"])


def predict(row: Row, plan: Plan) -> float:
    """Seconds that a plan takes for one clip of the row's length."""
    levels = evaluated_sigmas(plan.sampler, plan.levels)
    costs = [
        (row.evaluation + row.block * len(plan.layers.blocks(s))) * (row.guided if plan.guidance.active(s) else 1.0)
        for s in levels
    ]
    return row.text + row.start + sum(costs) + row.decode


def row_for(model: Pipeline, seconds: float) -> Row:
    """Costs at a length: between the two measured lengths around it, or measured now where there are none."""
    table = load_table(model)
    below = [row for row in table if row.seconds <= seconds]
    above = [row for row in table if row.seconds >= seconds]
    if not below or not above:
        log.warning("no timings for %g s clips here yet: measuring; `presto-rt tune` does it thoroughly", seconds)
        table = tune(model, [seconds], repeats=1)
        return next(row for row in table if row.seconds == seconds)
    low, high = asdict(below[-1]), asdict(above[0])
    share = (seconds - low["seconds"]) / max(high["seconds"] - low["seconds"], 1e-9)
    return Row(**{name: low[name] + share * (high[name] - low[name]) for name in low})


def candidates(model: Pipeline, steps: int | None, layers: Layers) -> list[tuple[int, Layers]]:
    """Plans as (steps, layers), the best first; what is given stays.

    The best is what the weights' own figures say. Without figures it is the most blocks run in all, over steps up to
    twice the default and the budgets that the model has learned: dropping others costs more than it saves.
    """
    known = [
        (entry["kid"], entry["steps"], entry.get("layers"))
        for entry in model.quality
        if steps in (None, entry["steps"]) and layers in (None, entry.get("layers"))
    ]
    if known:
        return [(n, budget) for _, n, budget in sorted(known, key=lambda entry: entry[0])]
    budgets = [layers] if layers is not None else list(model.schedules) or ["100%"]
    counts = [steps] if steps is not None else [n for n in STEPS if n <= 2 * model.defaults.steps]

    def blocks_run(candidate: tuple[int, Layers]) -> tuple[int, int]:
        plan = model.plan(1.0, candidate[0], layers=candidate[1])
        return sum(len(plan.layers.blocks(s)) for s in plan.levels[:-1]), candidate[0]

    return sorted(((n, budget) for n in counts for budget in budgets), key=blocks_run, reverse=True)


def plan_in_time(model: Pipeline, limit: float, clips: int, seconds: float, steps: int | None, layers: Layers,
                 request: dict[str, Any]) -> Plan:  # fmt: skip
    """The best plan for `clips` clips of `seconds` that ends within `limit` seconds.

    request: what else `Pipeline.plan` takes. Raises InvalidInputError, saying the fastest possible, when nothing fits.
    """
    each = isinstance(layers, list | tuple) or (steps is None and isinstance(layers, str) and "," in layers)
    if not isinstance(steps, int | None) or each:
        raise InvalidInputError(
            "with deadline_ms, steps is a whole number or left out, and layers has no entry per step"
        )
    plans = [model.plan(seconds, n, layers=budget, **request) for n, budget in candidates(model, steps, layers)]
    row = row_for(model, plans[0].samples / 44_100)
    costs = [MARGIN * clips * predict(row, plan) for plan in plans]
    for plan, cost in zip(plans, costs, strict=True):
        if cost <= limit:
            return plan
    cost, plan = min(zip(costs, plans, strict=True), key=lambda pair: pair[0])
    raise InvalidInputError(
        f"nothing fits {1000 * limit:g} ms here: the fastest plan, {len(plan.levels) - 1} steps, takes about "
        f"{1000 * cost:.0f} ms; allow that much, or ask for a shorter clip"
    )
