"""Band-limited change of sample rate, for audio files that are not at 44.1 kHz."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InvalidInputError

ZERO_CROSSINGS = 64  # on each side of the kernel, at the lower of the two rates
CUTOFF = 0.95  # of the lower Nyquist frequency: flat to 0.90, 100 dB down at 1.00
KAISER_BETA = 10.06


def resample(samples: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Samples (channels, N) float32 at from_rate (Hz) to (channels, ceil(N to_rate / from_rate)) at to_rate.

    A Kaiser-windowed sinc, evaluated for each of the to_rate / gcd phases (Smith, "Digital audio resampling"). Beyond
    both ends the signal is taken for silence. Raises InvalidInputError for rates that are not positive.
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
    # Output p + k up lies at input time (p + k up) down / up: for one phase p the taps repeat every `down` input
    # samples.
    for phase in range(min(up, total)):
        start, rest = divmod(phase * down, up)
        taps = _kernel(rest / up, reach, cutoff).to(samples)
        wanted = -(-(total - phase) // up)
        windows = padded[:, start:].unfold(1, taps.numel(), down)[:, :wanted]
        out[:, phase::up] = windows @ taps
    return out


def _kernel(fraction: float, reach: int, cutoff: float) -> Tensor:
    """2 reach taps at times -reach ... reach - 1, minus the fraction of an input sample."""
    time = torch.arange(-reach, reach, dtype=torch.float64) - fraction
    inside = (1.0 - (time / reach).square()).clamp_min(0.0)
    window = torch.special.i0(KAISER_BETA * inside.sqrt()) / torch.special.i0(
        torch.tensor(KAISER_BETA, dtype=torch.float64)
    )
    return cutoff * torch.sinc(cutoff * time) * window
