"""Step distillation: Presto-S (distribution matching and a GAN on continuous noise levels) and its baselines.

Three networks start from the teacher: the frozen guided teacher mu_real, the generator G, and the fake score mu_fake,
which learns G's own distribution and whose activations feed the discriminator. One generator update:

    x_hat = G(x + s_g n; s_g)                                  s_g ~ p_gen
    L_G   = follow(x_hat, w [mu_fake - mu_real]) + gan_weight (D(x_hat + s e) - 1)^2        s ~ p_dmd, p_gan

and `fake_updates` of mu_fake and D between two of them:

    L_F   = lambda(s) |mu_fake(x_hat + s e; s) - x_hat|^2 + (D(x + s e) - 1)^2 + D(x_hat + s e)^2      s ~ p_dsm, p_gan

mu_fake and D are told s_g (`fake_score.py` says why). Baselines are settings of the same code (`METHODS`):
DMD2-style (a discrete ladder, inference levels everywhere, nothing told), no GAN, and consistency distillation along
the teacher's ODE.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...diffusion.precond import coefficients, loss_weight, precondition
from ...diffusion.schedule import LayerSchedule
from ...errors import InvalidInputError
from ...models.dit import Condition, DiT
from ..training.base import draw_batch, held_out_error
from ..training.common import Ema
from ..training.loop import adamw, autocast, compile_blocks
from .discriminator import Head
from .fake_score import FakeScore
from .levels import check_levels, draw_levels
from .losses import (
    consistency_loss,
    corrupt,
    denoising_score_matching,
    discriminator_loss,
    distribution_matching_gradient,
    follow,
    generator_loss,
    matching_weight,
)
from .trainer import Distiller


@dataclass(frozen=True)
class StepDistillation:
    """Settings; the defaults are Presto-S. tap: block after which the discriminator listens (None: the middle).

    fake_told: whether mu_fake and the discriminator are told s_g. normalize: w of the matching gradient, by noise
    "level" or by "sample" (see `losses.distribution_matching_gradient`). fake_layers: mu_fake drops the generator's
    layers too (Presto-LS). sampling_steps: the packed model's default.
    """

    minutes: float
    p_gen: str = "inference"
    p_dmd: str = "train"
    p_dsm: str = "train"
    p_gan: str = "train"
    dmd_weight: float = 1.0
    gan_weight: float = 0.1
    consistency: bool = False
    guidance: float = 2.0
    guidance_interval: tuple[float, float] = (0.0, 3.0)
    fake_updates: int = 5
    fake_told: bool = True
    fake_layers: bool = False
    normalize: str = "level"
    tap: int | None = None
    sampling_steps: int = 4
    generator_rate: float = 5e-5
    fake_rate: float = 1e-4
    tokens: int = 1_024
    frames: tuple[tuple[int, float], ...] = ((128, 0.7), (256, 0.2), (689, 0.1))
    control_dropout: float = 0.3
    ema_decay: float = 0.99
    clip: float = 1.0
    checkpoint_minutes: float = 3.0
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (self.p_gen, self.p_dmd, self.p_dsm, self.p_gan):
            check_levels(name)
        if self.fake_updates < 1:
            raise InvalidInputError(f"fake_updates must be at least 1, not {self.fake_updates}")
        if self.normalize not in ("level", "sample"):
            raise InvalidInputError(f'normalize must be "level" or "sample", not {self.normalize!r}')


#: latent frames in a batch on a CUDA GPU
GPU_TOKENS = 16_384


#: the methods and ablations that are compared, as changes of the default
METHODS: dict[str, dict[str, Any]] = {
    "presto-s": {},
    "dmd2": {"p_gen": "ladder:4", "p_dmd": "inference", "p_dsm": "inference", "p_gan": "inference",
             "fake_told": False, "normalize": "sample"},
    "no-gan": {"gan_weight": 0.0},
    "consistency": {"consistency": True, "dmd_weight": 0.0, "gan_weight": 0.0},
    "gen-train": {"p_gen": "train"},
    "dmd-inference": {"p_dmd": "inference"},
    "dsm-inference": {"p_dsm": "inference"},
    "gan-inference": {"p_gan": "inference"},
    "fake-untold": {"fake_told": False},
    "sample-weight": {"normalize": "sample"},
    "fake-layers": {"fake_layers": True},
}  # fmt: skip


def settings(method: str, minutes: float, **changes: Any) -> StepDistillation:
    """The settings of a method by name. Raises InvalidInputError, listing what there is, for unknown methods and changes."""
    if method not in METHODS:
        raise InvalidInputError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    known = [f.name for f in fields(StepDistillation)]
    if unknown := sorted(set(changes) - set(known)):
        raise InvalidInputError(f"unknown settings {', '.join(unknown)}; there are {', '.join(known)}")
    return replace(StepDistillation(minutes), **{**METHODS[method], **changes})


class Networks(Protocol):
    """What the losses need of the networks: denoisers D(x, sigma, condition) and the discriminator's logits.

    `origin`: the level s_g (B,) at which the generator made what is looked at.
    """

    def generate(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor: ...
    def real(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor: ...
    def fake(self, x: Tensor, sigma: Tensor, condition: Any, origin: Tensor) -> Tensor: ...
    def logits(self, x: Tensor, sigma: Tensor, condition: Any, origin: Tensor) -> Tensor: ...


class StepLosses:
    """The algorithm: the two losses of the two sides, for any networks (the tests run it on toys).

    levels(name, count) draws noise levels (count,); gaussian(like) draws noise; ladder: (sigma_min, sigma_max, rho).
    """

    def __init__(self, networks: Networks, options: StepDistillation, levels: Callable[[str, int], Tensor],
                 gaussian: Callable[[Tensor], Tensor], sigma_data: float,
                 ladder: tuple[float, float, float]) -> None:  # fmt: skip
        self.networks, self.options, self.levels, self.gaussian = networks, options, levels, gaussian
        self.sigma_data, self.ladder = sigma_data, ladder

    def examples(self, x: Tensor, condition: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(x_hat, its noisy input, s_g) from real samples x."""
        sigma = self.levels(self.options.p_gen, len(x))
        noisy = corrupt(x, sigma, self.gaussian(x))
        return self.networks.generate(noisy, sigma, condition), noisy, sigma

    def fake_side(self, x: Tensor, condition: Any) -> dict[str, Tensor]:
        """Losses of mu_fake and the discriminator."""
        o, nets = self.options, self.networks
        with torch.no_grad():
            x_hat, _, origin = self.examples(x, condition)
            x_hat = x_hat.float()
        sigma = self.levels(o.p_dsm, len(x))
        losses = {
            "fake_score": denoising_score_matching(
                x_hat, sigma, self.gaussian(x), lambda y, s: nets.fake(y, s, condition, origin),
                loss_weight(sigma, self.sigma_data),
            )
        }  # fmt: skip
        if o.gan_weight:
            level = self.levels(o.p_gan, len(x))
            real = nets.logits(corrupt(x, level, self.gaussian(x)), level, condition, origin)
            generated = nets.logits(corrupt(x_hat, level, self.gaussian(x)), level, condition, origin)
            losses["discriminator"] = o.gan_weight * discriminator_loss(real, generated)
        return losses

    def generator_side(self, x: Tensor, condition: Any) -> dict[str, Tensor]:
        """Losses of the generator."""
        o, nets, losses = self.options, self.networks, {}
        x_hat, noisy, origin = self.examples(x, condition)
        if o.consistency:
            losses["consistency"] = consistency_loss(x_hat, self.consistency_target(noisy, origin, condition))
        if o.dmd_weight:
            sigma = self.levels(o.p_dmd, len(x))
            gradient = distribution_matching_gradient(
                x_hat.float(), sigma, self.gaussian(x), lambda y, s: nets.fake(y, s, condition, origin),
                lambda y, s: nets.real(y, s, condition),
                matching_weight(sigma, self.sigma_data) if o.normalize == "level" else None,
            )  # fmt: skip
            losses["matching"] = o.dmd_weight * follow(x_hat, gradient)
        if o.gan_weight:
            level = self.levels(o.p_gan, len(x))
            logits = nets.logits(corrupt(x_hat, level, self.gaussian(x)), level, condition, origin)
            losses["gan"] = o.gan_weight * generator_loss(logits)
        return losses

    @torch.no_grad()
    def consistency_target(self, noisy: Tensor, sigma: Tensor, condition: Any, steps: int = 18) -> Tensor:
        """The generator's answer one Euler step of the guided teacher's ODE further down the ladder."""
        sigma_min, sigma_max, rho = self.ladder
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        position = sigma ** (1 / rho) - (high - low) / steps
        lower = position.clamp_min(low) ** rho
        column = (-1,) + (1,) * (noisy.dim() - 1)
        x0 = self.networks.real(noisy, sigma, condition)
        moved = x0 + (lower / sigma).view(column) * (noisy - x0)
        answer = self.networks.generate(moved, lower, condition)
        return torch.where((position <= low).view(column), x0, answer)


class StepTrainer(Distiller):
    """Runs `StepLosses` on diffusion transformers.

    layers: the generator's layer schedule (Presto-LS), saved under `budget`. student: what the generator starts from,
    the teacher unless it is given (Presto-LS: the layer-distilled model).
    """

    options: StepDistillation

    def __init__(self, data_root: str | Path, run_dir: str | Path, teacher: DiT, options: StepDistillation,
                 device: str = "auto", layers: LayerSchedule | None = None, student: DiT | None = None,
                 budget: str = "100%") -> None:  # fmt: skip
        super().__init__(data_root, run_dir, teacher.config, options, device)
        c = self.config
        self.layers, self.budget = layers or LayerSchedule.full(c.blocks), budget
        if (student or teacher).config != c or self.layers.depth != c.blocks:
            raise InvalidInputError("teacher, student and layer schedule must be of one model configuration")
        self.teacher = copy.deepcopy(teacher).to(self.device).eval().requires_grad_(False)
        self.model = copy.deepcopy(student or teacher).to(self.device).requires_grad_(True)
        self.fake_model = FakeScore(teacher).to(self.device).requires_grad_(True)
        self.head = Head(c.width).to(self.device)
        self.tap = options.tap if options.tap is not None else max(1, c.blocks // 2)
        self.ema = Ema(self.model, options.ema_decay)
        self.modules = {"model": self.model, "fake": self.fake_model, "head": self.head}
        betas = (0.0, 0.99)  # no momentum: the two sides chase each other
        self.optimizers = {
            "model": adamw(self.model, options.generator_rate, betas, 0.0),
            "fake": adamw(self.fake_model, options.fake_rate, betas, 0.0),
            "head": adamw(self.head, options.fake_rate, betas, 0.0),
        }
        self.losses = StepLosses(self, options, self.levels, self.gaussian, c.sigma_data,
                                 (c.sigma_min, c.sigma_max, c.rho))  # fmt: skip
        compile_blocks(self.teacher, self.model, self.fake_model, always=options.compile)

    def sampling(self) -> dict[str, Any]:
        layers = {} if self.budget == "100%" else {"layers": self.budget}
        return {"steps": self.options.sampling_steps, "sampler": "few_step", "guidance": 1.0, **layers}

    def schedules(self) -> dict[str, LayerSchedule]:
        return {self.budget: self.layers}

    def levels(self, name: str, count: int) -> Tensor:
        return draw_levels(name, self.uniforms(count), self.config)

    def generate(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """G: each clip with the blocks that the layer schedule gives its own level."""
        return self.scheduled(self.model, x, sigma, condition)

    def real(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """mu_real: the teacher, full depth, guided at the levels where its own sampling is; both branches in one
        batch."""
        o = self.options
        low, high = o.guidance_interval
        scale = torch.where((sigma >= low) & (sigma <= high), o.guidance, 1.0)[:, None, None]
        doubled = condition.cat(self.teacher.null(condition))
        d_c, d_u = self.denoise(self.teacher, torch.cat([x, x]), torch.cat([sigma, sigma]), doubled).chunk(2)
        return d_u + scale * (d_c - d_u)

    def fake(self, x: Tensor, sigma: Tensor, condition: Condition, origin: Tensor) -> Tensor:
        """mu_fake, told s_g."""
        if self.options.fake_layers:
            return self.scheduled(self.fake_model, x, sigma, condition, self.told(origin))
        return self.denoise(self.fake_model, x, sigma, condition, None, self.told(origin))

    def logits(self, x: Tensor, sigma: Tensor, condition: Condition, origin: Tensor) -> Tensor:
        """The discriminator, listening to mu_fake's activations after `tap` blocks."""
        _, _, c_in, time = coefficients(sigma, self.config.network, self.config.sigma_data)
        scaled = c_in[:, None, None] * x
        return self.head(self.fake_model.hidden(scaled, time, condition, self.tap, self.told(origin)))

    def told(self, origin: Tensor) -> Tensor:
        """What mu_fake hears of s_g: ln(s_g) / 4, or always the same."""
        return origin.log() / 4 if self.options.fake_told else torch.zeros_like(origin)

    def denoise(self, model: DiT, x: Tensor, sigma: Tensor, condition: Condition,
                blocks: tuple[int, ...] | None = None, budget: float | Tensor | None = None) -> Tensor:  # fmt: skip
        return precondition(model, x, sigma, condition, blocks, budget,
                            kind=self.config.network, sigma_data=self.config.sigma_data)  # fmt: skip

    def scheduled(self, model: DiT, x: Tensor, sigma: Tensor, condition: Condition,
                  told: Tensor | None = None) -> Tensor:  # fmt: skip
        """D of a batch in which each clip runs the blocks of its own level; told: (B,), None for the schedule's."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, s in enumerate(sigma.tolist()):
            rows.setdefault(self.layers.blocks(s), []).append(i)
        out = torch.empty_like(x)
        for blocks, clips in rows.items():
            index = torch.tensor(clips, device=x.device)
            budget = self.layers.budget(float(sigma[clips[0]])) if told is None else told[index]
            part = self.denoise(model, x[index], sigma[index], condition.take(index), blocks, budget)
            out = out.index_copy(0, index, part)
        return out

    def train_step(self, progress: float) -> dict[str, float]:
        """`fake_updates` of the fake score and the discriminator, then one of the generator."""
        o, batches = self.options, []
        logged: dict[str, float] = {}
        for _ in range(0 if o.consistency else o.fake_updates):
            losses, x = self.backward(self.losses.fake_side)
            self.update("fake", o.fake_rate, progress, o.clip)
            if o.gan_weight:
                self.update("head", o.fake_rate, progress, o.clip)
            logged |= losses
            batches.append(x)
        losses, x = self.backward(self.losses.generator_side)
        self.update("model", o.generator_rate, progress, o.clip)
        for other in ("fake", "head"):  # they judged, and collected gradients that are not theirs
            self.modules[other].zero_grad(set_to_none=True)
        self.count(*batches, x)
        return {"loss": sum(losses.values())} | losses | logged

    def backward(self, side: Callable[[Tensor, Condition], dict[str, Tensor]]) -> tuple[dict[str, float], Tensor]:
        """Gradients of one side's losses on a fresh batch; returns the losses and the batch."""
        o = self.options
        x, condition = draw_batch(self.train_set, self.rng, o.tokens, o.frames, o.control_dropout)
        with autocast(self.device):
            losses = side(x, condition)
        torch.stack([v.float() for v in losses.values()]).sum().backward()
        return {k: float(v.detach()) for k, v in losses.items()}, x

    def validate(self) -> dict[str, float]:
        """Held-out error: no figure of quality (a generator samples, it does not average), but it shows divergence."""
        return held_out_error(self.averaged(), self.val_set, layers=self.layers)
