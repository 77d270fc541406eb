"""The table of operators for a CPU: matrix products by oneDNN over weights packed once, all between them in C++
(csrc/simd).

The C++ operators take addresses: shapes, dtypes and strides are checked here, sizes again there. `threads` goes with
every call, so two models of one process may use different numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import native
from ...diffusion import noise
from ...errors import BackendUnavailableError
from ..eager.ops import ACTIVATIONS
from .threads import reduce_openmp_spinning

EPS = 1e-6
DTYPES = (torch.float32, torch.bfloat16)
GELU_TANH, SILU, SWIGLU, NONE = 0, 1, 2, 3
KINDS = {"none": NONE, "gelu_tanh": GELU_TANH, "silu": SILU}
WIDE = 256  # inputs from which on a product is worth doing in int8


def unavailable(dtype: torch.dtype = torch.float32) -> str | None:
    """Why this table cannot be had here, in one line, or None."""
    if native.lib is None:
        return f"no C++ operators: {native.why}"
    if dtype not in DTYPES:
        return f"it computes in float32 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


@dataclass(frozen=True)
class Packed:
    """Weights of a matrix product in oneDNN's own layout (or plain ones, where torch has no oneDNN)."""

    weight: Tensor
    bias: Tensor | None
    product: Any

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        return self.product(x, self.weight, self.bias, activation)


# What `forward.Ops.linear` calls an activation: oneDNN's name and algorithm, applied to the fp32 sums.
FUSED = {"none": ("none", ""), "gelu_tanh": ("gelu", "tanh"), "gelu": ("gelu", "none"), "silu": ("swish", "")}


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    name, algorithm = FUSED[activation]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def pack(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int | None = None) -> Packed:
    """(N, K) weights for products in `dtype`. rows: how many rows the products will have, where that is known."""
    weight, bias = weight.detach().to(dtype).contiguous(), None if bias is None else bias.detach().to(dtype)
    if not torch.backends.mkldnn.is_available():
        return Packed(weight, bias, _plain)
    return Packed(torch.ops.mkldnn._reorder_linear_weight(weight, rows), bias, _onednn)


@dataclass(frozen=True)
class Packed8:
    """Weights in int8, a scale (N,) for each output channel, in oneDNN's own layout. The activations come as uint8
    around 128 with a scale for each token. bias (N,) fp32."""

    weight: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Integers (rows, K) -> their product times the weights' scales, (rows, N)."""
        return torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 128, self.weight, self.scale, self.zero, None, 1.0, 0, dtype, "none", [], ""
        )


def pack_int8(weight: Tensor, bias: Tensor | None) -> Packed8:
    """(N, K) weights rounded to int8: each channel's largest is 127."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    rounded = (weight / scale[:, None]).round().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(rounded, None)
    zero = torch.zeros(len(scale), dtype=torch.int8)
    return Packed8(packed, scale, zero, None if bias is None else bias.detach().float().clone())


@cache
def int8_is_exact() -> bool:
    """Whether products in int8 can be had, and are right: without VNNI two neighbours overflow 16 bits."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        most = pack_int8(torch.ones(16, WIDE), None)(torch.full((2, WIDE), 255, dtype=torch.uint8), torch.float32)
    except (RuntimeError, AttributeError):  # this torch or its oneDNN has none for this processor
        return False
    return bool(((most / WIDE - 127.0).abs() < 1e-2).all())


def check(x: Tensor, *shape: int, dtype: torch.dtype) -> int:
    """The tensor's address, if it is contiguous, of this shape and dtype, and on the CPU; ValueError otherwise."""
    if x.shape != shape or x.dtype != dtype or not x.is_contiguous() or x.device.type != "cpu":
        raise ValueError(f"expected {dtype} {shape}, contiguous, on the CPU; got {x.dtype} {tuple(x.shape)}")
    return x.data_ptr()


class CpuOps:
    """C++ and oneDNN in fp32 or bf16. See `forward.Ops` and `decoder.NetworkOps`.

    int8: products of at least WIDE inputs are done in 8-bit integers, the rest and all between them in `dtype`. Raises
    BackendUnavailableError where `unavailable` gives a reason, and for int8 where `int8_is_exact` says no.
    """

    allocates_matmul_output = True  # oneDNN's packed product takes no output tensor

    def __init__(self, dtype: torch.dtype = torch.float32, threads: int | None = None, int8: bool = False) -> None:
        if int8 and not int8_is_exact():
            raise BackendUnavailableError(
                "int8 needs a torch with oneDNN and a processor with VNNI; choose another dtype"
            )
        self.int8 = int8
        if (why := unavailable(dtype)) is not None:
            raise BackendUnavailableError(f"the CPU engine cannot be used: {why}")
        self.dtype = dtype
        self.bf16 = dtype == torch.bfloat16
        self.threads = torch.get_num_threads() if threads is None else threads
        self.lib: Any = native.lib
        if self.threads > 1:
            reduce_openmp_spinning(self.threads)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Packed | Packed8:
        narrow = self.int8 and weight.shape[1] >= WIDE
        return pack_int8(weight, bias) if narrow else pack(weight, bias, self.dtype)

    def linear(self, x: Tensor, weights: Packed | Packed8, out: Tensor | None, activation: str = "none") -> Tensor:
        if isinstance(weights, Packed):
            return weights(x, activation)
        numbers, scale = self.quantize(x)
        y = self.rescale(weights(numbers, self.dtype), scale, weights.bias, activation)
        return y.view(*x.shape[:-1], y.shape[-1])

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., K) -> uint8 (rows, K) around 128 and a scale (rows,) fp32 for each row."""
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        out, scale = torch.empty(rows, width, dtype=torch.uint8), torch.empty(rows)
        address = check(x, *x.shape, dtype=self.dtype)
        self.lib.quantize(address, out.data_ptr(), scale.data_ptr(), self.bf16, rows, width, self.threads)
        return out, scale

    def rescale(self, y: Tensor, scale: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
        """activation(scale y + bias) in place; y (rows, N), scale (rows,) and bias (N,) fp32; "none", "gelu_tanh" or
        "silu"."""
        rows, width = y.shape
        address = check(y, rows, width, dtype=self.dtype)
        self.lib.rescale(
            address, check(scale, rows, dtype=torch.float32),
            0 if bias is None else check(bias, width, dtype=torch.float32), address, self.bf16, rows, width,
            KINDS[activation], self.threads,
        )  # fmt: skip
        return y

    def activation(self, x: Tensor, kind: int, out: Tensor) -> Tensor:
        """gelu_tanh or silu of x into out (may be x), or swiglu of x (..., 2 N) into out (..., N)."""
        columns = out.shape[-1]
        rows = out.numel() // columns
        source = check(x, *out.shape[:-1], columns * (2 if kind == SWIGLU else 1), dtype=self.dtype)
        self.lib.activation(
            source, check(out, *out.shape, dtype=self.dtype), self.bf16, rows, columns, kind, self.threads
        )
        return out

    def adaln(
        self, source: Tensor, branch: Tensor | None, table: Tensor | None, gate: int | None, shift: int | None,
        scale: int | None, residual: Tensor, out: Tensor,
    ) -> None:  # fmt: skip
        shape = residual.shape
        batch, tokens, width = shape
        rows, stride = [0, 0, 0], 0
        if table is not None:
            stride = table.stride(0)
            start = table.data_ptr()
            if table.shape[0] != batch or table.shape[2] != width or table.dtype != torch.float32 or stride % width:
                raise ValueError(f"the table must be float32 ({batch}, rows, {width}), got {tuple(table.shape)}")
            for i, row in enumerate((gate, shift, scale)):
                if row is not None:
                    if not 0 <= row < table.shape[1]:
                        raise ValueError(f"row {row} is not in the table's 0..{table.shape[1] - 1}")
                    rows[i] = start + 4 * width * row
        self.lib.adaln(
            check(source, *shape, dtype=torch.float32), check(residual, *shape, dtype=torch.float32),
            0 if branch is None else check(branch, *shape, dtype=self.dtype), check(out, *shape, dtype=self.dtype),
            self.bf16, batch, tokens, width, *rows, stride, EPS, self.threads,
        )  # fmt: skip

    def qk_norm_rope(self, qkv: Tensor, angles: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], q: Tensor,
                     k: Tensor) -> Tensor:  # fmt: skip
        batch, heads, tokens, dim = q.shape
        f32 = torch.float32
        self.lib.qk_norm_rope(
            check(qkv, batch, tokens, 3 * heads * dim, dtype=self.dtype), check(q, *q.shape, dtype=self.dtype),
            check(k, *q.shape, dtype=self.dtype), self.bf16, batch, tokens, heads, dim,
            *(check(a, tokens, dim // 2, dtype=f32) for a in angles), *(check(w, dim, dtype=f32) for w in weights), EPS,
            self.threads,
        )  # fmt: skip
        return qkv.view(batch, tokens, 3, heads, dim)[:, :, 2].transpose(1, 2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scratch: Tensor | None, out: Tensor,
                  lengths: Tensor | None = None) -> Tensor:  # fmt: skip
        return self._attend(q, k, v, None, lengths, scratch, out)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, lengths: Tensor,
                        scratch: Tensor | None, out: Tensor) -> Tensor:  # fmt: skip
        split = q.unflatten(-1, (k.shape[1], k.shape[3])).transpose(1, 2)
        return self._attend(split, k, v, q_weight, lengths, scratch, out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, lengths: Tensor | None,
                scratch: Tensor | None, out: Tensor) -> Tensor:  # fmt: skip
        batch, heads, tokens, dim = q.shape
        keys = k.shape[2]
        for x in (q, k, v):
            if x.dtype != self.dtype or x.stride(3) != 1 or x.device.type != "cpu":
                raise ValueError(f"q, k and v must be {self.dtype} with contiguous heads, got {x.dtype} {x.stride()}")
        if scratch is None:
            raise ValueError("attention needs scratch memory of scratch_bytes()")
        if k.shape != (batch, heads, keys, dim) or v.shape != k.shape:
            raise ValueError(f"k and v must be ({batch}, {heads}, keys, {dim}), got {tuple(k.shape)}, {tuple(v.shape)}")
        self.lib.attention(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), check(out, batch, tokens, heads * dim, dtype=self.dtype),
            0 if q_weight is None else check(q_weight, dim, dtype=torch.float32),
            0 if lengths is None else check(lengths, batch, dtype=torch.int32), scratch.data_ptr(), scratch.numel(),
            self.bf16, batch, heads, tokens, keys, dim, q.stride()[:3], k.stride()[:3], v.stride()[:3], dim**-0.5, EPS,
            self.threads,
        )  # fmt: skip
        return out

    def scratch_bytes(self, batch: int, heads: int, keys: int, dim: int) -> int:
        return self.lib.attention_bytes(batch, heads, keys, dim, self.threads)

    def residual_mix_norm(
        self, source: Tensor | None, branch: Tensor | None, mix: Tensor | None, norm: tuple[Tensor, Tensor] | None,
        residual: Tensor | None, out: Tensor, eps: float = 1e-5, after: bool = False,
    ) -> Tensor:  # fmt: skip
        shape, f32 = out.shape, torch.float32
        batch, frames, width = shape

        def address(x: Tensor | None, *size: int, dtype: torch.dtype) -> int:
            return 0 if x is None else check(x, *size, dtype=dtype)

        self.lib.mix_norm(
            address(source, *shape, dtype=f32), address(branch, *shape, dtype=self.dtype),
            address(mix, 5, width, dtype=f32), *(address(w, width, dtype=f32) for w in norm or (None, None)),
            address(residual, *shape, dtype=f32), check(out, *shape, dtype=self.dtype), self.bf16, after, batch, frames,
            width, eps, self.threads,
        )  # fmt: skip
        return out

    def features(self, head: Tensor, linear: Tensor, mean: Tensor, ceiling: Tensor, scale: float,
                 out: Tensor) -> Tensor:  # fmt: skip
        batch, frames, _, bands = out.shape
        stride, f32 = head.shape[-1], torch.float32
        if stride < 3 * bands:
            raise ValueError(f"rows of {stride} numbers do not hold three of {bands} bands")
        self.lib.features(
            *(check(x, batch, frames, stride, dtype=self.dtype) for x in (head, linear)),
            check(mean, 2, bands, dtype=f32), check(ceiling, 2, bands, dtype=f32), check(out, *out.shape, dtype=f32),
            self.bf16, batch * frames, bands, stride, scale, self.threads,
        )  # fmt: skip
        return out

    def normal(self, seeds: list[int], stream: int, out: Tensor) -> Tensor:
        for clip, seed in zip(out, seeds, strict=True):
            self.lib.normal(clip.numpy(), noise.check_seed(seed), stream)
        return out

    def step(self, x: Tensor, history: Tensor, conditional: Tensor, unconditional: Tensor | None, noise: Tensor | None,
             update: Tensor, copies: int, network_input: Tensor) -> None:  # fmt: skip
        shape, f32 = x.shape, torch.float32
        if copies * shape[0] > network_input.shape[0]:
            raise ValueError(f"{copies} copies of {shape[0]} clips do not fit an input of {network_input.shape[0]}")
        self.lib.edm_step(
            check(x, *shape, dtype=f32), check(history, *shape, dtype=f32),
            check(conditional, *shape, dtype=self.dtype),
            0 if unconditional is None else check(unconditional, *shape, dtype=self.dtype),
            0 if noise is None else check(noise, *shape, dtype=f32),
            check(network_input, len(network_input), *shape[1:], dtype=self.dtype), check(update, 9, dtype=f32),
            self.bf16, x.numel(), copies, self.threads,
        )  # fmt: skip
