"""Step distillation on toys: small networks, and Gaussian mixtures with closed-form denoisers as teachers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from presto_rt.diffusion.precond import loss_weight, precondition
from presto_rt.diffusion.schedule import few_step_sigmas, inference_sigmas, karras_sigmas, training_sigmas
from presto_rt.lab.distill.step_losses import StepLosses
from presto_rt.lab.distill.step_options import StepDistillation
from tests.support.textbook_samplers import Denoised, sample

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX, RHO = 0.5, 0.02, 10.0, 7.0
BATCH = 512


class Mixture:
    """The mixture sum_k w_k N(m_k, std^2) in D dimensions, with its exact denoiser E[x_0 | x_0 + s n = x].

    Args:
        weights: weight of each mode, w_k.
        means: mean of each mode, m_k, D numbers.
        std: standard deviation of every mode.
    """

    def __init__(self, weights: list[float], means: list[list[float]], std: float) -> None:
        self.weights, self.means, self.std = torch.tensor(weights), torch.tensor(means), std

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw samples (count, D)."""
        modes = torch.multinomial(self.weights, count, True, generator=generator)
        return self.means[modes] + self.std * torch.randn(count, self.means.shape[1], generator=generator)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return D(x; sigma), (B, D), for x (B, D) and sigma (B,)."""
        s2 = sigma[:, None] ** 2
        variance = self.std**2 + s2
        distances = ((x[:, None] - self.means) ** 2).sum(-1)
        shares = (self.weights.log() - distances / (2 * variance)).softmax(-1)
        return ((shares @ self.means) * s2 + x * self.std**2) / variance

    def shares(self, x: Tensor) -> Tensor:
        """Return the share of samples x (B, D) nearest to each mode, (K,)."""
        nearest = ((x[:, None] - self.means) ** 2).sum(-1).argmin(1)
        return torch.bincount(nearest, minlength=len(self.weights)) / len(x)


MIXTURES = {
    1: Mixture([0.3, 0.7], [[-0.6], [0.4]], 0.1),
    2: Mixture([0.2, 0.3, 0.5], [[-0.6, -0.4], [0.6, -0.4], [0.0, 0.5]], 0.12),
}


class PointNetwork(nn.Module):
    """An EDM network on points, also conditioned on the generator's noise level s_g."""

    def __init__(self, dim: int, width: int = 96) -> None:
        super().__init__()
        inner = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.net = nn.Sequential(nn.Linear(dim + 2, width), nn.SiLU(), *inner, nn.Linear(width, dim))

    def forward(self, x: Tensor, c_noise: Tensor, origin: Tensor | None = None) -> Tensor:
        """Return F(x; c_noise, s_g), (B, D), for x (B, D), c_noise (B,) and origin s_g (B,); None for no s_g."""
        origin_input = torch.zeros_like(c_noise) if origin is None else origin.log() / 4
        output: Tensor = self.net(torch.cat([x, c_noise[:, None], origin_input[:, None]], 1))
        return output


class Toy:
    """The networks of `StepLosses`: generator, fake score and discriminator on points, and the exact teacher."""

    def __init__(self, mixture: Mixture, condition_on_origin: bool) -> None:
        dim = mixture.means.shape[1]
        self.mixture, self.condition_on_origin = mixture, condition_on_origin
        self.generator, self.fake_score, self.discriminator = PointNetwork(dim), PointNetwork(dim), PointNetwork(dim)

    @staticmethod
    def denoise(network: nn.Module, x: Tensor, sigma: Tensor, origin: Tensor | None = None) -> Tensor:
        return precondition(network, x, sigma, origin, kind="edm", sigma_data=SIGMA_DATA)

    def generate(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        return self.denoise(self.generator, x, sigma)

    def real(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        return self.mixture.denoise(x, sigma)

    def fake(self, x: Tensor, sigma: Tensor, condition: Any, origin: Tensor) -> Tensor:
        return self.denoise(self.fake_score, x, sigma, origin if self.condition_on_origin else None)

    def logits(self, x: Tensor, sigma: Tensor, condition: Any, origin: Tensor) -> Tensor:
        scaled = x / (sigma[:, None] ** 2 + SIGMA_DATA**2).sqrt()
        logits: Tensor = self.discriminator(scaled, sigma.log() / 4, origin if self.condition_on_origin else None)
        return logits


def draw_sigmas(name: str, count: int, generator: torch.Generator) -> Tensor:
    """Draw stratified sigmas (count,): "train" from ln s ~ N(-0.8, 1.2^2), else along the sampler's schedule."""
    u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    u = u.clamp(1e-4, 1 - 1e-4)
    return training_sigmas(u, -0.8, 1.2) if name == "train" else inference_sigmas(u, SIGMA_MIN, SIGMA_MAX, RHO)


def fit_to_teacher(toy: Toy, generator: torch.Generator, steps: int = 500) -> None:
    """Train generator and fake score by regression on the teacher, from which the method starts."""
    optimizer = torch.optim.Adam([*toy.generator.parameters(), *toy.fake_score.parameters()], 2e-3, fused=True)
    for step in range(steps):
        sigma = draw_sigmas("inference" if step % 2 else "train", BATCH, generator)
        x = toy.mixture.draw(BATCH, generator)
        noisy = x + sigma[:, None] * torch.randn(x.shape, generator=generator)
        target, weight = toy.real(noisy, sigma, None), loss_weight(sigma, SIGMA_DATA)[:, None]
        outputs = toy.generate(noisy, sigma, None), toy.fake(noisy, sigma, None, sigma)
        loss = torch.stack([(weight * (output - target) ** 2).mean() for output in outputs]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@dataclass(frozen=True)
class Phase:
    """Updates of one group of networks within a training step."""

    repeats: int
    losses: Callable[[Tensor, Any], dict[str, Tensor]]
    learning_rate: float
    optimizer: torch.optim.Optimizer


def distill(mixture: Mixture, options: StepDistillation, *, steps: int, frozen_fake: bool = False) -> Toy:
    """Train the toy networks with the method's own losses.

    Args:
        mixture: data and teacher.
        options: options of the method.
        steps: updates of the generator.
        frozen_fake: skip the updates of fake score and discriminator.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    toy = Toy(mixture, options.condition_on_origin)
    fit_to_teacher(toy, generator)
    losses = StepLosses(
        toy,
        options,
        lambda name, count: draw_sigmas(name, count, generator),
        lambda like: torch.randn(like.shape, generator=generator),
        SIGMA_DATA,
        (SIGMA_MIN, SIGMA_MAX, RHO),
    )

    def adam(*networks: nn.Module) -> torch.optim.Optimizer:
        parameters = [p for network in networks for p in network.parameters()]
        return torch.optim.Adam(parameters, betas=(0.0, 0.99), fused=True)

    fake_updates = 0 if frozen_fake else options.fake_updates
    phases = (
        Phase(fake_updates, losses.fake_losses, 2e-3, adam(toy.fake_score, toy.discriminator)),
        Phase(1, losses.generator_losses, 1e-3, adam(toy.generator)),
    )
    for step in range(steps):
        for phase in phases:
            for _ in range(phase.repeats):
                phase.optimizer.param_groups[0]["lr"] = phase.learning_rate * max(1 - step / steps, 0.1)
                parts = phase.losses(mixture.draw(BATCH, generator), None)
                phase.optimizer.zero_grad()
                torch.stack(list(parts.values())).sum().backward()
                phase.optimizer.step()
    return toy


def sample_toy(
    sampler: str, denoise: Callable[[Tensor, Tensor], Tensor], sigmas: list[float], noise: Callable[[int], Tensor]
) -> Tensor:
    """Sample points with a textbook sampler.

    Args:
        sampler: name of the sampler.
        denoise: D(x, sigma), with x (B, D) and sigma (B,).
        sigmas: noise levels, with 0 at the end.
        noise: standard normal noise (B, D) of a stream; stream 0 starts the trajectory.
    """

    def denoised(x: Tensor, sigma: float) -> Denoised:
        x0 = denoise(x, torch.full((len(x),), sigma))
        return Denoised(x0, x0)

    return sample(sampler, denoised, SIGMA_MAX * noise(0), sigmas, noise)


@torch.no_grad()
def few_step_samples(toy: Toy, steps: int, count: int = 8_000) -> Tensor:
    """Samples (count, D) of the generator by the few-step sampler."""
    generator = torch.Generator().manual_seed(7)
    shape = count, toy.mixture.means.shape[1]
    return sample_toy(
        "few_step",
        lambda x, sigma: toy.generate(x, sigma, None),
        few_step_sigmas(steps, SIGMA_MIN, SIGMA_MAX, RHO),
        lambda stream: torch.randn(shape, generator=generator),
    )


def teacher_samples(mixture: Mixture, count: int = 8_000) -> Tensor:
    """Samples (count, D) of the exact teacher by 40 Heun steps."""
    generator = torch.Generator().manual_seed(3)
    shape = count, mixture.means.shape[1]
    return sample_toy(
        "heun",
        mixture.denoise,
        karras_sigmas(40, SIGMA_MIN, SIGMA_MAX, RHO),
        lambda stream: torch.randn(shape, generator=generator),
    )


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return 2 E|a - b| - E|a - a'| - E|b - b'| of the first 4,000 samples (Szekely & Rizzo 2013)."""
    a, b = a[:4_000], b[:4_000]
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def errors(mixture: Mixture, samples: Tensor) -> tuple[float, float]:
    """Return (largest error of a mode's weight, energy distance to 8,000 samples of the data)."""
    data = mixture.draw(8_000, torch.Generator().manual_seed(9))
    return float((mixture.shares(samples) - mixture.weights).abs().max()), energy_distance(samples, data)
