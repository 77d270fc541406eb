r"""Denoising error by noise level, beside the best linear denoiser.

A denoiser D(x + s n; s) that has learned nothing but second-order statistics is a Wiener filter. Beating it is the
first sign that a diffusion model learned music, and the error needs neither sampling nor a codec.

**The linear denoiser.** Latents are taken as a stationary process with mean m and autocovariance R(k) = E[(x_t -
m)(x_{t+k} - m)^T], a (C, C) matrix per lag. A window of L frames, stacked, has the block-Toeplitz covariance S with
blocks S_{ij} = R(j - i). Given y = x + s n, the linear estimate with the least squared error is m + S (S + s^2
I)^{-1} (y - m). With S = U diag(l) U^T that is U diag(l / (l + s^2)) U^T: one eigendecomposition serves every noise
level. Each frame is estimated from the window around it (at a crop's ends, from the first or last window), so only C
of the L C rows are needed for all but the outermost frames: an L-tap matrix filter.

**Units.** `sigma` here is relative to the latents' standard deviation unless said otherwise: the noise added is sigma
* sigma_data, 0.5 for this project's codec. Errors are mean squared errors over sigma_data^2. Both are then comparable
between codecs of any scale; predicting the mean gives about 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InvalidInputError
from .statistics import Estimate, mean

SIGMAS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 8.0)
WINDOW = 32

#: (noisy crops (B, T, C), noise levels (B,) in the latents' own unit, indices of the crops) -> clean crops (B, T, C)
Denoiser = Callable[[Tensor, Tensor, list[int]], Tensor]


def autocovariance(latents: Sequence[np.ndarray], lags: int) -> tuple[Tensor, Tensor]:
    """Mean (C,) and autocovariance (lags, C, C) over recordings (T_i, C): R[k] = E[(x_t - m)(x_{t+k} - m)^T], k >=
    0.
    """
    total, channels = sum(len(x) for x in latents), latents[0].shape[1]
    if total < 2 * lags * channels:  # fewer frames than a window has numbers: the covariance would be mostly noise
        raise InvalidInputError(
            f"{total} latent frames are too few to fit a {lags}-frame linear denoiser of {channels} channels; "
            f"give it at least {2 * lags * channels}"
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
    """The Wiener filter of `window` frames for latents with the given statistics. float32; noise levels in the
    latents' own unit.
    """

    def __init__(self, mean: Tensor, autocov: Tensor) -> None:
        self.window, channels = autocov.shape[0], autocov.shape[1]
        self.mean = mean.float()
        span = range(self.window)  # S_ij = R(j - i), and R(-k) = R(k)^T
        rows = [torch.cat([autocov[j - i] if j >= i else autocov[i - j].T for j in span], 1) for i in span]
        covariance = torch.cat(rows, 0).float()
        values, self.vectors = torch.linalg.eigh(covariance)
        self.values = values.clamp_min(0)  # an estimate from finite data may have slightly negative ones
        self.channels = channels

    @classmethod
    def fit(cls, latents: Sequence[np.ndarray], window: int = WINDOW) -> LinearDenoiser:
        """Fit on training recordings, each (T_i, C)."""
        return cls(*autocovariance(latents, window))

    def __call__(self, noisy: Tensor, sigma: float) -> Tensor:
        """(B, T, C) with noise of level `sigma` -> estimate (B, T, C). T must be at least the window."""
        return self.at(sigma)(noisy)

    def at(self, sigma: float) -> Callable[[Tensor], Tensor]:
        """The filter for one noise level: (B, T, C) -> (B, T, C)."""
        window, channels, half = self.window, self.channels, self.window // 2
        gains = self.values / (self.values + sigma**2)
        whole = (self.vectors * gains) @ self.vectors.T  # row i C + c estimates channel c of a window's frame i
        head, centre, tail = whole.split([half * channels, channels, (window - half - 1) * channels])

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
            middle = spans.reshape(-1, window * channels) @ centre.T
            last = x[:, -window:].reshape(batch, -1) @ tail.T
            return torch.cat([part.view(batch, -1, channels) for part in (first, middle, last)], 1) + self.mean

        return apply


@dataclass(frozen=True)
class ErrorRow:
    """One noise level: errors are MSE / sigma_data^2, with 95 % intervals over crops.

    `sigma` is relative to sigma_data; `added` is the standard deviation of the noise that was added.
    """

    sigma: float
    added: float
    linear: Estimate
    model: Estimate | None


def crops(
    recordings: Sequence[np.ndarray], frames: int, count: int, seed: int = 0
) -> tuple[Tensor, list[tuple[int, int]]]:
    """`count` random crops (count, frames, C) float32 of recordings (T_i, C), and for each (recording, first
    frame).
    """
    usable = [i for i, x in enumerate(recordings) if len(x) >= frames]
    if not usable:
        raise InvalidInputError(f"no recording has {frames} latent frames; ask for shorter crops")
    rng = np.random.default_rng(seed)
    places = []
    for n in range(count):
        i = usable[n % len(usable)]
        places.append((i, int(rng.integers(0, len(recordings[i]) - frames + 1))))
    return torch.from_numpy(np.stack([recordings[i][s : s + frames] for i, s in places]).astype(np.float32)), places


@torch.inference_mode()
def denoising_errors(
    clean: Tensor,
    linear: LinearDenoiser,
    denoiser: Denoiser | None = None,
    *,
    sigmas: Sequence[float] = SIGMAS,
    sigma_data: float = 0.5,
    relative: bool = True,
    batch: int = 16,
    seed: int = 0,
) -> list[ErrorRow]:
    """Errors on held-out crops (N, T, C) at each noise level; model and linear denoiser see the same noise.

    `relative`: sigmas are multiples of sigma_data (the prototype's table, whose latents have std 1); otherwise the
    latents' own unit. The model's 95 % interval is over crops.
    """
    from ...diffusion.noise import normal

    rows = []
    for level, sigma in enumerate(sigmas):
        added = sigma * sigma_data if relative else sigma
        noisy = clean + added * normal(seed, tuple(clean.shape), stream=level)
        wiener = linear.at(added)
        errors: dict[str, list[Tensor]] = {"linear": [], "model": []}
        for start in range(0, len(clean), batch):
            chosen = list(range(start, min(start + batch, len(clean))))
            estimates = {"linear": wiener(noisy[chosen])}
            if denoiser is not None:
                estimates["model"] = denoiser(noisy[chosen], torch.full((len(chosen),), added), chosen)
            for name, estimate in estimates.items():
                errors[name].append((estimate - clean[chosen]).square().mean((1, 2)) / sigma_data**2)
        found = {name: mean(torch.cat(parts).numpy()) for name, parts in errors.items() if parts}
        rows.append(ErrorRow(added / sigma_data, added, found["linear"], found.get("model")))
    return rows


def table(rows: Sequence[ErrorRow]) -> str:
    """Markdown: one column per noise level."""

    def line(name: str, cells: Sequence[str]) -> str:
        return f"| {name} | " + " | ".join(cells) + " |"

    def number(value: float) -> str:
        return f"{value:.4f}" if value < 0.1 else f"{value:.3f}"

    lines = [
        line("sigma / sigma_data", [f"{r.sigma:g}" for r in rows]),
        line("---", ["---"] * len(rows)),
        line("sigma added", [f"{r.added:g}" for r in rows]),
        line(f"linear, {WINDOW} frames", [number(r.linear.value) for r in rows]),
    ]
    if all(r.model is not None for r in rows):
        models = [r.model for r in rows if r.model is not None]
        lines.append(line("model", [number(m.value) for m in models]))
        lines.append(line("interval", [f"{number(m.low)} to {number(m.high)}" for m in models]))
        lines.append(
            line("model / linear", [number(m.value / r.linear.value) for m, r in zip(models, rows, strict=True)])
        )
    return "\n".join(lines)


def load_pieces(folder: str | Path, split: str, most: int = 400_000) -> list[np.ndarray]:
    """Latents (T_i, C) float16 of a split's pieces, as `presto_rt.lab.training.latents` wrote them, up to `most` frames.

    Memory-mapped. With more frames than `most`, every k-th piece is taken. Raises InvalidInputError where there are none.
    """
    from ..training.latents import load_latents

    rows, index = load_latents(folder, split)
    pieces = [rows[i["start"] : i["start"] + i["frames"]] for i in index["items"][: index["done"]]]
    step = max(1, -(-sum(map(len, pieces)) // most))
    if not pieces:
        raise InvalidInputError(f"no encoded pieces of split {split!r} in {folder}: encode the data set first")
    return pieces[::step]


def model_errors(
    model: Any, data_root: str | Path, *, split: str = "test", clips: int = 64, frames: int = 128, seed: int = 1
) -> list[ErrorRow]:
    """Errors of a loaded pipeline's transformer, given each crop's own caption, tempo and length, on held-out crops.

    The linear denoiser is fitted on the training split's latents. Raises InvalidInputError where the latents are missing.
    """
    from ...diffusion.precond import precondition
    from ...models.dit import Condition
    from ..training.conditions import LatentSet

    linear = LinearDenoiser.fit(load_pieces(Path(data_root) / "latents", "train"))
    held_out = LatentSet(data_root, split)
    clean, condition = held_out.batch(np.random.default_rng(seed), clips, frames, control_dropout=0.0)
    config, weight = model.config, next(model.dit.parameters())

    def denoiser(noisy: Tensor, sigma: Tensor, chosen: list[int]) -> Tensor:
        own = Condition(*(getattr(condition, f.name)[chosen] for f in fields(Condition))).to(weight.device)
        with torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32):
            x = precondition(model.dit, noisy.to(weight.device), sigma.to(weight.device), own,
                             kind=config.network, sigma_data=config.sigma_data)  # fmt: skip
        return x.float().cpu()

    return denoising_errors(clean, linear, denoiser, sigma_data=config.sigma_data)
