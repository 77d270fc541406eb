"""What both distillations share: a trainer that starts from a teacher."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ...diffusion.schedule import LayerSchedule
from ...errors import InvalidInputError
from ...models.config import ModelConfig
from ..training.common import checkpoint_meta
from ..training.conditions import LatentSet
from ..training.loop import Trainer

#: settings that may change when a run goes on
FREE = ("minutes", "checkpoint_minutes")


class Distiller(Trainer):
    """A trainer whose networks start from a teacher's.

    `options` is one of the settings dataclasses; `method` only names them in the checkpoint. A subclass fills what
    `Trainer` asks for, and says in `sampling` and `schedules` how its model is meant to be run.
    """

    def __init__(self, data_root: str | Path, run_dir: str | Path, config: ModelConfig, options: Any,
                 device: str) -> None:  # fmt: skip
        super().__init__(run_dir, options.minutes, options.seed, device, options.checkpoint_minutes)
        self.config, self.options = config, options
        self.train_set = LatentSet(data_root, "train", self.device)
        self.val_set = LatentSet(data_root, "val", self.device)

    def sampling(self) -> dict[str, Any]:
        """Defaults for `presto_rt.pipeline.Defaults`; empty: the teacher's."""
        return {}

    def schedules(self) -> dict[str, LayerSchedule]:
        """Layer schedules that the model has learned, by the name of their budget."""
        return {}

    def describe(self) -> dict[str, Any]:
        schedules = {name: schedule.to_json() for name, schedule in self.schedules().items()}
        return {"options": asdict(self.options), "defaults": self.sampling(), "layers": schedules}

    def resume(self) -> None:
        """Go on from the run folder's checkpoint; raises InvalidInputError where it was made with other settings."""
        saved = checkpoint_meta(self.checkpoint)["options"]
        now = asdict(self.options)
        names = [f.name for f in fields(self.options) if f.name not in FREE]
        other = [n for n in names if saved.get(n) != _as_json(now[n])]
        if other:
            raise InvalidInputError(
                f"{self.checkpoint} was trained with other {', '.join(other)}; choose another --run"
            )
        super().resume()


def _as_json(value: Any) -> Any:
    return [_as_json(v) for v in value] if isinstance(value, list | tuple) else value
