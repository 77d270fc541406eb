"""Step distillation where the truth is known: Gaussian mixtures with closed-form denoisers, and small networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from presto_rt.diffusion.precond import loss_weight, precondition
from presto_rt.diffusion.samplers import Denoised, heun, sample
from presto_rt.diffusion.schedule import few_step_sigmas, inference_sigmas, karras_sigmas, training_sigmas
from presto_rt.lab.distill.steps import StepDistillation, StepLosses

SD, LOW, HIGH, RHO = 0.5, 0.02, 10.0, 7.0
BATCH = 512


class Mixture:
    """sum_k w_k N(m_k, std^2) in D dimensions: its samples, and its exact denoiser E[x_0 | x_0 + s n = x]."""

    def __init__(self, weights: list[float], means: list[list[float]], std: float) -> None:
        self.weights, self.means, self.std = torch.tensor(weights), torch.tensor(means), std

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        modes = torch.multinomial(self.weights, count, True, generator=generator)
        return self.means[modes] + self.std * torch.randn(count, self.means.shape[1], generator=generator)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x: (B, D), sigma: (B,)."""
        s2 = sigma[:, None] ** 2
        variance = self.std**2 + s2
        distances = ((x[:, None] - self.means) ** 2).sum(-1)
        shares = (self.weights.log() - distances / (2 * variance)).softmax(-1)
        return ((shares @ self.means) * s2 + x * self.std**2) / variance

    def shares(self, x: Tensor) -> Tensor:
        """The share of samples x (B, D) nearest to each mode."""
        nearest = ((x[:, None] - self.means) ** 2).sum(-1).argmin(1)
        return torch.bincount(nearest, minlength=len(self.weights)) / len(x)


MIXTURES = {
    1: Mixture([0.3, 0.7], [[-0.6], [0.4]], 0.1),
    2: Mixture([0.2, 0.3, 0.5], [[-0.6, -0.4], [0.6, -0.4], [0.0, 0.5]], 0.12),
}


class Small(nn.Module):
    """An EDM network on points: (x (B, D), ln(s)/4 (B,), ln(s_g)/4 (B,)) -> (B, D)."""

    def __init__(self, dim: int, width: int = 96) -> None:
        super().__init__()
        inner = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.net = nn.Sequential(nn.Linear(dim + 2, width), nn.SiLU(), *inner, nn.Linear(width, dim))

    def forward(self, x: Tensor, c_noise: Tensor, origin: Tensor | None = None) -> Tensor:
        told = torch.zeros_like(c_noise) if origin is None else origin.log() / 4
        return self.net(torch.cat([x, c_noise[:, None], told[:, None]], 1))


class Toy:
    """Generator, fake score and discriminator as small networks; the teacher is the closed form."""

    def __init__(self, mixture: Mixture, told: bool) -> None:
        dim = mixture.means.shape[1]
        self.mixture, self.told = mixture, told
        self.g, self.f, self.d = Small(dim), Small(dim), Small(dim)

    @staticmethod
    def denoise(net: nn.Module, x: Tensor, sigma: Tensor, origin: Tensor | None = None) -> Tensor:
        return precondition(net, x, sigma, origin, kind="edm", sigma_data=SD)

    def generate(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        return self.denoise(self.g, x, sigma)

    def real(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        return self.mixture.denoise(x, sigma)

    def fake(self, x: Tensor, sigma: Tensor, condition: Any, origin: Tensor) -> Tensor:
        return self.denoise(self.f, x, sigma, origin if self.told else None)

    def logits(self, x: Tensor, sigma: Tensor, condition: Any, origin: Tensor) -> Tensor:
        scaled = x / (sigma[:, None] ** 2 + SD**2).sqrt()
        return self.d(scaled, sigma.log() / 4, origin if self.told else None)


def levels(name: str, count: int, generator: torch.Generator) -> Tensor:
    u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    u = u.clamp(1e-4, 1 - 1e-4)
    return training_sigmas(u, -0.8, 1.2) if name == "train" else inference_sigmas(u, LOW, HIGH, RHO)


def learn_teacher(toy: Toy, generator: torch.Generator, steps: int = 500) -> None:
    """Generator and fake score start from the teacher, as in the method: regression on its answers."""
    optimizer = torch.optim.Adam([*toy.g.parameters(), *toy.f.parameters()], 2e-3, fused=True)
    for step in range(steps):
        sigma = levels("inference" if step % 2 else "train", BATCH, generator)
        x = toy.mixture.draw(BATCH, generator)
        noisy = x + sigma[:, None] * torch.randn(x.shape, generator=generator)
        truth, weight = toy.real(noisy, sigma, None), loss_weight(sigma, SD)[:, None]
        answers = (toy.denoise(toy.g, noisy, sigma), toy.denoise(toy.f, noisy, sigma, sigma if toy.told else None))
        loss = torch.stack([(weight * (answer - truth) ** 2).mean() for answer in answers]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def distil(mixture: Mixture, options: StepDistillation, *, steps: int, frozen_fake: bool = False, seed: int = 0) -> Toy:
    """The method's own losses, run on small networks for `steps` generator updates."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    toy = Toy(mixture, options.fake_told)
    learn_teacher(toy, generator)
    losses = StepLosses(toy, options, lambda name, count: levels(name, count, generator),
                        lambda like: torch.randn(like.shape, generator=generator), SD, (LOW, HIGH, RHO))  # fmt: skip
    judges = [*toy.f.parameters(), *toy.d.parameters()]
    sides = (
        (0 if frozen_fake else options.fake_updates, losses.fake_side, 2e-3,
         torch.optim.Adam(judges, betas=(0.0, 0.99), fused=True)),
        (1, losses.generator_side, 1e-3, torch.optim.Adam(toy.g.parameters(), betas=(0.0, 0.99), fused=True)),
    )  # fmt: skip
    for step in range(steps):
        for repeats, side, rate, optimizer in sides:
            for _ in range(repeats):
                optimizer.param_groups[0]["lr"] = rate * max(1 - step / steps, 0.1)
                parts = side(mixture.draw(BATCH, generator), None)
                optimizer.zero_grad()
                torch.stack(list(parts.values())).sum().backward()
                optimizer.step()
    return toy


@torch.no_grad()
def few_step_samples(toy: Toy, steps: int, count: int = 8_000) -> Tensor:
    """(count, D) samples of the generator by the few-step sampler."""
    generator = torch.Generator().manual_seed(7)

    def noise(stream: int) -> Tensor:
        return torch.randn(count, toy.mixture.means.shape[1], generator=generator)

    def denoise(x: Tensor, sigma: float) -> Denoised:
        x0 = toy.generate(x, torch.full((count,), sigma), None)
        return Denoised(x0, x0)

    return sample("few_step", denoise, HIGH * noise(0), few_step_sigmas(steps, LOW, HIGH, RHO), noise)


def teacher_samples(mixture: Mixture, count: int = 8_000) -> Tensor:
    """(count, D) samples of the closed-form teacher by 40 Heun steps."""
    start = HIGH * torch.randn(count, mixture.means.shape[1], generator=torch.Generator().manual_seed(3))

    def denoise(x: Tensor, sigma: float) -> Denoised:
        x0 = mixture.denoise(x, torch.full((count,), sigma))
        return Denoised(x0, x0)

    return heun(denoise, start, karras_sigmas(40, LOW, HIGH, RHO))


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| (Szekely & Rizzo 2013) over 4,000 of each."""
    a, b = a[:4_000], b[:4_000]
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def errors(mixture: Mixture, samples: Tensor) -> tuple[float, float]:
    """(largest error of a mode's weight, energy distance to the data)."""
    data = mixture.draw(8_000, torch.Generator().manual_seed(9))
    return float((mixture.shares(samples) - mixture.weights).abs().max()), energy_distance(samples, data)
