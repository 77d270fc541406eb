"""Distillation runs: one function for layers, steps and both, each with a teacher, a run folder and a time budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...checkpoints import load_folder
from ...diffusion.schedule import LayerSchedule, parse_layers
from ...errors import InvalidInputError
from ..training.checkpoint import checkpoint_meta, run_checkpoint
from ..training.device import large_batches
from ..training.loop import Trainer
from ..training.networks import load_network
from . import layers, step_options
from .steps import StepTrainer

#: share of the budget of `distill_both` that goes into layer distillation, if it does both
LAYER_SHARE = 0.35


def distill_layers(
    data: str | Path,
    run_dir: str | Path,
    minutes: float,
    teacher: str | Path,
    *,
    method: str = "presto-l",
    device: str = "auto",
    resume: bool = False,
    limit: float | None = None,
    **changes: Any,
) -> dict[str, float]:
    """Train a copy of a model to run fewer blocks.

    On a CUDA GPU a batch has `layers.GPU_TOKENS` latent frames unless `tokens` is given.

    Args:
        data: data set folder with encoded latents.
        run_dir: folder of the checkpoint and the log.
        minutes: time budget; a resumed run counts the minutes it has used.
        teacher: model to start from, as `networks.load_network` reads.
        method: a method of `layers.METHODS`.
        device: "auto", "cpu" or "cuda".
        resume: continue from the run folder's checkpoint if there is one.
        limit: minutes after which this call stops, to be resumed later; None for no limit.
        **changes: further fields of `layers.LayerDistillation`.

    Returns:
        The last held-out errors, by name.

    Raises:
        InvalidInputError: bad method, option or data set, or a run that exists while `resume` is False.
        WeightsError: missing or damaged weights.
    """
    if large_batches(device):
        changes.setdefault("tokens", layers.GPU_TOKENS)
    options = layers.settings(method, minutes, **changes)
    return _run(layers.LayerTrainer(data, run_dir, load_network(teacher), options, device), resume, limit)


def distill_steps(
    data: str | Path,
    run_dir: str | Path,
    minutes: float,
    teacher: str | Path,
    *,
    method: str = "presto-s",
    student: str | Path | None = None,
    budget: str = "100%",
    device: str = "auto",
    resume: bool = False,
    limit: float | None = None,
    **changes: Any,
) -> dict[str, float]:
    """Train a few-step generator.

    On a CUDA GPU a batch has `step_options.GPU_TOKENS` latent frames unless `tokens` is given.

    Args:
        data: data set folder with encoded latents.
        run_dir: folder of the checkpoint and the log.
        minutes: time budget; a resumed run counts the minutes it has used.
        teacher: model to distill, as `networks.load_network` reads.
        method: a method of `step_options.METHODS`.
        student: model that the generator starts from; None for the teacher.
        budget: layers that the generator runs, for instance "70%"; the student's own schedule of that name if it has
            one.
        device: "auto", "cpu" or "cuda".
        resume: continue from the run folder's checkpoint if there is one.
        limit: minutes after which this call stops, to be resumed later; None for no limit.
        **changes: further fields of `step_options.StepDistillation`.

    Returns:
        The last held-out errors, by name.

    Raises:
        InvalidInputError: bad method, option, budget or data set, or a run that exists while `resume` is False.
        WeightsError: missing or damaged weights.
    """
    if large_batches(device):
        changes.setdefault("tokens", step_options.GPU_TOKENS)
    options = step_options.settings(method, minutes, **changes)
    network = load_network(teacher)
    start = None if student is None else load_network(student)
    c = network.config
    schedule = parse_layers(budget, c.blocks, saved=saved_schedules(student), ladder=(c.sigma_min, c.sigma_max, c.rho))
    return _run(StepTrainer(data, run_dir, network, options, device, schedule, start, budget), resume, limit)


def distill_both(
    data: str | Path,
    run_dir: str | Path,
    minutes: float,
    teacher: str | Path,
    *,
    method: str = "presto-s",
    student: str | Path | None = None,
    budget: str = "70%",
    device: str = "auto",
    resume: bool = False,
    limit: float | None = None,
    seed: int = 0,
    **changes: Any,
) -> dict[str, float]:
    """Train a few-step generator with fewer layers (Presto-LS): layers first, then steps.

    The generator starts from the layer-distilled model. The real score of the step distillation is the teacher with all
    blocks.

    Args:
        data: data set folder with encoded latents.
        run_dir: folder of the checkpoint and the log.
        minutes: time budget of both parts; a resumed run counts the minutes it has used.
        teacher: model to distill, as `networks.load_network` reads.
        method: a method of `step_options.METHODS`.
        student: a layer-distilled model. None trains one in `run_dir`/layers with the first LAYER_SHARE of the budget,
            with the batches that `changes` asks for.
        budget: layers that the generator runs.
        device: "auto", "cpu" or "cuda".
        resume: continue from the run folder's checkpoints if there are any.
        limit: minutes after which this call stops, both parts together; None for no limit.
        seed: seed of both parts.
        **changes: further fields of `step_options.StepDistillation`.

    Returns:
        The last held-out errors, by name; empty if the call ended before the step distillation.

    Raises:
        InvalidInputError: bad method, option, budget or data set, or a run that exists while `resume` is False.
        WeightsError: missing or damaged weights.
    """
    used = 0.0
    if student is None:
        student = Path(run_dir) / "layers"
        share, used_before = LAYER_SHARE * minutes, used_minutes(student)
        if used_before < share:
            batches = {name: changes[name] for name in ("tokens", "frames", "control_dropout") if name in changes}
            distill_layers(
                data, student, share, teacher, device=device, resume=resume, limit=limit, seed=seed, **batches
            )
        used = used_minutes(student) - used_before
        if used_minutes(student) < share or (limit is not None and used >= limit):
            return {}
        minutes -= share
    return distill_steps(
        data,
        run_dir,
        minutes,
        teacher,
        method=method,
        student=student,
        budget=budget,
        device=device,
        resume=resume,
        limit=None if limit is None else limit - used,
        seed=seed,
        **changes,
    )


def used_minutes(run_dir: str | Path) -> float:
    """Minutes of its budget that a run has used; 0 if the folder has no checkpoint."""
    checkpoint = run_checkpoint(run_dir)
    return float(checkpoint_meta(checkpoint)["used_seconds"]) / 60 if checkpoint.is_file() else 0.0


def saved_schedules(student: str | Path | None) -> dict[str, LayerSchedule]:
    """Return the layer schedules of a run, checkpoint, weights folder or shipped model, by the name of their budget.

    Raises:
        InvalidInputError: malformed schedules.
        WeightsError: missing or damaged weights.
    """
    if student is None:
        return {}
    checkpoint = run_checkpoint(student) if Path(student).is_dir() else Path(student)
    meta = checkpoint_meta(checkpoint) if checkpoint.is_file() else load_folder(student).config
    saved = meta.get("layers", {})
    if not isinstance(saved, dict):
        raise InvalidInputError(f"the layer schedules of {student} are damaged; pack or train the model again")
    return {name: LayerSchedule.from_json(schedule) for name, schedule in saved.items()}


def _run(trainer: Trainer, resume: bool, limit: float | None) -> dict[str, float]:
    trainer.start(resume)
    return trainer.run(limit=limit)
