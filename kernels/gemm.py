"""Linear layer with activation and fp8 scales in the epilogue of one kernel.

    y = act((x W^T) * x_scale * weight_scale + bias) / out_scale            act: none or tanh GELU

x is (B, T, K) and W is (N, K), as in torch.nn.Linear: fp16, bf16, or float8_e4m3fn with a static x_scale (one number)
and a weight_scale (N,). y may be fp8 itself, saturated. Products accumulate in fp32; partial sums of fp8 products are
promoted to fp32 every 128 products. The epilogue saves one write and one read of the result per fused operation.

cuBLASLt is hard to beat on the product alone: backend="auto" measures both once per shape and takes the faster.
"torch" is cuBLASLt (oneDNN on a CPU) with the epilogue in eager torch.

Source: Hendrycks & Gimpel 2016, GELU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import runtime
from .autotune import KernelSelector
from .checks import FLOATS, FP8, check, check_fp8, check_out, check_same_device, check_tensor, check_vector
from .registration import register_operator
from .runtime import dot, jit, meta, saturate, strides, tl

ACTIVATIONS = ("none", "gelu_tanh")
selector = KernelSelector("gemm")


@dataclass(frozen=True)
class Fp8Scales:
    """Static scales of a product, all 1 by default.

    x_scale: factor of x's stored numbers. weight_scale: (N,) fp32, factor of each output's weights; None: 1.
    out_scale: positive divisor of the result.
    """

    x_scale: float = 1.0
    weight_scale: Tensor | None = None
    out_scale: float = 1.0


UNIT_SCALES = Fp8Scales()


@jit
def activate(z, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Apply the activation to fp32 numbers; tanh(u) is 2 sigmoid(2u) - 1."""
    if ACTIVATION == "gelu_tanh":
        return z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    return z


@jit
def gemm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    weight_scale_ptr,
    out_ptr,
    M,
    N,
    K,
    x_scale,
    inv_out_scale,
    stride_xb,
    stride_xm,
    stride_wn,
    stride_ob,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Compute one BLOCK_M x BLOCK_N tile of the linear layer.

    Writes: program (i, 0, b) writes the tile of row block i % cdiv(M, BLOCK_M) and column block i // cdiv(M, BLOCK_M)
    of batch element b in out_ptr. Neighboring programs share a block of weights.
    """
    pid_b = tl.program_id(2).to(tl.int64)
    num_pid_m = tl.cdiv(M, BLOCK_M)
    offs_m = tl.program_id(0) % num_pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) // num_pid_m * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read the last one again, which is cheaper than a mask, and are not stored.
    x_ptrs = x_ptr + pid_b * stride_xb + tl.minimum(offs_m, M - 1)[:, None].to(tl.int64) * stride_xm + offs_k[None, :]
    w_ptrs = weight_ptr + tl.minimum(offs_n, N - 1)[None, :].to(tl.int64) * stride_wn + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=start_k + offs_k[None, :] < K, other=0.0)
            w = tl.load(w_ptrs, mask=start_k + offs_k[:, None] < K, other=0.0)
        acc = dot(x, w, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    mask_n = offs_n < N
    factor = tl.full((BLOCK_N,), 1.0, tl.float32) * x_scale
    if weight_scale_ptr is not None:
        factor *= tl.load(weight_scale_ptr + offs_n, mask=mask_n, other=0.0)
    z = acc * factor[None, :]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y = saturate(activate(z, ACTIVATION) * inv_out_scale, LIMIT)
    out_ptrs = out_ptr + pid_b * stride_ob + offs_m[:, None].to(tl.int64) * stride_om + offs_n[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & mask_n[None, :])


def _activate_torch(z: Tensor, activation: str) -> Tensor:
    return F.gelu(z, approximate="tanh") if activation == "gelu_tanh" else z


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    scales: Fp8Scales = UNIT_SCALES,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute `linear` in plain torch; arithmetic in fp32, or fp64 for an fp64 x. Arguments as in `linear`."""
    wide = torch.promote_types(x.dtype, torch.float32) if x.dtype not in FP8 else torch.float32
    w = weight.to(wide) * scales.x_scale
    if scales.weight_scale is not None:
        w = w * scales.weight_scale.to(wide)[:, None]
    y = _activate_torch(F.linear(x.to(wide), w, None if bias is None else bias.to(wide)), activation)
    return runtime.saturating_cast(y / scales.out_scale, out_dtype or _default_out_dtype(x))


def _default_out_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype in FP8 else x.dtype


def _library_product(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Fp8Scales) -> Tensor:
    """Return x W^T * x_scale * weight_scale + bias by cuBLASLt or oneDNN, in the dtype of x (bf16 for fp8)."""
    x_scale, weight_scale = scales.x_scale, scales.weight_scale
    if x.dtype not in FP8:
        if weight_scale is None and x_scale == 1.0:
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        y = F.linear(x, weight) * (x_scale if weight_scale is None else (weight_scale * x_scale).to(x.dtype))
        return y if bias is None else y + bias.to(y.dtype)
    if not x.is_cuda:
        return linear_reference(x, weight, bias, scales=Fp8Scales(x_scale, weight_scale))
    rows = x.flatten(0, -2)
    scale_a = torch.full((rows.shape[0], 1), x_scale, device=x.device)
    scale_b = torch.ones(1, weight.shape[0], device=x.device) if weight_scale is None else weight_scale[None]
    bias = None if bias is None else bias.bfloat16()
    y = torch._scaled_mm(rows, weight.T, scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=torch.bfloat16)
    return y.view(*x.shape[:-1], -1)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    scales: Fp8Scales = UNIT_SCALES,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return act((x W^T) * x_scale * weight_scale + bias) / out_scale.

    Args:
        x: (B, T, K) fp16, bf16 or float8_e4m3fn (fp32 for checks).
        weight: (N, K), the dtype of x.
        bias: (N,), any float dtype, or None.
        activation: "none" or "gelu_tanh".
        scales: static scales of x, weight and result; default 1.
        out_dtype: default the dtype of x, bf16 for fp8. float8_e4m3fn is saturated.
        out: (B, T, N) output; its dtype takes precedence over `out_dtype`. None: a new tensor.
        backend: "auto" (the faster of both on a GPU, measured once per shape), "triton" or "torch".

    Returns:
        (B, T, N).

    Raises:
        InvalidInputError: shapes, dtypes or names that do not fit.
        BackendUnavailableError: the backend, or fp8, is not available on this device.
    """
    check(activation in ACTIVATIONS, f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    dtype = out.dtype if out is not None else out_dtype or _default_out_dtype(x)
    check(dtype in FLOATS + FP8, f"out_dtype={dtype} is not supported; use float32, float16, bfloat16 or float8_e4m3fn")
    _check(x, weight, bias, scales, out, dtype)

    def triton_linear(out: Tensor | None) -> Tensor:
        return _launch(x, weight, bias, activation, scales, out, dtype)

    def torch_linear(out: Tensor | None) -> Tensor:
        y = _activate_torch(_library_product(x, weight, bias, scales), activation)
        y = y / scales.out_scale if scales.out_scale != 1.0 else y
        return runtime.copy_into(out, runtime.saturating_cast(y, dtype))

    if not runtime.use_triton(x, backend):
        return torch_linear(out)
    if backend != "auto" or not x.is_cuda:
        return triton_linear(out)

    def candidates() -> dict[str, Callable[[], Tensor]]:
        scratch = None if out is None else torch.empty_like(out)
        return {"triton": partial(triton_linear, scratch), "torch": partial(torch_linear, scratch)}

    key = (x.dtype, x.shape, x.stride(), weight.shape, out is None, activation, bias is None, dtype)
    fastest = selector.fastest(x.device, key, candidates, "triton")
    return triton_linear(out) if fastest == "triton" else torch_linear(out)


#: BLOCK_M, BLOCK_N, bytes of BLOCK_K, num_warps, share of the matrix units' rate that the tile reaches; largest first.
TILES = (
    (128, 256, 128, 8, 1.0),
    (128, 128, 128, 8, 0.95),
    (128, 64, 128, 4, 0.8),
    (64, 128, 128, 4, 0.8),
    (64, 64, 128, 4, 0.65),
)
MULTIPROCESSORS = {80: 108, 90: 132}


def tile(rows: int, columns: int, batches: int, x: Tensor) -> tuple[int, int, int, int, int]:
    """Return (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) of the tile with the least estimated time.

    The estimate is waves over the multiprocessors times tile size over rate. With a few hundred rows the last wave
    decides: 700 x 1024 in tiles of 128 x 128 occupies 48 of 132 multiprocessors.
    """
    if x.dtype == torch.float32:
        return 32, 32, 32, 4, 1  # no matrix units: for checking, not for speed
    arch = 90 if runtime.capability(x) >= 90 else 80
    best, best_time = TILES[-1], float("inf")
    for candidate in TILES[1:] if arch < 90 else TILES:
        m, n, _, _, rate = candidate
        programs = batches * runtime.ceil_div(rows, m) * runtime.ceil_div(columns, n)
        time = runtime.ceil_div(programs, MULTIPROCESSORS[arch]) * m * n / rate
        if time < best_time:
            best, best_time = candidate, time
    m, n, k_bytes, num_warps, _ = best
    return m, n, k_bytes // x.dtype.itemsize, num_warps, 4 if arch >= 90 and m * n <= 128 * 128 else 3


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    scales: Fp8Scales,
    out: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    check_fp8(x, x.dtype, dtype)
    batches, tokens, depth = x.shape
    columns = weight.shape[0]
    result = torch.empty((batches, tokens, columns), dtype=dtype, device=x.device) if out is None else out
    target = result
    if batches > 1 and x.is_contiguous() and target.is_contiguous():
        # One tall product fills tiles better.
        x, target = x.view(1, -1, depth), target.view(1, -1, columns)
        batches, tokens = 1, batches * tokens
    block_m, block_n, block_k, num_warps, num_stages = tile(tokens, columns, batches, x)
    programs = runtime.ceil_div(tokens, block_m) * runtime.ceil_div(columns, block_n)
    runtime.launch(
        gemm_kernel, (programs, 1, batches),
        x, weight, bias, scales.weight_scale, target,
        tokens, columns, depth, float(scales.x_scale), 1.0 / scales.out_scale,
        *strides(x), weight.stride(0), *strides(target),
        num_warps=num_warps, num_stages=num_stages,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, EVEN_K=depth % block_k == 0,
        ACTIVATION=activation, LIMIT=runtime.fp8_limit(dtype),
    )  # fmt: skip
    return result


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Fp8Scales, out: Tensor | None, dtype: torch.dtype
) -> None:
    check(scales.out_scale > 0, f"out_scale={scales.out_scale} must be positive")
    check_tensor("x", x, 3, FLOATS + FP8)
    check_tensor("weight", weight, 2, (x.dtype,))
    columns, depth = weight.shape
    check(x.shape[2] == depth, f"x has width {x.shape[2]}, weight takes {depth}")
    check_vector("bias", bias, columns)
    check_vector("weight_scale", scales.weight_scale, columns, torch.float32)
    check_out("out", out, (*x.shape[:2], columns), dtype)
    check_same_device(x=x, weight=weight, bias=bias, weight_scale=scales.weight_scale, out=out)


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield name and call, on meta tensors, of every configuration that `report` compiles: the presets' layers."""
    fp8 = torch.float8_e4m3fn
    for width in (384, 1024, 1536):
        for tokens in (345, 689, 1378):
            x, up, down = meta(1, tokens, width), meta(4 * width, width), meta(width, 4 * width)
            name = f"{tokens}x{width}"
            yield f"{name} qkv", partial(linear, x, meta(3 * width, width))
            yield f"{name} up gelu_tanh", partial(linear, x, up, meta(4 * width), activation="gelu_tanh")
            yield f"{name} down", partial(linear, meta(1, tokens, 4 * width), down, meta(width))
    if arch >= 89:
        for width in (1024, 1536):
            x, up, down = (
                meta(1, 689, width, dtype=fp8),
                meta(4 * width, width, dtype=fp8),
                meta(width, 4 * width, dtype=fp8),
            )
            scales = Fp8Scales(0.02, meta(4 * width, dtype=torch.float32), 0.02)
            fp8_up = partial(linear, x, up, meta(4 * width), activation="gelu_tanh", scales=scales, out_dtype=fp8)
            yield f"689x{width} fp8 up gelu_tanh to fp8", fp8_up
            scales = Fp8Scales(0.02, meta(width, dtype=torch.float32))
            fp8_down = partial(linear, meta(1, 689, 4 * width, dtype=fp8), down, meta(width), scales=scales)
            yield f"689x{width} fp8 down", fp8_down


def _linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    x_scale: float = 1.0,
    weight_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out_scale: float = 1.0,
) -> Tensor:
    scales = Fp8Scales(x_scale, weight_scale, out_scale)
    return linear(x, weight, bias, activation=activation, scales=scales, out_dtype=out_dtype)


def _linear_fake(x: Tensor, weight: Tensor, *_: object, out_dtype: torch.dtype | None = None, **__: object) -> Tensor:
    return x.new_empty((*x.shape[:2], weight.shape[0]), dtype=out_dtype or _default_out_dtype(x))


register_operator(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, *, str activation='none', float x_scale=1.0, "
    "Tensor? weight_scale=None, ScalarType? out_dtype=None, float out_scale=1.0) -> Tensor",
    _linear_op,
    _linear_fake,
)
