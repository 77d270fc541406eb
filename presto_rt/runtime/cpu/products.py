"""Matrix products on a CPU: oneDNN over weights packed once, or plain torch where oneDNN has no such product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..eager.ops import ACTIVATIONS

INT8_MIN_INPUTS = 256  # narrower products gain nothing by int8

# oneDNN's name and algorithm of an activation, applied to the fp32 sums.
FUSED_ACTIVATIONS = {
    "none": ("none", ""),
    "gelu_tanh": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "silu": ("swish", ""),
}


class FloatLinear(Protocol):
    """Packed weights of a product in a floating-point dtype."""

    @property
    def input_scale(self) -> None:
        """None: inputs are not scaled."""

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """Return act(x W^T + bias)."""


@dataclass(frozen=True)
class OneDnnLinear:
    """Weights in oneDNN's own layout, bias (N,) or None."""

    weight: Tensor
    bias: Tensor | None
    input_scale: None = None

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """Return act(x W^T + bias)."""
        name, algorithm = FUSED_ACTIVATIONS[activation]
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)
        return y


@dataclass(frozen=True)
class TorchLinear:
    """Weights (N, K) as they are, bias (N,) or None."""

    weight: Tensor
    bias: Tensor | None
    input_scale: None = None

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """Return act(x W^T + bias)."""
        return ACTIVATIONS[activation](F.linear(x, self.weight, self.bias))


@dataclass(frozen=True)
class Int8Linear:
    """Weights rounded to int8, with a scale (N,) fp32 for each output channel; bias (N,) fp32 or None.

    The inputs are uint8 around 128, with a scale for each token. onednn: the weights are in oneDNN's layout; else they
    are (N, K) int8 and the product is `exact_sums`.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    onednn: bool
    input_scale: None = None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the product of integers (rows, K) with the weights, times the weights' scales, (rows, N)."""
        if not self.onednn:
            return (exact_sums(x, self.weight) * self.scale).to(dtype)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 128, self.weight, self.scale, self.zero_point, None, 1.0, 0, dtype, "none", [], ""
        )
        return y


def exact_sums(x: Tensor, weight: Tensor) -> Tensor:
    """Return (x - 128) W^T of integers, (rows, N) fp32, rounded once.

    Products of 1024 inputs stay below 2^24 (128 * 127 * 1024), so fp32 adds them exactly in any order.
    """
    columns = range(0, x.shape[1], 1024)
    parts = [(x[:, i : i + 1024].float() - 128.0) @ weight[:, i : i + 1024].float().T for i in columns]
    return parts[0] if len(parts) == 1 else torch.stack(parts).double().sum(0).float()


@cache
def onednn_supports(dtype: torch.dtype) -> bool:
    """Return True if oneDNN packs weights in `dtype` on this processor (bf16 needs AVX512BW or AVX-NE-CONVERT)."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), None)
    except (RuntimeError, AttributeError):
        return False
    return True


def pack_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int | None = None) -> FloatLinear:
    """Return weights packed for products in `dtype`.

    Args:
        weight: (N, K).
        bias: (N,) or None.
        dtype: of products and activations.
        rows: number of rows of the products, where it is known.

    oneDNN's layout where this processor supports it, else the weights as they are.
    """
    weight, bias = weight.detach().to(dtype).contiguous(), None if bias is None else bias.detach().to(dtype)
    if not onednn_supports(dtype):
        return TorchLinear(weight, bias)
    return OneDnnLinear(torch.ops.mkldnn._reorder_linear_weight(weight, rows), bias)


def pack_int8(weight: Tensor, bias: Tensor | None, onednn: bool = True) -> Int8Linear:
    """Return weights (N, K) rounded to int8: the largest of each output channel is 127.

    onednn: use oneDNN's product; else the exact one in plain torch, which is slow.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    rounded = (weight / scale[:, None]).round().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(rounded, None) if onednn else rounded
    zero_point = torch.zeros(len(scale), dtype=torch.int8)
    return Int8Linear(packed, scale, zero_point, None if bias is None else bias.detach().float().clone(), onednn)


@cache
def int8_is_exact() -> bool:
    """Return True if oneDNN's int8 product is available and right: without VNNI two neighbours overflow 16 bits."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        packed = pack_int8(torch.ones(16, INT8_MIN_INPUTS), None)
        largest = packed(torch.full((2, INT8_MIN_INPUTS), 255, dtype=torch.uint8), torch.float32)
    except (RuntimeError, AttributeError):  # this torch or its oneDNN has none for this processor
        return False
    return bool(((largest / INT8_MIN_INPUTS - 127.0).abs() < 1e-2).all())
