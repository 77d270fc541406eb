"""Band-limited sample-rate conversion (Kaiser-windowed sinc)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InvalidInputError

ZERO_CROSSINGS = 64  # on each side of the kernel, counted at the lower rate
CUTOFF = 0.95  # of the lower Nyquist frequency: flat to 0.90, 100 dB down at 1.00
KAISER_BETA = 10.06


def resample(samples: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resample float32 samples (channels, N) at from_rate (Hz) to (channels, ceil(N to_rate / from_rate)) at to_rate.

    The kernel is a Kaiser-windowed sinc, evaluated once for each of the to_rate / gcd phases; beyond both ends the
    signal counts as silence. Raises InvalidInputError if a rate is not positive.

    Smith, "Digital Audio Resampling".
    """
    if from_rate < 1 or to_rate < 1:
        raise InvalidInputError(f"sample rates must be positive, got {from_rate} and {to_rate}")
    if from_rate == to_rate:
        return samples
    divisor = math.gcd(from_rate, to_rate)
    up, down = to_rate // divisor, from_rate // divisor
    cutoff = CUTOFF * min(1.0, up / down)
    reach = math.ceil(ZERO_CROSSINGS / cutoff)
    channels, count = samples.shape
    total = -(-count * up // down)
    padded = torch.nn.functional.pad(samples, (reach, reach + down))
    out = samples.new_empty(channels, total)
    # Output p + k up lies at input time (p + k up) down / up: the taps of phase p repeat every `down` input samples.
    for phase in range(min(up, total)):
        start, rest = divmod(phase * down, up)
        taps = _kernel(rest / up, reach, cutoff).to(samples)
        wanted = -(-(total - phase) // up)
        windows = padded[:, start:].unfold(1, taps.numel(), down)[:, :wanted]
        out[:, phase::up] = windows @ taps
    return out


def _kernel(fraction: float, reach: int, cutoff: float) -> Tensor:
    """Return 2 reach taps at times -reach ... reach - 1, minus the fraction of an input sample."""
    time = torch.arange(-reach, reach, dtype=torch.float64) - fraction
    argument = KAISER_BETA * (1.0 - (time / reach).square()).clamp_min(0.0).sqrt()
    peak = torch.special.i0(torch.tensor(KAISER_BETA, dtype=torch.float64))
    window: Tensor = torch.special.i0(argument) / peak
    return cutoff * torch.sinc(cutoff * time) * window
