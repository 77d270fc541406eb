"""Samples to dithered, interleaved 16-bit integers.

    n = clamp(round(x 2^15 + d), -2^15, 2^15 - 1)

Ties round to even and NaN becomes 0. d is triangular noise in (-1, 1): element i of a clip's interleaved output takes
word w of the clip's Philox stream, d = ((w mod 2^16) - (w div 2^16)) / 2^16. The integers are bitwise equal to those of
presto_rt.audio.pcm.to_pcm for the same seed.

Source: Lipshitz, Wannamaker & Vanderkooy 1992, dither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from . import runtime
from .checks import check_contiguous, check_same_device, check_shape, check_tensor, check_vector
from .philox import UNFUSED, interleave, words
from .registration import register_operator
from .runtime import jit, meta, tl

BLOCK = 1024
DITHER_STREAM = 0xD17  # of presto_rt.audio.pcm; a test compares them


@jit
def pcm_kernel(  # type: ignore[no-untyped-def]
    samples_ptr,
    seed_ptr,
    out_ptr,
    channels,
    frames,
    stride_sb,
    stride_sc,
    BLOCK: tl.constexpr,
    STREAM: tl.constexpr,
):
    """Convert BLOCK samples of one clip.

    Writes: program (i, b) writes elements i*BLOCK ... of clip b, interleaved, in out_ptr.
    """
    pid_b = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    mask = offs < (pid_b * 0 + frames) * channels
    channel, frame = offs % channels, offs // channels
    x = tl.load(samples_ptr + pid_b * stride_sb + channel * stride_sc + frame, mask=mask, other=0.0)
    x = tl.where(x == x, x, 0.0) * 32768.0
    if seed_ptr is not None:
        counter = start // 4 + tl.arange(0, BLOCK // 4)
        w0, w1, w2, w3 = words(tl.load(seed_ptr + pid_b), counter, tl.full((), STREAM, tl.int64))
        word = interleave(w0, w1, w2, w3)
        x += ((word & 0xFFFF).to(tl.int32) - (word >> 16).to(tl.int32)).to(tl.float32) * 1.52587890625e-05
    x = tl.minimum(tl.maximum(x, -32769.0), 32768.0)
    x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: there fp32 has no fraction bits, so the sum rounds to even
    x = tl.minimum(tl.maximum(x, -32768.0), 32767.0)
    tl.store(out_ptr + pid_b * frames * channels + offs, x.to(tl.int16), mask=mask)


def pcm_reference(samples: Tensor, seeds: Tensor | None = None) -> Tensor:
    """Compute `pcm` by `presto_rt.audio.pcm`, clip by clip."""
    from ..audio.pcm import to_pcm

    numbers = [0] * samples.shape[0] if seeds is None else [seed % 2**64 for seed in seeds.tolist()]
    clips = [to_pcm(clip, 16, dither=seeds is not None, seed=n) for clip, n in zip(samples, numbers, strict=True)]
    return torch.stack(clips)


def pcm(samples: Tensor, seeds: Tensor | None = None, *, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Return samples as interleaved 16-bit integers.

    Args:
        samples: (B, channels, frames) fp32 in [-1, 1], any strides over B and channels; values beyond are clamped.
        seeds: (B,) int64, the seeds of the dither; None: no dither.
        out: (B, frames, channels) int16, contiguous. None: a new tensor.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, frames, channels) int16.

    Raises:
        InvalidInputError: shapes or dtypes that do not fit.
        BackendUnavailableError: the backend is not available on this device.
    """
    check_tensor("samples", samples, 3, (torch.float32,))
    batch, channels, frames = samples.shape
    check_vector("seeds", seeds, batch, torch.int64)
    out = torch.empty(batch, frames, channels, dtype=torch.int16, device=samples.device) if out is None else out
    check_tensor("out", out, 3, (torch.int16,))
    check_shape("out", out, (batch, frames, channels))
    check_contiguous(out=out)
    check_same_device(samples=samples, seeds=seeds, out=out)
    if not runtime.use_triton(samples, backend):
        return out.copy_(pcm_reference(samples, seeds))
    runtime.launch(
        pcm_kernel, (runtime.ceil_div(frames * channels, BLOCK), batch),
        samples, seeds, out, channels, frames, *samples.stride()[:2],
        options=UNFUSED, BLOCK=BLOCK, STREAM=DITHER_STREAM,
    )  # fmt: skip
    return out


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield name and call, on meta tensors, of every configuration that `report` compiles: 32 s of stereo."""
    samples = meta(1, 2, 32 * 44_100, dtype=torch.float32)
    yield "stereo dithered", partial(pcm, samples, meta(1, dtype=torch.int64))
    yield "stereo", partial(pcm, samples)


def _pcm_op(samples: Tensor, seeds: Tensor | None = None) -> Tensor:
    return pcm(samples, seeds)


def _pcm_fake(samples: Tensor, seeds: Tensor | None = None) -> Tensor:
    batch, channels, frames = samples.shape
    return samples.new_empty((batch, frames, channels), dtype=torch.int16)


register_operator("pcm(Tensor samples, Tensor? seeds=None) -> Tensor", _pcm_op, _pcm_fake)
