"""Base class of the distillation trainers: networks that start from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ...diffusion.schedule import LayerSchedule
from ...errors import InvalidInputError
from ...models.config import ModelConfig
from ..training.checkpoint import checkpoint_meta, saved_name, saved_options
from ..training.conditions import LatentSet
from ..training.loop import RunOptions, Trainer

#: options that may differ between a run and its resumption
RESUMABLE_FIELDS = ("minutes", "checkpoint_minutes")

Options = TypeVar("Options", bound=RunOptions)


class DistillationTrainer(Trainer):
    """Trainer whose networks start from a teacher.

    A subclass provides the attributes and methods that `Trainer` requires, and describes the sampling of its model in
    `sampling` and `schedules`.

    Args:
        data_root: data set folder with encoded latents.
        run_dir: folder of the checkpoint and the log.
        config: model configuration of the teacher.
        options: options of the distillation.
        device: "auto", "cpu" or "cuda".
    """

    options: RunOptions

    def __init__(
        self,
        data_root: str | Path,
        run_dir: str | Path,
        config: ModelConfig,
        options: RunOptions,
        device: str,
    ) -> None:
        super().__init__(run_dir, options, device)
        self.config, self.options = config, options
        self.train_set = LatentSet(data_root, "train", self.device)
        self.val_set = LatentSet(data_root, "val", self.device)

    def sampling(self) -> dict[str, Any]:
        """Sampling defaults of the packed model, fields of `presto_rt.pipeline.Defaults`; empty for none."""
        return {}

    def schedules(self) -> dict[str, LayerSchedule]:
        """Layer schedules that the model was trained with, by the name of their budget."""
        return {}

    def describe(self) -> dict[str, Any]:
        schedules = {name: schedule.to_json() for name, schedule in self.schedules().items()}
        return {"options": saved_options(self.options), "defaults": self.sampling(), "layers": schedules}

    def resume(self) -> None:
        """Load the run folder's checkpoint.

        Raises:
            InvalidInputError: the run has other options, RESUMABLE_FIELDS apart.
        """
        saved = checkpoint_meta(self.checkpoint)["options"]
        current = saved_options(self.options)
        changed = [
            option.name
            for option in fields(self.options)
            if option.name not in RESUMABLE_FIELDS
            and saved.get(saved_name(option)) != _as_json(current[saved_name(option)])
        ]
        if changed:
            raise InvalidInputError(
                f"{self.checkpoint} was trained with other values of {', '.join(changed)}; pass the same values, or "
                "choose another --run"
            )
        super().resume()


def with_method(
    options: Options, methods: Mapping[str, Mapping[str, Any]], method: str, changes: Mapping[str, Any]
) -> Options:
    """Return options with the changes of a named method and then `changes`.

    Raises:
        InvalidInputError: unknown method or option, or a bad value.
    """
    if method not in methods:
        raise InvalidInputError(f"unknown method {method!r}; choose from: {', '.join(methods)}")
    known = [option.name for option in fields(options)]
    if unknown := sorted(set(changes) - set(known)):
        raise InvalidInputError(f"unknown options {', '.join(unknown)}; choose from: {', '.join(known)}")
    return replace(options, **{**methods[method], **changes})


def _as_json(value: Any) -> Any:
    return [_as_json(v) for v in value] if isinstance(value, list | tuple) else value
