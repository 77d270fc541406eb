"""Training of the base model (the teacher): EDM denoising of codec latents under text, tempo and length.

Loss (Karras et al. 2022): E_{s ~ p(s_train)} lambda(s) |D(x + s n; s, c) - x|^2, with stratified noise levels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...diffusion.precond import loss_weight, precondition
from ...diffusion.schedule import P_MEAN, P_STD, LayerSchedule, training_sigmas
from ...errors import InvalidInputError
from ...models.config import ModelConfig, preset
from ...models.dit import Condition, DiT, drop_text
from .common import Ema, checkpoint_meta
from .conditions import LatentSet
from .loop import Trainer, adamw, autocast, compile_blocks, large_batches
from .networks import load_network
from .slow import SlowError

VALIDATION_SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 4.0)


@dataclass(frozen=True)
class BaseTraining:
    """Hyperparameters. `frames`: crop lengths with their shares of steps; a batch holds about `tokens` frames.

    slow_weight: of the error of window means (`slow.py`), 0 for none. compile: compile blocks on a CPU too (needs a
    C++ compiler, and a minute or two at the start).
    """

    minutes: float
    learning_rate: float = 1e-3
    tokens: int = 2_048
    frames: tuple[tuple[int, float], ...] = ((128, 0.5), (256, 0.25), (689, 0.2), (1_378, 0.05))
    text_dropout: float = 0.1
    control_dropout: float = 0.3
    p_mean: float = P_MEAN
    p_std: float = P_STD
    slow_weight: float = 0.2
    ema_decay: float = 0.998
    clip: float = 1.0
    weight_decay: float = 0.01
    checkpoint_minutes: float = 3.0
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InvalidInputError(f"tokens must be at least 1, not {self.tokens}")


def denoising_loss(
    network: Any, config: ModelConfig, x: Tensor, condition: Condition, sigma: Tensor, noise: Tensor,
    slow: SlowError | None = None, slow_weight: float = 0.0,
) -> Tensor:  # fmt: skip
    """Mean of lambda(s) |D(x + s n) - x|^2 over a batch x (B, T, C) with levels sigma (B,), plus the weighted error of
    window means."""
    noisy = x + sigma[:, None, None] * noise
    x0 = precondition(network, noisy, sigma, condition, kind=config.network, sigma_data=config.sigma_data)
    loss = (loss_weight(sigma, config.sigma_data)[:, None, None] * (x0 - x) ** 2).mean()
    return loss if slow is None or not slow_weight else loss + slow_weight * slow(x0 - x, sigma)


@torch.inference_mode()
def held_out_error(
    model: DiT, held_out: LatentSet, clips: int = 16, frames: int = 128, layers: LayerSchedule | None = None
) -> dict[str, float]:
    """E|D - x|^2 / sigma_data^2 at fixed noise levels on the same held-out crops every time, conditions given."""
    config = model.config
    layers = layers or LayerSchedule.full(config.blocks)
    x, condition = held_out.batch(np.random.default_rng(1), clips, frames, control_dropout=0.0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
    out = {}
    for s in VALIDATION_SIGMAS:
        sigma = torch.full((clips,), s, device=x.device)
        with autocast(x.device):
            x0 = precondition(model, x + s * noise, sigma, condition, layers.blocks(s), layers.budget(s),
                              kind=config.network, sigma_data=config.sigma_data)  # fmt: skip
        out[f"val_{s:g}"] = float(((x0 - x) ** 2).mean()) / config.sigma_data**2
    return out


def draw_batch(data: LatentSet, rng: np.random.Generator, tokens: int, frames: tuple[tuple[int, float], ...],
               control_dropout: float) -> tuple[Tensor, Condition]:  # fmt: skip
    """A batch of about `tokens` frames of one crop length, drawn by its share.

    Lengths that no piece has are left out: a small data set may lack the longest. Raises InvalidInputError where none is
    left.
    """
    fitting = [pair for pair in frames if pair[0] <= data.frames.max()]
    lengths, shares = zip(*(fitting or [min(frames)]), strict=True)
    length = int(rng.choice(lengths, p=np.array(shares) / sum(shares)))
    return data.batch(rng, max(1, tokens // length), length, control_dropout)


class BaseTrainer(Trainer):
    """Trains a diffusion transformer from nothing on the latents of a data set; see BaseTraining for the options."""

    def __init__(self, data_root: str | Path, run_dir: str | Path, config: ModelConfig, options: BaseTraining,
                 device: str = "auto") -> None:  # fmt: skip
        super().__init__(run_dir, options.minutes, options.seed, device, options.checkpoint_minutes)
        self.config, self.options = config, options
        self.model = DiT(config).to(self.device)
        self.train_set = LatentSet(data_root, "train", self.device)
        self.val_set = LatentSet(data_root, "val", self.device)
        self.ema = Ema(self.model, options.ema_decay)
        self.modules = {"model": self.model}
        self.optimizers = {"model": adamw(self.model, options.learning_rate, (0.9, 0.98), options.weight_decay)}
        self.slow = SlowError(self.train_set.latents) if options.slow_weight else None
        compile_blocks(self.model, always=options.compile)

    def describe(self) -> dict[str, Any]:
        return {"options": asdict(self.options)}

    def resume(self) -> None:
        """Go on from the run folder's checkpoint; raises InvalidInputError where it is a distillation's."""
        other = set(checkpoint_meta(self.checkpoint).get("options", {})) - {f.name for f in fields(BaseTraining)}
        if other:
            raise InvalidInputError(f"{self.checkpoint} is of a training with {', '.join(sorted(other))}; "
                               "choose another --run")  # fmt: skip
        super().resume()

    def start_from(self, where: str | Path) -> None:
        """Begin with the weights (averaged; no optimizer) of whatever `networks.load_network` reads."""
        network = load_network(where)
        if network.config != self.config:
            raise InvalidInputError(f"{where} holds another model configuration")
        self.model.load_state_dict(network.state_dict())
        self.ema.load_state_dict(network.state_dict(), 0)

    def train_step(self, progress: float) -> dict[str, float]:
        o = self.options
        x, condition = draw_batch(self.train_set, self.rng, o.tokens, o.frames, o.control_dropout)
        dropped = torch.rand(len(x), generator=self.generator, device=self.device) < o.text_dropout
        condition = drop_text(self.model, condition, dropped)
        sigma = training_sigmas(self.uniforms(len(x)), o.p_mean, o.p_std)
        with autocast(self.device):
            loss = denoising_loss(
                self.model, self.config, x, condition, sigma, self.gaussian(x), self.slow, o.slow_weight
            )
        loss.backward()
        self.update("model", o.learning_rate, progress, o.clip)
        self.count(x)
        return {"loss": float(loss.detach())}

    def validate(self) -> dict[str, float]:
        return held_out_error(self.averaged(), self.val_set)


def train_base(data_root: str | Path, run_dir: str | Path, minutes: float, *, device: str = "auto",
               resume: bool = False, limit: float | None = None, model: str = "nano",
               start_from: str | Path | None = None, **options: Any) -> dict[str, float]:  # fmt: skip
    """Train the base model for `minutes` (a resumed run counts the minutes it has used; `limit` stops this call
    earlier). See BaseTraining for options.

    With a CUDA GPU: compiled, data on the device, and batches of 65,536 frames unless `tokens` says otherwise.
    """
    options.setdefault("tokens", 65_536 if large_batches(device) else BaseTraining.tokens)
    trainer = BaseTrainer(data_root, run_dir, preset(model), BaseTraining(minutes=minutes, **options), device)
    if start_from is not None and not trainer.checkpoint.is_file():
        trainer.start_from(start_from)
    trainer.start(resume)
    return trainer.run(limit=limit)
