"""Cross-attention to a prompt: at most 256 keys, projected once per prompt and reused at every step.

    o_i = sum_j softmax_j(scale * n(q_i) . k_j) v_j                          over keys j < key_length[b]
    n(u) = u / sqrt(mean u^2 + eps) * q_weight, or u without q_weight

All keys fit one program, so the softmax is a plain one, without the running maximum of `attention`. Queries are read
from their projection and normalized on load; the result has the layout of the projection that follows. Softmax and norm
are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from . import runtime
from .checks import check, check_out, check_same_device, check_shape, check_tensor, check_vector
from .registration import register_operator
from .runtime import dot, jit, meta, strides, tl

LOG2_E = 1.4426950408889634
MAX_KEYS = 256


@jit
def cross_attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    length_ptr,
    out_ptr,
    M,
    N,
    scale,
    eps,
    stride_qb,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_om,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute BLOCK_M queries of one head over all keys. The scale includes log2(e): the softmax has base 2.

    Writes: program (i, h, b) writes tokens i*BLOCK_M ... , the columns of head h, of batch element b in out_ptr.
    """
    pid_h, pid_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_d, offs_n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    mask = (offs_m[:, None] < M) & (offs_d[None, :] < DIM)
    length = N
    if length_ptr is not None:
        length = tl.minimum(tl.load(length_ptr + pid_b), N)

    q_ptrs = q_ptr + pid_b * stride_qb + offs_m[:, None] * stride_qm + pid_h * DIM + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0)
    if q_weight_ptr is not None:
        wide = q.to(tl.float32)
        weight = tl.load(q_weight_ptr + offs_d, mask=offs_d < DIM, other=0.0).to(tl.float32)
        q = (wide * tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / DIM + eps) * weight[None, :]).to(q.dtype)
    k_ptrs = k_ptr + pid_b * stride_kb + pid_h * stride_kh + offs_n[None, :] * stride_kn + offs_d[:, None]
    k = tl.load(k_ptrs, mask=(offs_n[None, :] < length) & (offs_d[:, None] < DIM), other=0.0)
    qk = dot(q, k, tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
    qk = tl.where(offs_n[None, :] < length, qk, -1e30)  # finite: without any key the weights are zeroed below
    p = tl.exp2(qk - tl.max(qk, 1, keep_dims=True))
    p = tl.where(offs_n[None, :] < length, p, 0.0)
    l_i = tl.sum(p, 1, keep_dims=True)
    v_ptrs = v_ptr + pid_b * stride_vb + pid_h * stride_vh + offs_n[:, None] * stride_vn + offs_d[None, :]
    v = tl.load(v_ptrs, mask=(offs_n[:, None] < length) & (offs_d[None, :] < DIM), other=0.0)
    acc = dot(p.to(v.dtype), v, tl.zeros((BLOCK_M, BLOCK_D), tl.float32)) / tl.where(l_i == 0.0, 1.0, l_i)
    out_ptrs = out_ptr + pid_b * stride_ob + offs_m[:, None] * stride_om + pid_h * DIM + offs_d[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


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
    """Compute `cross_attention` in plain torch; softmax and norm in fp32, or fp64 for an fp64 q.

    Arguments as in `cross_attention`.
    """
    batch, tokens, _ = q.shape
    heads, dim = k.shape[1], k.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = q.reshape(batch, tokens, heads, dim).transpose(1, 2).to(wide)
    if q_weight is not None:
        queries = queries * torch.rsqrt(queries.square().mean(-1, keepdim=True) + eps) * q_weight.to(wide)
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
    """Return softmax(scale n(q) k^T) v, from the query projection to the input of the output projection.

    Args:
        q: (B, T, H * D) fp16 or bf16 (fp32 for checks), any strides over B and T; D a multiple of 16, up to 128.
        k: (B, H, S, D), the dtype of q; S at most 256.
        v: (B, H, S, D), the dtype of q.
        q_weight: (D,), weight of the queries' RMSNorm; None: no norm.
        key_lengths: (B,) int32, number of visible keys; None: S. A row without any is 0.
        scale: factor of the scores; default 1 / sqrt(D).
        eps: of the norm.
        out: (B, T, H * D), the dtype of q; None: a new tensor.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, T, H * D).

    Raises:
        InvalidInputError: shapes or dtypes that do not fit.
        BackendUnavailableError: the backend is not available on this device.
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
    check_vector("q_weight", q_weight, dim)
    check_vector("key_lengths", key_lengths, batch, torch.int32)
    check_out("out", out, tuple(q.shape), q.dtype)
    check_same_device(q=q, k=k, v=v, q_weight=q_weight, key_lengths=key_lengths, out=out)
    if not runtime.use_triton(q, backend):
        result = cross_attention_reference(q, k, v, q_weight=q_weight, key_lengths=key_lengths, scale=scale, eps=eps)
        return runtime.copy_into(out, result)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    block_n = max(16, runtime.next_power_of_2(keys))
    # Over 128 keys the scores of 64 queries do not fit the registers. 32 are too few for wgmma; spills would cost more.
    block_m = 32 if q.dtype == torch.float32 or block_n > 128 else 64
    runtime.launch(
        cross_attention_kernel, (runtime.ceil_div(tokens, block_m), heads, batch),
        q, k, v, q_weight, key_lengths, out,
        tokens, keys, (dim**-0.5 if scale is None else scale) * LOG2_E, eps,
        *strides(q), *strides(k), *strides(v), *strides(out),
        num_warps=8 if block_n * dim > 64 * 128 else 4,
        DIM=dim, BLOCK_D=max(16, runtime.next_power_of_2(dim)), BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return out


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield name and call, on meta tensors, of every configuration that `report` compiles."""
    for heads, dim, keys in ((16, 64, 64), (16, 64, 96), (24, 64, 256), (16, 96, 128), (12, 128, 128), (12, 128, 256)):
        q, k, v = meta(1, 689, heads * dim), meta(1, heads, keys, dim), meta(1, heads, keys, dim)
        lengths, weight = meta(1, dtype=torch.int32), meta(dim, dtype=torch.float32)
        yield f"{heads}x{dim} {keys} keys", partial(cross_attention, q, k, v, q_weight=weight, key_lengths=lengths)


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
