"""Layer distillation: Presto-L, and ASE (Moon et al. 2024) as the same code with its three ingredients off.

A schedule gives each noise level the blocks that run; the loss is the denoising error of the shortened network,

    lambda(s) |D_b(x + s n; s, c) - x|^2 + lambda(s) |D_b - sg(D_full)|^2          (self-teacher, Presto-L)

Presto-L keeps the last block and drops the ones before it (shift), tells the network its budget (budget input), and
learns from its own full depth (self-teacher).

A few-step generator can lose layers too (Presto-S, then layers). It samples, so there is no denoising error: the target
is the generator's own answer before it lost any, at the levels of its sampler,

    lambda(s) |G_b(x + s n; s, c) - G(x + s n; s, c)|^2                            (method "generator")

Its blocks are a prefix: the shifted drop begins nearer to full depth, but learns more slowly (docs/distillation.md).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...diffusion.precond import loss_weight, precondition
from ...diffusion.schedule import LayerSchedule, budget_schedule
from ...errors import InvalidInputError
from ...models.dit import Condition, DiT, drop_text
from ..training.base import draw_batch, held_out_error
from ..training.common import Ema
from ..training.loop import adamw, autocast, compile_blocks
from .levels import draw_levels
from .losses import weighted_error
from .trainer import Distiller


@dataclass(frozen=True)
class LayerDistillation:
    """Settings; the defaults are Presto-L. budgets: shares of blocks that are trained, one drawn for each step.

    generator: the teacher is a few-step generator, whose answers are the only target.
    """

    minutes: float
    budgets: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 1.0)
    shifted: bool = True
    budget_input: bool = True
    self_teacher: bool = True
    generator: bool = False
    learning_rate: float = 1e-4
    tokens: int = 2_048
    frames: tuple[tuple[int, float], ...] = ((128, 0.6), (256, 0.25), (689, 0.15))
    text_dropout: float = 0.1
    control_dropout: float = 0.3
    ema_decay: float = 0.998
    clip: float = 1.0
    checkpoint_minutes: float = 3.0
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.budgets or not all(0.25 <= share <= 1 for share in self.budgets):
            raise InvalidInputError(f"layer budgets must be shares from 0.25 to 1, not {self.budgets}")
        if self.generator and self.self_teacher:
            raise InvalidInputError(
                "a generator learns from its teacher alone: set self_teacher=false with generator=true"
            )


#: latent frames in a batch on a CUDA GPU
GPU_TOKENS = 65_536

#: the layers that a packed generator runs by default
GENERATOR_BUDGET = "70%"

#: the methods that are compared, as changes of the default
METHODS: dict[str, dict[str, Any]] = {
    "presto-l": {},
    "ase": {"shifted": False, "budget_input": False, "self_teacher": False},
    "no-shift": {"shifted": False},
    "no-budget": {"budget_input": False},
    "no-self-teacher": {"self_teacher": False},
    "generator": {"generator": True, "self_teacher": False, "text_dropout": 0.0, "shifted": False},
}


def settings(method: str, minutes: float, **changes: Any) -> LayerDistillation:
    """The settings of a method by name. Raises InvalidInputError, listing what there is, for unknown methods and changes."""
    if method not in METHODS:
        raise InvalidInputError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    known = [f.name for f in fields(LayerDistillation)]
    if unknown := sorted(set(changes) - set(known)):
        raise InvalidInputError(f"unknown settings {', '.join(unknown)}; there are {', '.join(known)}")
    return replace(LayerDistillation(minutes), **{**METHODS[method], **changes})


class LayerTrainer(Distiller):
    """Trains a copy of the teacher to run with fewer blocks; see LayerDistillation for the options."""

    options: LayerDistillation

    def __init__(self, data_root: str | Path, run_dir: str | Path, teacher: DiT, options: LayerDistillation,
                 device: str = "auto") -> None:  # fmt: skip
        super().__init__(data_root, run_dir, teacher.config, options, device)
        self.model = copy.deepcopy(teacher).to(self.device).requires_grad_(True)
        if options.budget_input:
            self.model.reset_budget_embedding()  # it learns them from there
        self.teacher = copy.deepcopy(teacher).to(self.device).requires_grad_(False) if options.generator else self.model
        self.ema = Ema(self.model, options.ema_decay)
        self.modules = {"model": self.model}
        self.optimizers = {"model": adamw(self.model, options.learning_rate, (0.9, 0.98), 0.0)}
        self.budgets = [self.schedule(share) for share in options.budgets]
        compile_blocks(self.model, always=options.compile)

    def sampling(self) -> dict[str, Any]:
        few = {"steps": 4, "sampler": "few_step", "guidance": 1.0, "layers": GENERATOR_BUDGET}
        return few if self.options.generator else {}

    def schedules(self) -> dict[str, LayerSchedule]:
        return {f"{share:.0%}": self.schedule(share) for share in self.options.budgets}

    def schedule(self, share: float) -> LayerSchedule:
        c, o = self.config, self.options
        plain = budget_schedule(c.blocks, share, shifted=o.shifted, sigma_min=c.sigma_min, sigma_max=c.sigma_max,
                                rho=c.rho)  # fmt: skip
        return replace(plain, told=o.budget_input)

    def denoise(self, x: Tensor, sigma: Tensor, condition: Condition, layers: LayerSchedule,
                model: DiT | None = None) -> Tensor:  # fmt: skip
        """D at levels (B,) that all run the same blocks of `layers`."""
        first = float(sigma[0])
        return precondition(model or self.model, x, sigma, condition, layers.blocks(first), layers.budget(first),
                            kind=self.config.network, sigma_data=self.config.sigma_data)  # fmt: skip

    def train_step(self, progress: float) -> dict[str, float]:
        """One budget; one part of its schedule, drawn as often as training's noise levels fall into it."""
        o = self.options
        layers = self.budgets[int(self.rng.integers(len(self.budgets)))]
        x, condition = draw_batch(self.train_set, self.rng, o.tokens, o.frames, o.control_dropout)
        dropped = torch.rand(len(x), generator=self.generator, device=self.device) < o.text_dropout
        condition = drop_text(self.model, condition, dropped)
        sigma = self.levels_of_one_row(layers, len(x))
        noisy = x + sigma[:, None, None] * self.gaussian(x)
        weight, full = loss_weight(sigma, self.config.sigma_data), LayerSchedule.full(self.config.blocks)
        losses = {}
        with autocast(self.device):
            short = self.denoise(noisy, sigma, condition, layers)
            if not o.generator:
                losses["denoising"] = weighted_error(short, x, weight)
            if o.generator or (o.self_teacher and layers.blocks(float(sigma[0])) != full.blocks(0.0)):
                with torch.no_grad():
                    target = self.denoise(noisy, sigma, condition, full, self.teacher)
                losses["generator" if o.generator else "self_teacher"] = weighted_error(short, target, weight)
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        self.update("model", o.learning_rate, progress, o.clip)
        self.count(x)
        return {"loss": float(loss.detach())} | {name: float(value.detach()) for name, value in losses.items()}

    def levels_of_one_row(self, schedule: LayerSchedule, count: int) -> Tensor:
        """Levels (count,) that all run the same blocks, so that a batch is one call: the first of many decides which,
        and of the others those that agree are taken (over again, where they are too few)."""
        drawn = draw_levels("inference" if self.options.generator else "train", self.uniforms(32 * count), self.config)
        blocks = [schedule.blocks(s) for s in drawn.tolist()]
        agreeing = torch.tensor([i for i, b in enumerate(blocks) if b == blocks[0]], device=drawn.device)
        return drawn[agreeing.repeat(-(-count // len(agreeing)))[:count]]

    def validate(self) -> dict[str, float]:
        """Held-out error at 60 % of the blocks, with the blocks that each level runs."""
        return held_out_error(self.averaged(), self.val_set, layers=self.schedule(0.6))
