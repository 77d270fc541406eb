"""Losses of step distillation: Presto-S (distribution matching and a GAN at continuous noise levels) and baselines.

Three networks start from the teacher: the frozen, guided teacher mu_real, the generator G, and the fake score mu_fake,
which is trained on the generator's distribution and whose activations feed the discriminator D. One update of the
generator, with s_g ~ p_gen, s ~ p_dmd and s' ~ p_gan:

    x_hat = G(x + s_g n; s_g)
    L_G   = dmd_weight <x_hat, w(s) [mu_fake - mu_real](x_hat + s e; s)> + gan_weight (D(x_hat + s' e) - 1)^2

where no gradient flows through the bracket. `fake_updates` updates of mu_fake and D come before it, with s ~ p_dsm and
s' ~ p_gan:

    L_F   = lambda(s) |mu_fake(x_hat + s e; s) - x_hat|^2
            + gan_weight [(D(x + s' e) - 1)^2 + D(x_hat + s' e)^2]

mu_fake and D are conditioned on s_g (see `fake_score.py`). The baselines are options of the same code
(`step_options.METHODS`): DMD2-style (Yin et al. 2024: discrete sigmas, the sampler's distribution for all losses, no
conditioning on s_g), no GAN, and consistency distillation along the teacher's ODE (Song et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ...diffusion.precond import loss_weight
from .losses import (
    consistency_loss,
    corrupt,
    denoising_score_matching,
    discriminator_loss,
    distribution_matching_gradient,
    generator_loss,
    gradient_as_loss,
    matching_weight,
)
from .step_options import StepDistillation

CONSISTENCY_STEPS = 18  # steps of the teacher's ODE over the whole sigma schedule


class Networks(Protocol):
    """Networks that the losses call: three denoisers D(x, sigma, condition) and the discriminator.

    x has shape (B, ...), sigma and origin (B,). `origin` is the noise level s_g at which the generator made the
    samples. The losses pass `condition` through unread, so it may be of any type.
    """

    def generate(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        """Return the generator's x_hat = G(x; sigma), like x."""
        ...

    def real(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        """Return mu_real(x; sigma), like x."""
        ...

    def fake(self, x: Tensor, sigma: Tensor, condition: Any, origin: Tensor) -> Tensor:
        """Return mu_fake(x; sigma, s_g), like x."""
        ...

    def logits(self, x: Tensor, sigma: Tensor, condition: Any, origin: Tensor) -> Tensor:
        """Return the discriminator's logits, (B, ...)."""
        ...


class StepLosses:
    """Losses of the generator, and of the fake score and the discriminator, for any networks.

    Args:
        networks: denoisers and discriminator.
        options: weights and distributions.
        draw: draws sigmas (count,) of a named distribution: draw(name, count).
        gaussian: draws standard normal noise of a tensor's shape.
        sigma_data: standard deviation of the data.
        sigma_range: (sigma_min, sigma_max, rho) of the sampler's sigma schedule.
    """

    def __init__(
        self,
        networks: Networks,
        options: StepDistillation,
        draw: Callable[[str, int], Tensor],
        gaussian: Callable[[Tensor], Tensor],
        sigma_data: float,
        sigma_range: tuple[float, float, float],
    ) -> None:
        self.networks, self.options, self.draw, self.gaussian = networks, options, draw, gaussian
        self.sigma_data, self.sigma_range = sigma_data, sigma_range

    def generated(self, x: Tensor, condition: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return (x_hat, the generator's noisy input, its noise level s_g) for real samples x (B, ...)."""
        origin = self.draw(self.options.p_gen, len(x))
        noisy = corrupt(x, origin, self.gaussian(x))
        return self.networks.generate(noisy, origin, condition), noisy, origin

    def fake_losses(self, x: Tensor, condition: Any) -> dict[str, Tensor]:
        """Return the losses of the fake score and the discriminator on real samples x (B, ...), by name."""
        o, networks = self.options, self.networks
        with torch.no_grad():
            x_hat, _, origin = self.generated(x, condition)
            x_hat = x_hat.float()

        def fake(y: Tensor, s: Tensor) -> Tensor:
            return networks.fake(y, s, condition, origin)

        sigma = self.draw(o.p_dsm, len(x))
        weight = loss_weight(sigma, self.sigma_data)
        losses = {"fake_score": denoising_score_matching(x_hat, sigma, self.gaussian(x), fake, weight)}
        if o.gan_weight:
            sigma = self.draw(o.p_gan, len(x))
            real_logits = networks.logits(corrupt(x, sigma, self.gaussian(x)), sigma, condition, origin)
            fake_logits = networks.logits(corrupt(x_hat, sigma, self.gaussian(x)), sigma, condition, origin)
            losses["discriminator"] = o.gan_weight * discriminator_loss(real_logits, fake_logits)
        return losses

    def generator_losses(self, x: Tensor, condition: Any) -> dict[str, Tensor]:
        """Return the losses of the generator on real samples x (B, ...), by name."""
        o, networks = self.options, self.networks
        losses: dict[str, Tensor] = {}
        x_hat, noisy, origin = self.generated(x, condition)
        if o.consistency:
            losses["consistency"] = consistency_loss(x_hat, self.consistency_target(noisy, origin, condition))
        if o.dmd_weight:
            sigma = self.draw(o.p_dmd, len(x))
            gradient = distribution_matching_gradient(
                x_hat.float(),
                sigma,
                self.gaussian(x),
                lambda y, s: networks.fake(y, s, condition, origin),
                lambda y, s: networks.real(y, s, condition),
                matching_weight(sigma, self.sigma_data) if o.normalize == "level" else None,
            )
            losses["matching"] = o.dmd_weight * gradient_as_loss(x_hat, gradient)
        if o.gan_weight:
            sigma = self.draw(o.p_gan, len(x))
            logits = networks.logits(corrupt(x_hat, sigma, self.gaussian(x)), sigma, condition, origin)
            losses["gan"] = o.gan_weight * generator_loss(logits)
        return losses

    @torch.no_grad()
    def consistency_target(self, noisy: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        """Return the generator's output after one Euler step of the guided teacher's ODE (Song et al. 2023).

        The step has 1 / CONSISTENCY_STEPS of the sampler's sigma schedule. Where it would reach sigma_min, the target
        is the teacher's output.

        Args:
            noisy: samples at noise level sigma, (B, ...).
            sigma: noise levels, (B,).
            condition: condition of the networks.
        """
        sigma_min, sigma_max, rho = self.sigma_range
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        position = sigma ** (1 / rho) - (high - low) / CONSISTENCY_STEPS
        lower = position.clamp_min(low) ** rho
        column = (-1,) + (1,) * (noisy.dim() - 1)
        x0 = self.networks.real(noisy, sigma, condition)
        stepped = x0 + (lower / sigma).view(column) * (noisy - x0)
        output = self.networks.generate(stepped, lower, condition)
        return torch.where((position <= low).view(column), x0, output)
