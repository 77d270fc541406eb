"""Phases for magnitudes: single-pass spectrogram inversion (SPSI), parallel over frames.

Each local maximum of a frame is taken for a sinusoid. A parabola through the maximum and its two neighbors gives the
frequency. The phase advances by frequency times hop from the same bin's phase one frame earlier, and the bins between
the valleys on both sides of a peak share its phase. With P_t(k) the peak that bin k of frame t belongs to:

    phase_t(k) = phase_{t-1}(P_t(k)) + d_t(P_t(k)),     d_t(p) = (p + offset) hop / N turns,     phase_{-1} = 0

Each frame is a map (P_t, d_t), and two successive maps compose to one: P = P_a o P_b, d = d_a o P_b + d_b. A parallel
prefix over frames therefore replaces the loop: in each of ceil(log2 T) rounds, every frame composes its map with the
map that ends 1, 2, 4, ... frames before it. Phases are 32-bit fractions of a turn. Their sums wrap and are exact in any
order, so the rounds equal the loop over frames to the bit.

Sources: Beauregard, Harish & Wyse, DSP 2015, SPSI; Hillis & Steele 1986, parallel prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import runtime
from .checks import check, check_contiguous, check_same_device, check_shape, check_tensor
from .registration import register_operator
from .runtime import jit, meta, tl
from .trig import sin_cos

TURN = 2**32
BLOCK = 1024


@jit
def larger(a, b):  # type: ignore[no-untyped-def]
    """Return the larger of two numbers; combiner of scans."""
    return tl.maximum(a, b)


@jit
def smaller(a, b):  # type: ignore[no-untyped-def]
    """Return the smaller of two numbers; combiner of scans."""
    return tl.minimum(a, b)


@jit
def spsi_peaks_kernel(  # type: ignore[no-untyped-def]
    magnitude_ptr,
    peak_ptr,
    turn_ptr,
    frames,
    bins,
    advance,
    stride_mb,
    stride_mt,
    BLOCK: tl.constexpr,
):
    """Find each bin's peak and that peak's phase advance over one hop, for one frame.

    Writes: program (t, b) writes frame t of clip b in peak_ptr and turn_ptr.
    """
    pid_t, pid_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < bins
    row_ptr = magnitude_ptr + pid_b * stride_mb + pid_t * stride_mt
    m = tl.load(row_ptr + offs, mask=mask, other=float("-inf"))
    left = tl.load(row_ptr + offs - 1, mask=mask & (offs > 0), other=float("-inf"))
    right = tl.load(row_ptr + offs + 1, mask=offs < bins - 1, other=float("-inf"))
    left2 = tl.load(row_ptr + offs - 2, mask=mask & (offs > 1), other=float("-inf"))
    is_peak = mask & (m > left) & (m >= right)
    after_valley = (m > left) & (left2 >= left) & (offs > 1)
    region = tl.associative_scan(tl.where(after_valley, offs, 0), 0, larger)
    previous_peak = tl.associative_scan(tl.where(is_peak, offs, -1), 0, larger)
    next_peak = tl.associative_scan(tl.where(is_peak, offs, BLOCK), 0, smaller, reverse=True)
    peak = tl.where(previous_peak >= region, previous_peak, next_peak)
    peak = tl.minimum(tl.maximum(peak, 0), bins - 1)  # a frame of NaN has no peak: keep the index in bounds

    inner = mask & (peak > 0) & (peak < bins - 1)
    a = tl.load(row_ptr + peak - 1, mask=inner, other=0.0)
    b = tl.load(row_ptr + peak, mask=inner, other=0.0)
    c = tl.load(row_ptr + peak + 1, mask=inner, other=0.0)
    curvature = (a - b) + (c - b)  # each difference rounds once; a - 2 b + c would cancel
    offset = tl.where(curvature < 0.0, 0.5 * (a - c) / tl.where(curvature < 0.0, curvature, 1.0), 0.0)
    turns = peak.to(tl.int64) * advance + (offset * advance).to(tl.int64)
    offs_out = (pid_b * frames + pid_t) * bins + offs
    tl.store(peak_ptr + offs_out, peak.to(tl.int16), mask=mask)
    tl.store(turn_ptr + offs_out, (turns & 0xFFFFFFFF).to(tl.int32), mask=mask)


@jit
def spsi_compose_kernel(  # type: ignore[no-untyped-def]
    peak_ptr,
    turn_ptr,
    peak_out_ptr,
    turn_out_ptr,
    frames,
    bins,
    reach,
    BLOCK: tl.constexpr,
):
    """Compose one frame's map with the map that ends `reach` frames before it.

    Writes: program (t, b) writes frame t of clip b in peak_out_ptr and turn_out_ptr.
    """
    pid_t, pid_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < bins
    row = (pid_b * frames + pid_t) * bins
    peak = tl.load(peak_ptr + row + offs, mask=mask, other=0)
    turns = tl.load(turn_ptr + row + offs, mask=mask, other=0)
    has_earlier = mask & (pid_t + 0 * offs >= reach)  # as wide as `mask`, which the interpreter requires
    earlier = row - reach * bins + peak
    turns += tl.load(turn_ptr + earlier, mask=has_earlier, other=0)
    peak = tl.load(peak_ptr + earlier, mask=has_earlier, other=0)
    tl.store(peak_out_ptr + row + offs, peak, mask=mask)
    tl.store(turn_out_ptr + row + offs, turns, mask=mask)


@jit
def spsi_phasor_kernel(turn_ptr, out_ptr, numel, bins, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Convert phases to unit phasors, with the sign (-1)^k of a centered frame.

    Writes: program (i) writes bins i*BLOCK ... of the flattened frames in out_ptr, real and imaginary part each.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    angle = tl.load(turn_ptr + offs, mask=mask, other=0).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    sine, cosine = sin_cos(angle)
    sign = tl.where(offs % bins % 2 == 0, 1.0, -1.0)
    tl.store(out_ptr + 2 * offs, sign * cosine, mask=mask)
    tl.store(out_ptr + 2 * offs + 1, sign * sine, mask=mask)


def spsi_reference(magnitude: Tensor, hop: int, size: int) -> Tensor:
    """Compute `spsi` in plain torch, frame by frame, with phases in fp64. Arguments as in `spsi`."""
    m = magnitude.double()
    batch, frames, bins = m.shape
    bin = torch.arange(bins, device=m.device)
    edge = float("-inf")
    left, right = F.pad(m[..., :-1], (1, 0), value=edge), F.pad(m[..., 1:], (0, 1), value=edge)
    left2 = F.pad(left[..., :-1], (1, 0), value=edge)
    is_peak = (m > left) & (m >= right)
    after_valley = (m > left) & (left2 >= left) & (bin > 1)
    region = torch.where(after_valley, bin, 0).cummax(-1).values
    previous_peak = torch.where(is_peak, bin, -1).cummax(-1).values
    next_peak = torch.where(is_peak, bin, bins - 1).flip(-1).cummin(-1).values.flip(-1)
    peak = torch.where(previous_peak >= region, previous_peak, next_peak)
    a, b, c = (x.gather(-1, peak) for x in (left, m, right))
    inner = (peak > 0) & (peak < bins - 1)
    offset = torch.where(inner, 0.5 * (a - c) / (a - 2 * b + c), 0.0)
    turns = (peak + offset) * hop / size
    phase = torch.zeros(batch, bins, dtype=torch.float64, device=m.device)
    out = torch.empty(batch, frames, bins, dtype=torch.complex64, device=m.device)
    signs = 1.0 - 2.0 * (bin % 2)
    for t in range(frames):
        phase = (phase.gather(1, peak[:, t]) + turns[:, t]) % 1.0
        out[:, t] = torch.polar(torch.ones_like(phase), 2 * torch.pi * phase) * signs
    return out


def spsi(magnitude: Tensor, hop: int, size: int, *, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Return unit phasors for the magnitudes of a centered FFT.

    Args:
        magnitude: (B, T, bins) fp32, bins = size / 2 + 1, at most 32767; any strides over B and T.
        hop: samples between frames; divides `size`.
        size: length of the FFT.
        out: (B, T, bins) complex64, contiguous. None: a new tensor.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, T, bins) complex64.

    Raises:
        InvalidInputError: shapes, dtypes or sizes that do not fit.
        BackendUnavailableError: the backend is not available on this device.
    """
    check_tensor("magnitude", magnitude, 3, (torch.float32,))
    batch, frames, bins = magnitude.shape
    check(bins == size // 2 + 1 <= 32767, f"an FFT of {size} has {size // 2 + 1} bins (at most 32767), not {bins}")
    check(1 <= hop < size and size % hop == 0, f"hop={hop} must divide the FFT's size {size}")
    if out is not None:
        check_tensor("out", out, 3, (torch.complex64,))
        check_shape("out", out, (batch, frames, bins))
        check_contiguous(out=out)
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
        arguments = (peaks[0], turns[0], peaks[1], turns[1], frames, bins, reach)
        runtime.launch(spsi_compose_kernel, grid, *arguments, BLOCK=block)
        peaks, turns, reach = peaks[::-1], turns[::-1], 2 * reach
    numel = batch * frames * bins
    real = torch.view_as_real(out)
    runtime.launch(spsi_phasor_kernel, (runtime.ceil_div(numel, BLOCK),), turns[0], real, numel, bins, BLOCK=BLOCK)
    return out


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield name and call, on meta tensors, of every configuration that `report` compiles.

    More frames are more rounds of the same kernel.
    """
    yield "2048 every 512", partial(spsi, meta(1, 16, 1025, dtype=torch.float32), 512, 2048)


def _spsi_op(magnitude: Tensor, hop: int, size: int) -> Tensor:
    return spsi(magnitude, hop, size)


def _spsi_fake(magnitude: Tensor, hop: int, size: int) -> Tensor:
    return magnitude.new_empty(magnitude.shape, dtype=torch.complex64)


register_operator("spsi(Tensor magnitude, int hop, int size) -> Tensor", _spsi_op, _spsi_fake)
