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
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

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
    control_dropout: float = 0.3
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
    return replace(StepDistillation(minutes), **{**METHODS[method], **changes})


class Networks(Protocol):
    """What the losses need of the networks: denoisers D(x, sigma, condition) and the discriminator's logits."""

    def generator(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor: ...
    def fake(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor: ...
    def real(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor: ...
    def logits(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor: ...


class StepLosses:
    """The algorithm: the two losses of the two sides, for any networks (the tests run it on toys).

    levels(name, count) draws noise levels (count,); gaussian(like) draws noise; ladder: (sigma_min, sigma_max, rho).
    """

    def __init__(self, networks: Networks, options: StepDistillation, levels: Callable[[str, int], Tensor],
                 gaussian: Callable[[Tensor], Tensor], sigma_data: float,
                 ladder: tuple[float, float, float]) -> None:  # fmt: skip
        self.networks, self.options, self.levels, self.gaussian = networks, options, levels, gaussian
        self.sigma_data, self.ladder = sigma_data, ladder

    def generate(self, x: Tensor, condition: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(x_hat, its noisy input, s_g) from real samples x."""
        sigma = self.levels(self.options.p_gen, len(x))
        noisy = corrupt(x, sigma, self.gaussian(x))
        return self.networks.generator(noisy, sigma, condition), noisy, sigma

    def fake_side(self, x: Tensor, condition: Any) -> dict[str, Tensor]:
        """Losses of mu_fake and the discriminator."""
        o, nets = self.options, self.networks
        with torch.no_grad():
            x_hat = self.generate(x, condition)[0].float()
        sigma = self.levels(o.p_dsm, len(x))
        weight = loss_weight(sigma, self.sigma_data)
        losses = {
            "fake_score": denoising_score_matching(
                x_hat, sigma, self.gaussian(x), lambda y, s: nets.fake(y, s, condition), weight
            )
        }
        if o.gan_weight:
            level = self.levels(o.p_gan, len(x))
            real = nets.logits(corrupt(x, level, self.gaussian(x)), level, condition)
            generated = nets.logits(corrupt(x_hat, level, self.gaussian(x)), level, condition)
            losses["discriminator"] = o.gan_weight * discriminator_loss(real, generated)
        return losses

    def generator_side(self, x: Tensor, condition: Any) -> dict[str, Tensor]:
        """Losses of the generator."""
        o, nets, losses = self.options, self.networks, {}
        x_hat, noisy, sigma = self.generate(x, condition)
        if o.consistency:
            losses["consistency"] = consistency_loss(x_hat, self.consistency_target(noisy, sigma, condition))
        if o.dmd_weight:
            gradient = distribution_matching_gradient(
                x_hat.float(), self.levels(o.p_dmd, len(x)), self.gaussian(x),
                lambda y, s: nets.fake(y, s, condition), lambda y, s: nets.real(y, s, condition),
            )  # fmt: skip
            losses["matching"] = o.dmd_weight * follow(x_hat, gradient)
        if o.gan_weight:
            level = self.levels(o.p_gan, len(x))
            logits = nets.logits(corrupt(x_hat, level, self.gaussian(x)), level, condition)
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
        answer = self.networks.generator(moved, lower, condition)
        return torch.where((position <= low).view(column), x0, answer)


class StepTrainer(Trainer):
    """Runs `StepLosses` on diffusion transformers. `layers`: the generator's layer schedule (Presto-LS)."""

    def __init__(self, data_root: str | Path, run_dir: str | Path, teacher: DiT, options: StepDistillation,
                 device: str = "auto", layers: LayerSchedule | None = None,
                 student: DiT | None = None) -> None:  # fmt: skip
        super().__init__(run_dir, options.minutes, options.seed, device, options.checkpoint_minutes)
        c = self.config = teacher.config
        self.options, self.layers = options, layers or LayerSchedule.full(c.blocks)
        self.teacher = copy.deepcopy(teacher).to(self.device).eval().requires_grad_(False)
        self.model = copy.deepcopy(student or teacher).to(self.device).requires_grad_(True)
        self.fake_model = copy.deepcopy(teacher).to(self.device).requires_grad_(True)
        self.head = Head(c.width).to(self.device)
        self.tap = options.tap if options.tap is not None else c.blocks // 2
        self.train_set = LatentSet(data_root, "train", self.device)
        self.val_set = LatentSet(data_root, "val", self.device)
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

    def describe(self) -> dict[str, Any]:
        return {"options": asdict(self.options), "layers": self.layers.to_json()}

    def levels(self, name: str, count: int) -> Tensor:
        return draw_levels(name, self.uniforms(count), self.config)

    def generator(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """G: each clip with the blocks that the layer schedule gives its own level."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, s in enumerate(sigma.tolist()):
            rows.setdefault(self.layers.blocks(s), []).append(i)
        out = torch.empty_like(x)
        for blocks, clips in rows.items():
            index = torch.tensor(clips, device=x.device)
            given = Condition(*(getattr(condition, k)[index] for k in condition.__dataclass_fields__))
            out = out.index_copy(0, index, self.denoise(self.model, x[index], sigma[index], given, blocks))
        return out

    def fake(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """mu_fake, full depth."""
        return self.denoise(self.fake_model, x, sigma, condition)

    def real(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """mu_real: the guided teacher, full depth, both branches in one batch."""
        doubled = condition.cat(self.teacher.null(condition))
        d_c, d_u = self.denoise(self.teacher, torch.cat([x, x]), torch.cat([sigma, sigma]), doubled).chunk(2)
        return d_u + self.options.guidance * (d_c - d_u)

    def logits(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The discriminator, listening to mu_fake's activations after `tap` blocks."""
        _, _, c_in, time = coefficients(sigma, self.config.network, self.config.sigma_data)
        return self.head(self.fake_model.hidden(c_in[:, None, None] * x, time, condition, self.tap))

    def denoise(self, model: DiT, x: Tensor, sigma: Tensor, condition: Condition,
                blocks: tuple[int, ...] | None = None) -> Tensor:  # fmt: skip
        return precondition(model, x, sigma, condition, blocks,
                            kind=self.config.network, sigma_data=self.config.sigma_data)  # fmt: skip

    def train_step(self, progress: float) -> dict[str, float]:
        o, logged = self.options, {}
        for _ in range(0 if o.consistency else o.fake_updates):
            losses = self.backward(self.losses.fake_side)
            self.update("fake", o.fake_rate, progress)
            if o.gan_weight:
                self.update("head", o.fake_rate, progress)
            logged |= losses
        losses = self.backward(self.losses.generator_side)
        self.update("model", o.generator_rate, progress)
        for other in ("fake", "head"):
            self.modules[other].zero_grad(set_to_none=True)
        self.ema.update(self.model)
        self.step += 1
        return {"loss": sum(losses.values())} | losses | logged

    def backward(self, side: Callable[[Tensor, Condition], dict[str, Tensor]]) -> dict[str, float]:
        """Gradients of one side's losses on a fresh batch."""
        o = self.options
        x, condition = draw_batch(self.train_set, self.rng, o.tokens, o.frames, o.control_dropout)
        with torch.autocast(self.device.type, torch.bfloat16):
            losses = side(x, condition)
        torch.stack([v.float() for v in losses.values()]).sum().backward()
        self.frames_seen += x.shape[0] * x.shape[1]
        return {k: float(v.detach()) for k, v in losses.items()}

    def update(self, name: str, rate: float, progress: float) -> None:
        module = self.modules[name]
        nn.utils.clip_grad_norm_(module.parameters(), self.options.clip)
        self.set_rate(name, rate, progress)
        self.optimizers[name].step()
        module.zero_grad(set_to_none=True)

    def validate(self) -> dict[str, float]:
        """Held-out error: no figure of quality (a generator samples, it does not average), but it shows divergence."""
        model = copy.deepcopy(self.model)
        self.ema.copy_to(model)
        return held_out_error(model.eval(), self.val_set)
