"""Adaptive normalisation of a diffusion transformer (Peebles & Xie 2023, "DiT", adaLN-Zero), with the residual folded
in.

    n(r) = (r - mean r) / sqrt(var r + eps)            norm="layer"
    n(r) = r / sqrt(mean r^2 + eps)                    norm="rms"      (Zhang & Sennrich 2019)
    y    = n(r) * weight * (1 + scale) + shift         norm_modulate:                 r = x
    r    = residual + gate * branch                    gate_residual_norm_modulate:   returns r and y

gate=None stands for 1 (a branch without a gate), shift=scale=None for no modulation.

shift, scale and gate are rows of one table (rows, width), computed for all steps and blocks before the first step.
Batch element b reads row `base[b] + shift` and so on: `base` (int32, on the device) may change between replays of a
captured graph, the offsets are constants. y may be fp8: y / out_scale, saturated.

Statistics and arithmetic are fp32 whatever the inputs; each input is read once, each output written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import runtime
from .runtime import (
    FLOATS,
    FP8,
    check,
    check_out,
    check_rows,
    check_same_device,
    check_shape,
    check_tensor,
    jit,
    saturate,
    strides,
    tl,
)  # fmt: skip

NORMS = ("layer", "rms")


@partial(jit, varying=("gate", "shift", "scale"))
def adaln_kernel(
    x_ptr, branch_ptr, table_ptr, base_ptr, weight_ptr, residual_ptr, out_ptr,
    tokens, x_batch, x_token, branch_batch, branch_token, residual_batch, residual_token, out_batch, out_token,
    table_row, gate, shift, scale, eps, inverse_out_scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr, FUSED: tl.constexpr,
    GATED: tl.constexpr, MODULATED: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Who writes what: program (i, b) writes tokens i*ROWS ... of batch element b, whole rows, in residual_ptr (where
    FUSED) and in out_ptr.
    """
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens) & (column < WIDTH)

    row = batch * 0  # int64: a table may hold more than 2^31 numbers
    if base_ptr is not None:
        row = tl.load(base_ptr + batch).to(tl.int64)
    r = tl.load(x_ptr + batch * x_batch + token * x_token + column, mask=inside, other=0.0).to(tl.float32)
    if FUSED:
        branch = tl.load(branch_ptr + batch * branch_batch + token * branch_token + column, mask=inside, other=0.0).to(
            tl.float32
        )
        if GATED:
            branch *= tl.load(table_ptr + (row + gate) * table_row + column, mask=column < WIDTH, other=0.0).to(
                tl.float32
            )
        r += branch
        stored = r.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + batch * residual_batch + token * residual_token + column, stored, mask=inside)
        r = stored.to(tl.float32)  # what later readers of the residual see is what is normalised here

    if CENTRED:
        r = tl.where(column < WIDTH, r - tl.sum(r, axis=1, keep_dims=True) / WIDTH, 0.0)
    y = r * tl.rsqrt(tl.sum(r * r, axis=1, keep_dims=True) / WIDTH + eps)
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if MODULATED:
        offset = tl.load(table_ptr + (row + shift) * table_row + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        factor = tl.load(table_ptr + (row + scale) * table_row + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        y = y * (1.0 + factor) + offset
    y = saturate(y * inverse_out_scale, LIMIT)
    tl.store(out_ptr + batch * out_batch + token * out_token + column, y.to(out_ptr.dtype.element_ty), mask=inside)


def norm_modulate_reference(
    x: Tensor,
    table: Tensor | None = None,
    *,
    shift: int | None = None,
    scale: int | None = None,
    base: Tensor | None = None,
    weight: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    out_scale: float = 1.0,
) -> Tensor:
    """`norm_modulate` in plain torch: arithmetic in fp32, or fp64 where x is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(wide)
    if table is not None and shift is not None and scale is not None:
        y = y * (1 + _rows(table, base, scale).to(wide)) + _rows(table, base, shift).to(wide)
    return runtime.narrow(y / out_scale, out_dtype or x.dtype)


def gate_residual_norm_modulate_reference(
    residual: Tensor,
    branch: Tensor,
    table: Tensor | None = None,
    *,
    gate: int | None = None,
    base: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`gate_residual_norm_modulate` in plain torch, arithmetic in fp32 (fp64); options: those of `norm_modulate`."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    gated = branch.to(wide) if table is None or gate is None else _rows(table, base, gate).to(wide) * branch.to(wide)
    r = (residual.to(wide) + gated).to(residual.dtype)
    return r, norm_modulate_reference(r, table, base=base, out_dtype=out_dtype or branch.dtype, **options)


def _rows(table: Tensor, base: Tensor | None, offset: int) -> Tensor:
    """(1 or B, 1, width): the row each batch element reads."""
    return table[offset][None, None] if base is None else table[base.long() + offset][:, None]


def norm_modulate(
    x: Tensor,
    table: Tensor | None = None,
    *,
    shift: int | None = None,
    scale: int | None = None,
    base: Tensor | None = None,
    weight: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    out_scale: float = 1.0,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """n(x) * weight * (1 + table[base + scale]) + table[base + shift].

    x (B, T, D) fp32, fp16 or bf16, any strides over B and T. table (rows, D), or None for the plain norm. base (B,)
    int32, default 0. weight (D,). out_dtype: x's by default, or torch.float8_e4m3fn with its static out_scale.
    Returns (B, T, D). Raises InvalidInputError for shapes, dtypes or row offsets that do not fit.
    """
    out_dtype = out.dtype if out is not None else out_dtype or x.dtype
    _check(x, None, table, None, shift, scale, base, weight, norm, out_dtype, out_scale, None, out)
    if runtime.use_triton(x, backend):
        return _launch(x, None, table, None, shift, scale, base, weight, norm, eps, out_dtype, out_scale, None, out)[1]
    result = norm_modulate_reference(
        x, table, shift=shift, scale=scale, base=base, weight=weight, norm=norm, eps=eps, out_dtype=out_dtype,
        out_scale=out_scale,
    )  # fmt: skip
    return runtime.filled(out, result)


def gate_residual_norm_modulate(
    residual: Tensor,
    branch: Tensor,
    table: Tensor | None = None,
    *,
    gate: int | None = None,
    shift: int | None = None,
    scale: int | None = None,
    base: Tensor | None = None,
    weight: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    out_scale: float = 1.0,
    residual_out: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """r = residual + table[base + gate] * branch, and y = n(r) * weight * (1 + table[base + scale]) + table[base +
    shift].

    residual, branch (B, T, D); they may differ in dtype (an fp32 residual stream). table (rows, D). gate=None: 1.
    residual_out may be `residual` itself. Returns (r in the residual's dtype, y in the branch's dtype or out_dtype).
    Raises InvalidInputError as `norm_modulate` does.
    """
    out_dtype = out.dtype if out is not None else out_dtype or branch.dtype
    rows = (gate, shift, scale, base)
    _check(residual, branch, table, *rows, weight, norm, out_dtype, out_scale, residual_out, out)
    if runtime.use_triton(residual, backend):
        return _launch(
            residual, branch, table, *rows, weight, norm, eps, out_dtype, out_scale, residual_out, out
        )  # fmt: skip
    r, y = gate_residual_norm_modulate_reference(
        residual, branch, table, gate=gate, shift=shift, scale=scale, base=base, weight=weight, norm=norm, eps=eps,
        out_dtype=out_dtype, out_scale=out_scale,
    )  # fmt: skip
    return runtime.filled(residual_out, r), runtime.filled(out, y)


def _launch(
    x: Tensor, branch: Tensor | None, table: Tensor | None, gate: int | None, shift: int | None, scale: int | None,
    base: Tensor | None, weight: Tensor | None, norm: str, eps: float, out_dtype: torch.dtype, out_scale: float,
    residual_out: Tensor | None, out: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(residual_out or x, out), made where they are None."""
    batch, tokens, width = x.shape
    runtime.check_fp8(x, out_dtype)
    if branch is not None and residual_out is None:
        residual_out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out is None:
        out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    block = runtime.next_power_of_2(width)
    rows = max(1, min(16, 1024 // block))  # narrow rows share a program, so that a warp reads whole cache lines
    runtime.launch(
        adaln_kernel, (runtime.ceil_div(tokens, rows), batch),
        x, branch, table, base, weight, residual_out, out,
        tokens, *strides(x), *strides(branch), *strides(residual_out), *strides(out),
        table.stride(0) if table is not None else 0, gate or 0, shift or 0, scale or 0, eps, 1.0 / out_scale,
        num_warps=8 if block > 1024 else 4,
        WIDTH=width, BLOCK=block, ROWS=rows, CENTRED=norm == "layer", FUSED=branch is not None, GATED=gate is not None,
        MODULATED=scale is not None, LIMIT=runtime.fp8_limit(out.dtype),
    )  # fmt: skip
    return x if residual_out is None else residual_out, out


def _check(
    x: Tensor, branch: Tensor | None, table: Tensor | None, gate: int | None, shift: int | None, scale: int | None,
    base: Tensor | None, weight: Tensor | None, norm: str, out_dtype: torch.dtype, out_scale: float,
    residual_out: Tensor | None, out: Tensor | None,
) -> None:  # fmt: skip
    check_tensor("x" if branch is None else "residual", x, 3)
    batch, _, width = x.shape
    if branch is not None:
        check_tensor("branch", branch, 3)
        check_shape("branch", branch, tuple(x.shape))
    check(norm in NORMS, f"norm={norm!r} is unknown; use 'layer' or 'rms'")
    check(width <= 16384, f"width {width} is over 16384, the widest row that one program holds")
    check(
        out_dtype in FLOATS + FP8,
        f"out_dtype={out_dtype} is not supported; use float32, float16, bfloat16 or float8_e4m3fn",
    )
    check(out_scale > 0, f"out_scale={out_scale} must be positive")
    check((shift is None) == (scale is None), "shift and scale go together; give both or neither")
    check_rows(table, base, [row for row in (gate, shift, scale) if row is not None], batch, width)
    if weight is not None:
        check_tensor("weight", weight, 1)
        check_shape("weight", weight, (width,))
    check_out("residual_out", residual_out, tuple(x.shape), x.dtype)
    check_out("out", out, tuple(x.shape), out_dtype)
    check_same_device(x=x, branch=branch, table=table, base=base, weight=weight, residual_out=residual_out, out=out)


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, on meta tensors, of every configuration that `report` compiles: widths of nano, small and
    medium.
    """
    meta = {"device": "meta"}
    for width in (384, 1024, 1536):
        x = torch.empty(1, 689, width, dtype=torch.bfloat16, **meta)
        table = torch.empty(480, width, **meta)
        base = torch.empty(1, dtype=torch.int32, **meta)
        rows = {"shift": 3, "scale": 4, "base": base}
        yield f"norm_modulate {width}", partial(norm_modulate, x, table, **rows)
        yield f"gate_residual_norm {width}", partial(gate_residual_norm_modulate, x, x, table, gate=2)
        yield f"gate_residual_norm_modulate {width}", partial(gate_residual_norm_modulate, x, x, table, gate=2, **rows)
        if arch >= 89:
            fp8 = {"out_dtype": torch.float8_e4m3fn, "out_scale": 0.02}
            yield (
                f"gate_residual_norm_modulate fp8 {width}",
                partial(gate_residual_norm_modulate, x, x, table, gate=2, **rows, **fp8),
            )
