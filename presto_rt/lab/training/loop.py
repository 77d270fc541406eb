"""The loop that every diffusion trainer shares: budget, checkpoints, logs, progress, clean stop, resume."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import BackendUnavailableError, InvalidInputError
from ...models.config import ModelConfig
from ...models.dit import DiT
from ...runtime.cpu.autodtype import fastest_float
from .common import Ema, Stopper, TrainLog, load_checkpoint, pack_optimizer, save_checkpoint, schedule, unpack_optimizer
from .conditions import FRAME_SECONDS


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a CUDA GPU where there is one, else the CPU.

    Raises InvalidInputError for a name that is none, BackendUnavailableError for a GPU where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise InvalidInputError(f"unknown device {name!r}; there are auto, cpu and cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise BackendUnavailableError("no CUDA GPU can be used here; choose the device auto or cpu")
    return torch.device(name)


def large_batches(device: str) -> bool:
    """Whether a run on that device should have a GPU's batch size by default."""
    return pick_device(device).type == "cuda"


def compile_blocks(*models: nn.Module, always: bool = False) -> None:
    """Compile each transformer block in place where the models lie on a CUDA GPU, or everywhere if `always`.

    Blocks share their code, so any choice of blocks, batch and crop length costs a handful of compilations together;
    a whole network would be compiled again for each. State dicts keep their names.
    """
    for model in models:
        if always or next(model.parameters()).device.type == "cuda":
            import torch._dynamo.config as dynamo

            # a handful for each of: with and without gradients, trained and frozen weights, static and dynamic sizes
            dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
            for block in model.get_submodule("blocks").children():
                block.compile()


def autocast(device: torch.device) -> torch.autocast:
    """Products in bf16 where they are the faster ones: on a GPU, and on those CPUs that `engine.rates` finds."""
    fast = device.type == "cuda" or fastest_float() is torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def adamw(module: nn.Module, learning_rate: float, betas: tuple[float, float], decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone."""
    matrices = [p for p in module.parameters() if p.dim() > 1]
    vectors = [p for p in module.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


class Trainer(ABC):
    """A run: modules and optimizers by name, one EMA, random state, and what it has used of its budget.

    A subclass fills `modules` and `optimizers`, sets `ema` (which follows the module called "model"), and defines
    `train_step` and `validate`. A killed run loses at most `checkpoint_minutes`.
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    ema: Ema
    config: ModelConfig

    def __init__(self, run_dir: str | Path, minutes: float, seed: int, device: str, checkpoint_minutes: float) -> None:
        self.device = pick_device(device)
        self.run_dir, self.minutes, self.checkpoint_minutes = Path(run_dir), minutes, checkpoint_minutes
        self.rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.step, self.used_seconds, self.frames_seen = 0, 0.0, 0

    @abstractmethod
    def train_step(self, progress: float) -> dict[str, float]:
        """One update at `progress` in [0, 1] of the budget; returns what to log, with "loss" in it."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Held-out figures of the averaged weights."""

    def describe(self) -> dict[str, Any]:
        """What else the checkpoint says of the run (JSON)."""
        return {}

    def averaged(self) -> DiT:
        """A network with the averaged weights, to look at."""
        model = DiT(self.config).to(self.device)
        self.ema.copy_to(model)
        return model.eval()

    @property
    def checkpoint(self) -> Path:
        return self.run_dir / "checkpoint.safetensors"

    def save(self, used_seconds: float) -> None:
        tensors: dict[str, Tensor] = {"generator": self.generator.get_state()}
        optimizers = {}
        for name, optimizer in self.optimizers.items():
            packed, optimizers[name] = pack_optimizer(optimizer, f"optimizer.{name}")
            tensors |= packed
        for name, module in self.modules.items():
            tensors |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        meta = {"step": self.step, "used_seconds": used_seconds, "frames_seen": self.frames_seen,
                "optimizers": optimizers, "ema_updates": self.ema.updates, "rng": self.rng.bit_generator.state,
                "config": self.config.to_dict(), **self.describe()}  # fmt: skip
        save_checkpoint(self.checkpoint, tensors, meta)

    def resume(self) -> None:
        """Go on from the run folder's checkpoint."""
        tensors, meta = load_checkpoint(self.checkpoint)
        if ModelConfig.from_dict(meta["config"]) != self.config:
            raise InvalidInputError(f"{self.checkpoint} holds another model configuration; choose another run folder")
        for name, module in self.modules.items():
            module.load_state_dict(part(tensors, name))
        self.ema.load_state_dict(part(tensors, "ema"), meta["ema_updates"])
        for name, optimizer in self.optimizers.items():
            unpack_optimizer(optimizer, tensors, meta["optimizers"][name], f"optimizer.{name}")
        self.generator.set_state(tensors["generator"])
        self.rng.bit_generator.state = meta["rng"]
        self.step, self.used_seconds, self.frames_seen = meta["step"], meta["used_seconds"], meta["frames_seen"]

    def start(self, resume: bool) -> None:
        """Resume if asked to and there is something to resume. Raises InvalidInputError rather than overwrite a run."""
        if self.checkpoint.is_file():
            if not resume:
                raise InvalidInputError(f"{self.checkpoint} exists: say --resume to go on, or choose another --run")
            self.resume()

    def update(self, name: str, learning_rate: float, progress: float, clip: float) -> None:
        """Clipped update of one module from its gradients, at `learning_rate` as decayed at `progress`; clears them.

        Gradients that are not finite are left out: one bad batch would be the end of the weights and of their averages.
        """
        module, optimizer = self.modules[name], self.optimizers[name]
        norm = nn.utils.clip_grad_norm_(module.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(progress, final=0.01)
        if torch.isfinite(norm):
            optimizer.step()
        module.zero_grad(set_to_none=True)

    def count(self, *batches: Tensor) -> None:
        """End a step that updated the model from `batches` (B, T, C): average the weights, count step and frames."""
        self.ema.update(self.modules["model"])
        self.step += 1
        self.frames_seen += sum(x.shape[0] * x.shape[1] for x in batches)

    def uniforms(self, size: int) -> Tensor:
        """(size,) stratified uniform numbers in (0, 1), in random order."""
        offsets = torch.rand(size, generator=self.generator, device=self.device)
        order = torch.randperm(size, generator=self.generator, device=self.device)
        return ((order + offsets) / size).clamp(1e-4, 1 - 1e-4)

    def gaussian(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, device=self.device)

    def run(self, progress_bar: bool = True, limit: float | None = None) -> dict[str, float]:
        """Train until the budget ends, a signal comes or `limit` minutes are over; returns the last validation."""
        from tqdm import tqdm

        logger = TrainLog(self.run_dir, self.step)
        smooth: dict[str, float] = {}
        with Stopper(self.minutes, self.used_seconds, limit) as stop, tqdm(
            total=round(self.minutes * 60), initial=round(self.used_seconds), disable=not progress_bar,
            bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}", mininterval=2,
        ) as bar:  # fmt: skip
            began, frames_before, last_save = time.monotonic(), self.frames_seen, time.monotonic()
            while not stop.should_stop():
                losses = self.train_step(stop.progress())
                smooth = {k: 0.98 * smooth.get(k, v) + 0.02 * v for k, v in losses.items()}
                rate = (self.frames_seen - frames_before) * FRAME_SECONDS / (time.monotonic() - began)
                bar.n = min(round(stop.elapsed()), bar.total)
                bar.set_postfix_str(f"step {self.step}, loss {smooth['loss']:.4f}, {rate:.0f} audio-s/s")
                if time.monotonic() - last_save > self.checkpoint_minutes * 60:
                    logger.write(self.step, **smooth, audio_seconds_per_second=rate, **self.validate())
                    self.save(stop.elapsed())
                    last_save = time.monotonic()
            figures = self.validate()
            if smooth:
                logger.write(self.step, **smooth, audio_seconds_per_second=rate, **figures)
            self.save(stop.elapsed())
        logger.close()
        return figures


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin with `name.`, without it."""
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
