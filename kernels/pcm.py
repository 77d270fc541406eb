"""Samples to 16-bit integers: clamp, dither, interleave.

    n = clamp(round(x 2^15 + d), -2^15, 2^15 - 1)

ties to even, NaN taken for silence, d triangular in (-1, 1) (Lipshitz, Wannamaker & Vanderkooy 1992): element i of a
clip's interleaved output takes word w of its Philox stream, d = ((w mod 2^16) - (w div 2^16)) / 2^16. To the bit what
presto_rt.audio.pcm.to_pcm gives for the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from . import runtime
from .checks import check, check_same_device, check_shape, check_tensor
from .philox import UNFUSED, interleave, words
from .registration import register_operator
from .runtime import jit, tl

BLOCK = 1024
DITHER_STREAM = 0xD17  # presto_rt.audio.pcm's; a test compares


@jit
def pcm_kernel(
    samples_ptr, seed_ptr, out_ptr, channels, frames, samples_batch, samples_channel,
    BLOCK: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Writes: program (i, b) writes elements i*BLOCK ... of clip b, interleaved, in out_ptr."""
    batch = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    element = start + tl.arange(0, BLOCK)
    inside = element < (batch * 0 + frames) * channels
    channel, frame = element % channels, element // channels
    x = tl.load(samples_ptr + batch * samples_batch + channel * samples_channel + frame, mask=inside, other=0.0)
    x = tl.where(x == x, x, 0.0) * 32768.0
    if seed_ptr is not None:
        block = start // 4 + tl.arange(0, BLOCK // 4)
        w0, w1, w2, w3 = words(tl.load(seed_ptr + batch), block, tl.full((), STREAM, tl.int64))
        word = interleave(w0, w1, w2, w3)
        x += ((word & 0xFFFF).to(tl.int32) - (word >> 16).to(tl.int32)).to(tl.float32) * 1.52587890625e-05
    x = tl.minimum(tl.maximum(x, -32769.0), 32768.0)
    x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: below it fp32 has no bits left for fractions, so the sum rounds
    x = tl.minimum(tl.maximum(x, -32768.0), 32767.0)
    tl.store(out_ptr + batch * frames * channels + element, x.to(tl.int16), mask=inside)


def pcm_reference(samples: Tensor, seeds: Tensor | None = None) -> Tensor:
    """`pcm` by the package's own conversion, clip by clip."""
    from ..audio.pcm import to_pcm

    numbers = [0] * samples.shape[0] if seeds is None else [seed % 2**64 for seed in seeds.tolist()]
    clips = [to_pcm(clip, 16, dither=seeds is not None, seed=n) for clip, n in zip(samples, numbers, strict=True)]
    return torch.stack(clips)


def pcm(samples: Tensor, seeds: Tensor | None = None, *, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """(B, frames, channels) int16 from samples (B, channels, frames) fp32 in [-1, 1], any strides over B and channels.

    seeds (B,) int64: dither; None: none. Raises InvalidInputError for anything that does not fit.
    """
    check_tensor("samples", samples, 3, (torch.float32,))
    batch, channels, frames = samples.shape
    if seeds is not None:
        check_tensor("seeds", seeds, 1, (torch.int64,))
        check_shape("seeds", seeds, (batch,))
    out = torch.empty(batch, frames, channels, dtype=torch.int16, device=samples.device) if out is None else out
    check_tensor("out", out, 3, (torch.int16,))
    check_shape("out", out, (batch, frames, channels))
    check(out.is_contiguous(), "out is not contiguous; call .contiguous()")
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
    """Name and call, on meta tensors, of every configuration that `report` compiles: 32 s of stereo."""
    samples = torch.empty(1, 2, 32 * 44_100, device="meta")
    seeds = torch.empty(1, dtype=torch.int64, device="meta")
    yield "stereo dithered", partial(pcm, samples, seeds)
    yield "stereo", partial(pcm, samples)


def _pcm_op(samples: Tensor, seeds: Tensor | None = None) -> Tensor:
    return pcm(samples, seeds)


def _pcm_fake(samples: Tensor, seeds: Tensor | None = None) -> Tensor:
    batch, channels, frames = samples.shape
    return samples.new_empty((batch, frames, channels), dtype=torch.int16)


register_operator("pcm(Tensor samples, Tensor? seeds=None) -> Tensor", _pcm_op, _pcm_fake)
