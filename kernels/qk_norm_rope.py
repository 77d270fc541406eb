"""Normalization of queries and keys, rotary positions and attention's layout, in one pass over packed QKV.

    n(u)   = u / sqrt(mean u^2 + eps) * weight          kind="rms"; "layer" subtracts the mean first; "none": u * weight
    y[a_i] = n[a_i] cos(t f_i) - n[b_i] sin(t f_i)
    y[b_i] = n[b_i] cos(t f_i) + n[a_i] sin(t f_i)      f_i = theta^(-2i / rotary_dims)

The rotation covers the first `rotary_dims` of each head; the other dims pass through. pairs="halves":
(a_i, b_i) = (i, i + rotary_dims / 2); "interleaved": (2i, 2i + 1). cos and sin are fp32 tables: bf16 positions drift
over long clips. Values are not changed, so v is a view of the input and is not moved.

Sources: Su et al. 2021, "RoFormer"; Henry et al. 2020, QK-norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import runtime
from .checks import check, check_out, check_same_device, check_shape, check_tensor, check_vector
from .registration import register_operator
from .runtime import jit, meta, strides, tl

NORMS = ("rms", "layer", "none")
PAIRS = ("halves", "interleaved")
MAX_HEAD_DIM = 512


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: cos and sin (T, rotary_dims / 2) fp32 of equal strides, and the pairing of dims."""

    cos: Tensor
    sin: Tensor
    pairs: str = "halves"

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x (..., T, head_dim) in plain torch."""
        half = self.cos.shape[-1]
        rotary, rest = x[..., : 2 * half], x[..., 2 * half :]
        if self.pairs == "halves":
            a, b = rotary[..., :half], rotary[..., half:]
        else:
            a, b = rotary[..., 0::2], rotary[..., 1::2]
        rotated = [a * self.cos - b * self.sin, b * self.cos + a * self.sin]
        y = torch.cat(rotated, -1) if self.pairs == "halves" else torch.stack(rotated, -1).flatten(-2)
        return torch.cat([y, rest], -1)

    def check(self, tokens: int, head_dim: int) -> None:
        """Raise InvalidInputError unless pairing and tables fit."""
        check(self.pairs in PAIRS, f"pairs={self.pairs!r} is unknown; use 'halves' or 'interleaved'")
        half = self.cos.shape[-1]
        check(2 * half <= head_dim, f"cos rotates {2 * half} dims, a head has {head_dim}")
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            check_tensor(name, table, 2, (torch.float32,))
            check_shape(name, table, (tokens, half))
        check(self.cos.stride() == self.sin.stride(), "cos and sin have different strides; make both contiguous")


@dataclass(frozen=True)
class QKNorm:
    """Normalization of heads: kind "rms", "layer" or "none", eps, and weights (head_dim,) of q and k or None."""

    kind: str = "rms"
    eps: float = 1e-6
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None

    def check(self, head_dim: int) -> None:
        """Raise InvalidInputError for an unknown kind or weights of another size."""
        check(self.kind in NORMS, f"norm={self.kind!r} is unknown; use 'rms', 'layer' or 'none'")
        check_vector("q_weight", self.q_weight, head_dim)
        check_vector("k_weight", self.k_weight, head_dim)


RMS_NORM = QKNorm()


@jit
def qk_norm_rope_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    M,
    stride_xb,
    stride_xm,
    stride_xp,
    stride_xh,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_km,
    stride_cm,
    eps,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STEP: tl.constexpr,
    GAP: tl.constexpr,
    NORMED: tl.constexpr,
    CENTERED: tl.constexpr,
):
    """Normalize and rotate BLOCK_M tokens of one head, first of q, then of k.

    Writes: program (i, h, b) writes tokens i*BLOCK_M ... of head h of batch element b in q_ptr and in k_ptr.
    """
    pid_h, pid_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P)[None, :]
    offs_r = 2 * PAIRS + tl.arange(0, BLOCK_R)[None, :]  # dims that are not rotated; all masked if there are none
    mask_p, mask_r = (offs_m < M) & (offs_p < PAIRS), (offs_m < M) & (offs_r < DIM)
    offs_a, offs_b = offs_p * STEP, offs_p * STEP + GAP
    cos = tl.load(cos_ptr + offs_m * stride_cm + offs_p, mask=mask_p, other=1.0)
    sin = tl.load(sin_ptr + offs_m * stride_cm + offs_p, mask=mask_p, other=0.0)

    for part in tl.static_range(2):
        x_ptrs = qkv_ptr + pid_b * stride_xb + offs_m * stride_xm + part * stride_xp + pid_h * stride_xh
        weight_ptr = q_weight_ptr if part == 0 else k_weight_ptr
        a = tl.load(x_ptrs + offs_a, mask=mask_p, other=0.0).to(tl.float32)
        b = tl.load(x_ptrs + offs_b, mask=mask_p, other=0.0).to(tl.float32)
        c = tl.load(x_ptrs + offs_r, mask=mask_r, other=0.0).to(tl.float32)
        if CENTERED:
            mean = tl.sum(a, 1, keep_dims=True) + tl.sum(b, 1, keep_dims=True) + tl.sum(c, 1, keep_dims=True)
            mean = mean / DIM
            a, b = tl.where(mask_p, a - mean, 0.0), tl.where(mask_p, b - mean, 0.0)
            c = tl.where(mask_r, c - mean, 0.0)
        if NORMED:
            square = tl.sum(a * a + b * b, 1, keep_dims=True) + tl.sum(c * c, 1, keep_dims=True)
            factor = tl.rsqrt(square / DIM + eps)
            a, b, c = a * factor, b * factor, c * factor
        if weight_ptr is not None:
            a *= tl.load(weight_ptr + offs_a, mask=offs_p < PAIRS, other=0.0).to(tl.float32)
            b *= tl.load(weight_ptr + offs_b, mask=offs_p < PAIRS, other=0.0).to(tl.float32)
            c *= tl.load(weight_ptr + offs_r, mask=offs_r < DIM, other=0.0).to(tl.float32)
        if part == 0:
            y_ptrs = q_ptr + pid_b * stride_qb + pid_h * stride_qh + offs_m * stride_qm
        else:
            y_ptrs = k_ptr + pid_b * stride_kb + pid_h * stride_kh + offs_m * stride_km
        tl.store(y_ptrs + offs_a, (a * cos - b * sin).to(q_ptr.dtype.element_ty), mask=mask_p)
        tl.store(y_ptrs + offs_b, (b * cos + a * sin).to(q_ptr.dtype.element_ty), mask=mask_p)
        tl.store(y_ptrs + offs_r, c.to(q_ptr.dtype.element_ty), mask=mask_r)


def qk_norm_rope_reference(
    qkv: Tensor, heads: int, rotary: Rotary, *, norm: QKNorm = RMS_NORM
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `qk_norm_rope` in plain torch; arithmetic in fp32, or fp64 for an fp64 qkv. Arguments as there."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = _split(qkv, heads).permute(2, 0, 3, 1, 4)

    def normalize(u: Tensor, weight: Tensor | None) -> Tensor:
        u = u.to(wide)
        if norm.kind == "layer":
            u = u - u.mean(-1, keepdim=True)
        if norm.kind != "none":
            u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + norm.eps)
        return u if weight is None else u * weight.to(wide)

    q, k = (rotary(normalize(u, weight)).to(qkv.dtype) for u, weight in ((q, norm.q_weight), (k, norm.k_weight)))
    return q, k, v


def _split(qkv: Tensor, heads: int) -> Tensor:
    """Return packed (B, T, 3 * heads * head_dim) as (B, T, 3, heads, head_dim), a view."""
    batch, tokens, packed = qkv.shape
    return qkv.view(batch, tokens, 3, heads, packed // (3 * heads))


def qk_norm_rope(
    qkv: Tensor,
    heads: int,
    rotary: Rotary,
    *,
    norm: QKNorm = RMS_NORM,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of attention from one packed projection.

    Args:
        qkv: (B, T, 3 * heads * head_dim) fp32, fp16 or bf16, any strides over B and T; head_dim at most 512.
        heads: number of heads.
        rotary: cos and sin tables and the pairing of dims; rotary_dims <= head_dim.
        norm: kind, eps and weights of the normalization; default RMSNorm, eps 1e-6, no weights.
        q_out: (B, heads, T, head_dim) output for q, the dtype of qkv, last dimension contiguous. None: a new tensor.
        k_out: the same for k.
        backend: "auto", "triton" or "torch".

    Returns:
        (q, k, v), each (B, heads, T, head_dim); v is a view of qkv.

    Raises:
        InvalidInputError: shapes, dtypes or names that do not fit.
        BackendUnavailableError: the backend is not available on this device.
    """
    check_tensor("qkv", qkv, 3)
    batch, tokens, packed = qkv.shape
    check(heads >= 1 and packed % (3 * heads) == 0, f"qkv has width {packed}, which 3 * {heads} heads do not divide")
    dim = packed // (3 * heads)
    check(dim <= MAX_HEAD_DIM, f"head dim {dim} is over {MAX_HEAD_DIM}")
    norm.check(dim)
    rotary.check(tokens, dim)
    shape = (batch, heads, tokens, dim)
    check_out("q_out", q_out, shape, qkv.dtype)
    check_out("k_out", k_out, shape, qkv.dtype)
    check_same_device(
        qkv=qkv,
        cos=rotary.cos,
        sin=rotary.sin,
        q_weight=norm.q_weight,
        k_weight=norm.k_weight,
        q_out=q_out,
        k_out=k_out,
    )
    if not runtime.use_triton(qkv, backend):
        q, k, v = qk_norm_rope_reference(qkv, heads, rotary, norm=norm)
        return runtime.copy_into(q_out, q), runtime.copy_into(k_out, k), v
    q = torch.empty(shape, dtype=qkv.dtype, device=qkv.device) if q_out is None else q_out
    k = torch.empty(shape, dtype=qkv.dtype, device=qkv.device) if k_out is None else k_out
    split, half = _split(qkv, heads), rotary.cos.shape[-1]
    block_m = max(1, min(64, 1024 // runtime.next_power_of_2(dim)))
    block_r = runtime.next_power_of_2(max(1, dim - 2 * half))
    runtime.launch(
        qk_norm_rope_kernel, (runtime.ceil_div(tokens, block_m), heads, batch),
        split, q, k, rotary.cos, rotary.sin, norm.q_weight, norm.k_weight,
        tokens, *strides(split), *strides(q), *strides(k), rotary.cos.stride(0), norm.eps,
        DIM=dim, PAIRS=half, BLOCK_P=runtime.next_power_of_2(half), BLOCK_R=block_r, BLOCK_M=block_m,
        STEP=1 if rotary.pairs == "halves" else 2, GAP=half if rotary.pairs == "halves" else 1,
        NORMED=norm.kind != "none", CENTERED=norm.kind == "layer",
    )  # fmt: skip
    return q, k, split[:, :, 2].transpose(1, 2)


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield name and call, on meta tensors, of every configuration that `report` compiles."""
    for heads, dim, rotary_dims, pairs, kind in (
        (6, 64, 64, "halves", "rms"),
        (16, 64, 64, "halves", "rms"),
        (24, 64, 64, "halves", "rms"),
        (16, 96, 96, "halves", "rms"),
        (12, 128, 128, "halves", "rms"),
        (16, 64, 32, "halves", "layer"),
        (16, 64, 64, "interleaved", "rms"),
    ):
        table, weight = meta(689, rotary_dims // 2, dtype=torch.float32), meta(dim, dtype=torch.float32)
        rotary, norm = Rotary(table, table, pairs), QKNorm(kind, q_weight=weight, k_weight=weight)
        call = partial(qk_norm_rope, meta(1, 689, 3 * heads * dim), heads, rotary, norm=norm)
        yield f"{heads}x{dim} {kind} {pairs} {rotary_dims}", call


def _qk_norm_rope_op(
    qkv: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    norm: str = "rms",
    pairs: str = "halves",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    q, k, _ = qk_norm_rope(qkv, heads, Rotary(cos, sin, pairs), norm=QKNorm(norm, eps, q_weight, k_weight))
    return q.contiguous(), k.contiguous()


def _qk_norm_rope_fake(qkv: Tensor, heads: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    batch, tokens, packed = qkv.shape
    shape = (batch, heads, tokens, packed // (3 * heads))
    return qkv.new_empty(shape), qkv.new_empty(shape)


# Without v: a registered operator returns no view of its input.
register_operator(
    "qk_norm_rope(Tensor qkv, int heads, Tensor cos, Tensor sin, *, Tensor? q_weight=None, Tensor? k_weight=None, "
    "str norm='rms', str pairs='halves', float eps=1e-6) -> (Tensor, Tensor)",
    _qk_norm_rope_op,
    _qk_norm_rope_fake,
)
