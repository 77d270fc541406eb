"""Overlap-add with window-square normalisation: the second half of an inverse short-time Fourier transform.

    y[i] = sum_f x[f, i - f hop] w[i - f hop]  /  sum_f w[i - f hop]^2        (Griffin and Lim 1984, eq. 6)

the least-squares signal whose windowed frames come nearest to the given ones. Both versions add in the same order
without fused multiply-adds, so they agree to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .errors import InvalidInputError

SMALLEST_ENVELOPE = 1e-8  # below this the division would only blow up rounding noise


def overlap_add(frames: Tensor, window: Tensor, hop: int, *, center: bool = True, length: int | None = None) -> Tensor:
    """Frames (B, F, n_fft) float32, as an inverse FFT returns them, to samples (B, N) float32.

    `window` (n_fft,) is applied here. With `center` the first n_fft // 2 samples are dropped, as in torch.istft, and
    the last n_fft // 2 too unless `length` asks for them; `length` is the number of samples to return.
    Differentiable. Raises InvalidInputError for wrong shapes or dtypes and where the windows leave a returned sample
    uncovered.
    """
    _check(frames, window, hop)
    batch, count, size = frames.shape
    total = (count - 1) * hop + size
    first = size // 2 if center else 0
    last = total - first if length is None else first + length
    if not first < last <= total:
        raise InvalidInputError(
            f"length must be from 1 to {total - first} for {count} frames of {size} at hop {hop}, got {length}"
        )
    needs_graph = torch.is_grad_enabled() and (frames.requires_grad or window.requires_grad)
    if native.lib is not None and frames.device.type == "cpu" and not needs_graph:
        summed, envelope = torch.empty(batch, total), torch.empty(total)
        inputs = frames.detach().contiguous().numpy(), window.detach().contiguous().numpy()
        native.lib.overlap_add(*inputs, hop, summed.numpy(), envelope.numpy())
    else:
        summed, envelope = overlap_add_torch(frames, window, hop)
    if float(envelope[first:last].min()) < SMALLEST_ENVELOPE:
        raise InvalidInputError(
            "the windows leave samples uncovered: use a smaller hop, another window, or center=True"
        )
    return summed[:, first:last]


def overlap_add_torch(frames: Tensor, window: Tensor, hop: int) -> tuple[Tensor, Tensor]:
    """The twin: all (F - 1) hop + n_fft samples, normalised (B, N), and the sum of squared windows (N,)."""
    _, count, size = frames.shape
    squares = (window * window).expand(1, count, size)
    total = (count - 1) * hop + size
    envelope = _add(squares, hop)[0, :total]
    return _add(frames * window, hop)[:, :total] / envelope, envelope


def _add(frames: Tensor, hop: int) -> Tensor:
    """Frames (B, F, n_fft) added at multiples of hop, earlier frames first: (B, at least (F - 1) hop + n_fft)."""
    batch, count, size = frames.shape
    parts = -(-size // hop)
    segments = torch.nn.functional.pad(frames, (0, parts * hop - size)).reshape(batch, count, parts, hop)
    out = frames.new_zeros(batch, count + parts - 1, hop)
    for part in reversed(range(parts)):  # within a block of hop samples, the last part belongs to the earliest frame
        out[:, part : part + count] += segments[:, :, part]
    return out.flatten(1)


def _check(frames: Tensor, window: Tensor, hop: int) -> None:
    if frames.ndim != 3 or frames.shape[1] < 1 or frames.dtype != torch.float32:
        raise InvalidInputError(
            f"frames must be float32 (batch, frames, size), got {frames.dtype} {tuple(frames.shape)}"
        )
    size = frames.shape[2]
    if window.shape != (size,) or window.dtype != torch.float32:
        raise InvalidInputError(f"window must be float32 ({size},), got {window.dtype} {tuple(window.shape)}")
    if not 1 <= hop <= size:
        raise InvalidInputError(f"hop must be from 1 to the frame size {size}, got {hop}")
