"""One function for each distillation: settings by name, a teacher, a run folder, a budget in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...diffusion.schedule import LayerSchedule, parse_layers
from ...errors import InvalidInputError
from ..training.common import checkpoint_meta
from ..training.loop import Trainer, large_batches
from ..training.networks import load_network
from . import layers, steps

#: share of the minutes of `both` that go into dropping layers, when it does both
LAYER_SHARE = 0.35


def distil_layers(data: str | Path, run_dir: str | Path, minutes: float, teacher: str | Path, *,
                  method: str = "presto-l", device: str = "auto", resume: bool = False, limit: float | None = None,
                  **changes: Any) -> dict[str, float]:  # fmt: skip
    """Train a copy of `teacher` to run with fewer blocks; see `layers.LayerDistillation` for `changes`.

    teacher: whatever `networks.load_network` reads. A resumed run counts the minutes it has used; `limit` stops this
    call earlier. On a CUDA GPU a batch has `layers.GPU_TOKENS` frames. Returns the last held-out figures.
    """
    if large_batches(device):
        changes.setdefault("tokens", layers.GPU_TOKENS)
    options = layers.settings(method, minutes, **changes)
    return _run(layers.LayerTrainer(data, run_dir, load_network(teacher), options, device), resume, limit)


def distil_steps(data: str | Path, run_dir: str | Path, minutes: float, teacher: str | Path, *,
                 method: str = "presto-s", student: str | Path | None = None, budget: str = "100%",
                 device: str = "auto", resume: bool = False, limit: float | None = None,
                 **changes: Any) -> dict[str, float]:  # fmt: skip
    """Train a few-step generator; see `steps.StepDistillation` for `changes`, `distil_layers` for the rest.

    student: what the generator starts from, if not the teacher; budget: the layers that it runs with.
    """
    if large_batches(device):
        changes.setdefault("tokens", steps.GPU_TOKENS)
    options = steps.settings(method, minutes, **changes)
    network = load_network(teacher)
    begin = None if student is None else load_network(student)
    c = network.config
    schedule = parse_layers(budget, c.blocks, saved=saved_schedules(student), ladder=(c.sigma_min, c.sigma_max, c.rho))
    trainer = steps.StepTrainer(data, run_dir, network, options, device, schedule, begin, budget)
    return _run(trainer, resume, limit)


def distil_both(data: str | Path, run_dir: str | Path, minutes: float, teacher: str | Path, *,
                method: str = "presto-s", student: str | Path | None = None, budget: str = "70%",
                device: str = "auto", resume: bool = False, limit: float | None = None, seed: int = 0,
                **changes: Any) -> dict[str, float]:  # fmt: skip
    """Presto-LS: layers first, then steps from the layer-distilled model, with the teacher at full depth as real score.

    student: a layer-distilled model that is there already; else the first `LAYER_SHARE` of the minutes make one in
    `run_dir`/layers, with the batches that `changes` asks for. `limit` counts for both parts together.
    """
    spent = 0.0
    if student is None:
        student = Path(run_dir) / "layers"
        share, before = LAYER_SHARE * minutes, used_minutes(student)
        if before < share:
            batches = {name: changes[name] for name in ("tokens", "frames", "control_dropout") if name in changes}
            distil_layers(
                data, student, share, teacher, device=device, resume=resume, limit=limit, seed=seed, **batches
            )
        spent = used_minutes(student) - before
        if used_minutes(student) < share or (limit is not None and spent >= limit):
            return {}
        minutes -= share
    rest = None if limit is None else limit - spent
    return distil_steps(data, run_dir, minutes, teacher, method=method, student=student, budget=budget, device=device,
                        resume=resume, limit=rest, seed=seed, **changes)  # fmt: skip


def used_minutes(run_dir: str | Path) -> float:
    """Minutes of its budget that a run has used; 0 where there is none."""
    checkpoint = Path(run_dir) / "checkpoint.safetensors"
    return float(checkpoint_meta(checkpoint)["used_seconds"]) / 60 if checkpoint.is_file() else 0.0


def saved_schedules(student: str | Path | None) -> dict[str, LayerSchedule]:
    """The layer schedules that a layer-distilled run or weights folder has learned."""
    if student is None:
        return {}
    from ...checkpoints import load_folder

    checkpoint = Path(student) / "checkpoint.safetensors" if Path(student).is_dir() else Path(student)
    meta = checkpoint_meta(checkpoint) if checkpoint.is_file() else load_folder(student).config
    saved = meta.get("layers", {})
    if not isinstance(saved, dict):
        raise InvalidInputError(f"the layer schedules of {student} are damaged")
    return {name: LayerSchedule.from_json(schedule) for name, schedule in saved.items()}


def _run(trainer: Trainer, resume: bool, limit: float | None) -> dict[str, float]:
    trainer.start(resume)
    return trainer.run(limit=limit)
