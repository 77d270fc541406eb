"""Step distillation: Presto-S (distribution matching and a GAN on continuous noise levels) and its baselines.

Three networks start from the teacher: the frozen guided teacher mu_real, the generator G, and the fake score mu_fake,
which learns G's own distribution and whose activations feed the discriminator. One generator update:

    x_hat = G(x + s_g n; s_g)                                  s_g ~ p_gen
    L_G   = follow(x_hat, w [mu_fake - mu_real]) + gan_weight (D(x_hat + s e) - 1)^2        s ~ p_dmd, p_gan

and `fake_updates` of mu_fake and D between two of them:

    L_F   = lambda(s) |mu_fake(x_hat + s e; s) - x_hat|^2 + (D(x + s e) - 1)^2 + D(x_hat + s e)^2      s ~ p_dsm, p_gan

Baselines are settings of the same code (`METHODS`): DMD2-style (a discrete ladder and inference levels everywhere),
no GAN, and consistency distillation along the teacher's ODE.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..diffusion.precond import coefficients, loss_weight, precondition
from ..diffusion.schedule import LayerSchedule
from ..errors import InvalidInput
from ..models.dit import Condition, DiT
from ..training.base import draw_batch, held_out_error
from ..training.common import Ema
from ..training.conditions import LatentSet
from ..training.loop import Trainer, adamw
from .discriminator import Head
from .levels import check_levels, draw_levels
from .losses import (
    consistency_loss,
    corrupt,
    denoising_score_matching,
    discriminator_loss,
    distribution_matching_gradient,
    follow,
    generator_loss,
)


@dataclass(frozen=True)
class StepDistillation:
    """Settings; the defaults are Presto-S. `tap`: block after which the discriminator listens (None: the middle)."""

    minutes: float
    p_gen: str = "inference"
    p_dmd: str = "train"
    p_dsm: str = "train"
    p_gan: str = "train"
    dmd_weight: float = 1.0
    gan_weight: float = 0.1
    consistency: bool = False
    guidance: float = 2.0
    fake_updates: int = 5
    tap: int | None = None
    generator_rate: float = 5e-5
    fake_rate: float = 1e-4
    tokens: int = 1_024
    frames: tuple[tuple[int, float], ...] = ((128, 0.7), (256, 0.2), (689, 0.1))
    beat_dropout: float = 0.3
    ema_decay: float = 0.99
    clip: float = 1.0
    checkpoint_minutes: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (self.p_gen, self.p_dmd, self.p_dsm, self.p_gan):
            check_levels(name)
        if self.fake_updates < 1:
            raise InvalidInput(f"fake_updates must be at least 1, not {self.fake_updates}")


#: the methods that are compared, as changes of the default
METHODS: dict[str, dict[str, Any]] = {
    "presto-s": {},
    "dmd2": {"p_gen": "ladder:4", "p_dmd": "inference", "p_dsm": "inference", "p_gan": "inference"},
    "no-gan": {"gan_weight": 0.0},
    "consistency": {"consistency": True, "dmd_weight": 0.0, "gan_weight": 0.0, "p_gen": "inference"},
}


def settings(method: str, minutes: float, **changes: Any) -> StepDistillation:
    """The settings of a method by name. Raises InvalidInput, listing the methods, for an unknown one."""
    if method not in METHODS:
        raise InvalidInput(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    return replace(StepDistillation(minutes), **METHODS[method], **changes)


class StepTrainer(Trainer):
    """`layers`: the generator's layer schedule (Presto-LS); None runs all blocks."""

    def __init__(self, data_root: str | Path, run_dir: str | Path, teacher: DiT, options: StepDistillation,
                 device: str = "auto", layers: LayerSchedule | None = None,
                 student: DiT | None = None) -> None:  # fmt: skip
        super().__init__(run_dir, options.minutes, options.seed, device, options.checkpoint_minutes)
        self.config: ModelConfig = teacher.config
        self.options, self.layers = options, layers or LayerSchedule.full(teacher.config.blocks)
        self.teacher = copy.deepcopy(teacher).to(self.device).eval().requires_grad_(False)
        self.generator_net = copy.deepcopy(student or teacher).to(self.device).requires_grad_(True)
        self.fake = copy.deepcopy(teacher).to(self.device).requires_grad_(True)
        self.head = Head(teacher.config.width).to(self.device)
        self.tap = options.tap if options.tap is not None else teacher.config.blocks // 2
        self.train_set = LatentSet(data_root, "train", self.device)
        self.val_set = LatentSet(data_root, "val", self.device)
        self.ema = Ema(self.generator_net, options.ema_decay)
        self.modules = {"model": self.generator_net, "fake": self.fake, "head": self.head}
        betas = (0.0, 0.99)  # no momentum: the two sides chase each other
        self.optimizers = {
            "model": adamw(self.generator_net, options.generator_rate, betas, 0.0),
            "fake": adamw(self.fake, options.fake_rate, betas, 0.0),
            "head": adamw(self.head, options.fake_rate, betas, 0.0),
        }

    def describe(self) -> dict[str, Any]:
        return {"options": asdict(self.options), "layers": self.layers.to_json()}

    def denoise(self, model: DiT, x: Tensor, sigma: Tensor, condition: Condition,
                layers: LayerSchedule | None = None) -> Tensor:  # fmt: skip
        """D(x; sigma) with the blocks that `layers` gives each clip's own level."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, s in enumerate(sigma.tolist()):
            groups.setdefault(layers.blocks(s) if layers else tuple(range(self.config.blocks)), []).append(i)
        out = torch.empty_like(x) if len(groups) > 1 else None
        for blocks, members in groups.items():
            part = x if out is None else x[members]
            given = condition if out is None else select(condition, members)
            y = precondition(model, part, sigma if out is None else sigma[members], given, blocks,
                             kind=self.config.network, sigma_data=self.config.sigma_data)  # fmt: skip
            if out is None:
                return y
            out = out.index_copy(0, torch.tensor(members, device=x.device), y)
        assert out is not None
        return out

    def real(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """mu_real: the guided teacher, both branches in one batch."""
        doubled = condition.cat(self.teacher.null(condition))
        d_c, d_u = self.denoise(self.teacher, torch.cat([x, x]), torch.cat([sigma, sigma]), doubled).chunk(2)
        return d_u + self.options.guidance * (d_c - d_u)

    def logits(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        _, _, c_in, time = coefficients(sigma, self.config.network, self.config.sigma_data)
        return self.head(self.fake.hidden(c_in[:, None, None] * x, time, condition, self.tap))

    def levels(self, name: str, count: int) -> Tensor:
        return draw_levels(name, self.uniforms(count), self.config)

    def generate(self, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """(x_hat, noisy input, s_g) from real latents x."""
        sigma = self.levels(self.options.p_gen, len(x))
        noisy = corrupt(x, sigma, self.gaussian(x))
        return self.denoise(self.generator_net, noisy, sigma, condition, self.layers), noisy, sigma

    def batch(self) -> tuple[Tensor, Condition]:
        o = self.options
        x, condition = draw_batch(self.train_set, self.rng, o.tokens, o.frames, o.beat_dropout)
        self.frames_seen += x.shape[0] * x.shape[1]
        return x, condition

    def train_step(self, progress: float) -> dict[str, float]:
        losses: dict[str, float] = {}
        if not self.options.consistency:
            for _ in range(self.options.fake_updates):
                losses |= self.fake_update(progress)
        losses |= self.generator_update(progress)
        self.step += 1
        return losses

    def fake_update(self, progress: float) -> dict[str, float]:
        o, (x, condition) = self.options, self.batch()
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.no_grad():
                x_hat = self.generate(x, condition)[0].float()
            sigma = self.levels(o.p_dsm, len(x))
            weight = loss_weight(sigma, self.config.sigma_data)
            loss = score = denoising_score_matching(
                x_hat, sigma, self.gaussian(x), lambda y, s: self.denoise(self.fake, y, s, condition), weight
            )
            if o.gan_weight:
                level = self.levels(o.p_gan, len(x))
                both = torch.cat([corrupt(x, level, self.gaussian(x)), corrupt(x_hat, level, self.gaussian(x))])
                real, generated = self.logits(both, torch.cat([level, level]), condition.cat(condition)).chunk(2)
                gan = discriminator_loss(real, generated)
                loss = score + o.gan_weight * gan
        loss.backward()
        self.update("fake", self.fake, o.fake_rate, progress)
        if o.gan_weight:
            self.update("head", self.head, o.fake_rate, progress)
        return {"fake_score": float(score.detach())} | ({"discriminator": float(gan.detach())} if o.gan_weight else {})

    def generator_update(self, progress: float) -> dict[str, float]:
        o, (x, condition) = self.options, self.batch()
        parts: dict[str, Tensor] = {}
        with torch.autocast(self.device.type, torch.bfloat16):
            x_hat, noisy, sigma_g = self.generate(x, condition)
            if o.consistency:
                parts["consistency"] = consistency_loss(x_hat, self.consistency_target(noisy, sigma_g, condition))
            if o.dmd_weight:
                gradient = distribution_matching_gradient(
                    x_hat.float(), self.levels(o.p_dmd, len(x)), self.gaussian(x),
                    lambda y, s: self.denoise(self.fake, y, s, condition), lambda y, s: self.real(y, s, condition),
                )  # fmt: skip
                parts["matching"] = o.dmd_weight * follow(x_hat, gradient)
            if o.gan_weight:
                level = self.levels(o.p_gan, len(x))
                parts["gan"] = o.gan_weight * generator_loss(
                    self.logits(corrupt(x_hat, level, self.gaussian(x)), level, condition)
                )
        loss = torch.stack(list(parts.values())).sum()
        loss.backward()
        self.update("model", self.generator_net, o.generator_rate, progress)
        for other in (self.fake, self.head):
            other.zero_grad(set_to_none=True)
        self.ema.update(self.generator_net)
        return {"loss": float(loss.detach())} | {k: float(v.detach()) for k, v in parts.items()}

    @torch.no_grad()
    def consistency_target(self, noisy: Tensor, sigma: Tensor, condition: Condition, steps: int = 18) -> Tensor:
        """The generator's answer one Euler step of the guided teacher's ODE further down the ladder."""
        c = self.config
        low, high = c.sigma_min ** (1 / c.rho), c.sigma_max ** (1 / c.rho)
        position = sigma ** (1 / c.rho) - (high - low) / steps
        lower = position.clamp_min(low) ** c.rho
        x0 = self.real(noisy, sigma, condition)
        moved = x0 + (lower / sigma)[:, None, None] * (noisy - x0)
        answer = self.denoise(self.generator_net, moved, lower, condition, self.layers)
        return torch.where((position <= low)[:, None, None], x0, answer)

    def update(self, name: str, module: nn.Module, rate: float, progress: float) -> None:
        nn.utils.clip_grad_norm_(module.parameters(), self.options.clip)
        self.set_rate(name, rate, progress)
        self.optimizers[name].step()
        module.zero_grad(set_to_none=True)

    def validate(self) -> dict[str, float]:
        """The generator is no denoiser any more; at full noise its error against the teacher's tells divergence."""
        model = copy.deepcopy(self.generator_net)
        self.ema.copy_to(model)
        return held_out_error(model.eval(), self.val_set)


def select(condition: Condition, members: Sequence[int]) -> Condition:
    """The clips `members` of a batch of conditions."""
    return Condition(*(getattr(condition, k)[list(members)] for k in condition.__dataclass_fields__))
