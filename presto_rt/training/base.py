"""Training of the base model (the teacher): EDM denoising of codec latents under text, tempo and length.

Loss (Karras et al. 2022): E_{s ~ p(s_train)} lambda(s) |D(x + s n; s, c) - x|^2, with stratified noise levels.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import ModelConfig, preset
from ..diffusion.precond import loss_weight, precondition
from ..diffusion.schedule import training_levels
from ..errors import InvalidInput
from ..models.dit import Condition, DiT, drop_text
from .common import (
    Ema,
    Stopper,
    TrainLog,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    schedule,
    unpack_optimizer,
)
from .conditions import FRAME_SECONDS, LatentSet

log = logging.getLogger("presto_rt")

VALIDATION_SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 4.0)


@dataclass(frozen=True)
class BaseTraining:
    """Hyperparameters. `frames`: crop lengths with their shares of steps; a batch holds about `tokens` frames."""

    minutes: float
    learning_rate: float = 1e-3
    tokens: int = 2_048
    frames: tuple[tuple[int, float], ...] = ((128, 0.5), (256, 0.25), (689, 0.2), (1_378, 0.05))
    text_dropout: float = 0.1
    beat_dropout: float = 0.3
    p_mean: float = -0.4
    p_std: float = 1.0
    ema_decay: float = 0.998
    clip: float = 1.0
    weight_decay: float = 0.01
    checkpoint_minutes: float = 3.0
    seed: int = 0


def denoising_loss(model: nn.Module, raw: DiT, x: Tensor, condition: Condition, u: Tensor, noise: Tensor,
                   t: BaseTraining) -> Tensor:  # fmt: skip
    """Mean weighted denoising error of a batch. u: (B,) stratified uniforms; noise like x."""
    config = raw.config
    sigma = training_levels(u, t.p_mean, t.p_std)
    noisy = x + sigma[:, None, None] * noise
    x0 = precondition(model, noisy, sigma, condition, kind=config.network, sigma_data=config.sigma_data)
    return (loss_weight(sigma, config.sigma_data)[:, None, None] * (x0 - x) ** 2).mean()


@torch.inference_mode()
def validation(model: DiT, held_out: LatentSet, clips: int = 16, frames: int = 128) -> dict[str, float]:
    """E|D - x|^2 / sigma_data^2 at fixed noise levels on the same held-out crops every time, conditions given."""
    config, rng = model.config, np.random.default_rng(1)
    x, condition = held_out.batch(rng, clips, frames, beat_dropout=0.0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
    out = {}
    for s in VALIDATION_SIGMAS:
        sigma = torch.full((clips,), s, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16):
            x0 = precondition(model, x + s * noise, sigma, condition, kind=config.network, sigma_data=config.sigma_data)
        out[f"val_{s:g}"] = float(((x0 - x) ** 2).mean()) / config.sigma_data**2
    return out


class BaseTrainer:
    """Owns model, EMA, optimizer and random state of a run; `run()` trains until the budget ends or a signal comes."""

    def __init__(self, data_root: str | Path, run_dir: str | Path, config: ModelConfig, options: BaseTraining,
                 device: str = "auto") -> None:  # fmt: skip
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.run_dir, self.options = Path(run_dir), options
        self.rng = np.random.default_rng(options.seed)
        torch.manual_seed(options.seed)
        self.generator = torch.Generator(self.device).manual_seed(options.seed)
        self.model = DiT(config).to(self.device)
        self.train_set = LatentSet(data_root, "train", self.device)
        self.val_set = LatentSet(data_root, "val", self.device)
        self.ema = Ema(self.model, options.ema_decay)
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), fused=True)
        self.step, self.used_seconds, self.frames_seen = 0, 0.0, 0
        self.network: Any = torch.compile(self.model, dynamic=False) if self.device.type == "cuda" else self.model

    @property
    def checkpoint(self) -> Path:
        return self.run_dir / "checkpoint.safetensors"

    def save(self, used_seconds: float) -> None:
        tensors, optimizer = pack_optimizer(self.optimizer)
        tensors |= {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        tensors["generator"] = self.generator.get_state()
        meta = {"step": self.step, "used_seconds": used_seconds, "frames_seen": self.frames_seen, "optimizer": optimizer,
                "ema_updates": self.ema.updates, "rng": self.rng.bit_generator.state,
                "config": self.model.config.to_dict(), "options": asdict(self.options)}  # fmt: skip
        save_checkpoint(self.checkpoint, tensors, meta)

    def resume(self) -> None:
        tensors, meta = load_checkpoint(self.checkpoint)
        if ModelConfig.from_dict(meta["config"]) != self.model.config:
            raise InvalidInput(f"{self.checkpoint} holds another model configuration; choose another run folder")
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.ema.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")}, meta["ema_updates"])
        unpack_optimizer(self.optimizer, tensors, meta["optimizer"])
        self.generator.set_state(tensors["generator"])
        self.rng.bit_generator.state = meta["rng"]
        self.step, self.used_seconds, self.frames_seen = meta["step"], meta["used_seconds"], meta["frames_seen"]

    def start_from(self, checkpoint: Path) -> None:
        """Take the weights (not the optimizer) of an earlier run's checkpoint as the start of this one."""
        tensors, meta = load_checkpoint(checkpoint)
        if ModelConfig.from_dict(meta["config"]) != self.model.config:
            raise InvalidInput(f"{checkpoint} holds another model configuration")
        state = {k[4:]: v for k, v in tensors.items() if k.startswith("ema.")}
        self.model.load_state_dict(state)
        self.ema.load_state_dict(state, 0)

    def train_step(self, progress: float) -> float:
        o = self.options
        lengths, shares = zip(*o.frames, strict=True)
        frames = int(self.rng.choice(lengths, p=np.array(shares) / sum(shares)))
        size = max(1, o.tokens // frames)
        x, condition = self.train_set.batch(self.rng, size, frames, o.beat_dropout)
        g, device = self.generator, self.device
        condition = drop_text(self.model, condition, torch.rand(size, generator=g, device=device) < o.text_dropout)
        offsets = torch.rand(size, generator=g, device=device)
        u = ((torch.randperm(size, generator=g, device=device) + offsets) / size).clamp(1e-4, 1 - 1e-4)
        noise = torch.randn(x.shape, generator=g, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = denoising_loss(self.network, self.model, x, condition, u, noise, o)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), o.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = o.learning_rate * schedule(progress, final=0.01)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)
        self.step += 1
        self.frames_seen += size * frames
        return float(loss.detach())

    def averaged(self) -> DiT:
        model = DiT(self.model.config).to(self.device)
        self.ema.copy_to(model)
        return model.eval()

    def run(self, progress_bar: bool = True) -> dict[str, float]:
        """Train; returns the last validation figures. A killed run loses at most `checkpoint_minutes`."""
        from tqdm import tqdm

        logger, last_save, smooth, figures = TrainLog(self.run_dir, self.step), time.monotonic(), None, {}
        self.model.train()
        with Stopper(self.options.minutes, self.used_seconds) as stop, tqdm(
            total=round(self.options.minutes * 60), initial=round(self.used_seconds), disable=not progress_bar,
            unit="s", bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}", mininterval=2,
        ) as bar:  # fmt: skip
            began, frames_before = time.monotonic(), self.frames_seen
            while not stop.should_stop():
                loss = self.train_step(stop.progress())
                smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
                rate = (self.frames_seen - frames_before) * FRAME_SECONDS / (time.monotonic() - began)
                bar.n = min(round(stop.elapsed()), bar.total)
                bar.set_postfix_str(f"step {self.step}, loss {smooth:.4f}, {rate:.0f} audio-s/s")
                if time.monotonic() - last_save > self.options.checkpoint_minutes * 60:
                    figures = validation(self.averaged(), self.val_set)
                    lr = self.optimizer.param_groups[0]["lr"]
                    logger.write(self.step, loss=smooth, lr=lr, audio_seconds_per_second=rate, **figures)
                    self.save(stop.elapsed())
                    last_save = time.monotonic()
            figures = validation(self.averaged(), self.val_set)
            logger.write(self.step, loss=smooth or float("nan"), lr=self.optimizer.param_groups[0]["lr"],
                         audio_seconds_per_second=rate if self.step else 0.0, **figures)  # fmt: skip
            self.save(stop.elapsed())
        logger.close()
        return figures


def train_base(data_root: str | Path, run_dir: str | Path, minutes: float, *, device: str = "auto",
               resume: bool = False, model: str = "nano", start_from: str | Path | None = None,
               **options: Any) -> dict[str, float]:  # fmt: skip
    """Train the base model for `minutes` (a resumed run counts the minutes it has used). See BaseTraining for options.

    With a CUDA GPU: compiled, data on the device, and batches of 65,536 frames unless `tokens` says otherwise.
    """
    cuda = device != "cpu" and torch.cuda.is_available()
    options.setdefault("tokens", 65_536 if cuda else BaseTraining.tokens)
    trainer = BaseTrainer(data_root, run_dir, preset(model), BaseTraining(minutes=minutes, **options), device)
    if resume and trainer.checkpoint.is_file():
        trainer.resume()
    elif trainer.checkpoint.is_file():
        raise InvalidInput(f"{trainer.checkpoint} exists: say --resume to continue it, or choose another --run")
    elif start_from is not None:
        trainer.start_from(Path(start_from))
    return trainer.run()
