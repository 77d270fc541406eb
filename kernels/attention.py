"""Self-attention over latent frames: every frame sees every other, or those near it.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j      over keys j < key_length[b], and |i - j| <= window where there
    is one

Online softmax (Milakov & Gimelshein 2018; Dao et al. 2022, "FlashAttention"): scores and softmax in fp32 and never in
memory, products on the matrix units in the inputs' dtype. A row that sees no key at all (key length 0, or a window
past the end) is 0.

One function, several backends, chosen by name or, with "auto", by measuring those that can take the input the first
time that a shape is seen on a device (`fastest`; call it before capturing a graph, for a capture cannot be measured
in).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from presto_rt.errors import BackendUnavailableError, InvalidInputError, MissingDependencyError

from . import runtime
from .autotune import KernelSelector
from .checks import check, check_out, check_same_device, check_shape, check_tensor
from .registration import register_operator
from .runtime import dot, jit, strides, tl

LOG2_E = 1.4426950408889634
Forward = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "int | None", float, "Tensor | None"], Tensor]


@jit
def attend(
    acc, top, total, q, k_ptr, v_ptr, row, first, last, length, window, k_token, v_token, scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Fold keys first ... last of one head into (acc, top, total): weighted values, largest score, sum of weights."""
    column, dim = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        key = start + column
        k_at, v_at = k_ptr + key[None, :] * k_token + dim[:, None], v_ptr + key[:, None] * v_token + dim[None, :]
        if MASKED:
            k = tl.load(k_at, mask=(key[None, :] < length) & (dim[:, None] < DIM), other=0.0)
        elif DIM < BLOCK_D:
            k = tl.load(k_at, mask=dim[:, None] < DIM, other=0.0)
        else:
            k = tl.load(k_at)
        scores = dot(q, k, tl.zeros((q.shape[0], BLOCK_N), tl.float32)) * scale
        if MASKED:
            seen = key[None, :] < length
            if WINDOWED:
                seen = seen & (key[None, :] >= row[:, None] - window) & (key[None, :] <= row[:, None] + window)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        kept = tl.exp2(top - new_top)
        total = total * kept + tl.sum(weights, 1)
        top = new_top
        if MASKED:
            v = tl.load(v_at, mask=(key[:, None] < length) & (dim[None, :] < DIM), other=0.0)
        elif DIM < BLOCK_D:
            v = tl.load(v_at, mask=dim[None, :] < DIM, other=0.0)
        else:
            v = tl.load(v_at)
        acc = dot(weights.to(v.dtype), v, acc * kept[:, None])
    return acc, top, total


@jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, length_ptr,
    tokens, keys, window, scale, q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    out_batch, out_head, out_token,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Writes: program (i, h, b) writes queries i*BLOCK_M ... of head h of batch element b in out_ptr.

    scale holds log2(e): the softmax runs in base 2.
    """
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_M
    row, dim = begin + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (row[:, None] < tokens) & (dim[None, :] < DIM)
    q = tl.load(q_ptr + batch * q_batch + head * q_head + row[:, None] * q_token + dim[None, :], mask=inside, other=0.0)
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    length = keys
    if length_ptr is not None:
        length = tl.minimum(tl.load(length_ptr + batch), keys)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite: exp2(-inf - top) stays 0 where a row sees no key
    total = tl.zeros((BLOCK_M,), tl.float32)
    if WINDOWED:
        first = tl.maximum(begin - window, 0) // BLOCK_N * BLOCK_N
        last = tl.minimum(begin + BLOCK_M + window, length)
        acc, top, total = attend(acc, top, total, q, k_ptr, v_ptr, row, first, last, length, window, k_token, v_token,
                                 scale, DIM, BLOCK_D, BLOCK_N, True, True)  # fmt: skip
    else:
        whole = length // BLOCK_N * BLOCK_N  # blocks that need no mask
        acc, top, total = attend(acc, top, total, q, k_ptr, v_ptr, row, 0, whole, length, window, k_token, v_token,
                                 scale, DIM, BLOCK_D, BLOCK_N, False, False)  # fmt: skip
        acc, top, total = attend(acc, top, total, q, k_ptr, v_ptr, row, whole, length, length, window, k_token, v_token,
                                 scale, DIM, BLOCK_D, BLOCK_N, True, False)  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out = out_ptr + batch * out_batch + head * out_head + row[:, None] * out_token + dim[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """`attention` in plain torch: arithmetic in fp32, or fp64 where q is; the scores are in memory."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = visible(q.shape[-2], k.shape[-2], key_lengths, window, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1).nan_to_num(0.0) @ v.to(wide)).to(q.dtype)


def visible(
    tokens: int, keys: int, key_lengths: Tensor | None, window: int | None, device: torch.device
) -> Tensor | None:
    """Boolean mask (B or 1, 1, T or 1, S), True where a query sees a key; None where all see all."""
    mask = None
    key = torch.arange(keys, device=device)
    if key_lengths is not None:
        mask = (key < key_lengths[:, None])[:, None, None]
    if window is not None:
        near = ((torch.arange(tokens, device=device)[:, None] - key).abs() <= window)[None, None]
        mask = near if mask is None else mask & near
    return mask


# ---- backends ------------------------------------------------------------------------------------------------------


def _triton(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, window: int | None, scale: float, out: Tensor | None
) -> Tensor:
    batch, heads, tokens, dim = q.shape
    out = _frame_major(q) if out is None else out
    # the kernel's offsets within a head are 32-bit
    reach = max(x.shape[2] * x.stride(2) for x in (q, k, v, out))
    check(reach < 2**31, f"the tokens of a head reach over {reach} elements, 2^31 are the most; call .contiguous()")
    block_m, block_n, warps, stages = tiles(batch * heads, tokens, dim, q)
    runtime.launch(
        attention_kernel, (runtime.ceil_div(tokens, block_m), heads, batch),
        q, k, v, out, lengths,
        tokens, k.shape[-2], min(window or 0, tokens), scale * LOG2_E, *strides(q), *strides(k), *strides(v),
        *strides(out),
        num_warps=warps, num_stages=stages,
        DIM=dim, BLOCK_D=max(16, runtime.next_power_of_2(dim)), BLOCK_M=block_m, BLOCK_N=block_n, WINDOWED=window is
        not None,
    )  # fmt: skip
    return out


def tiles(heads: int, tokens: int, dim: int, q: Tensor) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of one program: large where there is work for every multiprocessor, else small."""
    if q.dtype == torch.float32:
        return 32, 32, 4, 1  # no matrix units: for checking, not for speed
    many = heads * runtime.ceil_div(tokens, 128) >= 264
    hopper = runtime.capability(q) >= 90
    block_n = 64 if hopper or dim <= 64 else 32  # 64 would spill: mma keeps operands in registers
    return (128, block_n, 8, 3 if hopper else 2) if many else (64, block_n, 4, 3 if hopper else 2)


def _sdpa(kernel: str | None) -> Forward:
    """torch's scaled_dot_product_attention: its own choice of kernel, or the one named in torch.nn.attention."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, window: int | None, scale: float, out: Tensor | None
    ) -> Tensor:
        if kernel == "FLASH_ATTENTION" and (lengths is not None or window is not None):
            raise BackendUnavailableError("SDPA's flash kernel takes no mask; use backend='triton' or 'sdpa'")
        mask = visible(q.shape[-2], k.shape[-2], lengths, window, q.device)
        chosen: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if kernel is not None:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            chosen = sdpa_kernel(getattr(SDPBackend, kernel))
        with chosen:
            result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        if lengths is not None and mask is not None:  # some of its kernels answer NaN where a row sees no key
            result = result.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        return runtime.copy_into(out, result)

    return forward


def _flash_attn(module: str, package: str) -> Forward:
    """Dao's flash-attn, of the given module; its layout is (B, T, H, D)."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, window: int | None, scale: float, out: Tensor | None
    ) -> Tensor:
        try:
            function = importlib.import_module(module).flash_attn_func
        except (ImportError, AttributeError) as error:
            message = f"this attention backend needs {package}: pip install {package}, or use backend='triton'"
            raise MissingDependencyError(message) from error
        if lengths is not None:
            raise BackendUnavailableError(f"{package} takes no key lengths here; use backend='triton' or 'sdpa'")
        near = {} if window is None else {"window_size": (window, window)}
        result = function(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, **near)
        return runtime.copy_into(out, (result[0] if isinstance(result, tuple) else result).transpose(1, 2))

    return forward


def _torch(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, window: int | None, scale: float, out: Tensor | None
) -> Tensor:
    return runtime.copy_into(out, attention_reference(q, k, v, key_lengths=lengths, window=window, scale=scale))


BACKENDS: dict[str, Forward] = {
    "triton": _triton,
    "sdpa": _sdpa(None),
    "sdpa-flash": _sdpa("FLASH_ATTENTION"),
    "sdpa-cudnn": _sdpa("CUDNN_ATTENTION"),
    "flash-attn": _flash_attn("flash_attn", "flash-attn"),
    "flash-attn-4": _flash_attn("flash_attn.cute", "flash-attn-4"),
    "torch": _torch,
}
#: what "auto" measures on a GPU; the plain reference is never the fastest
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
    """softmax(scale q k^T) v over the visible keys.

    q (B, H, T, D), k and v (B, H, S, D), fp16 or bf16 (fp32 for checks), any strides but the last; D a multiple of
    16, 16 to 128. key_lengths (B,) int32: keys beyond are not seen. window: frames to either side that are seen (T =
    S only). scale: 1 / sqrt(D) by default. Returns (B, H, T, D); its memory is (B, T, H, D), so flattening the heads
    is free. backend: "auto", or one of BACKENDS. Raises InvalidInputError for inputs that do not fit, BackendUnavailableError
    or MissingDependencyError for a named backend that cannot take them.
    """
    _check(q, k, v, key_lengths, window, out)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "auto":
        backend = fastest(q, k, v, key_lengths=key_lengths, window=window, out=out)
    elif backend not in BACKENDS:
        raise InvalidInputError(f"attention backend {backend!r} is unknown; use 'auto' or one of {', '.join(BACKENDS)}")
    if backend == "triton":
        runtime.use_triton(q, "triton")  # raises where it cannot run
    return BACKENDS[backend](q, k, v, key_lengths, window, scale, out)


selector = KernelSelector("attention")


def fastest(
    q: Tensor, k: Tensor, v: Tensor, *, key_lengths: Tensor | None = None, window: int | None = None,
    out: Tensor | None = None,
) -> str:  # fmt: skip
    """Name of the backend that "auto" takes for such inputs; measured once per device, dtype, shape, layout, mask.

    out: given where the call will be; what is in it stays. Some backends must copy their result there.
    """
    if not q.is_cuda:
        return "triton" if runtime.use_triton(q) else "sdpa"
    names = [name for name in MEASURED if name != "triton" or runtime.triton is not None]
    key = (q.dtype, q.shape, k.shape, *(x.stride() for x in (q, k, v)), key_lengths is None, window, out is None)

    def ways() -> dict[str, Callable[[], Tensor]]:
        scratch = None if out is None else torch.empty_like(out)
        inputs = (q, k, v, key_lengths, window, q.shape[-1] ** -0.5, scratch)
        return {name: functools.partial(BACKENDS[name], *inputs) for name in names}

    return selector.fastest(q.device, key, ways, names[0])


def _frame_major(q: Tensor) -> Tensor:
    batch, heads, tokens, dim = q.shape
    return torch.empty(batch, tokens, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, window: int | None, out: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, 4)
    batch, heads, tokens, dim = q.shape
    check(dim % 16 == 0 and dim <= 128, f"head dim {dim} is not supported; use a multiple of 16 up to 128")
    check(k.dtype == q.dtype == v.dtype, f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; make them one")
    check_shape("k", k, (batch, heads, k.shape[2], dim))
    check_shape("v", v, tuple(k.shape))
    if key_lengths is not None:
        check_tensor("key_lengths", key_lengths, 1, (torch.int32,))
        check_shape("key_lengths", key_lengths, (batch,))
    if window is not None:
        check(window >= 0, f"window={window} must be 0 or more frames to either side")
        check(k.shape[2] == tokens, f"a window needs as many keys as queries, not {k.shape[2]} and {tokens}")
    check_out("out", out, tuple(q.shape), q.dtype)
    check_same_device(q=q, k=k, v=v, key_lengths=key_lengths, out=out)


def shipped(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, on meta tensors, of every configuration that `report` compiles."""
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
        qkv = torch.empty(3, batch, heads, 689, dim, dtype=torch.bfloat16, device="meta")
        lengths = torch.empty(batch, dtype=torch.int32, device="meta") if masked else None
        name = f"{batch}x{heads}x{dim}" + (" lengths" if masked else "") + (" window" if windowed else "")
        window = 64 if windowed else None
        yield name, functools.partial(attention, *qkv, key_lengths=lengths, window=window, backend="triton")


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
