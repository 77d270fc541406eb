r"""Denoising error by noise level, beside the error of the best linear denoiser.

A denoiser D(x + s n; s) that knows only second-order statistics is a Wiener filter. A diffusion model with a lower
error has learned more than these statistics. The error needs neither sampling nor a codec.

**Linear denoiser.** Latents are modeled as a stationary process with mean m and autocovariance R(k) = E[(x_t -
m)(x_{t+k} - m)^T], a (C, C) matrix per lag. A stacked window of L frames has the block-Toeplitz covariance S with
blocks S_{ij} = R(j - i). Given y = x + s n, the linear estimate with the least squared error is m + S (S + s^2 I)^{-1}
(y - m). With S = U diag(l) U^T the matrix is U diag(l / (l + s^2)) U^T, so one eigendecomposition serves all noise
levels. Each frame is estimated from the window around it, and near the ends of a crop from the first or last window.
All but the outermost frames need only C of the L C rows: an L-tap matrix filter.

**Units.** `sigma` is relative to the standard deviation of the latents, sigma_data (0.5 for this project's codec): the
added noise has the standard deviation sigma * sigma_data. Errors are mean squared errors over sigma_data^2. Both are
independent of the codec's scale; predicting the mean has an error of about 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...checkpoints.model import Model
from ...diffusion.noise import normal
from ...diffusion.precond import precondition
from ...errors import InvalidInputError
from ...models.dit import Condition, DiT
from ..training.conditions import LatentSet
from ..training.latents import load_latents
from .statistics import Estimate, mean

SIGMAS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 8.0)
WINDOW = 32

#: (noisy crops (B, T, C), standard deviations of the added noise (B,), indices of the crops) -> clean crops (B, T, C)
Denoiser = Callable[[Tensor, Tensor, list[int]], Tensor]


def autocovariance(latents: Sequence[np.ndarray], lags: int) -> tuple[Tensor, Tensor]:
    """Estimate the mean (C,) and the autocovariance (lags, C, C) of recordings (T_i, C), both float64.

    R[k] = E[(x_t - m)(x_{t+k} - m)^T] for k >= 0. Raises InvalidInputError for fewer than 2 * lags * C frames.
    """
    total, channels = sum(len(x) for x in latents), latents[0].shape[1]
    if total < 2 * lags * channels:  # the covariance estimate would be mostly noise
        raise InvalidInputError(
            f"{total} latent frames are too few to fit a {lags}-frame linear denoiser of {channels} channels; "
            f"pass at least {2 * lags * channels}"
        )
    mean = torch.from_numpy(sum(np.asarray(x, dtype=np.float64).sum(0) for x in latents) / total)
    sums = torch.zeros(lags, len(mean), len(mean), dtype=torch.float64)
    pairs = torch.zeros(lags, dtype=torch.float64)
    for recording in latents:
        x = torch.from_numpy(np.asarray(recording, dtype=np.float32)) - mean.float()
        for k in range(min(lags, len(x))):
            sums[k] += (x[: len(x) - k].T @ x[k:]).double()
            pairs[k] += len(x) - k
    return mean, sums / pairs.clamp_min(1)[:, None, None]


class LinearDenoiser:
    """Wiener filter for latents with mean (C,) and autocovariance (window, C, C), in float32."""

    def __init__(self, mean: Tensor, autocov: Tensor) -> None:
        self.window, channels = autocov.shape[0], autocov.shape[1]
        self.mean = mean.float()
        lags = range(self.window)  # S_ij = R(j - i), and R(-k) = R(k)^T
        rows = [torch.cat([autocov[j - i] if j >= i else autocov[i - j].T for j in lags], 1) for i in lags]
        covariance = torch.cat(rows, 0).float()
        values, self.vectors = torch.linalg.eigh(covariance)
        self.values = values.clamp_min(0)  # estimates from finite data may be slightly negative
        self.channels = channels

    @classmethod
    def fit(cls, latents: Sequence[np.ndarray], window: int = WINDOW) -> LinearDenoiser:
        """Fit the filter to training recordings, each (T_i, C)."""
        return cls(*autocovariance(latents, window))

    def at(self, added: float) -> Callable[[Tensor], Tensor]:
        """Return the filter (B, T, C) -> (B, T, C) for noise of standard deviation `added`.

        The filter raises InvalidInputError for crops shorter than the window or of other channels.
        """
        window, channels, half = self.window, self.channels, self.window // 2
        gains = self.values / (self.values + added**2)
        weights = (self.vectors * gains) @ self.vectors.T  # row i C + c estimates channel c of a window's frame i
        head, center, tail = weights.split([half * channels, channels, (window - half - 1) * channels])

        def apply(noisy: Tensor) -> Tensor:
            batch, frames = noisy.shape[:2]
            if frames < window or noisy.shape[2] != channels:
                raise InvalidInputError(
                    f"this linear denoiser needs crops of >= {window} frames and {channels} channels, "
                    f"got {tuple(noisy.shape)}"
                )
            x = noisy - self.mean
            first = x[:, :window].reshape(batch, -1) @ head.T
            spans = x.unfold(1, window, 1).transpose(2, 3)  # (B, T - window + 1, window, C), a view
            middle = spans.reshape(-1, window * channels) @ center.T
            last = x[:, -window:].reshape(batch, -1) @ tail.T
            return torch.cat([part.view(batch, -1, channels) for part in (first, middle, last)], 1) + self.mean

        return apply


@dataclass(frozen=True)
class ErrorRow:
    """Errors at one noise level: MSE / sigma_data^2, with 95 % intervals over crops.

    `sigma` is relative to sigma_data; `added` is the standard deviation of the added noise.
    """

    sigma: float
    added: float
    linear: Estimate
    model: Estimate


@torch.inference_mode()
def denoising_errors(
    clean: Tensor,
    linear: LinearDenoiser,
    denoiser: Denoiser,
    *,
    sigmas: Sequence[float] = SIGMAS,
    sigma_data: float = 0.5,
    batch: int = 16,
    seed: int = 0,
) -> list[ErrorRow]:
    """Measure the errors of a model and of the linear denoiser on the same noise.

    Args:
        clean: held-out crops (N, T, C) float32.
        linear: the linear denoiser.
        denoiser: the model's denoiser.
        sigmas: noise levels relative to sigma_data.
        sigma_data: standard deviation of the latents.
        batch: crops that are denoised at a time.
        seed: seed of the noise.

    Returns:
        One row for each noise level.
    """
    rows = []
    for level, sigma in enumerate(sigmas):
        added = sigma * sigma_data
        noisy = clean + added * normal(seed, tuple(clean.shape), stream=level)
        wiener = linear.at(added)
        errors: dict[str, list[Tensor]] = {"linear": [], "model": []}
        for start in range(0, len(clean), batch):
            indices = list(range(start, min(start + batch, len(clean))))
            estimates = {
                "linear": wiener(noisy[indices]),
                "model": denoiser(noisy[indices], torch.full((len(indices),), added), indices),
            }
            for name, estimate in estimates.items():
                errors[name].append((estimate - clean[indices]).square().mean((1, 2)) / sigma_data**2)
        means = {name: mean(torch.cat(parts).numpy()) for name, parts in errors.items()}
        rows.append(ErrorRow(added / sigma_data, added, means["linear"], means["model"]))
    return rows


def table(rows: Sequence[ErrorRow]) -> str:
    """Format a markdown table with one column for each noise level."""

    def line(name: str, cells: Sequence[str]) -> str:
        return f"| {name} | " + " | ".join(cells) + " |"

    def number(value: float) -> str:
        return f"{value:.4f}" if value < 0.1 else f"{value:.3f}"

    lines = [
        line("sigma / sigma_data", [f"{r.sigma:g}" for r in rows]),
        line("---", ["---"] * len(rows)),
        line("sigma added", [f"{r.added:g}" for r in rows]),
        line(f"linear, {WINDOW} frames", [number(r.linear.value) for r in rows]),
        line("model", [number(r.model.value) for r in rows]),
        line("interval", [f"{number(r.model.low)} to {number(r.model.high)}" for r in rows]),
        line("model / linear", [number(r.model.value / r.linear.value) for r in rows]),
    ]
    return "\n".join(lines)


def load_pieces(folder: str | Path, split: str, max_frames: int = 400_000) -> list[np.ndarray]:
    """Memory-map the latents (T_i, C) float16 of a split's pieces, written by `presto-rt lab train encode`.

    If there are more than `max_frames` frames, every k-th piece is taken. Raises InvalidInputError if there are no
    latents.
    """
    rows, index = load_latents(folder, split)
    pieces = [rows[i["start"] : i["start"] + i["frames"]] for i in index["items"][: index["done"]]]
    step = max(1, -(-sum(map(len, pieces)) // max_frames))
    if not pieces:
        raise InvalidInputError(f"no latents of split {split!r} in {folder}; run `presto-rt lab train encode`")
    return pieces[::step]


def model_errors(
    model: Model, data_root: str | Path, *, split: str = "test", clips: int = 64, frames: int = 128, seed: int = 1
) -> list[ErrorRow]:
    """Measure the errors of a model on held-out crops, conditioned on their captions, tempo and length.

    Args:
        model: with its network in plain torch, from `checkpoints.house.load_model`.
        data_root: folder of the data set with its latents; the linear denoiser is fitted to the training split.
        split: held-out split.
        clips: number of crops.
        frames: latent frames of each crop.
        seed: seed of the crops.

    Returns:
        One row for each noise level in SIGMAS.

    Raises:
        InvalidInputError: the latents are missing.
    """
    linear = LinearDenoiser.fit(load_pieces(Path(data_root) / "latents", "train"))
    held_out = LatentSet(data_root, split)
    clean, condition = held_out.batch(np.random.default_rng(seed), clips, frames, control_dropout=0.0)
    network, spec = model.network, model.spec
    if not isinstance(network, DiT):
        raise InvalidInputError(f"{model.name} has no network in plain torch; load it with load_model")
    weight = next(network.parameters())

    def denoiser(noisy: Tensor, sigma: Tensor, indices: list[int]) -> Tensor:
        part = Condition(*(getattr(condition, f.name)[indices] for f in fields(Condition))).to(weight.device)
        with torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32):
            x = precondition(
                network,
                noisy.to(weight.device),
                sigma.to(weight.device),
                part,
                kind=spec.prediction_type,
                sigma_data=spec.sigma_data,
            )
        return x.float().cpu()

    return denoising_errors(clean, linear, denoiser, sigma_data=spec.sigma_data)
