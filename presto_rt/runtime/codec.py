"""The codec's decoder network over fused operators and static buffers: `models/codec.py` once more, as it runs.

Between two matrix products of a block there is one operator: residual sum, mix of five frames and layer norm. SiLU is
part of the product before it. The latents' scale and mean are part of the first weights; the last operator adds the two
halves of the decoder, undoes the features' normalisation and applies the ceiling. The residual stays fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.codec import Block, Codec
from ..models.spectral import FRAMES_PER_LATENT
from .cpu.threads import thread_limit
from .memory import Arena, Buffer
from .pool import Pool

Linear = Any  # weights as the table packed them


class NetworkOps(Protocol):
    """The operators that the codec's decoder and the text encoder need beside those of the transformer. T is the
    activations' dtype."""

    dtype: torch.dtype
    allocates_matmul_output: bool

    def pack(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Weights (N, K) fp32 and bias (N,) in the form that `linear` wants, made once at load."""

    def linear(self, x: Tensor, weights: Linear, out: Tensor | None, activation: str = "none") -> Tensor:
        """act(x W^T + bias): (B, T, K) -> (B, T, N), both T; activation "none", "gelu", "gelu_tanh" or "silu"."""

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, lengths: Tensor,
                        scratch: Tensor | None, out: Tensor) -> Tensor:  # fmt: skip
        """Attention of q (B, T, H D) to the first `lengths` (B,) int32 of k, v (B, H, S, D); q_weight None: q as it
        is."""

    def scratch_bytes(self, batch: int, heads: int, keys: int, dim: int) -> int:
        """Bytes of working memory that attention needs."""

    def residual_mix_norm(
        self,
        source: Tensor | None,
        branch: Tensor | None,
        mix: Tensor | None,
        norm: tuple[Tensor, Tensor] | None,
        residual: Tensor | None,
        out: Tensor,
        eps: float = 1e-5,
        after: bool = False,
    ) -> Tensor:
        """r = source + branch; y = layer norm of (r mixed over five frames by `mix` (5, W)) with (weight, bias).

        source, residual (B, T, W) fp32; branch, out (B, T, W) T. None: 0, no mix, no norm, not wanted. y goes to out;
        residual takes r, or y with `after`. It must not be the source where there is a mix.
        """

    def features(self, head: Tensor, linear: Tensor, mean: Tensor, ceiling: Tensor, scale: float,
                 out: Tensor) -> Tensor:  # fmt: skip
        """y = head + linear, (B, F, at least 3 bands) T -> out (B, F, 3, bands) fp32: min(scale y + mean, ceiling) of
        mid and side, mean and ceiling (2, bands) fp32; tanh y of the cosine."""


@dataclass(frozen=True)
class MixLayer:
    """One block's weights."""

    mix: Tensor
    norm: tuple[Tensor, Tensor]
    up: Linear
    down: Linear


def _norm(layer: torch.nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return layer.weight.detach().float().clone(), layer.bias.detach().float().clone()


def pack_linear(ops: NetworkOps, layer: torch.nn.Linear) -> Linear:
    """A layer's weights as the table wants them."""
    return ops.pack(layer.weight.detach().float(), layer.bias.detach().float())


class DecoderWeights:
    """The decoder in a table's own form. stride: numbers in a row of the last products, 3 bands rounded up to whole
    cache lines."""

    def __init__(self, codec: Codec, ops: NetworkOps) -> None:
        decoder, bands = codec.decoder, codec.frames.bands
        self.bands, self.stride = bands, -(-3 * bands // 32) * 32
        scale, mean = codec.latent_scale.double(), codec.latent_mean.double()

        def first(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            """Weights for latents as they are, from those for (latents / scale + mean)."""
            weight = weight.detach().double()
            return (weight / scale).float(), (bias.detach().double() + weight @ mean).float()

        def rows(x: Tensor, parts: int) -> Tensor:
            """Zeros behind each of `parts` frames' rows of 3 bands."""
            wide = x.new_zeros(parts, self.stride, *x.shape[1:])
            wide[:, : 3 * bands] = x.unflatten(0, (parts, 3 * bands))
            return wide.flatten(0, 1)

        linear = first(decoder.linear.weight, decoder.linear.bias)
        self.linear = ops.pack(*(rows(x, FRAMES_PER_LATENT) for x in linear))
        self.stem = ops.pack(*first(decoder.stem.weight, decoder.stem.bias))
        self.blocks = [self._block(block, ops) for block in decoder.blocks]
        self.split = pack_linear(ops, decoder.split)
        self.frame_blocks = [self._block(block, ops) for block in decoder.frame_blocks]
        self.norm = _norm(decoder.norm)
        self.head = ops.pack(*(rows(x.detach().float(), 1) for x in (decoder.head.weight, decoder.head.bias)))
        self.mean, self.ceiling = (x.detach().float().clone() for x in (codec.feature_mean, codec.ceiling))
        self.scale = 1.0 / codec.feature_scale

    @staticmethod
    def _block(block: Block, ops: NetworkOps) -> MixLayer:
        mix = block.mix.detach().float().clone()
        return MixLayer(mix, _norm(block.norm), pack_linear(ops, block.up), pack_linear(ops, block.down))


# Positions in the forward pass, for the buffers' life times. A block's are the same for every block.
INPUT, STEM, MIX, UP, DOWN, LAST, SPLIT, FRAME_MIX, FRAME_UP, FRAME_DOWN, FRAME_LAST, HEAD, FEATURES = range(13)


def buffers(codec: Codec, weights: DecoderWeights, batch: int, tokens: int, ops: NetworkOps) -> list[Buffer]:
    """Everything that a pass writes, with the time that it is alive, for `batch` clips of `tokens` latents."""
    c, t, frames, dtype = codec.config, tokens, FRAMES_PER_LATENT * tokens, ops.dtype
    wide, narrow, f32 = c.decoder_width, c.frame_width, torch.float32
    out = [
        Buffer("input", (batch, t, c.latent_channels), dtype, ((INPUT, STEM),)),
        Buffer("residual0", (batch, t, wide), f32, ((MIX, LAST),)),
        Buffer("residual1", (batch, t, wide), f32, ((MIX, LAST),)),
        Buffer("normed", (batch, t, wide), dtype, ((MIX, UP), (LAST, SPLIT))),
        Buffer("frame_residual0", (batch, frames, narrow), f32, ((FRAME_MIX, FRAME_LAST),)),
        Buffer("frame_residual1", (batch, frames, narrow), f32, ((FRAME_MIX, FRAME_LAST),)),
        Buffer("frame_normed", (batch, frames, narrow), dtype, ((FRAME_MIX, FRAME_UP), (FRAME_LAST, HEAD))),
        Buffer("features", (batch, frames, 3, weights.bands), f32, ((FEATURES, FEATURES),)),
    ]
    if not ops.allocates_matmul_output:
        up = next((b.up.out_features // b.up.in_features for b in codec.decoder.blocks), 1)
        frame_up = next((b.up.out_features // b.up.in_features for b in codec.decoder.frame_blocks), 1)
        out += [
            Buffer("linear", (batch, t, FRAMES_PER_LATENT * weights.stride), dtype, ((INPUT, FEATURES),)),
            Buffer("branch", (batch, t, wide), dtype, ((STEM, LAST),)),
            Buffer("hidden", (batch, t, up * wide), dtype, ((UP, DOWN),)),
            Buffer("split", (batch, t, FRAMES_PER_LATENT * narrow), dtype, ((SPLIT, FRAME_MIX),)),
            Buffer("frame_branch", (batch, frames, narrow), dtype, ((FRAME_MIX, FRAME_LAST),)),
            Buffer("frame_hidden", (batch, frames, frame_up * narrow), dtype, ((FRAME_UP, FRAME_DOWN),)),
            Buffer("head", (batch, frames, weights.stride), dtype, ((HEAD, FEATURES),)),
        ]
    return out


def network(ops: NetworkOps, w: DecoderWeights, arena: Arena, latents: Tensor) -> Tensor:
    """Features (B, 4 T, 3, bands) fp32 of latents (B, T, C): a view of the arena. The hot path."""

    def place(name: str) -> Tensor | None:
        return arena.tensor(name) if name in arena.buffers else None

    def run(blocks: list[MixLayer], branch: Tensor, prefix: str) -> tuple[Tensor | None, Tensor]:
        source, normed = None, arena.tensor(f"{prefix}normed")
        for i, block in enumerate(blocks):
            residual = arena.tensor(f"{prefix}residual{i % 2}")
            ops.residual_mix_norm(source, branch, block.mix, block.norm, residual, normed)
            hidden = ops.linear(normed, block.up, place(f"{prefix}hidden"), "silu")
            branch = ops.linear(hidden, block.down, place(f"{prefix}branch"))
            source = residual
        return source, branch

    count = FRAMES_PER_LATENT * latents.shape[1]
    x = arena.tensor("input").copy_(latents)
    linear = ops.linear(x, w.linear, place("linear"))
    source, branch = run(w.blocks, ops.linear(x, w.stem, place("branch")), "")
    normed = ops.residual_mix_norm(source, branch, None, None, None, arena.tensor("normed"))
    split = ops.linear(normed, w.split, place("split"))
    source, branch = run(w.frame_blocks, split.view(len(latents), count, -1), "frame_")
    normed = ops.residual_mix_norm(source, branch, None, w.norm, None, arena.tensor("frame_normed"))
    head = ops.linear(normed, w.head, place("head"))
    halves = head, linear.view(len(latents), count, w.stride)
    return ops.features(*halves, w.mean, w.ceiling, w.scale, arena.tensor("features"))


class DecoderEngine:
    """A codec's decoder network ready to run. Any number of threads may call it: each has its own memory meanwhile.

    threads: how many a call uses, for all operators; None: as many as torch.
    """

    def __init__(self, codec: Codec, ops: NetworkOps, threads: int | None = None) -> None:
        self.codec, self.ops = codec, ops
        self.threads = torch.get_num_threads() if threads is None else threads
        self.weights = DecoderWeights(codec, ops)
        self.pool = Pool()

    def __call__(self, latents: Tensor) -> Tensor:
        """What `Codec.decode_features` gives: latents (B, T, C) fp32 -> features (B, 4 T, 3, bands) fp32."""
        batch, tokens = latents.shape[:2]
        listed = lambda: buffers(self.codec, self.weights, batch, tokens, self.ops)  # noqa: E731
        with torch.inference_mode(), thread_limit(self.threads), self.pool.arena((batch, tokens), listed) as arena:
            return network(self.ops, self.weights, arena, latents).clone()
