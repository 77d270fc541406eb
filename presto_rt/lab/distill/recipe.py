"""All trainings behind the result tables, by name, and a chain of them that continues from its checkpoints.

    python -m presto_rt.lab.distill.recipe base presto-l presto-s presto-ls --minutes base=8 presto-s=10 --limit 9
    python -m presto_rt.lab.distill.recipe --dry-run        # the same chain in seconds: tiny model, synthetic latents

Each training has a budget in minutes and a run folder `runs`/NAME. A call runs the named trainings in order, skips
those that have used their budget, and stops after `--limit` minutes with everything written; the same call continues.
The exit status is 0 if all are finished, 3 if budget is left and 1 after an error.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InvalidInputError, PrestoError
from ..training.base import train_base
from ..training.checkpoint import run_checkpoint
from ..training.pack import pack_network
from ..training.synthetic import write_latents
from . import layers, step_options
from .run import LAYER_SHARE, distill_both, distill_layers, distill_steps, used_minutes

UNFINISHED = 3
#: with fewer minutes than this before the limit no training is started, as loading and compiling would use them up
SHORTEST_MINUTES = 0.25
ROUNDING = 1 - 1e-9


@dataclass(frozen=True)
class Training:
    """One run: its job ("base", "layers", "steps" or "both"), the job's method, and its default budget in minutes."""

    job: str
    method: str
    minutes: float


TRAININGS: dict[str, Training] = {
    "base": Training("base", "", 10.0),
    **{name: Training("layers", name, 4.0) for name in layers.METHODS if name != "generator"},
    **{name: Training("steps", name, 8.0) for name in step_options.METHODS if name != "fake-layers"},
    "presto-s-long": Training("steps", "presto-s", 42.0),
    "presto-sl": Training("layers", "generator", 4.0),
    "presto-ls": Training("both", "presto-s", 8.0),
    "presto-ls-fake-layers": Training("both", "fake-layers", 8.0),
}
CHAIN = ("base", "presto-l", "presto-s", "presto-ls")


def run_folder(runs: str | Path, name: str, seed: int = 0) -> Path:
    """Path of a training's folder: runs/NAME, or runs/NAME-seedN for a seed other than 0."""
    return Path(runs) / (f"{name}-seed{seed}" if seed else name)


def train(
    name: str,
    data: str | Path,
    runs: str | Path,
    *,
    teacher: str | Path | None = None,
    minutes: float | None = None,
    limit: float | None = None,
    device: str = "auto",
    seed: int = 0,
    model: str = "nano",
    budget: str = "70%",
    **changes: Any,
) -> bool:
    """Start or continue one training.

    Presto-LS starts from the run presto-l if there is one, else it drops layers itself. Presto-SL starts from the run
    presto-s if there is one, else from `teacher`, which then must be a few-step model.

    Args:
        name: a training of TRAININGS.
        data: data set folder with encoded latents.
        runs: folder of the run folders.
        teacher: base model, as `networks.load_network` reads; None for the run base.
        minutes: budget; None for the training's default.
        limit: minutes after which this call stops; None for no limit.
        device: "auto", "cpu" or "cuda".
        seed: seed of the training.
        model: preset of the base model.
        budget: layers that Presto-LS runs.
        **changes: further options of the training.

    Returns:
        True if the budget is used up.

    Raises:
        InvalidInputError: unknown training, or a bad option or data set.
        WeightsError: missing or damaged weights.
    """
    if name not in TRAININGS:
        raise InvalidInputError(f"unknown training {name!r}; choose from: {', '.join(TRAININGS)}")
    training, run = TRAININGS[name], run_folder(runs, name, seed)
    total = training.minutes if minutes is None else minutes
    call: dict[str, Any] = {"device": device, "resume": True, "limit": limit, "seed": seed, **changes}
    source = teacher if teacher is not None else run_folder(runs, "base")
    if name == "presto-sl" and used_minutes(few_step := run_folder(runs, "presto-s", seed)):
        source = few_step
    student = run_folder(runs, "presto-l", seed)
    drops_layers = training.job == "both" and used_minutes(student) == 0
    goal = total * (1 - LAYER_SHARE if drops_layers else 1)  # the layer distillation has a run of its own
    if used_minutes(run) >= goal * ROUNDING:
        return True
    if training.job == "base":
        train_base(data, run, total, model=model, **call)
    elif training.job == "layers":
        distill_layers(data, run, total, source, method=training.method, **call)
    elif training.job == "steps":
        distill_steps(data, run, total, source, method=training.method, **call)
    else:
        start = None if drops_layers else student
        distill_both(data, run, total, source, method=training.method, budget=budget, student=start, **call)
    return used_minutes(run) >= goal * ROUNDING


def chain(
    names: Sequence[str],
    data: str | Path,
    runs: str | Path,
    minutes: dict[str, float],
    limit: float | None,
    **call: Any,
) -> bool:
    """Run trainings in order until `limit` minutes have passed.

    Args:
        names: trainings of TRAININGS.
        data: data set folder with encoded latents.
        runs: folder of the run folders.
        minutes: budgets that differ from the defaults, by name.
        limit: minutes after which this call stops; None for no limit.
        **call: further arguments of `train`.

    Returns:
        True if all have used up their budgets.
    """
    start = time.monotonic()
    for name in names:
        left = None if limit is None else limit - (time.monotonic() - start) / 60
        if left is not None and left < SHORTEST_MINUTES:
            return False
        used = used_minutes(run_folder(runs, name, call.get("seed", 0)))
        print(f"{name}: {used:.1f} minutes used before", flush=True)
        if not train(name, data, runs, minutes=minutes.get(name), limit=left, **call):
            return False
    return True


def dry_run(names: Sequence[str]) -> bool:
    """Run a chain with the tiny preset on synthetic latents, one to two seconds for each training."""
    with tempfile.TemporaryDirectory() as folder:
        data, runs = write_latents(Path(folder) / "data"), Path(folder) / "runs"
        call: dict[str, Any] = {"device": "cpu", "model": "tiny", "tokens": 96, "frames": ((24, 1.0),)}
        finished = chain(names, data, runs, dict.fromkeys(names, 0.02), None, **call)
        pack_network(Path(folder) / "out", run_folder(runs, names[-1]))
        return finished


def main(arguments: list[str] | None = None) -> int:
    """Run the chain from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m presto_rt.lab.distill.recipe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", default=list(CHAIN), help=f"trainings: {', '.join(TRAININGS)}")
    parser.add_argument("--data", default="data", help="data set folder with encoded latents")
    parser.add_argument("--runs", default="runs", help="folder of the run folders")
    parser.add_argument("--teacher", help="base model: weights or run folder (default: RUNS/base)")
    parser.add_argument("--model", default="nano", help="preset of the base model")
    parser.add_argument("--minutes", nargs="*", default=[], metavar="NAME=MINUTES", help="budgets other than the usual")
    parser.add_argument("--limit", type=float, help="minutes after which this call stops")
    parser.add_argument("--budget", default="70%", help="layers of Presto-LS")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", metavar="FOLDER", help="write the last model's bf16 weights there, without codec")
    parser.add_argument("--dry-run", action="store_true", help="tiny model, synthetic latents, seconds")
    a = parser.parse_args(arguments)
    try:
        if a.dry_run:
            return 0 if dry_run(a.names) else UNFINISHED
        budgets = {name: float(value) for name, _, value in (entry.partition("=") for entry in a.minutes)}
        finished = chain(
            a.names,
            a.data,
            a.runs,
            budgets,
            a.limit,
            teacher=a.teacher,
            model=a.model,
            device=a.device,
            seed=a.seed,
            budget=a.budget,
        )
        if a.export:
            for name in reversed(a.names):
                run = run_folder(a.runs, name, a.seed)
                if run_checkpoint(run).is_file():
                    pack_network(a.export, run)
                    break
    except (PrestoError, ValueError) as error:
        print(f"recipe: error: {error}", file=sys.stderr)
        return 1
    print("all finished" if finished else "budget is left; the same call continues")
    return 0 if finished else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
