"""Layer distillation: Presto-L, and ASE (Moon et al. 2024) as the same code without its three additions.

A schedule assigns to each noise level the blocks that run. The loss is the denoising error of the shortened network
D_b, and for Presto-L also its distance to the network with all blocks (the self-teacher; sg stops the gradient):

    lambda(s) |D_b(x + s n; s, c) - x|^2 + lambda(s) |D_b - sg(D_full)|^2

Presto-L keeps the last block and drops the ones before it (shifted drop), is conditioned on its budget, and has the
self-teacher. ASE runs a prefix of the blocks and has neither of the other two.

A few-step generator can also lose layers (method "generator": Presto-S, then layers). It samples instead of averaging,
so it has no denoising error; the target is the generator with all blocks, at the noise levels of its sampler:

    lambda(s) |G_b(x + s n; s, c) - G(x + s n; s, c)|^2

Its blocks are a prefix: the shifted drop starts nearer to full depth, but learns more slowly (docs/distillation.md).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...diffusion.precond import loss_weight, precondition
from ...diffusion.schedule import LayerSchedule, budget_schedule
from ...errors import InvalidInputError
from ...models.dit import Condition, DiT, drop_text
from ..training.averaging import Ema
from ..training.base import draw_batch, held_out_error
from ..training.device import autocast, compile_blocks
from ..training.loop import RunOptions, adamw
from .losses import weighted_error
from .sigmas import draw_sigmas
from .trainer import DistillationTrainer, with_method

GPU_TOKENS = 65_536  # latent frames in a batch on a CUDA GPU
GENERATOR_BUDGET = "70%"  # layers that a packed generator runs by default
VALIDATION_BUDGET = 0.6
CANDIDATES = 32  # sigmas drawn for each clip of a batch, of which those with equal blocks are used


@dataclass(frozen=True)
class LayerDistillation(RunOptions):
    """Options of the layer distillation, besides those of every trainer. The defaults are Presto-L.

    Args:
        budgets: shares of blocks, averaged over the sampler's sigmas, that are trained; each step draws one.
        shifted: keep the last block and drop the ones before it; else run a prefix.
        budget_input: condition the network on its budget.
        self_teacher: add the distance to the network with all blocks to the loss.
        generator: the teacher is a few-step generator and its output the only target.
        learning_rate: peak learning rate of AdamW.
        tokens: latent frames in a batch, approximately.
        frames: crop lengths in latent frames, each with the share of steps that use it.
        text_dropout: share of crops trained without text and key.
        ema_decay: decay of the averaged weights.

    Raises:
        InvalidInputError: a budget outside [0.25, 1], or `generator` together with `self_teacher`.
    """

    budgets: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 1.0)
    shifted: bool = True
    budget_input: bool = True
    self_teacher: bool = True
    generator: bool = False
    learning_rate: float = 1e-4
    tokens: int = 2_048
    frames: tuple[tuple[int, float], ...] = ((128, 0.6), (256, 0.25), (689, 0.15))
    text_dropout: float = 0.1
    ema_decay: float = 0.998

    def __post_init__(self) -> None:
        if not self.budgets or not all(0.25 <= share <= 1 for share in self.budgets):
            raise InvalidInputError(f"layer budgets must be shares from 0.25 to 1, not {self.budgets}")
        if self.generator and self.self_teacher:
            raise InvalidInputError(
                "generator and self_teacher cannot both be true; set self_teacher=false with generator=true"
            )


#: methods and ablations, as changes of the default
METHODS: dict[str, dict[str, Any]] = {
    "presto-l": {},
    "ase": {"shifted": False, "budget_input": False, "self_teacher": False},
    "no-shift": {"shifted": False},
    "no-budget": {"budget_input": False},
    "no-self-teacher": {"self_teacher": False},
    "generator": {"generator": True, "self_teacher": False, "text_dropout": 0.0, "shifted": False},
}


def settings(method: str, minutes: float, **changes: Any) -> LayerDistillation:
    """Return the options of a method in METHODS, with `changes`.

    Raises:
        InvalidInputError: unknown method or option, or a bad value.
    """
    return with_method(LayerDistillation(minutes), METHODS, method, changes)


class LayerTrainer(DistillationTrainer):
    """Trainer of a copy of the teacher that runs fewer blocks.

    Args:
        data_root: data set folder with encoded latents.
        run_dir: folder of the checkpoint and the log.
        teacher: network to start from; not modified.
        options: options of the distillation.
        device: "auto", "cpu" or "cuda".
    """

    options: LayerDistillation

    def __init__(
        self,
        data_root: str | Path,
        run_dir: str | Path,
        teacher: DiT,
        options: LayerDistillation,
        device: str = "auto",
    ) -> None:
        super().__init__(data_root, run_dir, teacher.config, options, device)
        self.model = copy.deepcopy(teacher).to(self.device).requires_grad_(True)
        if options.budget_input:
            self.model.reset_budget_embedding()  # a base model has not been trained on budgets other than 1
        self.teacher = copy.deepcopy(teacher).to(self.device).requires_grad_(False) if options.generator else self.model
        self.ema = Ema(self.model, options.ema_decay)
        self.modules = {"model": self.model}
        self.optimizers = {"model": adamw(self.model, options.learning_rate, (0.9, 0.98), 0.0)}
        self.budgets = [self.schedule(share) for share in options.budgets]
        compile_blocks(self.model, always=options.compile)

    def sampling(self) -> dict[str, Any]:
        few_step = {"steps": 4, "sampler": "few_step", "guidance": 1.0, "layers": GENERATOR_BUDGET}
        return few_step if self.options.generator else {}

    def schedules(self) -> dict[str, LayerSchedule]:
        return {f"{share:.0%}": self.schedule(share) for share in self.options.budgets}

    def schedule(self, share: float) -> LayerSchedule:
        """Return the layer schedule that runs a share of the blocks on average over the sampler's sigmas."""
        c, o = self.config, self.options
        schedule = budget_schedule(
            c.blocks, share, shifted=o.shifted, sigma_min=c.sigma_min, sigma_max=c.sigma_max, rho=c.rho
        )
        return replace(schedule, budget_input=o.budget_input)

    def denoise(
        self, x: Tensor, sigma: Tensor, condition: Condition, layers: LayerSchedule, model: DiT | None = None
    ) -> Tensor:
        """Return D(x; sigma), (B, T, C), of a batch whose sigmas all run the same blocks.

        Args:
            x: noisy latents, (B, T, C).
            sigma: noise levels, (B,).
            condition: conditions of the batch.
            layers: schedule that gives blocks and budget at sigma[0].
            model: network to run; None for the one that is trained.
        """
        first = float(sigma[0])
        return precondition(
            model or self.model,
            x,
            sigma,
            condition,
            layers.blocks(first),
            layers.budget(first),
            kind=self.config.network,
            sigma_data=self.config.sigma_data,
        )

    def train_step(self, progress: float) -> dict[str, float]:
        """Update the weights once with one budget and one of its sets of blocks.

        A set of blocks is drawn with the probability that the sigma distribution gives it.
        """
        o = self.options
        layers = self.budgets[int(self.rng.integers(len(self.budgets)))]
        x, condition = draw_batch(self.train_set, self.rng, o.tokens, o.frames, o.control_dropout)
        dropped = torch.rand(len(x), generator=self.generator, device=self.device) < o.text_dropout
        condition = drop_text(self.model, condition, dropped)
        sigma = self.sigmas_with_equal_blocks(layers, len(x))
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

    def sigmas_with_equal_blocks(self, schedule: LayerSchedule, count: int) -> Tensor:
        """Draw sigmas (count,) that all run the same blocks of `schedule`, so that a batch is one network call.

        The first of CANDIDATES * count sigmas determines the blocks; those with equal blocks are returned, repeated if
        they are fewer than `count`.
        """
        distribution = "inference" if self.options.generator else "train"
        drawn = draw_sigmas(distribution, self.uniforms(CANDIDATES * count), self.config)
        blocks = [schedule.blocks(s) for s in drawn.tolist()]
        equal = torch.tensor([i for i, b in enumerate(blocks) if b == blocks[0]], device=drawn.device)
        return drawn[equal.repeat(-(-count // len(equal)))[:count]]

    def validate(self) -> dict[str, float]:
        """Return the held-out errors with the layer schedule of a 60 % budget."""
        return held_out_error(self.averaged(), self.val_set, layers=self.schedule(VALIDATION_BUDGET))
