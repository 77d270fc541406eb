"""Transposed one-dimensional convolution (upsampling) with Snake on its input: a product with rows (channel, phase).

    y[q stride + r - padding] = sum_j W[:, :, r + j stride] s[q - j] + bias,      r = 0 ... stride - 1

s is Snake of x, as in `snake_conv1d`. The overlap-add is the sum over j inside one program: each output sample gathers
the ceil(K / stride) inputs that reach it, so nothing is added atomically. The phases of one input time are interleaved
before the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import runtime
from .checks import check, check_tensor
from .registration import register_operator
from .runtime import meta
from .snake_conv1d import Snake, TapGeometry, check_convolution, launch_convolution, snake_from


def pack(weight: Tensor, stride: int) -> Tensor:
    """Return torch.nn.ConvTranspose1d's weight (C_in, C_out, K) in the kernel's layout, contiguous.

    The layout is (ceil(K / stride), C_out * P, C_in), P the smallest power of two >= stride; taps and phases that do
    not exist are zero.
    """
    channels_in, channels_out, size = weight.shape
    taps, phases = runtime.ceil_div(size, stride), runtime.next_power_of_2(stride)
    padded = F.pad(weight, (0, taps * stride - size)).reshape(channels_in, channels_out, taps, stride)
    padded = F.pad(padded, (0, phases - stride))
    return padded.permute(2, 1, 3, 0).reshape(taps, channels_out * phases, channels_in).contiguous()


def unpack(packed: Tensor, stride: int, size: int) -> Tensor:
    """Return the inverse of `pack`: (C_in, C_out, size)."""
    taps, rows, channels_in = packed.shape
    phases = runtime.next_power_of_2(stride)
    split = packed.reshape(taps, rows // phases, phases, channels_in)[:, :, :stride]
    return split.permute(3, 1, 0, 2).flatten(2)[..., :size]


def conv_transpose1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int,
    kernel_size: int,
    padding: int = 0,
    output_padding: int = 0,
    snake: Snake | None = None,
) -> Tensor:
    """Compute `conv_transpose1d` in plain torch; arithmetic in fp32, or fp64 for an fp64 x.

    Arguments as in `conv_transpose1d`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    s = x.to(wide) if snake is None else snake(x.to(wide))
    kernel = unpack(weight, stride, kernel_size).to(wide)
    y = F.conv_transpose1d(s, kernel, None if bias is None else bias.to(wide), stride, padding, output_padding)
    return y.to(x.dtype)


def conv_transpose1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int,
    kernel_size: int,
    padding: int = 0,
    output_padding: int = 0,
    snake: Snake | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return conv_transpose1d(snake(x)) + bias, with the geometry of torch.nn.ConvTranspose1d.

    Args:
        x: (B, C_in, T) fp16 or bf16 (fp32 for checks), any strides over B and C.
        weight: from `pack(w, stride)`, the dtype of x.
        bias: (C_out,), the dtype of x or fp32; None: none.
        stride: output samples per input sample, 1 to 64.
        kernel_size: K of the unpacked weight.
        padding: samples cut at each end.
        output_padding: samples added at the end, less than the stride.
        snake: activation of the input; None: none.
        out: (B, C_out, T_out), the dtype of x; None: a new tensor.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, C_out, T_out) with T_out = (T - 1) stride - 2 padding + kernel_size + output_padding.

    Raises:
        InvalidInputError: shapes, dtypes or geometry that do not fit.
        BackendUnavailableError: the backend is not available on this device.
    """
    check_tensor("x", x, 3)
    check_tensor("weight", weight, 3, (x.dtype,))
    check(1 <= stride <= 64, f"stride={stride} must lie in 1..64")
    check(kernel_size >= 1 and padding >= 0, f"kernel_size={kernel_size} and padding={padding} must not be negative")
    check(0 <= output_padding < stride, f"output_padding={output_padding} must be less than the stride {stride}")
    batch, channels_in, length = x.shape
    taps, rows, depth = weight.shape
    phases = runtime.next_power_of_2(stride)
    check(depth == channels_in, f"weight takes {depth} channels, x has {channels_in}; pack it with pack(w, stride)")
    fits = taps == runtime.ceil_div(kernel_size, stride) and rows % phases == 0
    check(fits, f"weight was not packed for kernel_size {kernel_size} and stride {stride}; use pack(w, stride)")
    length_out = (length - 1) * stride - 2 * padding + kernel_size + output_padding
    check(length_out > 0, f"padding={padding} leaves no samples; make it smaller")
    shape = (batch, rows // phases, length_out)
    check_convolution(x, weight, bias, snake, None, out, shape)
    if not runtime.use_triton(x, backend):
        y = conv_transpose1d_reference(
            x,
            weight,
            bias,
            stride=stride,
            kernel_size=kernel_size,
            padding=padding,
            output_padding=output_padding,
            snake=snake,
        )
        return runtime.copy_into(out, y)
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    columns = runtime.ceil_div(length_out + padding, stride)
    geometry = TapGeometry(rows, columns, shift=0, step=-1, stride=stride, crop=padding, phases=phases)
    launch_convolution(x, weight, bias, snake, None, out, geometry)
    return out


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield name and call, on meta tensors, of every configuration that `report` compiles: Oobleck's upsampling."""
    for channels, stride, length in ((2048, 8, 690), (1024, 8, 5_520), (512, 4, 44_100), (256, 2, 176_400)):
        snake = Snake(meta(channels, dtype=torch.float32), meta(channels, dtype=torch.float32))
        call = partial(
            conv_transpose1d,
            meta(1, channels, length),
            meta(2, channels // 2 * stride, channels),
            meta(channels // 2),
            stride=stride,
            kernel_size=2 * stride,
            padding=stride // 2,
            snake=snake,
        )
        yield f"{channels} x{stride}", call
    x, weight = meta(1, 512, 4_000), meta(2, 256 * 8, 512)
    yield "512 x5", partial(conv_transpose1d, x, weight, stride=5, kernel_size=10, padding=3, output_padding=1)


def _conv_transpose1d_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int,
    kernel_size: int,
    padding: int = 0,
    output_padding: int = 0,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    return conv_transpose1d(
        x,
        weight,
        bias,
        stride=stride,
        kernel_size=kernel_size,
        padding=padding,
        output_padding=output_padding,
        snake=snake_from(alpha, beta),
    ).contiguous()


def _conv_transpose1d_fake(
    x: Tensor,
    weight: Tensor,
    *_: object,
    stride: int,
    kernel_size: int,
    padding: int = 0,
    output_padding: int = 0,
    **__: object,
) -> Tensor:
    channels = weight.shape[1] // runtime.next_power_of_2(stride)
    return x.new_empty((x.shape[0], channels, (x.shape[2] - 1) * stride - 2 * padding + kernel_size + output_padding))


register_operator(
    "conv_transpose1d(Tensor x, Tensor weight, Tensor? bias=None, *, int stride, int kernel_size, int padding=0, "
    "int output_padding=0, Tensor? alpha=None, Tensor? beta=None) -> Tensor",
    _conv_transpose1d_op,
    _conv_transpose1d_fake,
)
