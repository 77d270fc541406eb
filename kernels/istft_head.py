"""From a network's spectral head to samples: magnitude and phase (or real and imaginary parts), inverse FFT, overlap-
add.

    X[t, f] = min(e^m, limit) (cos p + i sin p)          kind="polar"       head = [m, p]      (Siuzdak 2023, "Vocos")
    X[t, f] = a + i b                                    kind="cartesian"   head = [a, b]
    x_t     = irfft(X[t])                                                                       N samples a frame
    y[n]    = sum_t w[n - t hop] x_t[n - t hop] / sum_t w[n - t hop]^2                          (Griffin & Lim 1984)

Two kernels around the FFT of the platform (cuFFT, MKL), which needs no help. Each output sample gathers the few
frames that reach it, so nothing is added atomically and the sum has one order. Arithmetic is fp32. The first and the
last bin of a real signal are real; MKL ignores an imaginary part there, cuFFT at some sizes does not, so it is made 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from . import runtime
from .runtime import check, check_same_device, check_shape, check_tensor, jit, tl
from .trig import sin_cos

KINDS = ("polar", "cartesian")
PADDINGS = ("center", "same")
BLOCK = 1024
SILENT = 1e-11  # below it no window reaches a sample, as in torch.istft


@jit
def spectrum_kernel(
    head_ptr, out_ptr, count, bins, head_row, limit, BLOCK: tl.constexpr, POLAR: tl.constexpr
):  # fmt: skip
    """Who writes what: program i writes bins i*BLOCK ... of the flattened (frames, bins) in out_ptr, real and imaginary
    part each.
    """
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    bin = element % bins
    at = head_ptr + element // bins * head_row + bin
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + bins, mask=inside, other=0.0).to(tl.float32)
    if POLAR:
        magnitude = tl.minimum(tl.exp(first), limit)
        sine, cosine = sin_cos(second)
        first, second = magnitude * cosine, magnitude * sine
    second = tl.where((bin == 0) | (bin == bins - 1), 0.0, second)
    tl.store(out_ptr + 2 * element, first, mask=inside)
    tl.store(out_ptr + 2 * element + 1, second, mask=inside)


@jit
def overlap_add_kernel(
    frames_ptr, window_ptr, out_ptr, frames, length, trim, hop, frames_batch, frames_row, out_batch,
    SIZE: tl.constexpr, OVERLAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Who writes what: program (i, b) writes samples i*BLOCK ... of clip b in out_ptr.

    OVERLAP = ceil(SIZE / hop) frames can reach a sample.
    """
    batch = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position = sample + trim
    total = tl.zeros((BLOCK,), tl.float32)
    envelope = tl.zeros((BLOCK,), tl.float32)
    for back in tl.static_range(OVERLAP):
        frame = position // hop - back
        inner = position - frame * hop
        reached = (frame >= 0) & (frame < frames) & (inner < SIZE) & (sample < length)
        w = tl.load(window_ptr + inner, mask=reached, other=0.0)
        at = frames_ptr + batch * frames_batch + frame.to(tl.int64) * frames_row + inner
        total += w * tl.load(at, mask=reached, other=0.0).to(tl.float32)
        envelope += w * w
    y = tl.where(envelope > 1e-11, total / tl.where(envelope > 1e-11, envelope, 1.0), 0.0)
    tl.store(out_ptr + batch * out_batch + sample, y, mask=sample < length)


def spectrum_reference(head: Tensor, kind: str = "polar", limit: float = 100.0) -> Tensor:
    """`spectrum` in plain torch: fp32, or fp64 where the head is."""
    first, second = head.to(torch.promote_types(head.dtype, torch.float32)).chunk(2, -1)
    result = torch.polar(first.exp().clamp(max=limit), second) if kind == "polar" else torch.complex(first, second)
    result.imag[..., [0, -1]] = 0
    return result


def overlap_add_reference(frames: Tensor, window: Tensor, hop: int, padding: str = "center") -> Tensor:
    """`overlap_add` in plain torch: fp32, or fp64 where the frames are."""
    batch, count, size = frames.shape
    wide = torch.promote_types(frames.dtype, torch.float32)
    w = window.to(wide)
    total = torch.zeros(batch, (count - 1) * hop + size, dtype=wide, device=frames.device)
    envelope = torch.zeros_like(total[0])
    for t in range(count):
        total[:, t * hop : t * hop + size] += w * frames[:, t].to(wide)
        envelope[t * hop : t * hop + size] += w * w
    trim, length = _span(count, size, hop, padding)
    y = torch.where(envelope > SILENT, total / envelope, 0.0)
    return torch.nn.functional.pad(y, (0, max(0, trim + length - y.shape[1])))[:, trim : trim + length]


def _span(count: int, size: int, hop: int, padding: str) -> tuple[int, int]:
    """(samples cut at the start, samples kept) of `count` frames."""
    return (size // 2, (count - 1) * hop) if padding == "center" else ((size - hop) // 2, count * hop)


def spectrum(head: Tensor, *, kind: str = "polar", limit: float = 100.0, backend: str = "auto") -> Tensor:
    """(B, T, bins) complex64 from the head (B, T, 2 * bins), fp32, fp16 or bf16; its first and last bin are real.

    limit: the largest magnitude. Phases must stay below 6000 in magnitude; beyond, an fp32 phase means little.

    Raises InvalidInputError for shapes, dtypes or names that do not fit.
    """
    check(kind in KINDS, f"kind={kind!r} is unknown; use 'polar' or 'cartesian'")
    check_tensor("head", head, 3)
    check(head.shape[2] % 2 == 0, f"head has width {head.shape[2]}; it must be even, two numbers a bin")
    if not runtime.use_triton(head, backend):
        return spectrum_reference(head, kind, limit)
    if head.stride(0) != head.shape[1] * head.stride(1):
        head = head.contiguous()
    batch, frames, bins = head.shape[0], head.shape[1], head.shape[2] // 2
    out = torch.empty(batch, frames, bins, 2, dtype=torch.float32, device=head.device)
    count = batch * frames * bins
    grid = (runtime.ceil_div(count, BLOCK),)
    arguments = (head, out, count, bins, head.stride(1), float(limit))
    runtime.launch(spectrum_kernel, grid, *arguments, BLOCK=BLOCK, POLAR=kind == "polar")
    return torch.view_as_complex(out)


def overlap_add(
    frames: Tensor, window: Tensor, hop: int, *, padding: str = "center", out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Windowed frames to samples (B, length) fp32, divided by the windows' energy; 0 where no window reaches.

    frames (B, T, N), fp32, fp16 or bf16; window (N,) fp32. padding "center": N/2 samples cut at both ends, length (T
    - 1) hop, as torch.istft; "same": length T hop. Raises InvalidInputError for anything that does not fit.
    """
    check(padding in PADDINGS, f"padding={padding!r} is unknown; use 'center' or 'same'")
    check_tensor("frames", frames, 3)
    batch, count, size = frames.shape
    check_tensor("window", window, 1, (torch.float32,))
    check_shape("window", window, (size,))
    check(1 <= hop <= size, f"hop={hop} must lie in 1..{size}, the window's length")
    trim, length = _span(count, size, hop, padding)
    check(length > 0, f"{count} frame with padding='center' makes no samples; give 2 or more")
    if out is None:
        out = torch.empty(batch, length, device=frames.device)
    check_tensor("out", out, 2, (torch.float32,))
    check_shape("out", out, (batch, length))
    check_same_device(frames=frames, window=window, out=out)
    if not runtime.use_triton(frames, backend):
        return out.copy_(overlap_add_reference(frames, window, hop, padding))
    runtime.launch(
        overlap_add_kernel, (runtime.ceil_div(length, BLOCK), batch),
        frames, window, out, count, length, trim, hop, *frames.stride()[:2], out.stride(0),
        SIZE=size, OVERLAP=runtime.ceil_div(size, hop), BLOCK=BLOCK,
    )  # fmt: skip
    return out


def istft_head(
    head: Tensor, window: Tensor, hop: int, *, kind: str = "polar", padding: str = "same", limit: float = 100.0,
    out: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Samples (B, length) from a head (B, T, N + 2), N the FFT's size and the window's length.

    The options are those of `spectrum` and `overlap_add`. Raises InvalidInputError for anything that does not fit.
    """
    size = window.shape[-1]
    check(head.shape[-1] == size + 2, f"head has width {head.shape[-1]}, an FFT of {size} needs {size + 2}")
    frames = torch.fft.irfft(spectrum(head, kind=kind, limit=limit, backend=backend), n=size)
    return overlap_add(frames, window, hop, padding=padding, out=out, backend=backend)


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, on meta tensors, of every configuration that `report` compiles: 32 s at 44.1 kHz."""
    for size, hop in ((1024, 256), (2048, 512)):
        frames = 32 * 44_100 // hop
        window = torch.empty(size, device="meta")
        for kind in KINDS:
            head = torch.empty(2, frames, size + 2, dtype=torch.bfloat16, device="meta")
            yield f"{size} {kind}", partial(spectrum, head, kind=kind)
        frames_of = torch.empty(2, frames, size, device="meta")
        yield f"{size} overlap-add", partial(overlap_add, frames_of, window, hop, padding="same")
