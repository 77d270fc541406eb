"""Every training behind the tables, by name, and a chain of them that goes on from its checkpoints.

    python -m presto_rt.lab.distill.recipe base presto-l presto-s presto-ls --minutes base=8 presto-s=10 --limit 9
    python -m presto_rt.lab.distill.recipe --dry-run        # the same chain in seconds: tiny model, synthetic latents

Each training has a budget in minutes and a run folder `runs`/NAME. A call works through the names in order, skips what
has used its budget, and stops after `--limit` minutes with everything on disk; the same call again goes on. The exit
status is 0 when all are done and 3 when minutes are left.
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
from ..training.pack import pack_network
from . import layers, steps
from .run import distil_both, distil_layers, distil_steps, used_minutes

UNFINISHED = 3
#: less than this many minutes before the limit, no further training is begun: loading and compiling would eat them
WORTHWHILE = 0.25
ROUNDING = 1 - 1e-9


@dataclass(frozen=True)
class Training:
    """One run: what kind, which method of it, and its budget in minutes unless the caller says another."""

    job: str
    method: str
    minutes: float


TRAININGS: dict[str, Training] = {
    "base": Training("base", "", 10.0),
    **{name: Training("layers", name, 4.0) for name in layers.METHODS if name != "generator"},
    **{name: Training("steps", name, 8.0) for name in steps.METHODS if name != "fake-layers"},
    "presto-s-long": Training("steps", "presto-s", 42.0),
    "presto-sl": Training("layers", "generator", 4.0),
    "presto-ls": Training("both", "presto-s", 8.0),
    "presto-ls-fake-layers": Training("both", "fake-layers", 8.0),
}
CHAIN = ("base", "presto-l", "presto-s", "presto-ls")


def run_folder(runs: str | Path, name: str, seed: int = 0) -> Path:
    """The folder of a training: runs/NAME, or runs/NAME-seedN."""
    return Path(runs) / (f"{name}-seed{seed}" if seed else name)


def train(name: str, data: str | Path, runs: str | Path, *, teacher: str | Path | None = None,
          minutes: float | None = None, limit: float | None = None, device: str = "auto", seed: int = 0,
          model: str = "nano", budget: str = "70%", **changes: Any) -> bool:  # fmt: skip
    """Begin or go on with one training; True when its budget is used up.

    teacher: the base model's run or weights, `runs`/base unless it is given. Presto-LS starts from `runs`/presto-l
    where that is there, and else drops layers itself; Presto-SL from `runs`/presto-s, and else from `teacher`, which
    then is a few-step model. Raises InvalidInputError, listing the names, for an unknown one.
    """
    if name not in TRAININGS:
        raise InvalidInputError(f"unknown training {name!r}; there are {', '.join(TRAININGS)}")
    what, run = TRAININGS[name], run_folder(runs, name, seed)
    total = what.minutes if minutes is None else minutes
    call: dict[str, Any] = {"device": device, "resume": True, "limit": limit, "seed": seed, **changes}
    source = teacher if teacher is not None else run_folder(runs, "base")
    if name == "presto-sl" and used_minutes(few_step := run_folder(runs, "presto-s", seed)):
        source = few_step
    student = run_folder(runs, "presto-l", seed)
    alone = what.job == "both" and used_minutes(student) == 0
    goal = total * (1 - layers_share(alone))
    if used_minutes(run) >= goal * ROUNDING:
        return True
    if what.job == "base":
        train_base(data, run, total, model=model, **call)
    elif what.job == "layers":
        distil_layers(data, run, total, source, method=what.method, **call)
    elif what.job == "steps":
        distil_steps(data, run, total, source, method=what.method, **call)
    else:
        begin = None if alone else student
        distil_both(data, run, total, source, method=what.method, budget=budget, student=begin, **call)
    return used_minutes(run) >= goal * ROUNDING


def layers_share(alone: bool) -> float:
    """The part of a Presto-LS budget that goes into its own layer distillation."""
    from .run import LAYER_SHARE

    return LAYER_SHARE if alone else 0.0


def chain(names: Sequence[str], data: str | Path, runs: str | Path, minutes: dict[str, float], limit: float | None,
          **call: Any) -> bool:  # fmt: skip
    """Work through trainings in order until `limit` minutes are over; True when all have used their budgets."""
    began = time.monotonic()
    for name in names:
        left = None if limit is None else limit - (time.monotonic() - began) / 60
        if left is not None and left < WORTHWHILE:
            return False
        print(
            f"{name}: {used_minutes(run_folder(runs, name, call.get('seed', 0))):.1f} minutes done before", flush=True
        )
        if not train(name, data, runs, minutes=minutes.get(name), limit=left, **call):
            return False
    return True


def dry_run(names: Sequence[str]) -> bool:
    """The chain with the tiny preset on synthetic latents, a second or two for each training."""
    from ..training.synthetic import write_latents

    with tempfile.TemporaryDirectory() as folder:
        data = write_latents(Path(folder) / "data")
        small: dict[str, Any] = {"tokens": 96, "frames": ((24, 1.0),)}
        call: dict[str, Any] = {"device": "cpu", "model": "tiny", **small}
        done = chain(names, data, Path(folder) / "runs", dict.fromkeys(names, 0.02), None, **call)
        pack_network(Path(folder) / "out", run_folder(Path(folder) / "runs", names[-1]))
        return done


def main(arguments: list[str] | None = None) -> int:
    """Command line of the chain."""
    parser = argparse.ArgumentParser(prog="python -m presto_rt.lab.distill.recipe", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("names", nargs="*", default=list(CHAIN), help=f"of {', '.join(TRAININGS)}")
    parser.add_argument("--data", default="data")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--teacher", help="base model: weights or run folder (default: RUNS/base)")
    parser.add_argument("--model", default="nano", help="preset of the base model")
    parser.add_argument("--minutes", nargs="*", default=[], metavar="NAME=MINUTES", help="budgets other than the usual")
    parser.add_argument("--limit", type=float, help="minutes after which this call stops")
    parser.add_argument("--budget", default="70%", help="layers of Presto-LS")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", metavar="FOLDER", help="write the last model's bf16 weights there, without codec")
    parser.add_argument("--dry-run", action="store_true", help="tiny model, synthetic latents, seconds")
    a = parser.parse_args(arguments)
    try:
        if a.dry_run:
            return 0 if dry_run(a.names) else UNFINISHED
        budgets = {name: float(value) for name, _, value in (each.partition("=") for each in a.minutes)}
        done = chain(a.names, a.data, a.runs, budgets, a.limit, teacher=a.teacher, model=a.model, device=a.device,
                     seed=a.seed, budget=a.budget)  # fmt: skip
        if a.export:
            for name in reversed(a.names):
                if (run_folder(a.runs, name, a.seed) / "checkpoint.safetensors").is_file():
                    pack_network(a.export, run_folder(a.runs, name, a.seed))
                    break
    except (PrestoError, ValueError) as error:
        print(f"recipe: error: {error}", file=sys.stderr)
        return 1
    print("all done" if done else "minutes are left: the same call goes on")
    return 0 if done else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
