"""Adaptive layer normalization of a diffusion transformer, fused with the gated residual before it.

    r = residual + gate * branch
    y = norm(r) * weight * (1 + scale) + shift

    norm(r) = (r - mean r) / sqrt(var r + eps)      kind="layer"
    norm(r) = r / sqrt(mean r^2 + eps)              kind="rms"

gate, shift and scale are rows of one modulation table (rows, D), computed for all steps and blocks before the first
step. Batch element b reads row base[b] + gate, and so on. `base` lies on the device and may change between replays of a
captured graph; the offsets are constants. y may be fp8: y / out_scale, saturated.

Statistics and arithmetic are fp32 for all input dtypes. Each input is read once and each output is written once.

Sources: Peebles & Xie 2023, "DiT", adaLN-Zero; Zhang & Sennrich 2019, RMSNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import runtime
from .checks import FLOATS, FP8, check, check_fp8, check_out, check_same_device, check_shape, check_tensor, check_vector
from .registration import register_operator
from .runtime import jit, meta, saturate, strides, tl

NORMS = ("layer", "rms")
MAX_WIDTH = 16384


@dataclass(frozen=True)
class Modulation:
    """Rows of a modulation table that one call reads.

    table: (rows, D), any float dtype. base: (B,) int32, first row of each batch element; None: 0. gate, shift, scale:
    row offsets from `base`. gate=None is a gate of 1; shift and scale are given together, or both None for no
    modulation. base + offset must lie in the table; `base` is not checked, since it lies on the device.
    """

    table: Tensor
    base: Tensor | None = None
    gate: int | None = None
    shift: int | None = None
    scale: int | None = None

    def rows(self, offset: int) -> Tensor:
        """Return the row that each batch element reads at `offset`: (B, 1, D), or (1, 1, D) without `base`."""
        if self.base is None:
            return self.table[offset][None, None]
        return self.table[self.base.long() + offset][:, None]

    def check(self, batch: int, width: int) -> None:
        """Raise InvalidInputError unless table, base and offsets fit (batch, tokens, width) inputs."""
        check((self.shift is None) == (self.scale is None), "shift and scale go together; give both or neither")
        check_tensor("table", self.table, 2)
        count = self.table.shape[0]
        check(
            self.table.shape[1] == width,
            f"table has width {self.table.shape[1]}, the rows it modulates have {width}",
        )
        offsets = [offset for offset in (self.gate, self.shift, self.scale) if offset is not None]
        check(all(0 <= offset < count for offset in offsets), f"row offsets {offsets} must lie in 0..{count - 1}")
        check_vector("base", self.base, batch, torch.int32)


@dataclass(frozen=True)
class Norm:
    """Normalization: kind "layer" or "rms", eps, and weight (D,) or None."""

    kind: str = "layer"
    eps: float = 1e-6
    weight: Tensor | None = None

    def check(self, width: int) -> None:
        """Raise InvalidInputError for an unknown kind or a weight of another width."""
        check(self.kind in NORMS, f"norm={self.kind!r} is unknown; use 'layer' or 'rms'")
        check_vector("weight", self.weight, width)


LAYER_NORM = Norm()


@partial(jit, varying=("gate", "shift", "scale"))
def adaln_kernel(  # type: ignore[no-untyped-def]
    residual_ptr,
    branch_ptr,
    table_ptr,
    base_ptr,
    weight_ptr,
    residual_out_ptr,
    out_ptr,
    M,
    stride_rb,
    stride_rm,
    stride_bb,
    stride_bm,
    stride_sb,
    stride_sm,
    stride_ob,
    stride_om,
    stride_tr,
    gate,
    shift,
    scale,
    eps,
    inv_out_scale,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CENTERED: tl.constexpr,
    GATED: tl.constexpr,
    MODULATED: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Compute adaln for BLOCK_M whole rows of one batch element.

    Writes: program (i, b) writes rows i*BLOCK_M ... of batch element b, all N columns, in residual_out_ptr and out_ptr.
    """
    pid_b = tl.program_id(1).to(tl.int64)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask_n = offs_n < N
    mask = (offs_m < M) & mask_n

    row = pid_b * 0  # int64: a table may hold more than 2^31 numbers
    if base_ptr is not None:
        row = tl.load(base_ptr + pid_b).to(tl.int64)
    r = tl.load(residual_ptr + pid_b * stride_rb + offs_m * stride_rm + offs_n, mask=mask, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + pid_b * stride_bb + offs_m * stride_bm + offs_n, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        branch *= tl.load(table_ptr + (row + gate) * stride_tr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    r += branch
    stored = r.to(residual_out_ptr.dtype.element_ty)
    tl.store(residual_out_ptr + pid_b * stride_sb + offs_m * stride_sm + offs_n, stored, mask=mask)
    r = stored.to(tl.float32)  # normalize the residual as later kernels will read it, rounded

    if CENTERED:
        r = tl.where(mask_n, r - tl.sum(r, axis=1, keep_dims=True) / N, 0.0)
    y = r * tl.rsqrt(tl.sum(r * r, axis=1, keep_dims=True) / N + eps)
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if MODULATED:
        offset = tl.load(table_ptr + (row + shift) * stride_tr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        factor = tl.load(table_ptr + (row + scale) * stride_tr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        y = y * (1.0 + factor) + offset
    y = saturate(y * inv_out_scale, LIMIT)
    tl.store(out_ptr + pid_b * stride_ob + offs_m * stride_om + offs_n, y.to(out_ptr.dtype.element_ty), mask=mask)


def adaln_reference(
    residual: Tensor,
    branch: Tensor,
    modulation: Modulation | None = None,
    *,
    norm: Norm = LAYER_NORM,
    out_dtype: torch.dtype | None = None,
    out_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute `adaln` in plain torch; arithmetic in fp32, or fp64 for an fp64 residual. Arguments as in `adaln`."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    m = modulation
    gated = branch.to(wide) if m is None or m.gate is None else m.rows(m.gate).to(wide) * branch.to(wide)
    r = (residual.to(wide) + gated).to(residual.dtype)
    y = r.to(wide)
    if norm.kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps)
    if norm.weight is not None:
        y = y * norm.weight.to(wide)
    if m is not None and m.shift is not None and m.scale is not None:
        y = y * (1 + m.rows(m.scale).to(wide)) + m.rows(m.shift).to(wide)
    return r, runtime.saturating_cast(y / out_scale, out_dtype or branch.dtype)


def adaln(
    residual: Tensor,
    branch: Tensor,
    modulation: Modulation | None = None,
    *,
    norm: Norm = LAYER_NORM,
    out_dtype: torch.dtype | None = None,
    out_scale: float = 1.0,
    residual_out: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual and return the residual and its modulated norm.

    Args:
        residual: (B, T, D) fp32, fp16 or bf16, any strides over B and T; D at most 16384.
        branch: (B, T, D), fp32, fp16 or bf16; may differ from the residual's dtype (an fp32 residual stream).
        modulation: gate, shift and scale as table rows; None: gate 1 and no modulation.
        norm: kind, eps and weight of the normalization; default LayerNorm, eps 1e-6, no weight.
        out_dtype: dtype of y; default the branch's. float8_e4m3fn is saturated.
        out_scale: positive static scale; y is divided by it.
        residual_out: output for r, the residual's dtype; may be `residual` itself. None: a new tensor.
        out: output for y; its dtype takes precedence over `out_dtype`. None: a new tensor.
        backend: "auto", "triton" or "torch".

    Returns:
        (r, y), each (B, T, D).

    Raises:
        InvalidInputError: shapes, dtypes, row offsets or names that do not fit.
        BackendUnavailableError: the backend, or fp8, is not available on this device.
    """
    out_dtype = out.dtype if out is not None else out_dtype or branch.dtype
    _check(residual, branch, modulation, norm, out_dtype, out_scale, residual_out, out)
    if not runtime.use_triton(residual, backend):
        r, y = adaln_reference(residual, branch, modulation, norm=norm, out_dtype=out_dtype, out_scale=out_scale)
        return runtime.copy_into(residual_out, r), runtime.copy_into(out, y)
    check_fp8(residual, out_dtype)
    batch, tokens, width = residual.shape
    if residual_out is None:
        residual_out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    if out is None:
        out = torch.empty(residual.shape, dtype=out_dtype, device=residual.device)
    table, base, gate, shift, scale = (
        (None, None, None, None, None)
        if modulation is None
        else (modulation.table, modulation.base, modulation.gate, modulation.shift, modulation.scale)
    )
    block_n = runtime.next_power_of_2(width)
    block_m = max(1, min(16, 1024 // block_n))  # narrow rows share a program, so that a warp reads whole cache lines
    runtime.launch(
        adaln_kernel, (runtime.ceil_div(tokens, block_m), batch),
        residual, branch, table, base, norm.weight, residual_out, out,
        tokens, *strides(residual), *strides(branch), *strides(residual_out), *strides(out),
        table.stride(0) if table is not None else 0, gate or 0, shift or 0, scale or 0, norm.eps, 1.0 / out_scale,
        num_warps=8 if block_n > 1024 else 4,
        N=width, BLOCK_M=block_m, BLOCK_N=block_n,
        CENTERED=norm.kind == "layer", GATED=gate is not None, MODULATED=scale is not None,
        LIMIT=runtime.fp8_limit(out.dtype),
    )  # fmt: skip
    return residual_out, out


def _check(
    residual: Tensor,
    branch: Tensor,
    modulation: Modulation | None,
    norm: Norm,
    out_dtype: torch.dtype,
    out_scale: float,
    residual_out: Tensor | None,
    out: Tensor | None,
) -> None:
    check_tensor("residual", residual, 3)
    check_tensor("branch", branch, 3)
    shape = tuple(residual.shape)
    check_shape("branch", branch, shape)
    check(shape[2] <= MAX_WIDTH, f"width {shape[2]} is over {MAX_WIDTH}, the widest row that one program holds")
    check(
        out_dtype in FLOATS + FP8,
        f"out_dtype={out_dtype} is not supported; use float32, float16, bfloat16 or float8_e4m3fn",
    )
    check(out_scale > 0, f"out_scale={out_scale} must be positive")
    norm.check(shape[2])
    table = base = None
    if modulation is not None:
        modulation.check(shape[0], shape[2])
        table, base = modulation.table, modulation.base
    check_out("residual_out", residual_out, shape, residual.dtype)
    check_out("out", out, shape, out_dtype)
    check_same_device(
        residual=residual,
        branch=branch,
        table=table,
        base=base,
        weight=norm.weight,
        residual_out=residual_out,
        out=out,
    )


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield name and call, on meta tensors, of every configuration that `report` compiles: widths of all presets."""
    for width in (384, 1024, 1536):
        x, table = meta(1, 689, width), meta(480, width, dtype=torch.float32)
        base = meta(1, dtype=torch.int32)
        yield f"unmodulated {width}", partial(adaln, x, x, Modulation(table, gate=2))
        modulated = partial(adaln, x, x, Modulation(table, base, gate=2, shift=3, scale=4))
        yield f"modulated {width}", modulated
        yield f"ungated {width}", partial(adaln, x, x, Modulation(table, base, shift=3, scale=4))
        if arch >= 89:
            yield f"modulated fp8 {width}", partial(modulated, out_dtype=torch.float8_e4m3fn, out_scale=0.02)


def _adaln_op(
    residual: Tensor,
    branch: Tensor,
    table: Tensor | None = None,
    *,
    base: Tensor | None = None,
    gate: int | None = None,
    shift: int | None = None,
    scale: int | None = None,
    weight: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    out_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    offsets = [offset for offset in (gate, shift, scale) if offset is not None]
    check(table is not None or not offsets, "gate, shift and scale are rows of a table; pass the table")
    modulation = None if table is None else Modulation(table, base, gate, shift, scale)
    r, y = adaln(residual, branch, modulation, norm=Norm(norm, eps, weight), out_dtype=out_dtype, out_scale=out_scale)
    return r.contiguous(), y.contiguous()


def _adaln_fake(
    residual: Tensor, branch: Tensor, *_: object, out_dtype: torch.dtype | None = None, **__: object
) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), branch.new_empty(branch.shape, dtype=out_dtype or branch.dtype)


register_operator(
    "adaln(Tensor residual, Tensor branch, Tensor? table=None, *, Tensor? base=None, int? gate=None, int? shift=None, "
    "int? scale=None, Tensor? weight=None, str norm='layer', float eps=1e-6, ScalarType? out_dtype=None, "
    "float out_scale=1.0) -> (Tensor, Tensor)",
    _adaln_op,
    _adaln_fake,
)
