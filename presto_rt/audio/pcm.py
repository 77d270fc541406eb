"""Samples to integers.

    n = clamp(round(x 2^(bits - 1) + d), -2^(bits - 1), 2^(bits - 1) - 1)

with ties to even, NaN taken for silence, and triangular dither d in (-1, 1) steps: the difference of two independent
uniforms, which makes the rounding error's mean and power independent of the music (Lipshitz, Wannamaker and
Vanderkooy 1992). The dither is counter-based: element i of the interleaved output takes word i of its Philox stream,
d = ((word mod 2^16) - (word div 2^16)) / 2^16, so a seed gives the same file everywhere and a longer clip begins with
the same integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..diffusion.noise import check_seed, random_words
from ..errors import InvalidInputError

DITHER_STREAM = 0xD17  # apart from the streams that latents are drawn from

_TYPES = {16: torch.int16, 24: torch.int32}


def to_pcm(samples: Tensor, bits: int = 16, *, dither: bool = True, seed: int = 0) -> Tensor:
    """Samples (channels, frames) float32 in [-1, 1] to integers (frames, channels), on the samples' device.

    int16 for 16 bits, int32 holding -2^23 ... 2^23 - 1 for 24 bits. Values beyond [-1, 1] are clamped. Raises
    InvalidInputError for another dtype, shape, number of bits or a seed out of range.
    """
    if samples.ndim != 2 or samples.dtype != torch.float32:
        raise InvalidInputError(
            f"samples must be float32 (channels, frames), got {samples.dtype} {tuple(samples.shape)}"
        )
    if bits not in _TYPES:
        raise InvalidInputError(f"bits must be 16 or 24, got {bits!r}")
    seed = check_seed(seed)
    if native.lib is None or samples.device.type != "cpu":
        return to_pcm_torch(samples, bits, dither=dither, seed=seed)
    out = torch.empty(samples.shape[1], samples.shape[0], dtype=_TYPES[bits])
    native.lib.to_pcm(samples.detach().contiguous().numpy(), out.numpy(), dither, seed, DITHER_STREAM)
    return out


def to_pcm_torch(samples: Tensor, bits: int, *, dither: bool, seed: int) -> Tensor:
    """The twin of the C++ operator."""
    scale = float(2 ** (bits - 1))
    x = samples.T
    x = torch.where(torch.isnan(x), 0.0, x) * scale
    if dither:
        words = random_words(seed, x.numel(), stream=DITHER_STREAM, device=x.device)[: x.numel()]
        x = x + (((words & 0xFFFF) - (words >> 16)).to(torch.float32) * 2.0**-16).reshape(x.shape)
    return torch.round(x).clamp(-scale, scale - 1.0).to(_TYPES[bits])
