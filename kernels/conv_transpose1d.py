"""Transposed one-dimensional convolution (upsampling), with Snake on its way in: a matrix product whose rows are
(channel, phase).

    y[q stride + r - padding] = sum_j W[:, :, r + j stride] s[q - j] + bias
    r = 0 ... stride - 1, s as in snake_conv1d

The overlap-add happens in the sum over j, inside one program: each output sample gathers the ceil(K / stride) inputs
that reach it, and nothing is added atomically. The stride phases of a time are put side by side before the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import runtime
from .runtime import check, check_tensor
from .snake_conv1d import prepare, run, snake_reference


def pack(weight: Tensor, stride: int) -> Tensor:
    """torch.nn.ConvTranspose1d's weight (C_in, C_out, K) as the kernel reads it. Once, at load.

    (ceil(K / stride), C_out * P, C_in), P the power of two from stride up; taps and phases that do not exist are zero.
    """
    channels_in, channels_out, size = weight.shape
    taps, phases = runtime.ceil_div(size, stride), runtime.next_power_of_2(stride)
    padded = F.pad(weight, (0, taps * stride - size)).unflatten(-1, (taps, stride))  # C_in, C_out, j, r
    padded = F.pad(padded, (0, phases - stride))
    return padded.permute(2, 1, 3, 0).reshape(taps, channels_out * phases, channels_in).contiguous()


def unpack(packed: Tensor, stride: int, size: int) -> Tensor:
    """The inverse of `pack`: (C_in, C_out, size)."""
    phases = runtime.next_power_of_2(stride)
    split = packed.unflatten(1, (-1, phases))[:, :, :stride]  # j, C_out, r, C_in
    return split.permute(3, 1, 0, 2).flatten(2)[..., :size]


def conv_transpose1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int, kernel_size: int, padding: int = 0,
    output_padding: int = 0, alpha: Tensor | None = None, beta: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`conv_transpose1d` in plain torch, with packed weights; arithmetic in fp32, or fp64 where x is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    s = x.to(wide) if alpha is None else snake_reference(x.to(wide), alpha, beta)
    kernel = unpack(weight, stride, kernel_size).to(wide)
    y = F.conv_transpose1d(s, kernel, None if bias is None else bias.to(wide), stride, padding, output_padding)
    return y.to(x.dtype)


def conv_transpose1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int, kernel_size: int, padding: int = 0,
    output_padding: int = 0, alpha: Tensor | None = None, beta: Tensor | None = None, out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """conv_transpose1d(snake(x)) + bias, as torch.nn.ConvTranspose1d(C_in, C_out, kernel_size, stride, padding,
    output_padding).

    x (B, C_in, T) fp16 or bf16 (fp32 for checks); weight from `pack(w, stride)`, same dtype; alpha, beta as in
    snake_conv1d. Returns (B, C_out, (T - 1) stride - 2 padding + kernel_size + output_padding). Raises InvalidInputError
    for what does not fit.
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
    out = prepare(x, weight, bias, alpha, beta, None, out, (batch, rows // phases, length_out))
    if not runtime.use_triton(x, backend):
        geometry = {"stride": stride, "kernel_size": kernel_size, "padding": padding, "output_padding": output_padding}
        return out.copy_(conv_transpose1d_reference(x, weight, bias, alpha=alpha, beta=beta, **geometry))
    columns = runtime.ceil_div(length_out + padding, stride)
    run(
        x, weight, bias, alpha, beta, None, out,
        rows=rows, columns=columns, shift=0, step=-1, stride=stride, crop=padding, phases=phases,
    )  # fmt: skip
    return out


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, on meta tensors, of every configuration that `report` compiles: the upsampling of an Oobleck
    decoder.
    """
    meta = {"device": "meta"}
    for channels, stride, length in ((2048, 8, 690), (1024, 8, 5_520), (512, 4, 44_100), (256, 2, 176_400)):
        x = torch.empty(1, channels, length, dtype=torch.bfloat16, **meta)
        weight = torch.empty(2, channels // 2 * stride, channels, dtype=torch.bfloat16, **meta)
        bias, alpha = torch.empty(channels // 2, dtype=torch.bfloat16, **meta), torch.empty(channels, **meta)
        geometry = {"stride": stride, "kernel_size": 2 * stride, "padding": stride // 2}
        yield f"{channels} x{stride}", partial(conv_transpose1d, x, weight, bias, alpha=alpha, beta=alpha, **geometry)
    x = torch.empty(1, 512, 4_000, dtype=torch.bfloat16, **meta)
    weight = torch.empty(2, 256 * 8, 512, dtype=torch.bfloat16, **meta)
    yield "512 x5", partial(conv_transpose1d, x, weight, stride=5, kernel_size=10, padding=3, output_padding=1)
