"""`Ops`: the operators that a backend implements. Plans, networks and the codec are written over them once.

T stands for the activations' dtype. Outputs are written to the given buffers; a residual is fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..models.spectral import SpectralFrames
    from .plan import LatentEdit, PlannedCall

#: One seed for each clip: Python integers, or an int64 tensor (B,) that holds their 64 bits.
Seeds = Sequence[int] | Tensor


class PackedLinear(Protocol):
    """Weights of a linear layer in a table's own form.

    input_scale: None, or the divisor of the layer's input, which is then fp8 (e4m3).
    """

    @property
    def input_scale(self) -> float | None:
        """Scale of fp8 inputs, or None."""


@dataclass(frozen=True)
class Capabilities:
    """Abilities that not every table has.

    allocates_matmul_output: `linear` returns a tensor of its own, so the arena holds no buffer for it.
    """

    allocates_matmul_output: bool = False


@dataclass(frozen=True)
class Modulation:
    """Rows of the modulation table (B, rows, D) fp32 for one adaptive norm; None: gate 1, shift 0, scale 0."""

    table: Tensor
    gate: int | None = None
    shift: int | None = None
    scale: int | None = None


@dataclass(frozen=True)
class SamplerBuffers:
    """State of a sampler: x and history (B, T, C) fp32; noise (B, T, C) fp32, scratch; network_input (N, T, C) T."""

    x: Tensor
    history: Tensor
    noise: Tensor
    network_input: Tensor


class Ops(Protocol):
    """Table of operators of one backend, for activations of one dtype on one device."""

    dtype: torch.dtype
    device: torch.device
    capabilities: Capabilities

    def pack(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Return weights (N, K) and bias (N,), fp32, in the form that `linear` takes; called once, at load."""

    def linear(
        self,
        x: Tensor,
        weights: PackedLinear,
        out: Tensor | None,
        activation: str = "none",
        out_scale: float | None = None,
    ) -> Tensor:
        """Return act(x W^T + bias).

        Args:
            x: (B, T, K) T.
            weights: from `pack`.
            out: (B, T, N) T; None where the table allocates outputs of matrix products.
            activation: "none", "gelu", "gelu_tanh" or "silu".
            out_scale: None, or the divisor of an fp8 output.
        """

    def adaln(
        self,
        source: Tensor,
        branch: Tensor,
        modulation: Modulation,
        residual: Tensor,
        out: Tensor,
        eps: float,
        out_scale: float | None = None,
    ) -> None:
        """residual = source + gate * branch; out = layer_norm(residual) * (1 + scale) + shift (Peebles & Xie 2023).

        Args:
            source: (B, T, D) fp32; may be the residual itself.
            branch: (B, T, D) T.
            modulation: rows of gate, shift and scale.
            residual: (B, T, D) fp32, written.
            out: (B, T, D) T, or fp8 with `out_scale`; written.
            eps: epsilon of the norm.
            out_scale: None, or the divisor of an fp8 output.
        """

    def qk_norm_rope(
        self,
        qkv: Tensor,
        angles: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        q: Tensor,
        k: Tensor,
        eps: float,
    ) -> Tensor:
        """RMS-normalize and rotate queries and keys; return the values (B, H, T, D), a view of qkv.

        Args:
            qkv: (B, T, 3 H D) T.
            angles: cos and sin (T, D / 2) fp32.
            weights: of the norms, (D,) fp32 each.
            q: (B, H, T, D) T, written.
            k: (B, H, T, D) T, written.
            eps: epsilon of the norms.
        """

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scratch: Tensor | None, out: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """softmax(q k^T / sqrt(D)) v into out (B, T, H D).

        Args:
            q: (B, H, T, D) T.
            k: (B, H, S, D) T.
            v: (B, H, S, D) T; may have gaps between its tokens.
            scratch: working memory of `scratch_bytes`, or None where that is 0.
            out: written.
            lengths: (B,) int32 valid keys; None for all.
        """

    def cross_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor | None,
        lengths: Tensor,
        scratch: Tensor | None,
        out: Tensor,
        eps: float = 1e-6,
    ) -> Tensor:
        """Attention of q (B, T, H D), RMS-normalized on the way in, to the first `lengths` of k, v (B, H, S, D).

        Args:
            q: (B, T, H D) T.
            k: (B, H, S, D) T, already normalized.
            v: (B, H, S, D) T.
            q_weight: (D,) fp32; None leaves q as it is.
            lengths: (B,) int32.
            scratch: working memory of `scratch_bytes`, or None where that is 0.
            out: (B, T, H D) T, written.
            eps: epsilon of the norm.
        """

    def scratch_bytes(self, batch: int, heads: int, keys: int, dim: int) -> int:
        """Return the bytes of working memory that both attentions need."""

    def normal(self, seeds: Seeds, stream: int, out: Tensor) -> Tensor:
        """Fill out (B, T, C) fp32 with standard normal noise of each clip's seed (`diffusion.noise`)."""

    def sampler_step(
        self,
        buffers: SamplerBuffers,
        conditional: Tensor,
        unconditional: Tensor | None,
        seeds: Seeds,
        call: PlannedCall,
        edit: LatentEdit | None,
    ) -> None:
        """Update the sampler's state after a network call and write the next network input (`trajectory`).

        Args:
            buffers: x, history and network_input are written.
            conditional: raw output F_c (B, T, C) T.
            unconditional: raw output F_u, or None.
            seeds: of the fresh noise.
            call: coefficients, noise stream and number of copies of the next input.
            edit: latents that are kept, or None.
        """

    def mix_norm(
        self,
        source: Tensor | None,
        branch: Tensor | None,
        mix: Tensor | None,
        norm: tuple[Tensor, Tensor] | None,
        residual: Tensor | None,
        out: Tensor,
        eps: float = 1e-5,
        after: bool = False,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """r = source + branch; out = layer_norm(r mixed over five frames).

        Args:
            source: (B, T, W) fp32, or None for 0.
            branch: (B, T, W) T, or None for 0.
            mix: (5, W) fp32 depthwise filter over time, or None for none.
            norm: weight and bias (W,) fp32, or None for none.
            residual: (B, T, W) fp32, written with r, or with the norm's result if `after`; None if not wanted. With a
                mix it must not be the source.
            out: (B, T, W) T, written.
            eps: epsilon of the norm.
            after: the residual takes the norm's result (a post-norm layer).
            lengths: (B,) int32 valid frames, r is 0 beyond; None for all.
        """

    def features(
        self, head: Tensor, linear: Tensor, mean: Tensor, maximum: Tensor, scale: float, out: Tensor
    ) -> Tensor:
        """Log-magnitudes and cosine from the two halves of the codec's decoder.

        Args:
            head: (B, F, R) T, the first 3 bands of each row count.
            linear: (B, F, R) T.
            mean: (2, bands) fp32 in nats.
            maximum: (2, bands) fp32 in nats.
            scale: nats of a unit of output.
            out: (B, F, 3, bands) fp32, written: min(scale y + mean, maximum) of mid and side, tanh y of the cosine.
        """

    def synthesize(
        self,
        frames: SpectralFrames,
        features: Tensor,
        gain: Tensor,
        iterations: int,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Stereo samples (B, 2, 512 F) fp32 of features (B, F, 3, bands), after Griffin-Lim iterations.

        Args:
            frames: the codec's transforms between samples and frames.
            features: log-magnitudes of mid and side and their cosine, fp32.
            gain: (bands,) fp32 in nats.
            iterations: of fast Griffin-Lim.
            lengths: (B,) int32 valid frames; samples beyond are 0. None for all.
        """
