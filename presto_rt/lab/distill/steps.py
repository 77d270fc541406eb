"""Step distillation of diffusion transformers; the losses are in `step_losses.py`, the options in `step_options.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...diffusion.precond import coefficients, precondition
from ...diffusion.schedule import LayerSchedule
from ...errors import InvalidInputError
from ...models.dit import Condition, DiT
from ..training.averaging import Ema
from ..training.base import draw_batch, held_out_error
from ..training.device import autocast, compile_blocks
from ..training.loop import adamw
from .discriminator import DiscriminatorHead
from .fake_score import FakeScore
from .sigmas import draw_sigmas
from .step_losses import StepLosses
from .step_options import StepDistillation
from .trainer import DistillationTrainer


class StepTrainer(DistillationTrainer):
    """Trainer of a few-step generator: `StepLosses` on diffusion transformers.

    Args:
        data_root: data set folder with encoded latents.
        run_dir: folder of the checkpoint and the log.
        teacher: network of mu_real, and start of mu_fake; not modified.
        options: options of the distillation.
        device: "auto", "cpu" or "cuda".
        layers: layer schedule of the generator (Presto-LS); None for all blocks.
        student: network that the generator starts from (Presto-LS: the layer-distilled model); None for the teacher.
        budget: name under which the layer schedule is saved.

    Raises:
        InvalidInputError: student or layer schedule of another model configuration.
    """

    options: StepDistillation

    def __init__(
        self,
        data_root: str | Path,
        run_dir: str | Path,
        teacher: DiT,
        options: StepDistillation,
        device: str = "auto",
        layers: LayerSchedule | None = None,
        student: DiT | None = None,
        budget: str = "100%",
    ) -> None:
        super().__init__(data_root, run_dir, teacher.config, options, device)
        c = self.config
        self.layers, self.budget = layers or LayerSchedule.full(c.blocks), budget
        if (student or teacher).config != c or self.layers.depth != c.blocks:
            raise InvalidInputError(
                f"teacher, student and layer schedule must have the teacher's model configuration, {c.blocks} blocks"
            )
        self.teacher = copy.deepcopy(teacher).to(self.device).eval().requires_grad_(False)
        self.model = copy.deepcopy(student or teacher).to(self.device).requires_grad_(True)
        self.fake_model = FakeScore(teacher).to(self.device).requires_grad_(True)
        self.head = DiscriminatorHead(c.width).to(self.device)
        self.tap = options.tap if options.tap is not None else max(1, c.blocks // 2)
        self.ema = Ema(self.model, options.ema_decay)
        self.modules = {"model": self.model, "fake": self.fake_model, "head": self.head}
        betas = (0.0, 0.99)  # without momentum, as each network's objective follows the others
        self.optimizers = {
            "model": adamw(self.model, options.generator_rate, betas, 0.0),
            "fake": adamw(self.fake_model, options.fake_rate, betas, 0.0),
            "head": adamw(self.head, options.fake_rate, betas, 0.0),
        }
        sigma_range = c.sigma_min, c.sigma_max, c.rho
        self.losses = StepLosses(self, options, self.draw, self.gaussian, c.sigma_data, sigma_range)
        compile_blocks(self.teacher, self.model, self.fake_model, always=options.compile)

    def sampling(self) -> dict[str, Any]:
        layers = {} if self.budget == "100%" else {"layers": self.budget}
        return {"steps": self.options.sampling_steps, "sampler": "few_step", "guidance": 1.0, **layers}

    def schedules(self) -> dict[str, LayerSchedule]:
        return {self.budget: self.layers}

    def draw(self, name: str, count: int) -> Tensor:
        """Draw stratified sigmas (count,) of a named distribution."""
        return draw_sigmas(name, self.uniforms(count), self.config)

    def generate(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Return G(x; sigma), each clip with the blocks that the layer schedule runs at its sigma."""
        return self.denoise_scheduled(self.model, x, sigma, condition)

    def real(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Return mu_real(x; sigma): the teacher with all blocks, guided at sigmas in `guidance_interval`.

        Conditional and unconditional branch are one batch.
        """
        o = self.options
        low, high = o.guidance_interval
        scale = torch.where((sigma >= low) & (sigma <= high), o.guidance, 1.0)[:, None, None]
        doubled = condition.cat(self.teacher.null(condition))
        d_c, d_u = self.denoise(self.teacher, torch.cat([x, x]), torch.cat([sigma, sigma]), doubled).chunk(2)
        return d_u + scale * (d_c - d_u)

    def fake(self, x: Tensor, sigma: Tensor, condition: Condition, origin: Tensor) -> Tensor:
        """Return mu_fake(x; sigma, s_g)."""
        if self.options.fake_layers:
            return self.denoise_scheduled(self.fake_model, x, sigma, condition, self.origin_input(origin))
        return self.denoise(self.fake_model, x, sigma, condition, None, self.origin_input(origin))

    def logits(self, x: Tensor, sigma: Tensor, condition: Condition, origin: Tensor) -> Tensor:
        """Return the discriminator's logits (B, T') from mu_fake's activations after `tap` blocks."""
        _, _, c_in, time = coefficients(sigma, self.config.network, self.config.sigma_data)
        scaled = c_in[:, None, None] * x
        activations = self.fake_model.hidden(scaled, time, condition, self.tap, self.origin_input(origin))
        logits: Tensor = self.head(activations)
        return logits

    def origin_input(self, origin: Tensor) -> Tensor:
        """Return the input (B,) of mu_fake that encodes s_g: ln(s_g) / 4, or 0 without `condition_on_origin`."""
        return origin.log() / 4 if self.options.condition_on_origin else torch.zeros_like(origin)

    def denoise(
        self,
        model: DiT,
        x: Tensor,
        sigma: Tensor,
        condition: Condition,
        blocks: tuple[int, ...] | None = None,
        budget: float | Tensor | None = None,
    ) -> Tensor:
        """Return D(x; sigma), (B, T, C), of a network.

        Args:
            model: network to run.
            x: noisy latents, (B, T, C).
            sigma: noise levels, (B,).
            condition: conditions of the batch.
            blocks: blocks to run; None for all.
            budget: the network's budget input, one for all clips or (B,); None for the share of blocks that run.
        """
        c = self.config
        return precondition(model, x, sigma, condition, blocks, budget, kind=c.network, sigma_data=c.sigma_data)

    def denoise_scheduled(
        self, model: DiT, x: Tensor, sigma: Tensor, condition: Condition, budget: Tensor | None = None
    ) -> Tensor:
        """Return D(x; sigma), (B, T, C), each clip with the blocks that the layer schedule runs at its sigma.

        Args:
            model: network to run.
            x: noisy latents, (B, T, C).
            sigma: noise levels, (B,).
            condition: conditions of the batch.
            budget: the network's budget input, (B,); None for that of the schedule.
        """
        clips_by_blocks: dict[tuple[int, ...], list[int]] = {}
        for i, s in enumerate(sigma.tolist()):
            clips_by_blocks.setdefault(self.layers.blocks(s), []).append(i)
        denoised = torch.empty_like(x)
        for blocks, clips in clips_by_blocks.items():
            index = torch.tensor(clips, device=x.device)
            budget_input = self.layers.budget(float(sigma[clips[0]])) if budget is None else budget[index]
            part = self.denoise(model, x[index], sigma[index], condition.take(index), blocks, budget_input)
            denoised = denoised.index_copy(0, index, part)
        return denoised

    def train_step(self, progress: float) -> dict[str, float]:
        """Update fake score and discriminator `fake_updates` times, then the generator once."""
        o, batches = self.options, []
        logged: dict[str, float] = {}
        for _ in range(0 if o.consistency else o.fake_updates):
            losses, x = self.backward(self.losses.fake_losses)
            self.update("fake", o.fake_rate, progress, o.clip)
            if o.gan_weight:
                self.update("head", o.fake_rate, progress, o.clip)
            logged |= losses
            batches.append(x)
        losses, x = self.backward(self.losses.generator_losses)
        self.update("model", o.generator_rate, progress, o.clip)
        for name in ("fake", "head"):  # the generator's GAN loss also reached these
            self.modules[name].zero_grad(set_to_none=True)
        self.count(*batches, x)
        return {"loss": sum(losses.values())} | losses | logged

    def backward(self, loss: Callable[[Tensor, Condition], dict[str, Tensor]]) -> tuple[dict[str, float], Tensor]:
        """Compute the gradients of the sum of some losses on a new batch; return the losses and the batch (B, T, C)."""
        o = self.options
        x, condition = draw_batch(self.train_set, self.rng, o.tokens, o.frames, o.control_dropout)
        with autocast(self.device):
            losses = loss(x, condition)
        torch.stack([v.float() for v in losses.values()]).sum().backward()
        return {k: float(v.detach()) for k, v in losses.items()}, x

    def validate(self) -> dict[str, float]:
        """Return the held-out errors, which show divergence but not quality, as a generator samples."""
        return held_out_error(self.averaged(), self.val_set, layers=self.layers)
