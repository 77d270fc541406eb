"""One-dimensional convolution with the Snake activation on its way in and the residual on its way out.

    s    = x + sin^2(alpha x) / (beta + 1e-9)          by channel; Snake (Ziyin et al. 2020; beta = alpha there)
    y[t] = sum_k W_k s[t + k dilation - padding] + bias (+ residual)

An implicit matrix product over time: for each tap, a block of weights (C_out, C_in) times a block of samples (C_in,
T), which pass through Snake between load and product. An unfused Snake at audio rate moves more bytes than the
convolution itself. Sums and Snake are fp32, products run in the inputs' dtype. `conv_transpose1d` is the same kernel
with several output phases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import runtime
from .runtime import check, check_same_device, check_shape, check_tensor, dot, jit, tl
from .trig import sin_squared


@jit
def conv_kernel(
    x_ptr, weight_ptr, bias_ptr, alpha_ptr, beta_ptr, residual_ptr, out_ptr,
    length_in, length_out, channels_in, channels_out, rows, taps, shift, step, stride, crop,
    x_batch, x_channel, residual_batch, residual_channel, out_batch, out_channel,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, PHASES: tl.constexpr,
):  # fmt: skip
    """Who writes what: program (i, j, b) writes channels j*BLOCK_M/PHASES ... of clip b in out_ptr, all phases 0 ...
    stride - 1 of the input times q = i*BLOCK_Q ... ; phase r of time q is sample q*stride + r - crop.
    """
    batch = tl.program_id(2).to(tl.int64)
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    blocks = tl.cdiv(channels_in, BLOCK_C)
    acc = tl.zeros((BLOCK_M, BLOCK_Q), tl.float32)
    for item in range(taps * blocks):
        tap, start = item // blocks, item % blocks * BLOCK_C
        channel = start + tl.arange(0, BLOCK_C)
        time = q + shift + tap * step
        known = channel < channels_in
        # 64-bit offsets for the whole block, 32-bit ones within it: half the registers
        at = x_ptr + (batch * x_batch + (batch * 0 + start) * x_channel)
        at = at + tl.arange(0, BLOCK_C)[:, None] * x_channel + time[None, :]
        x = tl.load(at, mask=known[:, None] & (time >= 0)[None, :] & (time < length_in)[None, :], other=0.0)
        if alpha_ptr is not None:
            alpha = tl.load(alpha_ptr + channel, mask=known, other=0.0)[:, None]
            beta = tl.load(beta_ptr + channel, mask=known, other=1.0)[:, None]
            wide = x.to(tl.float32)
            x = (wide + sin_squared(wide * alpha) / (beta + 1e-9)).to(x.dtype)
        at = weight_ptr + (tap * rows + row[:, None]) * channels_in + channel[None, :]
        w = tl.load(at, mask=(row < rows)[:, None] & known[None, :], other=0.0)
        acc = dot(w, x, acc)

    # (channel, phase; q) to (channel; sample), so that neighbouring threads store neighbouring samples
    CHANNELS: tl.constexpr = BLOCK_M // PHASES
    if PHASES > 1:
        acc = tl.permute(tl.reshape(acc, (CHANNELS, PHASES, BLOCK_Q)), (0, 2, 1))
        acc = tl.reshape(acc, (CHANNELS, BLOCK_Q * PHASES))
    start, local = tl.program_id(1).to(tl.int64) * CHANNELS, tl.arange(0, CHANNELS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    column = tl.arange(0, BLOCK_Q * PHASES)
    sample = (tl.program_id(0) * BLOCK_Q + column // PHASES) * stride + column % PHASES - crop
    inside = (column % PHASES < stride) & (sample >= 0) & (sample < length_out)
    inside = inside[None, :] & (channel < channels_out)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=channel < channels_out, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        at = residual_ptr + (batch * residual_batch + start * residual_channel)
        at = at + local * residual_channel + sample[None, :]
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + (batch * out_batch + start * out_channel) + local * out_channel + sample[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


def snake_reference(x: Tensor, alpha: Tensor, beta: Tensor | None = None) -> Tensor:
    """Snake in plain torch: x (B, C, T), alpha and beta (C,); beta = alpha by default. In x's dtype."""
    alpha, beta = alpha.to(x.dtype)[:, None], (alpha if beta is None else beta).to(x.dtype)[:, None]
    return x + (alpha * x).sin().square() / (beta + 1e-9)


def snake_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, alpha: Tensor | None = None, beta: Tensor | None = None,
    dilation: int = 1, padding: int = 0, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`snake_conv1d` in plain torch, with packed weights; arithmetic in fp32, or fp64 where x is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    s = x.to(wide) if alpha is None else snake_reference(x.to(wide), alpha, beta)
    kernel = weight.permute(1, 2, 0).to(wide)
    y = F.conv1d(s, kernel, None if bias is None else bias.to(wide), dilation=dilation, padding=padding)
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


def pack(weight: Tensor) -> Tensor:
    """torch.nn.Conv1d's weight (C_out, C_in, K) as the kernel reads it: (K, C_out, C_in), contiguous. Once, at load."""
    return weight.permute(2, 0, 1).contiguous()


def snake_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, alpha: Tensor | None = None, beta: Tensor | None = None,
    dilation: int = 1, padding: int = 0, residual: Tensor | None = None, out: Tensor | None = None, backend: str =
    "auto",
) -> Tensor:  # fmt: skip
    """conv1d(snake(x)) + bias + residual, stride 1.

    x (B, C_in, T) fp16 or bf16 (fp32 for checks), any strides over B and C; weight (K, C_out, C_in) from `pack`, same
    dtype. alpha, beta (C_in,) fp32: Snake; alpha=None: none, beta=None: alpha. residual (B, C_out, T_out) same dtype.
    Returns (B, C_out, T + 2 padding - dilation (K - 1)). Raises InvalidInputError for anything that does not fit.
    """
    check_tensor("x", x, 3)
    check_tensor("weight", weight, 3, (x.dtype,))
    batch, channels_in, length = x.shape
    taps, channels_out, depth = weight.shape
    check(depth == channels_in, f"weight takes {depth} channels, x has {channels_in}; pack Conv1d's weight with pack()")
    check(dilation >= 1 and padding >= 0, f"dilation={dilation} must be 1 or more and padding={padding} 0 or more")
    length_out = length + 2 * padding - dilation * (taps - 1)
    check(length_out > 0, f"{taps} taps with dilation {dilation} reach over {length} samples with padding {padding}")
    shape = (batch, channels_out, length_out)
    out = prepare(x, weight, bias, alpha, beta, residual, out, shape)
    if not runtime.use_triton(x, backend):
        return out.copy_(
            snake_conv1d_reference(
                x, weight, bias, alpha=alpha, beta=beta, dilation=dilation, padding=padding, residual=residual
            )
        )
    run(
        x,
        weight,
        bias,
        alpha,
        beta,
        residual,
        out,
        rows=channels_out,
        columns=length_out,
        shift=-padding,
        step=dilation,
    )
    return out


def prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, residual: Tensor | None,
    out: Tensor | None, shape: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """Check what both convolutions share and return the output of `shape`."""
    check(weight.is_contiguous(), "weight is not contiguous; pack it with pack()")
    check(alpha is not None or beta is None, "beta goes with alpha; pass both or alpha alone")
    for name, tensor, count in (("bias", bias, shape[1]), ("alpha", alpha, x.shape[1]), ("beta", beta, x.shape[1])):
        if tensor is not None:
            check_tensor(name, tensor, 1, (x.dtype, torch.float32) if name == "bias" else (torch.float32,))
            check_shape(name, tensor, (count,))
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None:
            check_tensor(name, tensor, 3, (x.dtype,))
            check_shape(name, tensor, shape)
    check_same_device(x=x, weight=weight, bias=bias, alpha=alpha, beta=beta, residual=residual, out=out)
    return out


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor | None, beta: Tensor | None, residual: Tensor | None,
    out: Tensor, *, rows: int, columns: int, shift: int, step: int, stride: int = 1, crop: int = 0, phases: int = 1,
) -> None:  # fmt: skip
    """Launch the shared kernel: weight (taps, rows, C_in), rows = channels times phases; columns: input times q."""
    batch, channels_in, length_in = x.shape
    _, channels_out, length_out = out.shape
    strides = [tensor.stride(1) for tensor in (x, residual, out) if tensor is not None]
    check(max(strides) < 2**24, f"channels are {max(strides)} samples apart; split the clip, 2^24 is the most")
    # 16 rows are the least that the matrix units take, 64 the least of a Hopper warp group
    block_m = max(phases, 16, min(64 if x.dtype == torch.float32 else 128, runtime.next_power_of_2(rows)))
    block_q = 32 if x.dtype == torch.float32 else 128
    block_c = max(16, min(32, runtime.next_power_of_2(channels_in)))
    runtime.launch(
        conv_kernel, (runtime.ceil_div(columns, block_q), runtime.ceil_div(rows, block_m), batch),
        x, weight, bias, alpha, alpha if beta is None else beta, residual, out,
        length_in, length_out, channels_in, channels_out, rows, weight.shape[0], shift, step, stride, crop,
        *x.stride()[:2], *(residual.stride()[:2] if residual is not None else (0, 0)), *out.stride()[:2],
        num_warps=8 if block_m >= 128 else 4, num_stages=2,
        BLOCK_M=block_m, BLOCK_Q=block_q, BLOCK_C=block_c, PHASES=phases,
    )  # fmt: skip


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, on meta tensors, of every configuration that `report` compiles: the residual units of an
    Oobleck decoder.
    """
    meta = {"device": "meta"}
    for channels, length in ((128, 1_411_200), (256, 705_600), (512, 176_400), (1024, 22_050)):
        x = torch.empty(1, channels, length, dtype=torch.bfloat16, **meta)
        bias = torch.empty(channels, dtype=torch.bfloat16, **meta)
        alpha = torch.empty(channels, **meta)
        wide, narrow = (torch.empty(k, channels, channels, dtype=torch.bfloat16, **meta) for k in (7, 1))
        yield f"{channels} dilated", partial(snake_conv1d, x, wide, bias, alpha=alpha, dilation=9, padding=27)
        yield (
            f"{channels} pointwise residual",
            partial(snake_conv1d, x, narrow, bias, alpha=alpha, beta=alpha, residual=x),
        )
    x = torch.empty(1, 128, 1_411_200, dtype=torch.bfloat16, **meta)
    last = torch.empty(7, 2, 128, dtype=torch.bfloat16, **meta)
    yield "128 to stereo", partial(snake_conv1d, x, last, alpha=torch.empty(128, **meta), padding=3)
