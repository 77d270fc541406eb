"""Phases for magnitudes: single-pass spectrogram inversion (Beauregard, Harish, Wyse, DSP 2015), parallel over time.

Each local maximum of a frame is a sinusoid. A parabola through it and its neighbours gives its frequency, its phase
goes on by frequency times hop from the same bin's phase one frame earlier, and the bins between the valleys on its
sides share it. With P_t(k) the peak that bin k of frame t belongs to:

    phase_t(k) = phase_{t-1}(P_t(k)) + d_t(P_t(k)),     d_t(p) = (p + offset) hop / N turns,     phase_{-1} = 0

That is a map (P_t, d_t), and two maps in a row are one again: P = P_a o P_b, d = d_a o P_b + d_b. So frames need not
wait for each other: after ceil(log2 T) rounds, in which every frame takes in the map that ends 1, 2, 4, ... frames
before it, all phases are known (Hillis & Steele 1986). Phases are 32-bit fractions of a turn: their sums wrap by
themselves and are exact in any order, so the rounds give what a loop over frames gives, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import runtime
from .checks import check, check_same_device, check_shape, check_tensor
from .registration import register_operator
from .runtime import jit, tl
from .trig import sin_cos

TURN = 2**32


@jit
def larger(a, b):
    """The larger of two, for scans."""
    return tl.maximum(a, b)


@jit
def smaller(a, b):
    """The smaller of two, for scans."""
    return tl.minimum(a, b)


@jit
def spsi_peaks_kernel(
    magnitude_ptr, peak_ptr, turn_ptr, frames, bins, advance, magnitude_batch, magnitude_frame, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes: program (t, b) writes frame t of clip b in peak_ptr and turn_ptr."""
    frame, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    bin = tl.arange(0, BLOCK)
    inside = bin < bins
    row = magnitude_ptr + batch * magnitude_batch + frame * magnitude_frame
    here = tl.load(row + bin, mask=inside, other=float("-inf"))
    left = tl.load(row + bin - 1, mask=inside & (bin > 0), other=float("-inf"))
    right = tl.load(row + bin + 1, mask=bin < bins - 1, other=float("-inf"))
    before = tl.load(row + bin - 2, mask=inside & (bin > 1), other=float("-inf"))
    peak = inside & (here > left) & (here >= right)
    start = (here > left) & (before >= left) & (bin > 1)  # the bin before is a valley
    first = tl.associative_scan(tl.where(start, bin, 0), 0, larger)
    last = tl.associative_scan(tl.where(peak, bin, -1), 0, larger)
    following = tl.associative_scan(tl.where(peak, bin, BLOCK), 0, smaller, reverse=True)
    owner = tl.where(last >= first, last, following)
    owner = tl.minimum(tl.maximum(owner, 0), bins - 1)  # a frame of NaN has no peak: stay in memory

    middle = inside & (owner > 0) & (owner < bins - 1)
    a = tl.load(row + owner - 1, mask=middle, other=0.0)
    b = tl.load(row + owner, mask=middle, other=0.0)
    c = tl.load(row + owner + 1, mask=middle, other=0.0)
    bend = (a - b) + (c - b)  # each difference is rounded once: a - 2 b + c would cancel
    offset = tl.where(bend < 0.0, 0.5 * (a - c) / tl.where(bend < 0.0, bend, 1.0), 0.0)
    turns = owner.to(tl.int64) * advance + (offset * advance).to(tl.int64)
    at = (batch * frames + frame) * bins + bin
    tl.store(peak_ptr + at, owner.to(tl.int16), mask=inside)
    tl.store(turn_ptr + at, (turns & 0xFFFFFFFF).to(tl.int32), mask=inside)


@jit
def spsi_follow_kernel(
    peak_ptr, turn_ptr, peak_out_ptr, turn_out_ptr, frames, bins, reach, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes: program (t, b) writes frame t of clip b in peak_out_ptr and turn_out_ptr."""
    frame, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    bin = tl.arange(0, BLOCK)
    inside = bin < bins
    row = (batch * frames + frame) * bins
    owner = tl.load(peak_ptr + row + bin, mask=inside, other=0)
    turns = tl.load(turn_ptr + row + bin, mask=inside, other=0)
    behind = inside & (frame + 0 * bin >= reach)  # as wide as `inside`: the interpreter needs it
    earlier = row - reach * bins + owner
    turns += tl.load(turn_ptr + earlier, mask=behind, other=0)
    owner = tl.load(peak_ptr + earlier, mask=behind, other=0)
    tl.store(peak_out_ptr + row + bin, owner, mask=inside)
    tl.store(turn_out_ptr + row + bin, turns, mask=inside)


@jit
def spsi_phasor_kernel(turn_ptr, out_ptr, count, bins, BLOCK: tl.constexpr):
    """Writes: program i writes bins i*BLOCK ... of the flattened frames in out_ptr, real and imaginary part
    each.
    """
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    angle = tl.load(turn_ptr + element, mask=inside, other=0).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    sine, cosine = sin_cos(angle)
    sign = tl.where(element % bins % 2 == 0, 1.0, -1.0)
    tl.store(out_ptr + 2 * element, sign * cosine, mask=inside)
    tl.store(out_ptr + 2 * element + 1, sign * sine, mask=inside)


def spsi_reference(magnitude: Tensor, hop: int, size: int) -> Tensor:
    """`spsi` in plain torch, frame by frame, phases in fp64."""
    m = magnitude.double()
    batch, frames, bins = m.shape
    bin = torch.arange(bins, device=m.device)
    edge = float("-inf")
    left, right = F.pad(m[..., :-1], (1, 0), value=edge), F.pad(m[..., 1:], (0, 1), value=edge)
    before = F.pad(left[..., :-1], (1, 0), value=edge)
    peak = (m > left) & (m >= right)
    start = (m > left) & (before >= left) & (bin > 1)
    first = torch.where(start, bin, 0).cummax(-1).values
    last = torch.where(peak, bin, -1).cummax(-1).values
    following = torch.where(peak, bin, bins - 1).flip(-1).cummin(-1).values.flip(-1)
    owner = torch.where(last >= first, last, following)
    a, b, c = (x.gather(-1, owner) for x in (left, m, right))
    inside = (owner > 0) & (owner < bins - 1)
    offset = torch.where(inside, 0.5 * (a - c) / (a - 2 * b + c), 0.0)
    turns = (owner + offset) * hop / size
    phase = torch.zeros(batch, bins, dtype=torch.float64, device=m.device)
    out = torch.empty(batch, frames, bins, dtype=torch.complex64, device=m.device)
    signs = 1.0 - 2.0 * (bin % 2)
    for t in range(frames):
        phase = (phase.gather(1, owner[:, t]) + turns[:, t]) % 1.0
        out[:, t] = torch.polar(torch.ones_like(phase), 2 * torch.pi * phase) * signs
    return out


def spsi(magnitude: Tensor, hop: int, size: int, *, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Unit phasors (B, T, bins) complex64 for magnitudes (B, T, bins) fp32 of a centred FFT of `size`, every `hop`
    samples.

    bins = size / 2 + 1, at most 32767; hop must divide size. out: (B, T, bins) complex64, contiguous.
    Raises InvalidInputError for anything that does not fit.
    """
    check_tensor("magnitude", magnitude, 3, (torch.float32,))
    batch, frames, bins = magnitude.shape
    check(bins == size // 2 + 1 <= 32767, f"an FFT of {size} has {size // 2 + 1} bins (at most 32767), not {bins}")
    check(1 <= hop < size and size % hop == 0, f"hop={hop} must divide the FFT's size {size}")
    if out is not None:
        check_tensor("out", out, 3, (torch.complex64,))
        check_shape("out", out, (batch, frames, bins))
        check(out.is_contiguous(), "out is not contiguous; call .contiguous()")
    check_same_device(magnitude=magnitude, out=out)
    if not runtime.use_triton(magnitude, backend):
        return runtime.copy_into(out, spsi_reference(magnitude, hop, size))
    shape, device = (batch, frames, bins), magnitude.device
    peaks = [torch.empty(shape, dtype=torch.int16, device=device) for _ in range(2)]
    turns = [torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2)]
    out = torch.empty(shape, dtype=torch.complex64, device=device) if out is None else out
    grid, block = (frames, batch), runtime.next_power_of_2(bins)
    runtime.launch(
        spsi_peaks_kernel, grid, magnitude, peaks[0], turns[0], frames, bins, TURN // (size // hop),
        *magnitude.stride()[:2], BLOCK=block,
    )  # fmt: skip
    reach = 1
    while reach < frames:
        runtime.launch(
            spsi_follow_kernel, grid, peaks[0], turns[0], peaks[1], turns[1], frames, bins, reach, BLOCK=block
        )
        peaks, turns, reach = peaks[::-1], turns[::-1], 2 * reach
    count = batch * frames * bins
    numbers = torch.view_as_real(out)
    runtime.launch(spsi_phasor_kernel, (runtime.ceil_div(count, 1024),), turns[0], numbers, count, bins, BLOCK=1024)
    return out


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, on meta tensors, of every configuration that `report` compiles. More frames are more rounds
    of the same kernel.
    """
    magnitude = torch.empty(1, 16, 1025, device="meta")
    yield "2048 every 512", partial(spsi, magnitude, 512, 2048)


def _spsi_op(magnitude: Tensor, hop: int, size: int) -> Tensor:
    return spsi(magnitude, hop, size)


def _spsi_fake(magnitude: Tensor, hop: int, size: int) -> Tensor:
    return magnitude.new_empty(magnitude.shape, dtype=torch.complex64)


register_operator("spsi(Tensor magnitude, int hop, int size) -> Tensor", _spsi_op, _spsi_fake)
