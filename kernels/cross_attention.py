"""Cross-attention to a prompt: few keys, the same at every step, so they are made once and held.

    hold_keys_values:   [K_l, V_l] = states W_l^T for every block l, one matrix product; K_l = rms(K_l) * k_weight_l
    cross_attention:    o_i = sum_j softmax_j(scale * rms(q_i) * q_weight . k_j) v_j      over keys j < key_length[b]

At most 256 keys fit one program whole, so its softmax is a plain one, without the running maximum of `attention`. The
queries come straight from their projection and are normalised on the way in (q_weight=None: they are not); the result
goes out in the layout of the projection that follows. Softmax and norm in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from . import runtime
from .checks import check, check_out, check_same_device, check_shape, check_tensor
from .registration import register_operator
from .runtime import dot, jit, strides, tl

LOG2_E = 1.4426950408889634
MAX_KEYS = 256


@jit
def cross_attention_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, length_ptr, out_ptr,
    tokens, keys, scale, eps, q_batch, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch,
    out_token,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Writes: program (i, h, b) writes tokens i*BLOCK_M ... , the columns of head h, of batch element b in
    out_ptr. It sees all keys. scale holds log2(e).
    """
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    dim, key = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    inside = (token[:, None] < tokens) & (dim[None, :] < DIM)
    length = keys
    if length_ptr is not None:
        length = tl.minimum(tl.load(length_ptr + batch), keys)

    q = tl.load(q_ptr + batch * q_batch + token[:, None] * q_token + head * DIM + dim[None, :], mask=inside, other=0.0)
    if q_weight_ptr is not None:
        wide = q.to(tl.float32)
        weight = tl.load(q_weight_ptr + dim, mask=dim < DIM, other=0.0).to(tl.float32)
        q = (wide * tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / DIM + eps) * weight[None, :]).to(q.dtype)
    k_at = k_ptr + batch * k_batch + head * k_head + key[None, :] * k_token + dim[:, None]
    k = tl.load(k_at, mask=(key[None, :] < length) & (dim[:, None] < DIM), other=0.0)
    scores = dot(q, k, tl.zeros((BLOCK_M, BLOCK_S), tl.float32)) * scale
    scores = tl.where(key[None, :] < length, scores, -1e30)  # finite: with no key at all the weights are cut below
    weights = tl.exp2(scores - tl.max(scores, 1, keep_dims=True))
    weights = tl.where(key[None, :] < length, weights, 0.0)
    total = tl.sum(weights, 1, keep_dims=True)
    v_at = v_ptr + batch * v_batch + head * v_head + key[:, None] * v_token + dim[None, :]
    v = tl.load(v_at, mask=(key[:, None] < length) & (dim[None, :] < DIM), other=0.0)
    result = dot(weights.to(v.dtype), v, tl.zeros((BLOCK_M, BLOCK_D), tl.float32)) / tl.where(total == 0.0, 1.0, total)
    out = out_ptr + batch * out_batch + token[:, None] * out_token + head * DIM + dim[None, :]
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=inside)


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def cross_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_weight: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`cross_attention` in plain torch: softmax and norm in fp32, or fp64 where q is."""
    heads, dim = k.shape[1], k.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = _rms(q.unflatten(-1, (heads, dim)).transpose(1, 2).to(wide), q_weight, eps)
    scores = queries @ k.to(wide).transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    if key_lengths is not None:
        hidden = torch.arange(k.shape[2], device=q.device) >= key_lengths[:, None, None, None]
        scores = scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1).nan_to_num(0.0) @ v.to(wide)).transpose(1, 2).flatten(2).to(q.dtype)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_weight: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale rms(q) k^T) v, from a query projection to the input of the output projection.

    q (B, T, H * D); k, v (B, H, S, D) from `hold_keys_values`, S <= 256, D a multiple of 16 up to 128, all of one
    dtype. q_weight (D,). key_lengths (B,) int32. Returns (B, T, H * D). Raises InvalidInputError for anything that does
    not fit.
    """
    check_tensor("q", q, 3)
    check_tensor("k", k, 4, (q.dtype,))
    check_tensor("v", v, 4, (q.dtype,))
    batch, tokens, width = q.shape
    heads, keys, dim = k.shape[1:]
    check(dim % 16 == 0 and dim <= 128, f"head dim {dim} is not supported; use a multiple of 16 up to 128")
    check(keys <= MAX_KEYS, f"{keys} keys are over {MAX_KEYS}; use attention, which takes any number")
    check(width == heads * dim, f"q has width {width}, the keys have {heads} heads of {dim}")
    check_shape("k", k, (batch, heads, keys, dim))
    check_shape("v", v, tuple(k.shape))
    if q_weight is not None:
        check_tensor("q_weight", q_weight, 1)
        check_shape("q_weight", q_weight, (dim,))
    if key_lengths is not None:
        check_tensor("key_lengths", key_lengths, 1, (torch.int32,))
        check_shape("key_lengths", key_lengths, (batch,))
    check_out("out", out, tuple(q.shape), q.dtype)
    check_same_device(q=q, k=k, v=v, q_weight=q_weight, key_lengths=key_lengths, out=out)
    if not runtime.use_triton(q, backend):
        result = cross_attention_reference(q, k, v, q_weight=q_weight, key_lengths=key_lengths, scale=scale, eps=eps)
        return runtime.copy_into(out, result)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    block_s = max(16, runtime.next_power_of_2(keys))
    # over 128 keys the scores of 64 queries do not fit the registers; 32 are too few for wgmma, and spills would cost
    # more
    block_m = 32 if q.dtype == torch.float32 or block_s > 128 else 64
    runtime.launch(
        cross_attention_kernel, (runtime.ceil_div(tokens, block_m), heads, batch),
        q, k, v, q_weight, key_lengths, out,
        tokens, keys, (dim**-0.5 if scale is None else scale) * LOG2_E, eps,
        *strides(q), *strides(k), *strides(v), *strides(out),
        num_warps=8 if block_s * dim > 64 * 128 else 4,
        DIM=dim, BLOCK_D=max(16, runtime.next_power_of_2(dim)), BLOCK_M=block_m, BLOCK_S=block_s,
    )  # fmt: skip
    return out


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, on meta tensors, of every configuration that `report` compiles."""
    for heads, dim, keys in ((16, 64, 64), (16, 64, 96), (24, 64, 256), (16, 96, 128), (12, 128, 128), (12, 128, 256)):
        q = torch.empty(1, 689, heads * dim, dtype=torch.bfloat16, device="meta")
        kv = torch.empty(2, 1, heads, keys, dim, dtype=torch.bfloat16, device="meta")
        lengths = torch.empty(1, dtype=torch.int32, device="meta")
        weight = torch.empty(dim, device="meta")
        yield f"{heads}x{dim} {keys} keys", partial(cross_attention, q, *kv, q_weight=weight, key_lengths=lengths)


def _cross_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_weight: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    out = q.new_empty(q.shape)
    return cross_attention(q, k, v, q_weight=q_weight, key_lengths=key_lengths, scale=scale, eps=eps, out=out)


def _cross_attention_fake(q: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty(q.shape)


register_operator(
    "cross_attention(Tensor q, Tensor k, Tensor v, *, Tensor? q_weight=None, Tensor? key_lengths=None, "
    "float? scale=None, float eps=1e-6) -> Tensor",
    _cross_attention_op,
    _cross_attention_fake,
)
