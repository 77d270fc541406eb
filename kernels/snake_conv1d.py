"""One-dimensional convolution with the Snake activation on its input and a residual added to its output.

    s    = x + sin^2(alpha x) / (beta + 1e-9)                      per channel
    y[t] = sum_k W_k s[t + k dilation - padding] + bias (+ residual)

An implicit matrix product over time: per tap, a (C_out, C_in) block of weights times a (C_in, T) block of samples,
which pass through Snake between load and product. A separate Snake at audio rate would move more bytes than the
convolution. Sums and Snake are fp32; products run in the inputs' dtype. `conv_transpose1d` is the same kernel with
several output phases.

Source: Ziyin et al. 2020, Snake; there beta = alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import runtime
from .checks import check, check_same_device, check_shape, check_tensor, check_vector
from .registration import register_operator
from .runtime import dot, jit, meta, tl
from .trig import sin_squared


@dataclass(frozen=True)
class Snake:
    """Parameters of the activation: alpha (C_in,) fp32; beta (C_in,) fp32, default alpha."""

    alpha: Tensor
    beta: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the activation to x (B, C_in, T) in plain torch, in x's dtype."""
        alpha = self.alpha.to(x.dtype)[:, None]
        beta = (self.alpha if self.beta is None else self.beta).to(x.dtype)[:, None]
        return x + (alpha * x).sin().square() / (beta + 1e-9)

    def check(self, channels: int) -> None:
        """Raise InvalidInputError unless alpha and beta are fp32 vectors of `channels` numbers."""
        check_vector("alpha", self.alpha, channels, torch.float32)
        check_vector("beta", self.beta, channels, torch.float32)


@dataclass(frozen=True)
class TapGeometry:
    """Positions that the shared kernel reads and writes.

    Tap j of column q reads input time q + shift + j * step. Phase r of column q is output time q * stride + r - crop.
    rows: weight rows, output channels times phases. columns: number of q. phases: rows per output channel, a power of
    two >= stride.
    """

    rows: int
    columns: int
    shift: int
    step: int
    stride: int = 1
    crop: int = 0
    phases: int = 1


@jit
def conv_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    alpha_ptr,
    beta_ptr,
    residual_ptr,
    out_ptr,
    length_in,
    length_out,
    channels_in,
    channels_out,
    rows,
    taps,
    shift,
    step,
    stride,
    crop,
    stride_xb,
    stride_xc,
    stride_rb,
    stride_rc,
    stride_ob,
    stride_oc,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PHASES: tl.constexpr,
):
    """Compute BLOCK_M rows (channel, phase) for BLOCK_N columns (input times) of one clip.

    Writes: program (i, j, b) writes channels j*BLOCK_M/PHASES ... of clip b in out_ptr, phases 0 ... stride - 1 of the
    columns q = i*BLOCK_N ... ; phase r of column q is sample q*stride + r - crop.
    """
    pid_b = tl.program_id(2).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    num_k_blocks = tl.cdiv(channels_in, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for item in range(taps * num_k_blocks):
        tap, start_k = item // num_k_blocks, item % num_k_blocks * BLOCK_K
        offs_k = start_k + tl.arange(0, BLOCK_K)
        time = offs_n + shift + tap * step
        mask_k = offs_k < channels_in
        # 64-bit offsets for the whole block and 32-bit ones within it need half the registers.
        x_ptrs = x_ptr + (pid_b * stride_xb + (pid_b * 0 + start_k) * stride_xc)
        x_ptrs = x_ptrs + tl.arange(0, BLOCK_K)[:, None] * stride_xc + time[None, :]
        x = tl.load(x_ptrs, mask=mask_k[:, None] & (time >= 0)[None, :] & (time < length_in)[None, :], other=0.0)
        if alpha_ptr is not None:
            alpha = tl.load(alpha_ptr + offs_k, mask=mask_k, other=0.0)[:, None]
            beta = tl.load(beta_ptr + offs_k, mask=mask_k, other=1.0)[:, None]
            wide = x.to(tl.float32)
            x = (wide + sin_squared(wide * alpha) / (beta + 1e-9)).to(x.dtype)
        w_ptrs = weight_ptr + (tap * rows + offs_m[:, None]) * channels_in + offs_k[None, :]
        w = tl.load(w_ptrs, mask=(offs_m < rows)[:, None] & mask_k[None, :], other=0.0)
        acc = dot(w, x, acc)

    # (channel, phase; column) to (channel; sample), so that neighboring threads store neighboring samples.
    CHANNELS: tl.constexpr = BLOCK_M // PHASES
    if PHASES > 1:
        acc = tl.permute(tl.reshape(acc, (CHANNELS, PHASES, BLOCK_N)), (0, 2, 1))
        acc = tl.reshape(acc, (CHANNELS, BLOCK_N * PHASES))
    start_c, offs_c = tl.program_id(1).to(tl.int64) * CHANNELS, tl.arange(0, CHANNELS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    offs_q = tl.arange(0, BLOCK_N * PHASES)
    sample = (tl.program_id(0) * BLOCK_N + offs_q // PHASES) * stride + offs_q % PHASES - crop
    mask = (offs_q % PHASES < stride) & (sample >= 0) & (sample < length_out)
    mask = mask[None, :] & (channel < channels_out)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=channel < channels_out, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + (pid_b * stride_rb + start_c * stride_rc)
        residual_ptrs = residual_ptrs + offs_c * stride_rc + sample[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + (pid_b * stride_ob + start_c * stride_oc) + offs_c * stride_oc + sample[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def snake_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    snake: Snake | None = None,
    dilation: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute `snake_conv1d` in plain torch; arithmetic in fp32, or fp64 for an fp64 x.

    Arguments as in `snake_conv1d`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    s = x.to(wide) if snake is None else snake(x.to(wide))
    kernel = weight.permute(1, 2, 0).to(wide)
    y = F.conv1d(s, kernel, None if bias is None else bias.to(wide), dilation=dilation, padding=padding)
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


def pack(weight: Tensor) -> Tensor:
    """Return torch.nn.Conv1d's weight (C_out, C_in, K) in the kernel's layout (K, C_out, C_in), contiguous."""
    return weight.permute(2, 0, 1).contiguous()


def snake_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    snake: Snake | None = None,
    dilation: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return conv1d(snake(x)) + bias + residual, stride 1.

    Args:
        x: (B, C_in, T) fp16 or bf16 (fp32 for checks), any strides over B and C.
        weight: (K, C_out, C_in) from `pack`, the dtype of x.
        bias: (C_out,), the dtype of x or fp32; None: none.
        snake: activation of the input; None: none.
        dilation: distance of the taps in samples.
        padding: zeros added at each end, in samples.
        residual: (B, C_out, T_out), the dtype of x, added to the result; None: none.
        out: (B, C_out, T_out), the dtype of x; None: a new tensor.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, C_out, T_out) with T_out = T + 2 padding - dilation (K - 1).

    Raises:
        InvalidInputError: shapes or dtypes that do not fit.
        BackendUnavailableError: the backend is not available on this device.
    """
    check_tensor("x", x, 3)
    check_tensor("weight", weight, 3, (x.dtype,))
    batch, channels_in, length = x.shape
    taps, channels_out, depth = weight.shape
    check(depth == channels_in, f"weight takes {depth} channels, x has {channels_in}; pack Conv1d's weight with pack()")
    check(dilation >= 1 and padding >= 0, f"dilation={dilation} must be 1 or more and padding={padding} 0 or more")
    length_out = length + 2 * padding - dilation * (taps - 1)
    check(length_out > 0, f"{taps} taps with dilation {dilation} reach over {length} samples with padding {padding}")
    check_convolution(x, weight, bias, snake, residual, out, (batch, channels_out, length_out))
    if not runtime.use_triton(x, backend):
        y = snake_conv1d_reference(x, weight, bias, snake=snake, dilation=dilation, padding=padding, residual=residual)
        return runtime.copy_into(out, y)
    out = torch.empty((batch, channels_out, length_out), dtype=x.dtype, device=x.device) if out is None else out
    geometry = TapGeometry(channels_out, length_out, shift=-padding, step=dilation)
    launch_convolution(x, weight, bias, snake, residual, out, geometry)
    return out


def check_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    snake: Snake | None,
    residual: Tensor | None,
    out: Tensor | None,
    shape: tuple[int, ...],
) -> None:
    """Raise InvalidInputError unless the arguments that both convolutions share fit an output of `shape`.

    Arguments as in `snake_conv1d`.
    """
    check(weight.is_contiguous(), "weight is not contiguous; pack it with pack()")
    check_vector("bias", bias, shape[1], x.dtype, torch.float32)
    if snake is not None:
        snake.check(x.shape[1])
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None:
            check_tensor(name, tensor, 3, (x.dtype,))
            check_shape(name, tensor, shape)
    alpha, beta = (None, None) if snake is None else (snake.alpha, snake.beta)
    check_same_device(x=x, weight=weight, bias=bias, alpha=alpha, beta=beta, residual=residual, out=out)


def launch_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    snake: Snake | None,
    residual: Tensor | None,
    out: Tensor,
    geometry: TapGeometry,
) -> None:
    """Launch the kernel that both convolutions share; weight (taps, rows, C_in). Arguments as in `snake_conv1d`."""
    batch, channels_in, length_in = x.shape
    _, channels_out, length_out = out.shape
    reach = max(tensor.stride(1) for tensor in (x, residual, out) if tensor is not None)
    check(reach < 2**24, f"channels are {reach} samples apart; split the clip, 2^24 is the most")
    # 16 rows are the least that the matrix units take, 64 the least of a Hopper warp group.
    rows, phases = geometry.rows, geometry.phases
    block_m = max(phases, 16, min(64 if x.dtype == torch.float32 else 128, runtime.next_power_of_2(rows)))
    block_n = 32 if x.dtype == torch.float32 else 128
    block_k = max(16, min(32, runtime.next_power_of_2(channels_in)))
    alpha = None if snake is None else snake.alpha
    beta = None if snake is None else snake.alpha if snake.beta is None else snake.beta
    runtime.launch(
        conv_kernel, (runtime.ceil_div(geometry.columns, block_n), runtime.ceil_div(rows, block_m), batch),
        x, weight, bias, alpha, beta, residual, out,
        length_in, length_out, channels_in, channels_out, rows, weight.shape[0],
        geometry.shift, geometry.step, geometry.stride, geometry.crop,
        *x.stride()[:2], *(residual.stride()[:2] if residual is not None else (0, 0)), *out.stride()[:2],
        num_warps=8 if block_m >= 128 else 4, num_stages=2,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, PHASES=phases,
    )  # fmt: skip


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield name and call, on meta tensors, of every configuration that `report` compiles: Oobleck's residual units."""
    for channels, length in ((128, 1_411_200), (256, 705_600), (512, 176_400), (1024, 22_050)):
        x, bias, alpha = meta(1, channels, length), meta(channels), meta(channels, dtype=torch.float32)
        dilated, pointwise = meta(7, channels, channels), meta(1, channels, channels)
        yield (
            f"{channels} dilated",
            partial(snake_conv1d, x, dilated, bias, snake=Snake(alpha), dilation=9, padding=27),
        )
        yield (
            f"{channels} pointwise residual",
            partial(snake_conv1d, x, pointwise, bias, snake=Snake(alpha, alpha), residual=x),
        )
    x, alpha = meta(1, 128, 1_411_200), meta(128, dtype=torch.float32)
    yield "128 to stereo", partial(snake_conv1d, x, meta(7, 2, 128), snake=Snake(alpha), padding=3)


def snake_from(alpha: Tensor | None, beta: Tensor | None) -> Snake | None:
    """Return the activation of a registered operator's alpha and beta; None without alpha."""
    check(alpha is not None or beta is None, "beta goes with alpha; pass both or alpha alone")
    return None if alpha is None else Snake(alpha, beta)


def _snake_conv1d_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    dilation: int = 1,
    padding: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    return snake_conv1d(
        x, weight, bias, snake=snake_from(alpha, beta), dilation=dilation, padding=padding, residual=residual
    ).contiguous()


def _snake_conv1d_fake(
    x: Tensor, weight: Tensor, *_: object, dilation: int = 1, padding: int = 0, **__: object
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1], x.shape[2] + 2 * padding - dilation * (weight.shape[0] - 1)))


register_operator(
    "snake_conv1d(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? alpha=None, Tensor? beta=None, "
    "int dilation=1, int padding=0, Tensor? residual=None) -> Tensor",
    _snake_conv1d_op,
    _snake_conv1d_fake,
)
