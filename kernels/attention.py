"""Self-attention over latent frames, full or windowed, behind one function with several backends.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j        over keys j < key_length[b] with |i - j| <= window

Online softmax: scores and softmax are fp32 and never in memory; products run on the matrix units in the inputs' dtype.
A row without any visible key (key length 0, or a window past the end) is 0.

The backend is given by name. "auto" measures the backends that accept the input when a shape is first seen on a device.
Nothing can be measured during a graph capture, so call `fastest` (or `attention`) once before.

Sources: Milakov & Gimelshein 2018, online softmax; Dao et al. 2022, "FlashAttention".
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from presto_rt.errors import BackendUnavailableError, InvalidInputError, MissingDependencyError

from . import runtime
from .autotune import KernelSelector
from .checks import check, check_out, check_same_device, check_shape, check_tensor, check_vector
from .registration import register_operator
from .runtime import dot, jit, meta, strides, tl

LOG2_E = 1.4426950408889634
selector = KernelSelector("attention")


@dataclass(frozen=True)
class AttentionMask:
    """Keys that are visible to a query; all by default.

    key_lengths: (B,) int32, number of visible keys of each batch element; None: all. window: frames to either side that
    are visible; None: all.
    """

    key_lengths: Tensor | None = None
    window: int | None = None

    def dense(self, tokens: int, keys: int, device: torch.device) -> Tensor | None:
        """Return the boolean mask (B or 1, 1, T or 1, S), True for visible keys; None if all keys are visible."""
        mask = None
        key = torch.arange(keys, device=device)
        if self.key_lengths is not None:
            mask = (key < self.key_lengths[:, None])[:, None, None]
        if self.window is not None:
            near = ((torch.arange(tokens, device=device)[:, None] - key).abs() <= self.window)[None, None]
            mask = near if mask is None else mask & near
        return mask


#: A backend: (q, k, v, mask, scale, out) -> result, in `out` if that is not None.
Forward = Callable[[Tensor, Tensor, Tensor, AttentionMask, float, "Tensor | None"], Tensor]


@jit
def attend(  # type: ignore[no-untyped-def]
    acc,
    m_i,
    l_i,
    q,
    k_ptr,
    v_ptr,
    offs_m,
    start,
    stop,
    length,
    window,
    stride_km,
    stride_vm,
    scale,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Fold keys start ... stop of one head into (acc, m_i, l_i): weighted values, running maximum, sum of weights."""
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    for start_n in range(start, stop, BLOCK_N):
        key = start_n + offs_n
        k_ptrs = k_ptr + key[None, :] * stride_km + offs_d[:, None]
        v_ptrs = v_ptr + key[:, None] * stride_vm + offs_d[None, :]
        if MASKED:
            k = tl.load(k_ptrs, mask=(key[None, :] < length) & (offs_d[:, None] < DIM), other=0.0)
        elif DIM < BLOCK_D:
            k = tl.load(k_ptrs, mask=offs_d[:, None] < DIM, other=0.0)
        else:
            k = tl.load(k_ptrs)
        qk = dot(q, k, tl.zeros((q.shape[0], BLOCK_N), tl.float32)) * scale
        if MASKED:
            visible = key[None, :] < length
            if WINDOWED:
                near = (key[None, :] >= offs_m[:, None] - window) & (key[None, :] <= offs_m[:, None] + window)
                visible = visible & near
            qk = tl.where(visible, qk, float("-inf"))
        m_ij = tl.maximum(m_i, tl.max(qk, 1))
        p = tl.exp2(qk - m_ij[:, None])
        alpha = tl.exp2(m_i - m_ij)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_ij
        if MASKED:
            v = tl.load(v_ptrs, mask=(key[:, None] < length) & (offs_d[None, :] < DIM), other=0.0)
        elif DIM < BLOCK_D:
            v = tl.load(v_ptrs, mask=offs_d[None, :] < DIM, other=0.0)
        else:
            v = tl.load(v_ptrs)
        acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, m_i, l_i


@jit
def attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    length_ptr,
    M,
    N,
    window,
    scale,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_km,
    stride_vb,
    stride_vh,
    stride_vm,
    stride_ob,
    stride_oh,
    stride_om,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Compute attention for BLOCK_M queries of one head. The scale includes log2(e): the softmax has base 2.

    Writes: program (i, h, b) writes queries i*BLOCK_M ... of head h of batch element b in out_ptr.
    """
    pid_h, pid_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start_m = tl.program_id(0) * BLOCK_M
    offs_m, offs_d = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = (offs_m[:, None] < M) & (offs_d[None, :] < DIM)
    q_ptrs = q_ptr + pid_b * stride_qb + pid_h * stride_qh + offs_m[:, None] * stride_qm + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0)
    k_ptr += pid_b * stride_kb + pid_h * stride_kh
    v_ptr += pid_b * stride_vb + pid_h * stride_vh
    length = N
    if length_ptr is not None:
        length = tl.minimum(tl.load(length_ptr + pid_b), N)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m_i = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite, so that exp2(-inf - m_i) is 0 in rows without visible keys
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    if WINDOWED:
        start = tl.maximum(start_m - window, 0) // BLOCK_N * BLOCK_N
        stop = tl.minimum(start_m + BLOCK_M + window, length)
        acc, m_i, l_i = attend(
            acc, m_i, l_i, q, k_ptr, v_ptr, offs_m, start, stop, length, window, stride_km, stride_vm,
            scale, DIM, BLOCK_D, BLOCK_N, True, True,
        )  # fmt: skip
    else:
        whole = length // BLOCK_N * BLOCK_N  # blocks that need no mask
        acc, m_i, l_i = attend(
            acc, m_i, l_i, q, k_ptr, v_ptr, offs_m, 0, whole, length, window, stride_km, stride_vm,
            scale, DIM, BLOCK_D, BLOCK_N, False, False,
        )  # fmt: skip
        acc, m_i, l_i = attend(
            acc, m_i, l_i, q, k_ptr, v_ptr, offs_m, whole, length, length, window, stride_km, stride_vm,
            scale, DIM, BLOCK_D, BLOCK_N, True, False,
        )  # fmt: skip
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    out_ptrs = out_ptr + pid_b * stride_ob + pid_h * stride_oh + offs_m[:, None] * stride_om + offs_d[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute `attention` in plain torch with materialized scores; arithmetic in fp32, or fp64 for an fp64 q.

    Arguments as in `attention`.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = AttentionMask(key_lengths, window).dense(q.shape[-2], k.shape[-2], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1).nan_to_num(0.0) @ v.to(wide)).to(q.dtype)


def _frame_major(q: Tensor) -> Tensor:
    """Return an uninitialized (B, H, T, D) tensor whose memory is (B, T, H, D)."""
    batch, heads, tokens, dim = q.shape
    return torch.empty(batch, tokens, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)


def _triton(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, out: Tensor | None) -> Tensor:
    batch, heads, tokens, dim = q.shape
    out = _frame_major(q) if out is None else out
    # The kernel's offsets within a head are 32-bit.
    reach = max(x.shape[2] * x.stride(2) for x in (q, k, v, out))
    check(reach < 2**31, f"the tokens of a head reach over {reach} elements, 2^31 are the most; call .contiguous()")
    block_m, block_n, num_warps, num_stages = tiles(batch * heads, tokens, dim, q)
    runtime.launch(
        attention_kernel, (runtime.ceil_div(tokens, block_m), heads, batch),
        q, k, v, out, mask.key_lengths,
        tokens, k.shape[-2], min(mask.window or 0, tokens), scale * LOG2_E,
        *strides(q), *strides(k), *strides(v), *strides(out),
        num_warps=num_warps, num_stages=num_stages,
        DIM=dim, BLOCK_D=max(16, runtime.next_power_of_2(dim)), BLOCK_M=block_m, BLOCK_N=block_n,
        WINDOWED=mask.window is not None,
    )  # fmt: skip
    return out


def tiles(heads: int, tokens: int, dim: int, q: Tensor) -> tuple[int, int, int, int]:
    """Return (BLOCK_M, BLOCK_N, num_warps, num_stages): large tiles if they occupy every multiprocessor twice."""
    if q.dtype == torch.float32:
        return 32, 32, 4, 1  # no matrix units: for checking, not for speed
    large = heads * runtime.ceil_div(tokens, 128) >= 264
    hopper = runtime.capability(q) >= 90
    block_n = 64 if hopper or dim <= 64 else 32  # 64 would spill: mma keeps operands in registers
    return (128, block_n, 8, 3 if hopper else 2) if large else (64, block_n, 4, 3 if hopper else 2)


def _sdpa(kernel: str | None) -> Forward:
    """Return torch's scaled_dot_product_attention with its own choice of kernel or one of torch.nn.attention's."""

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, out: Tensor | None) -> Tensor:
        if kernel == "FLASH_ATTENTION" and (mask.key_lengths is not None or mask.window is not None):
            raise BackendUnavailableError("SDPA's flash kernel takes no mask; use backend='triton' or 'sdpa'")
        dense = mask.dense(q.shape[-2], k.shape[-2], q.device)
        context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if kernel is not None:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            context = sdpa_kernel(getattr(SDPBackend, kernel))
        with context:
            result = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=scale)
        if mask.key_lengths is not None and dense is not None:  # some kernels return NaN in rows without visible keys
            result = result.masked_fill(~dense.any(-1, keepdim=True), 0.0)
        return runtime.copy_into(out, result)

    return forward


def _flash_attn(module: str, package: str) -> Forward:
    """Return flash-attn's function from the given module; its layout is (B, T, H, D)."""

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, out: Tensor | None) -> Tensor:
        try:
            function = importlib.import_module(module).flash_attn_func
        except (ImportError, AttributeError) as error:
            message = f"this attention backend needs {package}: pip install {package}, or use backend='triton'"
            raise MissingDependencyError(message) from error
        if mask.key_lengths is not None:
            raise BackendUnavailableError(f"{package} takes no key lengths here; use backend='triton' or 'sdpa'")
        window = {} if mask.window is None else {"window_size": (mask.window, mask.window)}
        result = function(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, **window)
        return runtime.copy_into(out, (result[0] if isinstance(result, tuple) else result).transpose(1, 2))

    return forward


def _torch(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, out: Tensor | None) -> Tensor:
    result = attention_reference(q, k, v, key_lengths=mask.key_lengths, window=mask.window, scale=scale)
    return runtime.copy_into(out, result)


BACKENDS: dict[str, Forward] = {
    "triton": _triton,
    "sdpa": _sdpa(None),
    "sdpa-flash": _sdpa("FLASH_ATTENTION"),
    "sdpa-cudnn": _sdpa("CUDNN_ATTENTION"),
    "flash-attn": _flash_attn("flash_attn", "flash-attn"),
    "flash-attn-4": _flash_attn("flash_attn.cute", "flash-attn-4"),
    "torch": _torch,
}
#: Backends that "auto" measures on a GPU; the reference is never the fastest.
MEASURED = tuple(name for name in BACKENDS if name != "torch")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return softmax(scale q k^T) v over the visible keys.

    Args:
        q: (B, H, T, D) fp16 or bf16 (fp32 for checks), any strides but the last; D a multiple of 16, 16 to 128.
        k: (B, H, S, D), the dtype of q.
        v: (B, H, S, D), the dtype of q.
        key_lengths: (B,) int32, number of visible keys; None: S.
        window: frames to either side that are visible, for T = S; None: all.
        scale: factor of the scores; default 1 / sqrt(D).
        out: (B, H, T, D), the dtype of q; None: a new tensor.
        backend: "auto" (the fastest, measured once per shape on a GPU) or one of BACKENDS.

    Returns:
        (B, H, T, D). The memory of a new tensor is (B, T, H, D), so that flattening the heads is free.

    Raises:
        InvalidInputError: inputs or names that do not fit.
        BackendUnavailableError: the named backend does not take these inputs on this device.
        MissingDependencyError: the named backend is not installed.
    """
    _check(q, k, v, key_lengths, window, out)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "auto":
        backend = fastest(q, k, v, key_lengths=key_lengths, window=window, out=out)
    elif backend not in BACKENDS:
        raise InvalidInputError(f"attention backend {backend!r} is unknown; use 'auto' or one of {', '.join(BACKENDS)}")
    if backend == "triton":
        runtime.use_triton(q, "triton")  # raises if Triton cannot run
    return BACKENDS[backend](q, k, v, AttentionMask(key_lengths, window), scale, out)


def fastest(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    window: int | None = None,
    out: Tensor | None = None,
) -> str:
    """Return the backend that "auto" takes for such inputs, measured once per device, dtype, shape, strides and mask.

    Arguments as in `attention`. Pass `out` if the call will: some backends copy their result there. Its contents stay.
    """
    if not q.is_cuda:
        return "triton" if runtime.use_triton(q) else "sdpa"
    names = [name for name in MEASURED if name != "triton" or runtime.triton is not None]
    key = (q.dtype, q.shape, k.shape, *(x.stride() for x in (q, k, v)), key_lengths is None, window, out is None)

    def candidates() -> dict[str, Callable[[], Tensor]]:
        scratch = None if out is None else torch.empty_like(out)
        inputs = (q, k, v, AttentionMask(key_lengths, window), q.shape[-1] ** -0.5, scratch)
        return {name: functools.partial(BACKENDS[name], *inputs) for name in names}

    return selector.fastest(q.device, key, candidates, names[0])


def _check(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, window: int | None, out: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, 4)
    batch, heads, tokens, dim = q.shape
    check(dim % 16 == 0 and dim <= 128, f"head dim {dim} is not supported; use a multiple of 16 up to 128")
    check(k.dtype == q.dtype == v.dtype, f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; make them one")
    check_shape("k", k, (batch, heads, k.shape[2], dim))
    check_shape("v", v, tuple(k.shape))
    check_vector("key_lengths", key_lengths, batch, torch.int32)
    if window is not None:
        check(window >= 0, f"window={window} must be 0 or more frames to either side")
        check(k.shape[2] == tokens, f"a window needs as many keys as queries, not {k.shape[2]} and {tokens}")
    check_out("out", out, tuple(q.shape), q.dtype)
    check_same_device(q=q, k=k, v=v, key_lengths=key_lengths, out=out)


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield name and call, on meta tensors, of every configuration that `report` compiles."""
    for dim, heads, batch, windowed, masked in (
        (64, 16, 1, False, False),
        (64, 16, 4, False, True),
        (64, 16, 1, True, False),
        (96, 16, 1, False, False),
        (96, 16, 4, False, True),
        (128, 12, 1, False, False),
        (128, 12, 4, False, True),
        (128, 12, 4, True, True),
    ):
        q, k, v = (meta(batch, heads, 689, dim) for _ in range(3))
        lengths = meta(batch, dtype=torch.int32) if masked else None
        name = f"{batch}x{heads}x{dim}" + (" lengths" if masked else "") + (" window" if windowed else "")
        window = 64 if windowed else None
        yield name, functools.partial(attention, q, k, v, key_lengths=lengths, window=window, backend="triton")


def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    # An explicit output gives the result the same strides on every backend.
    out = _frame_major(q)
    return attention(q, k, v, key_lengths=key_lengths, window=window, scale=scale, out=out, backend=backend)


def _attention_fake(q: Tensor, *_: object, **__: object) -> Tensor:
    return _frame_major(q)


register_operator(
    "attention(Tensor q, Tensor k, Tensor v, *, Tensor? key_lengths=None, int? window=None, float? scale=None, "
    "str backend='auto') -> Tensor",
    _attention_op,
    _attention_fake,
)
