"""Normalisation of queries and keys, rotary positions, and the layout that attention wants, in one pass over packed
QKV.

    n(u)   = u / sqrt(mean u^2 + eps) * weight          norm="rms"; "layer" takes the mean off first; "none": u * weight
    y[a_i] = n[a_i] cos(t f_i) - n[b_i] sin(t f_i)      (Su et al. 2021, "RoFormer"; QK-norm: Henry et al. 2020)
    y[b_i] = n[b_i] cos(t f_i) + n[a_i] sin(t f_i)      f_i = theta^(-2i / rotary_dims)

over the first `rotary_dims` of each head; the rest passes through. pairs="halves": (a_i, b_i) = (i, i + rotary_dims/2);
"interleaved": (2i, 2i + 1). Angles are made in fp64 on the host and stored as fp32 cos and sin: bf16 positions drift
over long clips. Values need no change, so V is a view of the input: it is not moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from . import runtime
from .checks import check, check_out, check_same_device, check_shape, check_tensor
from .registration import register_operator
from .runtime import jit, strides, tl

NORMS = ("rms", "layer", "none")
PAIRS = ("halves", "interleaved")


@jit
def qk_norm_rope_kernel(
    qkv_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
    tokens, qkv_batch, qkv_token, qkv_part, qkv_head, q_batch, q_head, q_token, k_batch, k_head, k_token, angle_token,
    eps,
    DIM: tl.constexpr, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    STEP: tl.constexpr, GAP: tl.constexpr, NORMED: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Writes: program (i, h, b) writes tokens i*BLOCK_T ... of head h of batch element b, in q_ptr and then in
    k_ptr.
    """
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
    pair = tl.arange(0, BLOCK_P)[None, :]
    rest = 2 * PAIRS + tl.arange(0, BLOCK_R)[None, :]  # the dims that do not turn; masked out where there are none
    pairs_in, rest_in = (token < tokens) & (pair < PAIRS), (token < tokens) & (rest < DIM)
    first, second = pair * STEP, pair * STEP + GAP
    cos = tl.load(cos_ptr + token * angle_token + pair, mask=pairs_in, other=1.0)
    sin = tl.load(sin_ptr + token * angle_token + pair, mask=pairs_in, other=0.0)

    for part in tl.static_range(2):
        source = qkv_ptr + batch * qkv_batch + token * qkv_token + part * qkv_part + head * qkv_head
        weight_ptr = q_weight_ptr if part == 0 else k_weight_ptr
        a = tl.load(source + first, mask=pairs_in, other=0.0).to(tl.float32)
        b = tl.load(source + second, mask=pairs_in, other=0.0).to(tl.float32)
        c = tl.load(source + rest, mask=rest_in, other=0.0).to(tl.float32)
        if CENTRED:
            mean = tl.sum(a, 1, keep_dims=True) + tl.sum(b, 1, keep_dims=True) + tl.sum(c, 1, keep_dims=True)
            mean = mean / DIM
            a, b = tl.where(pairs_in, a - mean, 0.0), tl.where(pairs_in, b - mean, 0.0)
            c = tl.where(rest_in, c - mean, 0.0)
        if NORMED:
            square = tl.sum(a * a + b * b, 1, keep_dims=True) + tl.sum(c * c, 1, keep_dims=True)
            factor = tl.rsqrt(square / DIM + eps)
            a, b, c = a * factor, b * factor, c * factor
        if weight_ptr is not None:
            a *= tl.load(weight_ptr + first, mask=pair < PAIRS, other=0.0).to(tl.float32)
            b *= tl.load(weight_ptr + second, mask=pair < PAIRS, other=0.0).to(tl.float32)
            c *= tl.load(weight_ptr + rest, mask=rest < DIM, other=0.0).to(tl.float32)
        if part == 0:
            target = q_ptr + batch * q_batch + head * q_head + token * q_token
        else:
            target = k_ptr + batch * k_batch + head * k_head + token * k_token
        tl.store(target + first, (a * cos - b * sin).to(q_ptr.dtype.element_ty), mask=pairs_in)
        tl.store(target + second, (b * cos + a * sin).to(q_ptr.dtype.element_ty), mask=pairs_in)
        tl.store(target + rest, c.to(q_ptr.dtype.element_ty), mask=rest_in)


def qk_norm_rope_reference(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope` in plain torch: arithmetic in fp32, or fp64 where qkv is."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    parts = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # 3, B, H, T, Dh
    turned = []
    for part, weight in zip(parts[:2].to(wide), (q_weight, k_weight), strict=True):
        if norm == "layer":
            part = part - part.mean(-1, keepdim=True)
        if norm != "none":
            part = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + eps)
        if weight is not None:
            part = part * weight.to(wide)
        half = cos.shape[-1]
        rotary, rest = part[..., : 2 * half], part[..., 2 * half :]
        if pairs == "halves":
            a, b = rotary[..., :half], rotary[..., half:]
        else:
            a, b = rotary[..., 0::2], rotary[..., 1::2]
        new_a, new_b = a * cos - b * sin, b * cos + a * sin
        both = torch.cat([new_a, new_b], -1) if pairs == "halves" else torch.stack([new_a, new_b], -1).flatten(-2)
        turned.append(torch.cat([both, rest], -1).to(qkv.dtype))
    return turned[0], turned[1], parts[2]


def qk_norm_rope(
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
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of attention, each (B, heads, T, head_dim), from one packed projection.

    qkv (B, T, 3 * heads * head_dim), any strides over B and T. cos, sin (T, rotary_dims / 2) fp32 from `rotary_table`;
    rotary_dims <= head_dim. q_weight, k_weight (head_dim,). q and k are new (or q_out, k_out, last dimension
    contiguous), v is a view of qkv. Raises InvalidInputError for shapes, dtypes or names that do not fit.
    """
    check_tensor("qkv", qkv, 3)
    batch, tokens, packed = qkv.shape
    check(heads >= 1 and packed % (3 * heads) == 0, f"qkv has width {packed}, which 3 * {heads} heads do not divide")
    dim, half = packed // (3 * heads), cos.shape[-1]
    check(norm in NORMS, f"norm={norm!r} is unknown; use 'rms', 'layer' or 'none'")
    check(pairs in PAIRS, f"pairs={pairs!r} is unknown; use 'halves' or 'interleaved'")
    check(dim <= 512, f"head dim {dim} is over 512")
    check(2 * half <= dim, f"cos turns {2 * half} dims, a head has {dim}")
    for name, angles in (("cos", cos), ("sin", sin)):
        check_tensor(name, angles, 2, (torch.float32,))
        check_shape(name, angles, (tokens, half))
    check(cos.stride() == sin.stride(), "cos and sin have different strides; make both contiguous")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_tensor(name, weight, 1)
            check_shape(name, weight, (dim,))
    shape = (batch, heads, tokens, dim)
    check_out("q_out", q_out, shape, qkv.dtype)
    check_out("k_out", k_out, shape, qkv.dtype)
    check_same_device(qkv=qkv, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight, q_out=q_out, k_out=k_out)
    if not runtime.use_triton(qkv, backend):
        q, k, v = qk_norm_rope_reference(
            qkv, heads, cos, sin, q_weight=q_weight, k_weight=k_weight, norm=norm, pairs=pairs, eps=eps
        )
        return runtime.copy_into(q_out, q), runtime.copy_into(k_out, k), v
    q = torch.empty(shape, dtype=qkv.dtype, device=qkv.device) if q_out is None else q_out
    k = torch.empty(shape, dtype=qkv.dtype, device=qkv.device) if k_out is None else k_out
    split = qkv.unflatten(-1, (3, heads, dim))
    block_t = max(1, min(64, 1024 // runtime.next_power_of_2(dim)))
    block_r = runtime.next_power_of_2(max(1, dim - 2 * half))
    runtime.launch(
        qk_norm_rope_kernel, (runtime.ceil_div(tokens, block_t), heads, batch),
        split, q, k, cos, sin, q_weight, k_weight,
        tokens, *strides(split), *strides(q), *strides(k), cos.stride(0), eps,
        DIM=dim, PAIRS=half, BLOCK_P=runtime.next_power_of_2(half), BLOCK_R=block_r, BLOCK_T=block_t,
        STEP=1 if pairs == "halves" else 2, GAP=half if pairs == "halves" else 1,
        NORMED=norm != "none", CENTRED=norm == "layer",
    )  # fmt: skip
    return q, k, split[:, :, 2].transpose(1, 2)


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, on meta tensors, of every configuration that `report` compiles."""
    for heads, dim, turned, pairs, norm in (
        (6, 64, 64, "halves", "rms"),
        (16, 64, 64, "halves", "rms"),
        (24, 64, 64, "halves", "rms"),
        (16, 96, 96, "halves", "rms"),
        (12, 128, 128, "halves", "rms"),
        (16, 64, 32, "halves", "layer"),
        (16, 64, 64, "interleaved", "rms"),
    ):
        qkv = torch.empty(1, 689, 3 * heads * dim, dtype=torch.bfloat16, device="meta")
        angles = torch.empty(689, turned // 2, device="meta")
        weight = torch.empty(dim, device="meta")
        name = f"{heads}x{dim} {norm} {pairs} {turned}"
        yield (
            name,
            partial(qk_norm_rope, qkv, heads, angles, angles, q_weight=weight, k_weight=weight, norm=norm, pairs=pairs),
        )


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
    q, k, _ = qk_norm_rope(qkv, heads, cos, sin, q_weight=q_weight, k_weight=k_weight, norm=norm, pairs=pairs, eps=eps)
    return q, k


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
