"""Training loop of the diffusion trainers: time budget, checkpoints, log, progress bar, clean stop, resume."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import InvalidInputError
from ...models.config import ModelConfig
from ...models.dit import DiT
from .averaging import Ema
from .checkpoint import (
    load_checkpoint,
    pack_optimizer,
    run_checkpoint,
    save_checkpoint,
    unpack_optimizer,
    with_prefix,
    without_prefix,
)
from .conditions import FRAME_SECONDS
from .device import pick_device
from .time_budget import TimeBudget, learning_rate_factor
from .train_log import TrainLog

SMOOTHING = 0.02  # weight of the latest step in the logged losses' moving averages


@dataclass(frozen=True)
class RunOptions:
    """Options that every trainer has.

    Args:
        minutes: time budget.
        control_dropout: share of crops trained without tempo, and independently without key.
        clip: largest norm of a module's gradient.
        checkpoint_minutes: time between checkpoints.
        compile: compile the blocks on a CPU too, which needs a C++ compiler and 1 to 2 minutes at the start.
        seed: seed of initialization, crops and noise.
    """

    minutes: float
    control_dropout: float = 0.3
    clip: float = 1.0
    checkpoint_minutes: float = 3.0
    compile: bool = False
    seed: int = 0


def adamw(module: nn.Module, learning_rate: float, betas: tuple[float, float], decay: float) -> torch.optim.AdamW:
    """Return an AdamW optimizer with weight decay on matrices only."""
    matrices = [p for p in module.parameters() if p.dim() > 1]
    vectors = [p for p in module.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


class Trainer(ABC):
    """State and loop of a training run: modules and optimizers by name, averaged weights, random state, used budget.

    A subclass fills `modules` and `optimizers`, sets `config` and `ema` (which follows the module "model"), and defines
    `train_step` and `validate`. A killed run loses at most `checkpoint_minutes`; a resumed run equals the uninterrupted
    one to the bit.

    Args:
        run_dir: folder of the checkpoint and the log.
        options: budget, checkpoint interval and seed.
        device: "auto", "cpu" or "cuda".
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    ema: Ema
    config: ModelConfig

    def __init__(self, run_dir: str | Path, options: RunOptions, device: str) -> None:
        self.device = pick_device(device)
        self.run_dir = Path(run_dir)
        self.minutes, self.checkpoint_minutes = options.minutes, options.checkpoint_minutes
        self.rng = np.random.default_rng(options.seed)
        torch.manual_seed(options.seed)
        self.generator = torch.Generator(self.device).manual_seed(options.seed)
        self.step, self.used_seconds, self.frames_seen = 0, 0.0, 0

    @abstractmethod
    def train_step(self, progress: float) -> dict[str, float]:
        """Update the weights once, at `progress` in [0, 1] of the budget; return the scalars to log, with "loss"."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Return held-out errors of the averaged weights, by name."""

    def describe(self) -> dict[str, Any]:
        """Further JSON-serializable metadata for the checkpoint."""
        return {}

    def averaged(self) -> DiT:
        """Return a new network with the averaged weights, in evaluation mode."""
        model = DiT(self.config).to(self.device)
        self.ema.copy_to(model)
        return model.eval()

    @property
    def checkpoint(self) -> Path:
        """Path of the run's checkpoint."""
        return run_checkpoint(self.run_dir)

    def save(self, used_seconds: float) -> None:
        """Write the checkpoint of a run that has used `used_seconds` of its budget."""
        tensors: dict[str, Tensor] = {"generator": self.generator.get_state()}
        optimizers = {}
        for name, optimizer in self.optimizers.items():
            packed, optimizers[name] = pack_optimizer(optimizer, f"optimizer.{name}")
            tensors |= packed
        for name, module in self.modules.items():
            tensors |= with_prefix(name, module.state_dict())
        tensors |= with_prefix("ema", self.ema.state_dict())
        meta = {
            "step": self.step,
            "used_seconds": used_seconds,
            "frames_seen": self.frames_seen,
            "optimizers": optimizers,
            "ema_updates": self.ema.updates,
            "rng": self.rng.bit_generator.state,
            "config": self.config.to_dict(),
            **self.describe(),
        }
        save_checkpoint(self.checkpoint, tensors, meta)

    def resume(self) -> None:
        """Load the run folder's checkpoint.

        Raises:
            InvalidInputError: it is of another model configuration.
            WeightsError: it is missing or damaged.
        """
        tensors, meta = load_checkpoint(self.checkpoint)
        if ModelConfig.from_dict(meta["config"]) != self.config:
            raise InvalidInputError(f"{self.checkpoint} has another model configuration; choose another --run")
        for name, module in self.modules.items():
            module.load_state_dict(without_prefix(name, tensors))
        self.ema.load_state_dict(without_prefix("ema", tensors), meta["ema_updates"])
        for name, optimizer in self.optimizers.items():
            unpack_optimizer(optimizer, tensors, meta["optimizers"][name], f"optimizer.{name}")
        self.generator.set_state(tensors["generator"])
        self.rng.bit_generator.state = meta["rng"]
        self.step, self.used_seconds, self.frames_seen = meta["step"], meta["used_seconds"], meta["frames_seen"]

    def start(self, resume: bool) -> None:
        """Resume if `resume` is set and the run folder has a checkpoint.

        Raises:
            InvalidInputError: there is a checkpoint and `resume` is not set.
        """
        if self.checkpoint.is_file():
            if not resume:
                raise InvalidInputError(f"{self.checkpoint} exists; pass --resume to continue, or choose another --run")
            self.resume()

    def update(self, name: str, learning_rate: float, progress: float, clip: float) -> None:
        """Update one module from its gradients and clear them.

        A gradient that is not finite is discarded, as it would destroy the weights and their averages.

        Args:
            name: key in `modules` and `optimizers`.
            learning_rate: peak learning rate, decayed by `learning_rate_factor`.
            progress: used share of the budget, in [0, 1].
            clip: largest norm of the module's gradient.
        """
        module, optimizer = self.modules[name], self.optimizers[name]
        norm = nn.utils.clip_grad_norm_(module.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(progress, final=0.01)
        if torch.isfinite(norm):
            optimizer.step()
        module.zero_grad(set_to_none=True)

    def count(self, *batches: Tensor) -> None:
        """End a step that updated the model on `batches` (B, T, C): average the weights, count the step and frames."""
        self.ema.update(self.modules["model"])
        self.step += 1
        self.frames_seen += sum(x.shape[0] * x.shape[1] for x in batches)

    def uniforms(self, size: int) -> Tensor:
        """Stratified uniform numbers in (0, 1), in random order, shape (size,)."""
        offsets = torch.rand(size, generator=self.generator, device=self.device)
        order = torch.randperm(size, generator=self.generator, device=self.device)
        return ((order + offsets) / size).clamp(1e-4, 1 - 1e-4)

    def gaussian(self, like: Tensor) -> Tensor:
        """Standard normal noise of the shape of `like`, in float32."""
        return torch.randn(like.shape, generator=self.generator, device=self.device)

    def run(self, progress_bar: bool = True, limit: float | None = None) -> dict[str, float]:
        """Train until the budget is used, a signal arrives or `limit` minutes have passed.

        Returns:
            The last validation, by name.
        """
        from tqdm import tqdm

        logger = TrainLog(self.run_dir, self.step)
        budget = TimeBudget(self.minutes, self.used_seconds, limit)
        progress = tqdm(
            total=round(self.minutes * 60),
            initial=round(self.used_seconds),
            disable=not progress_bar,
            bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}",
            mininterval=2,
        )
        smooth: dict[str, float] = {}
        with budget, progress:
            start, frames_before, last_save = time.monotonic(), self.frames_seen, time.monotonic()
            while not budget.should_stop():
                losses = self.train_step(budget.progress())
                smooth = {k: (1 - SMOOTHING) * smooth.get(k, v) + SMOOTHING * v for k, v in losses.items()}
                rate = (self.frames_seen - frames_before) * FRAME_SECONDS / (time.monotonic() - start)
                progress.n = min(round(budget.elapsed()), progress.total)
                progress.set_postfix_str(f"step {self.step}, loss {smooth['loss']:.4f}, {rate:.0f} audio-s/s")
                if time.monotonic() - last_save > self.checkpoint_minutes * 60:
                    logger.write(self.step, **smooth, audio_seconds_per_second=rate, **self.validate())
                    self.save(budget.elapsed())
                    last_save = time.monotonic()
            errors = self.validate()
            if smooth:
                logger.write(self.step, **smooth, audio_seconds_per_second=rate, **errors)
            self.save(budget.elapsed())
        logger.close()
        return errors
