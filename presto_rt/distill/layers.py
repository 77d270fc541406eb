"""Layer distillation: Presto-L, and ASE (Moon et al. 2024) as the same code with its three ingredients off.

A schedule gives each noise level the blocks that run; the loss is the denoising error of the shortened network,

    lambda(s) |D_b(x + s n; s, c) - x|^2 + lambda(s) |D_b - sg(D_full)|^2          (self-teacher, Presto-L)

Presto-L keeps the last block and drops the ones before it (shift), tells the network its budget (budget input), and
learns from its own full depth (self-teacher).
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..diffusion.precond import loss_weight, precondition
from ..diffusion.schedule import LayerSchedule, budget_schedule, training_levels
from ..errors import InvalidInput
from ..models.dit import Condition, DiT, drop_text
from ..training.base import draw_batch, held_out_error
from ..training.common import Ema
from ..training.conditions import LatentSet
from ..training.loop import Trainer, adamw


@dataclass(frozen=True)
class LayerDistillation:
    """Settings; the defaults are Presto-L. budgets: shares of blocks that are trained, one drawn for each step."""

    minutes: float
    budgets: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 1.0)
    shifted: bool = True
    budget_input: bool = True
    self_teacher: bool = True
    learning_rate: float = 1e-4
    tokens: int = 2_048
    frames: tuple[tuple[int, float], ...] = ((128, 0.6), (256, 0.25), (689, 0.15))
    text_dropout: float = 0.1
    control_dropout: float = 0.3
    ema_decay: float = 0.998
    clip: float = 1.0
    checkpoint_minutes: float = 3.0
    seed: int = 0


#: the methods that are compared, as changes of the default
METHODS: dict[str, dict[str, Any]] = {
    "presto-l": {},
    "ase": {"shifted": False, "budget_input": False, "self_teacher": False},
    "no-shift": {"shifted": False},
    "no-budget": {"budget_input": False},
    "no-self-teacher": {"self_teacher": False},
}


def settings(method: str, minutes: float, **changes: Any) -> LayerDistillation:
    """The settings of a method by name. Raises InvalidInput, listing the methods, for an unknown one."""
    if method not in METHODS:
        raise InvalidInput(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    return replace(LayerDistillation(minutes), **{**METHODS[method], **changes})


class LayerTrainer(Trainer):
    """Trains a copy of the teacher to run with fewer blocks; see LayerDistillation for the options."""

    def __init__(self, data_root: str | Path, run_dir: str | Path, teacher: DiT, options: LayerDistillation,
                 device: str = "auto") -> None:  # fmt: skip
        super().__init__(run_dir, options.minutes, options.seed, device, options.checkpoint_minutes)
        self.config: ModelConfig = teacher.config
        self.options = options
        self.model = copy.deepcopy(teacher).to(self.device).requires_grad_(True)
        self.train_set = LatentSet(data_root, "train", self.device)
        self.val_set = LatentSet(data_root, "val", self.device)
        self.ema = Ema(self.model, options.ema_decay)
        self.modules = {"model": self.model}
        self.optimizers = {"model": adamw(self.model, options.learning_rate, (0.9, 0.98), 0.0)}
        self.schedules = [self.schedule(share) for share in options.budgets]

    def describe(self) -> dict[str, Any]:
        return {"options": asdict(self.options)}

    def schedule(self, share: float) -> LayerSchedule:
        c = self.config
        return budget_schedule(c.blocks, share, shifted=self.options.shifted, sigma_min=c.sigma_min,
                               sigma_max=c.sigma_max, rho=c.rho)  # fmt: skip

    def denoise(self, model: DiT, x: Tensor, sigma: Tensor, condition: Condition, blocks: tuple[int, ...]) -> Tensor:
        told = None if self.options.budget_input else 1.0
        return precondition(model, x, sigma, condition, blocks, told,
                            kind=self.config.network, sigma_data=self.config.sigma_data)  # fmt: skip

    def train_step(self, progress: float) -> dict[str, float]:
        """One budget; one part of its schedule, drawn as often as training's noise levels fall into it."""
        o = self.options
        schedule = self.schedules[int(self.rng.integers(len(self.schedules)))]
        x, condition = draw_batch(self.train_set, self.rng, o.tokens, o.frames, o.control_dropout)
        dropped = torch.rand(len(x), generator=self.generator, device=self.device) < o.text_dropout
        condition = drop_text(self.model, condition, dropped)
        sigma = self.levels_of_one_row(schedule, len(x))
        blocks = schedule.blocks(float(sigma[0]))
        noisy = x + sigma[:, None, None] * self.gaussian(x)
        weight = loss_weight(sigma, self.config.sigma_data)[:, None, None]
        full = tuple(range(self.config.blocks))
        with torch.autocast(self.device.type, torch.bfloat16):
            short = self.denoise(self.model, noisy, sigma, condition, blocks)
            denoising = (weight * (short - x) ** 2).mean()
            loss = denoising
            if o.self_teacher and blocks != full:
                with torch.no_grad():
                    target = self.denoise(self.model, noisy, sigma, condition, full)
                loss = denoising + (weight * (short - target) ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), o.clip)
        self.set_rate("model", o.learning_rate, progress)
        self.optimizers["model"].step()
        self.model.zero_grad(set_to_none=True)
        self.ema.update(self.model)
        self.step += 1
        self.frames_seen += x.shape[0] * x.shape[1]
        return {"loss": float(loss.detach()), "denoising": float(denoising.detach())}

    def levels_of_one_row(self, schedule: LayerSchedule, count: int) -> Tensor:
        """Levels of p(s_train) that all run the same blocks: one decides the row, the rest are drawn within it."""
        first = training_levels(torch.rand(1, generator=self.generator, device=self.device).clamp(1e-4, 1 - 1e-4))
        bounds = [0.0] + [upper for upper, _ in schedule.rows]
        row = next(i for i, upper in enumerate(bounds[1:]) if float(first) <= upper)
        ends = torch.tensor([max(bounds[row], 1e-6), min(bounds[row + 1], 1e6)]).log()
        low, high = torch.special.ndtr((ends + 0.4) / 1.0).clamp(1e-4, 1 - 1e-4).tolist()
        return training_levels(low + (high - low) * self.uniforms(count))

    def validate(self) -> dict[str, float]:
        """Held-out error at 60 % of the blocks, with the blocks that each level runs."""
        model = copy.deepcopy(self.model)
        self.ema.copy_to(model)
        schedule = self.schedule(0.6)
        figures: dict[str, float] = {}
        for key in held_out_error(model.eval(), self.val_set):
            sigma = float(key.removeprefix("val_"))
            figures[key] = held_out_error(model, self.val_set, blocks=schedule.blocks(sigma))[key]
        return figures
