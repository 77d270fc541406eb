"""Linear layers with what follows them in a transformer block, in one kernel.

    z = (x W^T) * x_scale * weight_scale + bias
    linear:                 y = act(z)       act: none, GELU (exact or tanh), SiLU; SwiGLU: z = [a, g], y = a * silu(g)
    linear_gate_residual:   r = residual + table[base + gate] * z

x is (batch, tokens, K), W is (N, K) as in torch.nn.Linear, fp16 or bf16, or float8_e4m3fn with a static x_scale (one
number) and a weight_scale (N,). y may be fp8 itself: y / out_scale, saturated. Products accumulate in fp32; fp8 ones
move to fp32 every 128 products. The epilogue saves one write and one read of the result for each operation it takes
in.

cuBLASLt is hard to beat on the product alone. backend="auto" measures both ways once per shape and takes the faster;
"torch" is cuBLASLt with the epilogue in eager torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import runtime
from .choice import Choice
from .runtime import (
    FLOATS,
    FP8,
    check,
    check_out,
    check_rows,
    check_same_device,
    check_shape,
    check_tensor,
    dot,
    jit,
    saturate,
    strides,
    tl,
)  # fmt: skip

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "swiglu")
choice = Choice("gemm")


@jit
def activate(z, ACTIVATION: tl.constexpr):
    """GELU (Hendrycks & Gimpel 2016) and SiLU on fp32; tanh(u) is 2 sigmoid(2u) - 1."""
    if ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        return z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    if ACTIVATION == "silu":
        return z / (1.0 + tl.exp(-z))
    return z


@jit
def gemm_kernel(
    x_ptr, weight_ptr, bias_ptr, weight_scale_ptr, table_ptr, base_ptr, residual_ptr, out_ptr,
    tokens, columns, depth, x_scale, inverse_out_scale, gate, table_row,
    x_batch, x_token, weight_row, residual_batch, residual_token, out_batch, out_token,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Who writes what: program (i, 0, b) writes one BLOCK_M x BLOCK_N tile of batch element b in out_ptr: row block i
    modulo their number, column block i divided by it. So neighbouring programs share a block of weights.
    """
    batch = tl.program_id(2).to(tl.int64)
    row_blocks = tl.cdiv(tokens, BLOCK_M)
    row = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) // row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # rows and columns past the end read the last one again (cheaper than a mask) and are not stored
    x_at = x_ptr + batch * x_batch + tl.minimum(row, tokens - 1)[:, None].to(tl.int64) * x_token + k[None, :]
    w_at = weight_ptr + tl.minimum(column, columns - 1)[None, :].to(tl.int64) * weight_row + k[:, None]
    second = (batch * 0 + columns) * weight_row  # SwiGLU: distance of a gate's weights from its value's
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_gate = tl.zeros((BLOCK_M, BLOCK_N) if ACTIVATION == "swiglu" else (1, 1), tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=start + k[None, :] < depth, other=0.0)
            w = tl.load(w_at, mask=start + k[:, None] < depth, other=0.0)
        acc = dot(x, w, acc)
        if ACTIVATION == "swiglu":
            w = tl.load(w_at + second) if EVEN_K else tl.load(w_at + second, mask=start + k[:, None] < depth, other=0.0)
            acc_gate = dot(x, w, acc_gate)
        x_at += BLOCK_K
        w_at += BLOCK_K

    here = column < columns
    factor = tl.full((BLOCK_N,), 1.0, tl.float32) * x_scale
    if weight_scale_ptr is not None:
        factor *= tl.load(weight_scale_ptr + column, mask=here, other=0.0)
    z = acc * factor[None, :]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=here, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "swiglu":
        factor = tl.full((BLOCK_N,), 1.0, tl.float32) * x_scale
        if weight_scale_ptr is not None:
            factor *= tl.load(weight_scale_ptr + columns + column, mask=here, other=0.0)
        g = acc_gate * factor[None, :]
        if bias_ptr is not None:
            g += tl.load(bias_ptr + columns + column, mask=here, other=0.0).to(tl.float32)[None, :]
        y = z * activate(g, "silu")
    else:
        y = activate(z, ACTIVATION)
    inside = (row[:, None] < tokens) & here[None, :]
    if residual_ptr is not None:
        if table_ptr is not None:
            first = batch * 0
            if base_ptr is not None:
                first = tl.load(base_ptr + batch).to(tl.int64)
            y *= tl.load(table_ptr + (first + gate) * table_row + column, mask=here, other=0.0).to(tl.float32)[None, :]
        at = residual_ptr + batch * residual_batch + row[:, None].to(tl.int64) * residual_token + column[None, :]
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y = saturate(y * inverse_out_scale, LIMIT)
    out = out_ptr + batch * out_batch + row[:, None].to(tl.int64) * out_token + column[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)


_TORCH_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swiglu": lambda z: z.chunk(2, -1)[0] * F.silu(z.chunk(2, -1)[1]),
}


def linear_reference(
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
    """`linear` in plain torch: arithmetic in fp32, or fp64 where x is."""
    wide = torch.promote_types(x.dtype, torch.float32) if x.dtype not in FP8 else torch.float32
    w = weight.to(wide) * x_scale
    if weight_scale is not None:
        w = w * weight_scale.to(wide)[:, None]
    y = _TORCH_ACTIVATIONS[activation](F.linear(x.to(wide), w, None if bias is None else bias.to(wide)))
    return runtime.narrow(y / out_scale, out_dtype or _result_dtype(x))


def linear_gate_residual_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    table: Tensor | None = None,
    *,
    gate: int = 0,
    base: Tensor | None = None,
    x_scale: float = 1.0,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """`linear_gate_residual` in plain torch: arithmetic in fp32, or fp64 where the residual is."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    z = linear_reference(x, weight, bias, x_scale=x_scale, weight_scale=weight_scale, out_dtype=wide)
    if table is not None:
        z = _gate(table, base, gate, wide) * z
    return (residual.to(wide) + z).to(residual.dtype)


def _gate(table: Tensor, base: Tensor | None, gate: int, dtype: torch.dtype) -> Tensor:
    return (table[gate][None, None] if base is None else table[base.long() + gate][:, None]).to(dtype)


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype in FP8 else x.dtype


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, x_scale: float, weight_scale: Tensor | None) -> Tensor:
    """x W^T * scales + bias through cuBLASLt or oneDNN, in the dtype of x (fp8: bf16)."""
    if x.dtype not in FP8:
        if weight_scale is None and x_scale == 1.0:
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        y = F.linear(x, weight) * (x_scale if weight_scale is None else (weight_scale * x_scale).to(x.dtype))
        return y if bias is None else y + bias.to(y.dtype)
    if not x.is_cuda:
        return linear_reference(x, weight, bias, x_scale=x_scale, weight_scale=weight_scale)
    rows = x.flatten(0, -2)
    scale_a = torch.full((rows.shape[0], 1), x_scale, device=x.device)
    scale_b = torch.ones(1, weight.shape[0], device=x.device) if weight_scale is None else weight_scale[None]
    bias = None if bias is None else bias.bfloat16()
    y = torch._scaled_mm(rows, weight.T, scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=torch.bfloat16)
    return y.unflatten(0, x.shape[:-1])


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    x_scale: float = 1.0,
    weight_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out_scale: float = 1.0,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """act((x W^T) x_scale weight_scale + bias) / out_scale.

    x (B, T, K), weight (N, K) of one dtype: fp16, bf16, float8_e4m3fn (fp32 for checks). bias (N,), weight_scale (N,)
    fp32. activation "swiglu" takes weights (2N, K), values before gates. Returns (B, T, N) in x's dtype (bf16 for
    fp8) or out_dtype. Raises InvalidInputError for shapes, dtypes or names that do not fit.
    """
    check(activation in ACTIVATIONS, f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    dtype = out.dtype if out is not None else out_dtype or _result_dtype(x)
    check(dtype in FLOATS + FP8, f"out_dtype={dtype} is not supported; use float32, float16, bfloat16 or float8_e4m3fn")
    check(out_scale > 0, f"out_scale={out_scale} must be positive")
    shape = _check(x, weight, bias, weight_scale, out, dtype, swiglu=activation == "swiglu")

    def fused(out: Tensor | None) -> Tensor:
        scales = {"x_scale": x_scale, "weight_scale": weight_scale, "out_scale": out_scale}
        return _launch(x, weight, bias, out, shape, dtype, activation=activation, **scales)

    def plain(out: Tensor | None) -> Tensor:
        y = _TORCH_ACTIVATIONS[activation](_product(x, weight, bias, x_scale, weight_scale))
        return runtime.filled(out, runtime.narrow(y / out_scale if out_scale != 1.0 else y, dtype))

    return _run(fused, plain, x, weight, out, backend, (activation, bias is None, dtype))


def linear_gate_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    table: Tensor | None = None,
    *,
    gate: int = 0,
    base: Tensor | None = None,
    x_scale: float = 1.0,
    weight_scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """residual + table[base + gate] * (x W^T + bias): the way out of attention and MLP. table=None: no gate.

    residual (B, T, N), any float dtype. table (rows, N), base (B,) int32 as in `adaln`. out may be the residual itself.
    Raises InvalidInputError for anything that does not fit.
    """
    shape = _check(x, weight, bias, weight_scale, out, residual.dtype)
    check_tensor("residual", residual, 3)
    check_shape("residual", residual, shape)
    check_rows(table, base, [] if table is None else [gate], shape[0], shape[2])
    check_same_device(x=x, residual=residual, table=table, base=base)

    def fused(out: Tensor | None) -> Tensor:
        scales = {"x_scale": x_scale, "weight_scale": weight_scale}
        rows = {"table": table, "base": base, "gate": gate}
        return _launch(x, weight, bias, out, shape, residual.dtype, residual=residual, **rows, **scales)

    def plain(out: Tensor | None) -> Tensor:
        z = _product(x, weight, bias, x_scale, weight_scale).to(residual.dtype)
        if table is None:
            return torch.add(residual, z, out=out)
        return torch.addcmul(residual, _gate(table, base, gate, z.dtype), z, out=out)

    return _run(fused, plain, x, weight, out, backend, ("residual", table is None, bias is None, residual.dtype))


def _run(
    fused: Callable[[Tensor | None], Tensor], plain: Callable[[Tensor | None], Tensor], x: Tensor, weight: Tensor,
    out: Tensor | None, backend: str, key: tuple[object, ...],
) -> Tensor:  # fmt: skip
    """Of two ways to fill `out` (None: a new tensor) the one that `backend` names or that is the faster on x's GPU."""
    if not runtime.use_triton(x, backend):
        return plain(out)
    if backend != "auto" or not x.is_cuda:
        return fused(out)

    def ways() -> dict[str, Callable[[], Tensor]]:
        scratch = None if out is None else torch.empty_like(out)  # in place, every run would add once more
        return {"triton": partial(fused, scratch), "torch": partial(plain, scratch)}

    key = (x.dtype, x.shape, x.stride(), weight.shape, out is None, *key)
    return {"triton": fused, "torch": plain}[choice.fastest(x.device, key, ways, "triton")](out)


#: BLOCK_M, BLOCK_N, BLOCK_K in bytes, warps, and how much of the matrix units' rate such a tile reaches, largest first
TILES = (
    (128, 256, 128, 8, 1.0),
    (128, 128, 128, 8, 0.95),
    (128, 64, 128, 4, 0.8),
    (64, 128, 128, 4, 0.8),
    (64, 64, 128, 4, 0.65),
)
MULTIPROCESSORS = {80: 108, 90: 132}


def tile(rows: int, columns: int, batches: int, x: Tensor, swiglu: bool) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages): the tile whose waves over the multiprocessors take least time.

    With a few hundred rows the last wave decides: 700 x 1024 in tiles of 128 x 128 keeps 48 of 132 multiprocessors
    busy.
    """
    if x.dtype == torch.float32:
        return 32, 32, 32, 4, 1  # no matrix units: for checking, not for speed
    arch = 90 if runtime.capability(x) >= 90 else 80
    best, best_time = TILES[-1], float("inf")
    for candidate in TILES[2:] if swiglu else TILES[1:] if arch < 90 else TILES:  # swiglu holds two sums per tile
        m, n, _, _, rate = candidate
        programs = batches * runtime.ceil_div(rows, m) * runtime.ceil_div(columns, n)
        time = runtime.ceil_div(programs, MULTIPROCESSORS[arch]) * m * n / rate
        if time < best_time:
            best, best_time = candidate, time
    m, n, k_bytes, warps, _ = best
    if swiglu:
        warps = 8
    stages = 4 if arch >= 90 and m * n <= 128 * 128 and not swiglu else 3
    return m, n, k_bytes // x.dtype.itemsize, warps, stages


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, *,
    activation: str = "none", x_scale: float = 1.0, weight_scale: Tensor | None = None, out_scale: float = 1.0,
    residual: Tensor | None = None, table: Tensor | None = None, base: Tensor | None = None, gate: int = 0,
) -> Tensor:  # fmt: skip
    runtime.check_fp8(x, x.dtype, dtype)
    result = torch.empty(shape, dtype=dtype, device=x.device) if out is None else out
    batches, tokens, depth = x.shape
    columns, out = shape[2], result
    if residual is None and batches > 1 and x.is_contiguous() and out.is_contiguous():
        # one tall product fills tiles better
        x, out = x.view(1, -1, depth), out.view(1, -1, columns)
        batches, tokens = 1, batches * tokens
    block_m, block_n, block_k, warps, stages = tile(tokens, columns, batches, x, activation == "swiglu")
    programs = runtime.ceil_div(tokens, block_m) * runtime.ceil_div(columns, block_n)
    runtime.launch(
        gemm_kernel, (programs, 1, batches),
        x, weight, bias, weight_scale, table, base, residual, out,
        tokens, columns, depth, float(x_scale), 1.0 / out_scale, gate, table.stride(0) if table is not None else 0,
        *strides(x), weight.stride(0), *strides(residual), *strides(out),
        num_warps=warps, num_stages=stages,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, EVEN_K=depth % block_k == 0,
        ACTIVATION=activation, LIMIT=runtime.fp8_limit(dtype),
    )  # fmt: skip
    return result


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None, out: Tensor | None,
    dtype: torch.dtype, swiglu: bool = False,
) -> tuple[int, ...]:  # fmt: skip
    """The shape of the result, (B, T, N)."""
    check_tensor("x", x, 3, FLOATS + FP8)
    check_tensor("weight", weight, 2, (x.dtype,))
    columns, depth = weight.shape
    check(x.shape[2] == depth, f"x has width {x.shape[2]}, weight takes {depth}")
    if bias is not None:
        check_tensor("bias", bias, 1)
        check_shape("bias", bias, (columns,))
    if weight_scale is not None:
        check_tensor("weight_scale", weight_scale, 1, (torch.float32,))
        check_shape("weight_scale", weight_scale, (columns,))
    if swiglu:
        check(columns % 2 == 0, f"swiglu needs an even number of weight rows, values and gates, not {columns}")
        columns //= 2
    shape = (*x.shape[:2], columns)
    check_out("out", out, shape, dtype)
    check_same_device(x=x, weight=weight, bias=bias, weight_scale=weight_scale, out=out)
    return shape


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, on meta tensors, of every configuration that `report` compiles: the layers of small and medium."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    fp8 = torch.float8_e4m3fn
    for width in (384, 1024, 1536):
        for tokens in (345, 689, 1378):
            x, up, down = empty(1, tokens, width), empty(4 * width, width), empty(width, 4 * width)
            name = f"{tokens}x{width}"
            yield f"{name} qkv", partial(linear, x, empty(3 * width, width))
            yield f"{name} up gelu_tanh", partial(linear, x, up, empty(4 * width), activation="gelu_tanh")
            wide, table = empty(1, tokens, 4 * width), empty(480, width, dtype=torch.float32)
            base = empty(1, dtype=torch.int32)
            residual = partial(linear_gate_residual, wide, down, empty(width), x, table, gate=5, base=base)
            yield f"{name} down gate residual", residual
    x = empty(1, 689, 1024)
    yield "689x1024 swiglu", partial(linear, x, empty(8192, 1024), empty(8192), activation="swiglu")
    yield "689x1024 gelu", partial(linear, x, empty(4096, 1024), empty(4096), activation="gelu")
    if arch >= 89:
        for width in (1024, 1536):
            x8, scale = empty(1, 689, width, dtype=fp8), empty(4 * width, dtype=torch.float32)
            up8, down8 = empty(4 * width, width, dtype=fp8), empty(width, 4 * width, dtype=fp8)
            up = partial(linear, x8, up8, empty(4 * width), x_scale=0.02, weight_scale=scale, activation="gelu_tanh")
            yield f"689x{width} fp8 up gelu_tanh to fp8", partial(up, out_dtype=fp8, out_scale=0.02)
            hidden, residual = empty(1, 689, 4 * width, dtype=fp8), empty(1, 689, width)
            table, scale = empty(480, width, dtype=torch.float32), empty(width, dtype=torch.float32)
            down = partial(linear_gate_residual, hidden, down8, empty(width), residual, table, gate=5)
            yield f"689x{width} fp8 down gate residual", partial(down, x_scale=0.02, weight_scale=scale)
