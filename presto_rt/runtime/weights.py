"""Weights of a diffusion transformer under neutral names: what checkpoints give and tables of operators pack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

#: (times (N,), vector port (N, V), budgets (N,)) fp32 -> modulation input (N, width) fp32
ConditionEmbedding = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LinearWeights:
    """A linear layer: weight (outputs, inputs), bias (outputs,) or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class BlockWeights:
    """One transformer block. The norms are RMS norms over the head dimension, (head_dim,) each.

    modulation gives 6 rows of the width: shift, scale and gate of attention, then of the MLP.
    """

    qkv: LinearWeights
    out: LinearWeights
    cross_q: LinearWeights
    cross_kv: LinearWeights
    cross_out: LinearWeights
    up: LinearWeights
    down: LinearWeights
    modulation: LinearWeights
    q_norm: Tensor
    k_norm: Tensor
    cross_q_norm: Tensor
    cross_k_norm: Tensor


@dataclass(frozen=True)
class TransformerWeights:
    """A whole transformer in fp32 on one device.

    input, output: latent channels to width and back. local: (width, L), projection of the local port. modulation: 2
    rows of the width, shift and scale before the output. embedding: of noise level, vector port and layer budget.
    """

    input: LinearWeights
    output: LinearWeights
    local: Tensor
    modulation: LinearWeights
    embedding: ConditionEmbedding
    blocks: tuple[BlockWeights, ...]
