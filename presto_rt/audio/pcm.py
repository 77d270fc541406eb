"""Conversion of samples to 16- or 24-bit integers with triangular dither.

    n = clamp(round(x 2^(bits - 1) + d), -2^(bits - 1), 2^(bits - 1) - 1)

Ties round to even and NaN becomes silence. The dither d in (-1, 1) steps is the difference of two independent uniforms,
which makes mean and power of the rounding error independent of the signal (Lipshitz, Wannamaker and Vanderkooy 1992).
It is counter-based: element i of the interleaved output uses word i of its Philox stream,

    d = ((word mod 2^16) - (word div 2^16)) / 2^16,

so a seed gives the same file on every machine and a longer clip begins with the same integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..diffusion.noise import check_seed, random_words
from ..errors import InvalidInputError

DITHER_STREAM = 0xD17  # differs from every stream of latent noise

_DTYPES = {16: torch.int16, 24: torch.int32}


def to_pcm(samples: Tensor, bits: int = 16, *, dither: bool = True, seed: int = 0) -> Tensor:
    """Convert float32 samples (channels, frames) to integers (frames, channels) on the samples' device.

    Args:
        samples: Nominally in [-1, 1]; values beyond are clamped.
        bits: 16 gives int16; 24 gives int32 in [-2^23, 2^23 - 1].
        dither: Add triangular dither before rounding.
        seed: Seed of the dither, 0 to 2^64 - 1.

    Raises:
        InvalidInputError: The samples have another dtype or shape, or bits or seed are out of range.
    """
    if samples.ndim != 2 or samples.dtype != torch.float32:
        raise InvalidInputError(
            f"samples must be float32 (channels, frames), got {samples.dtype} {tuple(samples.shape)}"
        )
    if bits not in _DTYPES:
        raise InvalidInputError(f"bits must be 16 or 24, got {bits!r}")
    seed = check_seed(seed)
    if native.lib is None or samples.device.type != "cpu":
        return to_pcm_reference(samples, bits, dither=dither, seed=seed)
    out = torch.empty(samples.shape[1], samples.shape[0], dtype=_DTYPES[bits])
    native.lib.to_pcm(samples.detach().contiguous(), out, dither, seed, DITHER_STREAM)
    return out


def to_pcm_reference(samples: Tensor, bits: int, *, dither: bool, seed: int) -> Tensor:
    """Return the same integers as `to_pcm` by torch alone: the reference of the C++ operator."""
    scale = float(2 ** (bits - 1))
    x = samples.T
    x = torch.where(torch.isnan(x), 0.0, x) * scale
    if dither:
        words = random_words(seed, x.numel(), stream=DITHER_STREAM, device=x.device)[: x.numel()]
        x = x + (((words & 0xFFFF) - (words >> 16)).to(torch.float32) * 2.0**-16).reshape(x.shape)
    return torch.round(x).clamp(-scale, scale - 1.0).to(_DTYPES[bits]).contiguous()
